"""Options that ``attackroute report`` and ``compare`` share."""

from __future__ import annotations

from typing import Annotated

import typer

from attackroute.cli import options

_IMAGES = "The images"

Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        rich_help_panel=_IMAGES,
        help="The run's images, as attackroute trace takes them; else as its files say.",
    ),
]
Split = Annotated[
    options.Splits | None,
    typer.Option("--split", rich_help_panel=_IMAGES, help="Which part of the data; else as the run had it."),
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples",
        metavar="N",
        min=1,
        rich_help_panel=_IMAGES,
        help="How many of the run's images, evenly apart, to measure influence, gradients and sensitivity on.",
    ),
]
Attacks = Annotated[
    list[str] | None,
    typer.Option(
        "--attack",
        metavar="NAME",
        rich_help_panel=_IMAGES,
        help="What attacks the images, beside what the run has traced; repeat it for several. Without any, pgd.",
    ),
]
Linear = Annotated[
    bool,
    typer.Option(
        "--linear",
        rich_help_panel="The route",
        help="Where routes are traced for the page, linear maps are layers too (attention projections and MLPs); a run "
        "of trace, analyze or hardness with --linear needs no telling.",
    ),
]
