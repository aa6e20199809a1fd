"""Options that the commands of studies share."""

from __future__ import annotations

from typing import Annotated

import typer

STUDY = "The study"
"""Where help shows them."""

Seeds = Annotated[
    int, typer.Option("--seeds", metavar="N", min=1, rich_help_panel=STUDY, help="Networks that are judged.")
]
Epochs = Annotated[
    int, typer.Option("--epochs", metavar="N", min=1, rich_help_panel=STUDY, help="Passes of the training.")
]
FineEpochs = Annotated[
    int, typer.Option("--fine-epochs", metavar="N", min=1, rich_help_panel=STUDY, help="Of the fine-tuning.")
]
AutoattackSamples = Annotated[
    int,
    typer.Option(
        "--autoattack-samples",
        metavar="N",
        min=0,
        rich_help_panel=STUDY,
        help="Test images for AutoAttack, which is slow and needs the extra autoattack; 0 leaves it out.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", rich_help_panel="The run", help="Go on with the study in --out.")]
