"""The ``attackroute`` command: its subcommands, how they end, and its exit codes."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from attackroute.cli.analyze import AnalyzeOptions, analyze
from attackroute.cli.arguments import WIDEST, filled, parse
from attackroute.cli.console import print_error
from attackroute.cli.demo import DemoOptions, demo
from attackroute.cli.evaluate import EvaluateOptions, evaluate
from attackroute.cli.harden import HardenOptions, harden
from attackroute.cli.hardness import HardnessOptions, hardness
from attackroute.cli.report import CompareOptions, ReportOptions, compare, report
from attackroute.cli.reproduce import ReproduceOptions, reproduce
from attackroute.cli.trace import TraceOptions, trace
from attackroute.cli.train import TrainOptions, train
from attackroute.core import __version__
from attackroute.core.distributed import (
    LostProcessError,
    interrupted_at_once,
    joined,
    started_by_torchrun,
    terminated_as_interrupted,
)
from attackroute.core.errors import UserError, did_you_mean

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

_PROGRAM = "attackroute"
_EXPERIMENTS = "{experiments}"  # their place in the help of analyze
_ABOUT = """Find the channels that carry an attack through a convolutional network.

A critical attacking route is the chain of channels, layer by layer, that pass on the most of what changes the loss.
attackroute trace finds it for every image, at about the cost of running the network where closed forms are known."""


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    options: type  # a dataclass, whose docstring is the help
    run: Callable[[Any], int | None]  # returns an exit code other than 0 if there is one
    shared: bool = False  # processes that torchrun started can share the work


COMMANDS: Mapping[str, Command] = {
    "demo": Command(DemoOptions, lambda options: demo(options, _call)),
    "train": Command(TrainOptions, train),
    "trace": Command(TraceOptions, trace, shared=True),
    "analyze": Command(AnalyzeOptions, analyze, shared=True),
    "hardness": Command(HardnessOptions, hardness, shared=True),
    "harden": Command(HardenOptions, harden),
    "evaluate": Command(EvaluateOptions, evaluate, shared=True),
    "reproduce": Command(ReproduceOptions, reproduce),
    "report": Command(ReportOptions, report),
    "compare": Command(CompareOptions, compare),
}


def run(words: Sequence[str]) -> int:
    """Run a command line, and return the exit code; what users can mend becomes one line on stderr."""
    try:
        with terminated_as_interrupted():
            code = _run(words)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except (UserError, LostProcessError) as error:
        print_error(str(error))
        return BAD_INPUT if isinstance(error, UserError) else FAILED
    except OSError as error:  # a full disk, a pipe that nobody reads, a file system that cannot be written to
        if sys.stdout is sys.__stdout__:  # what is left of the output goes nowhere, in silence
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):
            print_error(
                f"{error.filename or 'the output'}: {error.strerror or error}; free some space, or choose another"
            )
        return BAD_INPUT


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"{_PROGRAM} {__version__}")
        return 0
    if words[0] == "--completion":
        print(resources.files(__package__).joinpath("help", "completion.bash").read_text(), end="")
        return 0
    name, *given = words
    if name not in COMMANDS:
        what, names = (
            ("option", ["--help", "--version", "--completion"]) if name.startswith("-") else ("command", list(COMMANDS))
        )
        raise UserError(f"no {what} {name}{did_you_mean(name, names)} (see {_PROGRAM} --help)")
    command = COMMANDS[name]
    epilog = _examples(name) if {"-h", "--help"} & set(given) else ""
    try:
        options: Any = parse(command.options, f"{_PROGRAM} {name}", given, epilog)
    except SystemExit:  # help was asked for
        return 0
    with interrupted_at_once():
        import torch  # noqa: F401  # takes seconds
    with joined():
        if not command.shared and started_by_torchrun():
            raise UserError(f"{name} runs in one process; start it without torchrun")
        return command.run(options) or 0


def _call(name: str, words: Sequence[str]) -> int | None:
    """A step of the demo."""
    return COMMANDS[name].run(parse(COMMANDS[name].options, f"{_PROGRAM} {name}", words))


def _help() -> str:
    width = min(shutil.get_terminal_size().columns - 2, WIDEST)
    lines = [f"usage: {_PROGRAM} COMMAND [options]", "", filled(_ABOUT, width), "", "Commands:"]
    for name, command in COMMANDS.items():
        summary, *_ = (inspect.getdoc(command.options) or "").split("\n\n")
        lines.append(filled(summary, width, f"  {name:<12}"))
    options = (
        "Options:\n  -h, --help    Show this; with a command, its options.\n  --version     Print the version.\n"
        '  --completion  Print completion for bash: eval "$(attackroute --completion)".'
    )
    return "\n".join([*lines, "", options]) + "\n" + _examples(_PROGRAM)


def _examples(name: str) -> str:
    """The end of a command's help: examples and the files that it writes."""
    text = resources.files(__package__).joinpath("help", f"{name}.txt").read_text()
    if _EXPERIMENTS in text:  # found by their registry, which loads PyTorch
        from attackroute.analysis.experiment import all_experiments

        lines = [f"  {experiment:<13} {each.help}" for experiment, each in all_experiments().items()]
        text = text.replace(_EXPERIMENTS, "\n".join(lines))
    return "\n" + text.rstrip()
