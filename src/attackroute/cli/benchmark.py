"""``attackroute benchmark``: what a trace costs on this machine, as ratios."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from attackroute.cli import options
from attackroute.cli.console import Output
from attackroute.core.errors import UserError

EXAMPLES = """
 Examples:

   Everything, in about ten minutes on two processor cores
   $ attackroute benchmark

   A look within a minute: VGG-16, the naive way, memory
   $ attackroute benchmark --quick

   One network on one thread, in both memory formats
   $ attackroute benchmark --case resnet50 --threads 1 --channels-last

   Well-known architectures, and their table as Markdown
   $ attackroute benchmark --case architectures --repeats 3 --threads 1 --table architectures.md

   Every repeat, for another program
   $ attackroute benchmark --case vgg16 --case naive --json | jq '.speed[].trace_to_forward'

 The cases:

   vgg16          32x32, 128 images at a time: time of a trace / of plain inference, and / of a training step; of a
                  trace that follows noise / of two plain inferences
   resnet18, resnet50, mobilenet_v2
                  the same at 224x224, 16 images at a time
   naive          the same scores by torch.autograd.grad, channel by channel and position by position, and by
                  torch.func.jacrev; both extrapolated from random parts, since they take minutes for one image
   memory         peaks of a trace and of plain inference, and of traces of few and of many images, each in its own
                  process
   pgd            projected gradient descent, 10 steps on a quarter-width VGG-16, against torchattack, torchattacks and
                  foolbox, where they are installed
   hardening      training steps with penalties against plain ones, on a quarter-width VGG-16: time, peak memory
                  (each in its own process), and how far the approximate gradient of the gradient penalty is from the
                  exact one
   architectures  EfficientNet, MobileNetV3, RegNet, DenseNet, GoogLeNet, Inception, ResNet with group norm, ConvNeXt,
                  Swin, ViT, and DeiT where timm is installed, 2 images at a time: layers, edges, time of a trace with
                  32 sketches and of an exact one (extrapolated), and distance from the oracle at reduced size. Only
                  where it is asked for; --quick leaves EfficientNet-B0 and ViT-B/16
   processes      traces of VGG-16 at 32x32 by two processes of one thread against those of one, and what an image
                  costs where several processes trace many, in processor time and bytes, for VGG-16 and ResNet-18. Only
                  where it is asked for, on two processor cores that do nothing else

 The numbers:

   Runs take turns in one process. A ratio is of two runs in the same turn; the median is shown, and (lowest-highest).
   Times by themselves say little on a machine that does other work too, where --threads 1 is the steadiest.
   Weights and images are random.
"""


class Cases(str, Enum):
    """Names of the cases."""

    VGG16 = "vgg16"
    RESNET18 = "resnet18"
    RESNET50 = "resnet50"
    MOBILENET_V2 = "mobilenet_v2"
    NAIVE = "naive"
    MEMORY = "memory"
    PGD = "pgd"
    HARDENING = "hardening"
    ARCHITECTURES = "architectures"
    PROCESSES = "processes"


_MEASUREMENTS = "The measurements"


def benchmark(
    case: Annotated[
        list[Cases] | None,
        typer.Option(
            "--case",
            metavar="NAME",
            rich_help_panel=_MEASUREMENTS,
            help=f"{', '.join(name.value for name in Cases)}: measure this; can be given several times.",
            show_default="all but architectures and processes",
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(
            "--repeats",
            metavar="N",
            min=1,
            rich_help_panel=_MEASUREMENTS,
            help="Turns of interleaved runs; at most 3 for memory.",
            show_default="7, 2 with --quick",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            metavar="N",
            min=1,
            rich_help_panel=_MEASUREMENTS,
            help="Images at a time; the limits to be kept are for each case's own.",
            show_default="each case's own",
        ),
    ] = None,
    channels_last: Annotated[
        bool,
        typer.Option(
            "--channels-last/--no-channels-last",
            rich_help_panel=_MEASUREMENTS,
            help="Measure speed in the channels_last memory format too.",
        ),
    ] = False,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            rich_help_panel=_MEASUREMENTS,
            help="Less of everything; without --case only vgg16, naive and memory.",
        ),
    ] = False,
    table: Annotated[
        Path | None,
        typer.Option(
            "--table",
            metavar="FILE",
            rich_help_panel=_MEASUREMENTS,
            help="Write the table of the architectures here, as Markdown.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            min=1,
            rich_help_panel="The run",
            help="PyTorch's threads.",
            show_default="its own choice",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", metavar="N", min=0, rich_help_panel="The run", help="For weights, images and the parts drawn."
        ),
    ] = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what a trace costs: against plain inference, a training step and the naive way, and its memory."""
    from attackroute.benchmark.plan import Plan
    from attackroute.benchmark.report import run_benchmark
    from attackroute.cli.architecture_report import write_table
    from attackroute.cli.benchmark_report import show

    output = Output(as_json, quiet)
    if table is not None and Cases.ARCHITECTURES not in (case or ()):
        raise UserError("--table holds the architectures: add --case architectures")
    plan = Plan(
        cases=tuple(name.value for name in case or ()),
        repeats=repeats,
        batch_size=batch_size,
        threads=threads,
        channels_last=channels_last,
        quick=quick,
        seed=seed,
        device=options.resolve_device(device),
    )
    with output.progress("steps") as progress:
        result = run_benchmark(plan, progress)
    show(output, result)
    if table is not None:
        write_table(table, result)
