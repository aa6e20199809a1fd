"""``attackroute reproduce``: the paper's tables and figures with the paper's settings, beside the paper's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attackroute.cli import options, study_options, train_options
from attackroute.cli.console import Output
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from attackroute.zoo.images import ImageData

EXAMPLES = """
 Examples:

   Table 1 on the networks that come with the package, and your copy of CIFAR-10
   $ attackroute reproduce table1 --data cifar10:~/data --out runs/paper

   All that takes no training, for one network; then the page
   $ attackroute reproduce table1 table4 fig2 fig3 fig4 fig5 fig6 --data cifar10:~/data \\
       --model preset:vgg16-cifar10 --out runs/paper

   Your own network
   $ attackroute reproduce fig3 --data cifar10:~/data --model runs/vgg --out runs/paper

   Table 2: trains 63 networks at an eighth of the width on half of the images; hours on one core
   $ attackroute reproduce table2 --data cifar10:~/data --width 0.125 --train-samples 25000 --out runs/paper

   Go on after an interruption
   $ attackroute reproduce all --data cifar10:~/data --out runs/paper --resume

 The targets:

   table1   how much images' routes share, and how few images give the route
   table2   hardening on CIFAR-10, with its controls
   table3   the same on SVHN (--data svhn:PATH)
   table4   gradients of hard and of weak images
   fig2     sensitivity and gradients of the route's neurons
   fig3     transplants of clean values
   fig4     silenced channels, weakened connections
   fig5     Grad-CAM of the route's channels
   fig6     whom the hardness metric predicts to be fooled
   all      all of these, of tables 2 and 3 that of the data

 The files:

   NETWORK/PART.json, .csv, .png, .svg   every number and figure of one experiment on one network
   table2/ or table3/                    the networks and the numbers of a hardening study
   reproduction.md                       all of it, beside the paper's numbers, with a verdict for each claim
"""

_ALL = "all"
_CHECKED = 128  # images for signs of masked gradients
_WHAT = "What is reproduced"


def reproduce(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="TARGET...", help="table1 to table4, fig2 to fig6, or all.", show_default=False),
    ],
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where everything goes.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            rich_help_panel=_WHAT,
            help="A trained network: preset:NAME or a train folder; may be repeated. Else every preset for the data.",
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            metavar="N",
            min=2,
            rich_help_panel=_WHAT,
            help="Test images; half decide on routes and ranks, half are measured. Table 1 takes all there are.",
        ),
    ] = 2500,
    page: Annotated[
        Path | None,
        typer.Option(
            "--page",
            metavar="FILE",
            rich_help_panel=_WHAT,
            help="Put the tables between the marks of this Markdown file; else into --out/reproduction.md.",
        ),
    ] = None,
    width: Annotated[
        float,
        typer.Option(
            "--width",
            metavar="FACTOR",
            rich_help_panel=study_options.STUDY,
            help="Factor on the channels of the VGG-16 that tables 2 and 3 train.",
            parser=options.parse_factor,
        ),
    ] = 0.125,
    train_samples: Annotated[
        int | None,
        typer.Option(
            "--train-samples",
            metavar="N",
            min=2,
            rich_help_panel=study_options.STUDY,
            help="Only so many training images, for tables 2 and 3.",
        ),
    ] = None,
    seeds: study_options.Seeds = 3,
    epochs: study_options.Epochs = 10,
    fine_epochs: study_options.FineEpochs = 1,
    table_samples: Annotated[
        int,
        typer.Option(
            "--table-samples",
            metavar="N",
            min=1,
            rich_help_panel=study_options.STUDY,
            help="Test images of tables 2 and 3.",
        ),
    ] = 2000,
    autoattack_samples: study_options.AutoattackSamples = 64,
    batch_size: options.BatchSize = 128,
    resume: train_options.Resume = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Reproduce tables and figures of the paper with its settings, and say of each claim whether it holds.

    Half of the images decide on routes and ranks, the other half are measured. Every comparison has its controls, and a
    control that does as well is named. What was interrupted goes on with --resume.
    """
    from attackroute.analysis.hardening_plan import paper_plan
    from attackroute.cli.paper_experiments import PARTS
    from attackroute.cli.reproduction_run import Run, check_page
    from attackroute.paper.page import DATA_OF
    from attackroute.zoo.sources import load_data

    output = Output(as_json, quiet)
    wanted = _chosen(targets, data)
    plan = paper_plan(seeds, epochs, fine_epochs, autoattack_samples, _CHECKED)
    if page is not None:
        check_page(page)
    run = Run(options.open_folder(out), data, batch_size, seed, options.resolve_device(device), resume, output)
    figures = [name for name in wanted if name in PARTS]
    if figures:
        every = load_data(data, split="test")
        some = load_data(data, split="test", samples=samples, seed=seed)
        for name in _models(model, every):
            run.network(name, figures, every, some)
    for table in (name for name in wanted if name in DATA_OF):
        run.hardening(table, plan, width, train_samples, table_samples)
    run.write_page(page, wanted)


def _chosen(targets: list[str], data: str) -> list[str]:
    """The targets, each once, figures before tables."""
    from attackroute.cli.paper_experiments import PARTS
    from attackroute.core.errors import did_you_mean
    from attackroute.paper.page import DATA_OF

    known = sorted([*PARTS, *DATA_OF])
    other = "table2" if data.startswith("svhn:") else "table3"
    found = set()
    for target in targets:
        if target == _ALL:
            found |= set(known) - {other}
        elif target == other:
            raise UserError(f"{other} is about {DATA_OF[other]}, not about {data}; leave it out, or give other --data")
        elif target in known:
            found.add(target)
        else:
            close = did_you_mean(target, [*known, _ALL])
            raise UserError(f"no table or figure {target!r}{close}; choose from {', '.join([*known, _ALL])}")
    return [name for name in known if name in found]


def _models(given: list[str] | None, images: ImageData) -> list[str]:
    """The networks to look at."""
    from attackroute.zoo.card import ModelCard
    from attackroute.zoo.presets import preset_folder, preset_names

    if given:
        return list(dict.fromkeys(given))
    fitting = [name for name in preset_names() if ModelCard.load(preset_folder(name)).classes == images.classes]
    if not fitting:
        raise UserError(f"no preset knows the classes of {images.name}'s images; name a network with --model")
    return [f"preset:{name}" for name in fitting]
