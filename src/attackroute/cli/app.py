"""The ``attackroute`` command: its subcommands, how they end, and its exit codes."""

from __future__ import annotations

import inspect
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attackroute.cli.analyze import ANALYZE_EXAMPLES, AnalyzeOptions, analyze
from attackroute.cli.arguments import WIDEST, filled, parse
from attackroute.cli.console import print_error
from attackroute.cli.demo import DEMO_EXAMPLES, DemoOptions, demo
from attackroute.cli.evaluate import EVALUATE_EXAMPLES, EvaluateOptions, evaluate
from attackroute.cli.harden import HARDEN_EXAMPLES, HardenOptions, harden
from attackroute.cli.hardness import HARDNESS_EXAMPLES, HardnessOptions, hardness
from attackroute.cli.report import COMPARE_EXAMPLES, REPORT_EXAMPLES, CompareOptions, ReportOptions, compare, report
from attackroute.cli.reproduce import REPRODUCE_EXAMPLES, ReproduceOptions, reproduce
from attackroute.cli.trace import TRACE_EXAMPLES, TraceOptions, trace
from attackroute.cli.train import TRAIN_EXAMPLES, TrainOptions, train
from attackroute.core import __version__
from attackroute.core.distributed import LostProcessError, joined, started_by_torchrun, terminated_as_interrupted
from attackroute.core.errors import UserError, did_you_mean

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

_PROGRAM = "attackroute"

_ABOUT = """Find the channels that carry an attack through a convolutional network.

A critical attacking route is the chain of channels, layer by layer, that pass on the most of what changes the loss.
attackroute trace finds it exactly, for every image, at about the cost of running the network."""

_EXAMPLES = """
Examples:

  attackroute demo
  attackroute train --model vgg_small --data mnist-sample --epochs 3 --out runs/digits
  attackroute trace --model runs/digits --data mnist-sample --out runs/digits/routes
  attackroute trace --model torchvision:resnet18 --weights resnet18.pth --classes 1000 \\
    --data folder:photos --image-size 224 --out runs/photos
  attackroute evaluate --model runs/digits --data mnist-sample --eps 0.1 --out runs/digits/evaluation
  attackroute report runs/digits
  attackroute trace --help

Exit codes:

    0  done
    1  unexpected failure, with a traceback; or a check that failed
    2  bad input, with one line that says what to change
  130  interrupted
"""


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        options: The dataclass of its options; the docstring is its help.
        run: Does it, and returns an exit code other than 0 if there is one.
        examples: The end of its help.
        shared: Whether processes that ``torchrun`` started can share the work.
        resumable: Whether ``--resume`` goes on with what is in ``--out``.
    """

    options: type
    run: Callable[[Any], int | None]
    examples: str
    shared: bool = False
    resumable: bool = False


COMMANDS: Mapping[str, Command] = {
    "demo": Command(DemoOptions, demo, DEMO_EXAMPLES),
    "train": Command(TrainOptions, train, TRAIN_EXAMPLES, shared=True, resumable=True),
    "trace": Command(TraceOptions, trace, TRACE_EXAMPLES, shared=True, resumable=True),
    "analyze": Command(AnalyzeOptions, analyze, ANALYZE_EXAMPLES, shared=True, resumable=True),
    "hardness": Command(HardnessOptions, hardness, HARDNESS_EXAMPLES, shared=True),
    "harden": Command(HardenOptions, harden, HARDEN_EXAMPLES, shared=True, resumable=True),
    "evaluate": Command(EvaluateOptions, evaluate, EVALUATE_EXAMPLES, shared=True, resumable=True),
    "reproduce": Command(ReproduceOptions, reproduce, REPRODUCE_EXAMPLES, resumable=True),
    "report": Command(ReportOptions, report, REPORT_EXAMPLES),
    "compare": Command(CompareOptions, compare, COMPARE_EXAMPLES),
}


def main() -> None:
    """Run the command line; the entry point of the ``attackroute`` script."""
    sys.exit(run(sys.argv[1:]))


def run(words: Sequence[str]) -> int:
    """Run a command line; what users can mend becomes one line on stderr.

    Returns:
        The exit code.
    """
    try:
        with terminated_as_interrupted():
            return _run(words)
    except KeyboardInterrupt:
        return INTERRUPTED
    except UserError as error:
        print_error(str(error))
        return BAD_INPUT
    except LostProcessError as error:
        print_error(str(error))
        return FAILED


def _run(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"{_PROGRAM} {__version__}")
        return 0
    name, *given = words
    if name not in COMMANDS:
        what, known = ("option", ["--help", "--version"]) if name.startswith("-") else ("command", list(COMMANDS))
        raise UserError(f"no {what} {name}{did_you_mean(name, known)} (see {_PROGRAM} --help)")
    command = COMMANDS[name]
    try:
        options: Any = parse(command.options, f"{_PROGRAM} {name}", given, command.examples)
    except SystemExit:  # help was asked for
        return 0
    resumable = command.resumable and options.out is not None
    hint = "; what is finished is kept, so give the same command with --resume to go on" if resumable else ""
    with joined(hint=hint):
        if not command.shared and started_by_torchrun():
            raise UserError(f"{name} runs in one process; start it without torchrun")
        return command.run(options) or 0


def _help() -> str:
    width = min(shutil.get_terminal_size().columns - 2, WIDEST)
    lines = [f"usage: {_PROGRAM} COMMAND [options]", "", filled(_ABOUT, width), "", "Commands:"]
    for name, command in COMMANDS.items():
        summary, *_ = (inspect.getdoc(command.options) or "").split("\n\n")
        lines.append(filled(summary, width, f"  {name:<12}"))
    lines += [
        "",
        "Options:",
        "  -h, --help  Show this; with a command, its options.",
        "  --version   Print the version.",
    ]
    return "\n".join(lines) + "\n" + _EXAMPLES.rstrip()
