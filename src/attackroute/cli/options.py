"""Options that commands share, and the parsers of their values."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attackroute.cli.console import Output
from attackroute.core.distributed import leading
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    import torch

    from attackroute.zoo.data import ImageData


def parse_number(text: str) -> float:
    """Read a finite number, also as a fraction: ``0.03``, ``8/255``, ``1e-3``."""
    numerator, slash, denominator = str(text).partition("/")
    try:
        value = float(numerator) / float(denominator) if slash else float(numerator)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise typer.BadParameter(f"{text!r} is not a number; write it as 0.03 or 8/255")
    return value


def parse_share(text: str) -> float:
    """Read a share, above 0 and at most 1."""
    value = parse_number(text)
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{text} is outside (0, 1]; 0.2 is a fifth")
    return value


def parse_factor(text: str) -> float:
    """Read a factor above 0, such as a network's width."""
    value = parse_number(text)
    if value <= 0:
        raise typer.BadParameter(f"{text} is not above 0")
    return value


def parse_sketches(text: str) -> int | str:
    """Read a number of sketches, or ``auto``."""
    from attackroute.tracing.sketches import AUTO, check_sketches

    value = int(text) if str(text).isdecimal() else text
    try:
        check_sketches(value)
    except UserError as error:
        raise typer.BadParameter(f"{text!r} is no number of sketches; write 32, 64, ... or {AUTO}") from error
    return value


def resolve_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes an accelerator where there is one, and each process one of its own.

    Raises:
        UserError: PyTorch does not know the device, or the machine lacks it.
    """
    import torch

    from attackroute.core.distributed import own_device

    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return own_device("cpu" if found is None else found.type)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); leave it out, or take cpu") from error
    return own_device(name)


def open_folder(folder: Path) -> Path:
    """Create the folder where it is missing, or say in one line why that cannot be; of processes, the first does."""
    try:
        if leading():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be a folder ({error.strerror}); name another") from error
    return folder


def report_skipped(data: ImageData | None, output: Output) -> None:
    """Name the files that ``--skip-unreadable`` left out."""
    for path in () if data is None else data.skipped:
        output.note(f"note: left out {path}, which cannot be read")


class Carriers(str, Enum):
    """What is pushed through the segments between layers."""

    UNIT = "unit"
    NOISE = "noise"


class Splits(str, Enum):
    """Parts of a data set."""

    TRAIN = "train"
    TEST = "test"


_NETWORK = "The network"
_IMAGES = "The images"
_RUN = "The run"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL",
        rich_help_panel=_NETWORK,
        help="A folder that [bold]attackroute train[/bold] wrote, preset:NAME (small networks for CIFAR-10 that come "
        "along: vgg16-cifar10, alexnet-cifar10, resnet18-cifar10), or vgg16, alexnet, resnet18, vgg_small, "
        "torchvision:NAME, timm:NAME or package.module:factory.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        metavar="FILE",
        rich_help_panel=_NETWORK,
        help="A state dict as .safetensors or .pt. A train folder brings its own.",
    ),
]
ModelWidth = Annotated[
    float | None,
    typer.Option(
        "--model-width",
        metavar="FACTOR",
        parser=parse_factor,
        rich_help_panel=_NETWORK,
        help="Factor on the channels of a built-in network; a train folder knows its own.",
    ),
]
Classes = Annotated[
    int | None,
    typer.Option(
        "--classes", metavar="N", min=1, rich_help_panel=_NETWORK, help="Outputs of the network; else as the data has."
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="DATA",
        rich_help_panel=_IMAGES,
        help="mnist-sample (digits, no download), cifar10:PATH, svhn:PATH, imagenet:PATH or folder:PATH.",
    ),
]
Split = Annotated[Splits, typer.Option("--split", rich_help_panel=_IMAGES, help="Which part of the data.")]
Samples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        metavar="N",
        min=1,
        rich_help_panel=_IMAGES,
        help="Only so many images, drawn with --seed; else all.",
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        "--image-size",
        metavar="PIXELS",
        min=1,
        rich_help_panel=_IMAGES,
        help="Resize the images to this size; else as the data set or the train folder has it.",
    ),
]
SkipUnreadable = Annotated[
    bool,
    typer.Option("--skip-unreadable", rich_help_panel=_IMAGES, help="Leave out image files that cannot be read."),
]
Linear = Annotated[
    bool,
    typer.Option(
        "--linear",
        rich_help_panel="The route",
        help="Linear maps are route layers too: in ViT and Swin the attention's projections and the MLPs. Their "
        "neurons are output features, their positions tokens.",
    ),
]
Sketches = Annotated[
    str | None,
    typer.Option(
        "--sketches",
        metavar="N|auto",
        parser=parse_sketches,
        rich_help_panel="The route",
        help="Estimate edges without a closed form (attention, layer norm) from N random products each, such as "
        "32: approximate, and far quicker; auto doubles N until the routes are clear.",
    ),
]
Carrier = Annotated[
    Carriers,
    typer.Option(
        "--carrier",
        rich_help_panel="The route",
        help="What a traced route follows: unit, how strongly channels could act on the next layer's (the paper's), or "
        "noise, how much of what --attack changes they pass on.",
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, rich_help_panel=_RUN, help="Images at a time.")
]
Workers = Annotated[
    int,
    typer.Option("--workers", metavar="N", min=0, rich_help_panel=_RUN, help="Processes that read the images."),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="NAME", rich_help_panel=_RUN, help="cpu, cuda, cuda:1, mps; auto takes what is there."
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", metavar="N", min=0, rich_help_panel=_RUN, help="Same seed, same machine: same result."),
]
Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=_RUN, help="Print the result as JSON on stdout and nothing else there."),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", rich_help_panel=_RUN, help="Print nothing but errors (and JSON, with --json).")
]
