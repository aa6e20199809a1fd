"""How commands of this package end and how they explain themselves."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from attackroute.cli.console import print_error
from attackroute.core.distributed import LostProcessError, joined, started_by_torchrun, terminated_as_interrupted
from attackroute.core.errors import UserError

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130


class _ExamplesLast:
    """Help that ends with the epilog as it is written, so that a command in it can be copied."""

    epilog: str | None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        # Hidden meanwhile: typer would break its lines anew, in another way in each version.
        epilog, self.epilog = self.epilog, None
        try:
            super().format_help(ctx, formatter)  # type: ignore[misc]
        finally:
            self.epilog = epilog
        formatter.write(epilog or "")


class Command(_ExamplesLast, TyperCommand):
    """A command whose help ends with examples."""


class Group(_ExamplesLast, TyperGroup):
    """A group that turns what users can mend into one line on stderr and an exit code."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run a command line; see :meth:`typer.core.TyperGroup.main`."""
        code = self._run(*args, **{**extra, "standalone_mode": False})
        if standalone_mode:
            sys.exit(code)
        return code

    def _run(self, *args: Any, **extra: Any) -> int:
        try:
            with terminated_as_interrupted():
                return self._answered(*args, **extra)
        except KeyboardInterrupt:
            return INTERRUPTED

    def _answered(self, *args: Any, **extra: Any) -> int:
        try:
            return super().main(*args, **extra) or 0
        except UserError as error:
            print_error(str(error))
            return BAD_INPUT
        except LostProcessError as error:
            print_error(str(error))
            return FAILED
        except typer.Abort:
            return INTERRUPTED
        except Exception as error:
            # Parse errors of typer (and of click, on which older versions stand) have no public class in common.
            if not hasattr(error, "format_message"):
                raise
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context is not None else ""
            print_error(f"{error.format_message()}{hint}")
            return BAD_INPUT


def add_command(app: typer.Typer, function: Callable[..., None], examples: str, *, shared: bool = False) -> None:
    """Make a function a command of its name, with its docstring and the examples as help.

    Args:
        app: Where to add it.
        function: The command.
        examples: The end of its help.
        shared: Whether processes that ``torchrun`` started can share the work.
    """
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(function.__name__.replace("_", "-"), cls=Command, help=text, epilog=examples)(
        _in_processes(function, shared)
    )


def _in_processes(function: Callable[..., None], shared: bool) -> Callable[..., None]:
    @wraps(function)
    def run(*args: Any, **options: Any) -> None:
        resumable = "resume" in options and options.get("out") is not None
        hint = "; what is finished is kept, so give the same command with --resume to go on" if resumable else ""
        with joined(hint=hint):
            if not shared and started_by_torchrun():
                raise UserError(f"{function.__name__.replace('_', '-')} runs in one process; start it without torchrun")
            function(*args, **options)

    return run
