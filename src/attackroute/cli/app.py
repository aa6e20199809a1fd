"""The ``attackroute`` command: its subcommands and its exit codes."""

from __future__ import annotations

from typing import Annotated

import typer

from attackroute.cli import analyze, compare, demo, evaluate, harden, hardness, report, reproduce, trace, train
from attackroute.cli.commands import Group, add_command
from attackroute.core.version import __version__

_ABOUT = (
    "Find the channels that carry an attack through a convolutional network.\n\n"
    "A critical attacking route is the chain of channels, layer by layer, that pass on the most of what changes the "
    "loss. [bold]trace[/bold] finds it exactly, for every image, at about the cost of running the network."
)

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

app = typer.Typer(
    name="attackroute",
    cls=Group,
    help=_ABOUT,
    epilog=_EXAMPLES,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"attackroute {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


add_command(app, demo.demo, demo.EXAMPLES)
add_command(app, train.train, train.EXAMPLES, shared=True)
add_command(app, trace.trace, trace.EXAMPLES, shared=True)
add_command(app, analyze.analyze, analyze.EXAMPLES, shared=True)
add_command(app, harden.harden, harden.EXAMPLES, shared=True)
add_command(app, hardness.hardness, hardness.EXAMPLES, shared=True)
add_command(app, evaluate.evaluate, evaluate.EXAMPLES, shared=True)
add_command(app, reproduce.reproduce, reproduce.EXAMPLES)
add_command(app, report.report, report.EXAMPLES)
add_command(app, compare.compare, compare.EXAMPLES)


def main() -> None:
    """Run the command line; the entry point of the ``attackroute`` script."""
    app(prog_name="attackroute")
