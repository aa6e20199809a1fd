"""What the command lines of studies and benchmarks share: bad input is one line on stderr, with exit code 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from attackroute.cli.console import Output, print_error
from attackroute.core.errors import UserError
from attackroute.core.journal import Journal

BAD_INPUT, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """A parser of options that may not be shortened, and whose help keeps the lines of its examples.

    Args:
        program: What is typed, such as ``"python -m studies.repair"``.
        about: The beginning of the help.
        examples: Its end.
    """

    def __init__(self, program: str, about: str, examples: str) -> None:
        super().__init__(
            prog=program, description=about, epilog=examples, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        self.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, mps; auto takes what is there.")
        self.add_argument("--json", action="store_true", help="Print the result as JSON, and nothing else on stdout.")
        self.add_argument("-q", "--quiet", action="store_true", help="Print nothing but errors, and JSON with --json.")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        raise UserError(f"{message} (see {self.prog} --help)")


def output_of(options: argparse.Namespace) -> Output:
    """Where the words go."""
    return Output(options.json, options.quiet)


def begin(journal: Journal, path: Path, *, resume: bool) -> None:
    """Begin a study whose journal is to lie there, or, only with ``resume``, go on with the one that does."""
    if resume:
        journal.resume()
    elif path.exists():
        raise UserError(
            f"{path.parent} already holds a study; pass --resume to go on with it, or choose another folder"
        )
    else:
        journal.keep(("begun",), "")


def run_command(command: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None) -> int:
    """Run a command line; returns the exit code."""
    try:
        command(arguments)
    except UserError as error:
        print_error(str(error))
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def at_least(least: int) -> Callable[[str], int]:
    """Reads a whole number that is not below ``least``."""

    def parse(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def number(text: str) -> float:
    """Reads a finite number, also as a fraction: ``0.03``, ``8/255``."""
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number; write it as 0.03 or 8/255")
    return value
