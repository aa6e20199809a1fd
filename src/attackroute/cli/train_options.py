"""Options that the commands which train share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from attackroute.cli import options


class Schedules(str, Enum):
    """Names of learning rate schedules."""

    ONE_CYCLE = "one-cycle"
    COSINE = "cosine"


class Augmentations(str, Enum):
    """Names of augmentations."""

    NONE = "none"
    CROP = "crop"
    CROP_FLIP = "crop-flip"


_TRAINING = "The training"
_RUN = "The run"

Width = Annotated[
    float,
    typer.Option(
        "--width",
        metavar="FACTOR",
        parser=options.parse_factor,
        rich_help_panel="The network",
        help="Factor on the channels of a built-in network.",
    ),
]
Epochs = Annotated[
    int, typer.Option("--epochs", metavar="N", min=1, rich_help_panel=_TRAINING, help="Passes over the images.")
]
Rate = Annotated[
    float,
    typer.Option(
        "--lr",
        metavar="RATE",
        parser=options.parse_factor,
        rich_help_panel=_TRAINING,
        help="Largest learning rate.",
    ),
]
Schedule = Annotated[
    Schedules, typer.Option("--schedule", rich_help_panel=_TRAINING, help="Course of the learning rate.")
]
WeightDecay = Annotated[
    float,
    typer.Option(
        "--weight-decay",
        metavar="FACTOR",
        parser=options.parse_number,
        rich_help_panel=_TRAINING,
        help="L2 penalty on all parameters.",
    ),
]
Augment = Annotated[
    Augmentations,
    typer.Option("--augment", rich_help_panel=_TRAINING, help="Random shifts, also with mirror images."),
]
Attack = Annotated[
    str | None,
    typer.Option(
        "--attack",
        metavar="NAME",
        rich_help_panel=_TRAINING,
        help="Train against this attack, as pgd or pgd:eps=4/255,steps=7.",
        show_default="clean images",
    ),
]
RobustSamples = Annotated[
    int,
    typer.Option(
        "--robust-samples",
        metavar="N",
        min=1,
        rich_help_panel=_TRAINING,
        help="Images that are attacked to choose the best epoch, with --attack.",
    ),
]
Amp = Annotated[bool, typer.Option("--amp", rich_help_panel=_TRAINING, help="Mixed precision, for speed on GPUs.")]
ClipNorm = Annotated[
    float | None,
    typer.Option(
        "--clip-norm",
        metavar="NORM",
        parser=options.parse_factor,
        rich_help_panel=_TRAINING,
        help="Largest norm of a step's whole gradient.",
        show_default="no limit",
    ),
]
Accumulate = Annotated[
    int,
    typer.Option(
        "--accumulate",
        metavar="N",
        min=1,
        rich_help_panel=_TRAINING,
        help="Take each batch in N parts, one after the other, for less memory.",
    ),
]
Holdout = Annotated[
    float,
    typer.Option(
        "--holdout",
        metavar="SHARE",
        parser=options.parse_number,
        rich_help_panel=_TRAINING,
        help="Share of the training images that is not learnt from but chooses the best epoch; with 0, the test images "
        "do, and their accuracy is a little too good.",
    ),
]
ChannelsLast = Annotated[
    bool,
    typer.Option(
        "--channels-last", rich_help_panel=_TRAINING, help="Hold images and weights channels last, for speed on GPUs."
    ),
]
Workers = options.Workers
Resume = Annotated[
    bool,
    typer.Option("--resume", rich_help_panel=_RUN, help="Go on with the run in --out; start one if there is none."),
]
TensorBoard = Annotated[
    bool,
    typer.Option(
        "--tensorboard", rich_help_panel=_RUN, help="Log to --out/tensorboard too (needs the extra tensorboard)."
    ),
]
