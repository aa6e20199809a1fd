"""``attackroute reproduce``: the paper's tables and figures with the paper's settings, beside the paper's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attackroute.cli import options, train_options
from attackroute.cli.console import Output

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

_WHAT = "What is reproduced"
_STUDY = "The study"


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
            rich_help_panel=_STUDY,
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
            rich_help_panel=_STUDY,
            help="Only so many training images, for tables 2 and 3.",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", min=1, rich_help_panel=_STUDY, help="Networks that are judged.")
    ] = 3,
    epochs: Annotated[
        int, typer.Option("--epochs", metavar="N", min=1, rich_help_panel=_STUDY, help="Passes of the training.")
    ] = 10,
    fine_epochs: Annotated[
        int, typer.Option("--fine-epochs", metavar="N", min=1, rich_help_panel=_STUDY, help="Of the fine-tuning.")
    ] = 1,
    table_samples: Annotated[
        int,
        typer.Option(
            "--table-samples",
            metavar="N",
            min=1,
            rich_help_panel=_STUDY,
            help="Test images of tables 2 and 3.",
        ),
    ] = 2000,
    autoattack_samples: Annotated[
        int,
        typer.Option(
            "--autoattack-samples",
            metavar="N",
            min=0,
            rich_help_panel=_STUDY,
            help="Test images for AutoAttack, which is slow and needs the extra autoattack; 0 leaves it out.",
        ),
    ] = 64,
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
    from attackroute.paper.run import ReproductionSettings, StudySettings
    from attackroute.paper.run import reproduce as run

    output = Output(as_json, quiet)
    settings = ReproductionSettings(
        targets=targets,
        data=data,
        folder=out,
        models=model or (),
        samples=samples,
        page=page,
        study=StudySettings(
            width=width,
            train_samples=train_samples,
            test_samples=table_samples,
            seeds=seeds,
            epochs=epochs,
            fine_epochs=fine_epochs,
            autoattack_samples=autoattack_samples,
        ),
        batch_size=batch_size,
        seed=seed,
        device=options.resolve_device(device),
        resume=resume,
    )
    options.open_folder(out)
    result = run(settings, output)
    output.result(result.to_json())
    for target, claims in result.claims.items():
        output.line(f"\n{target}")
        for claim in claims:
            output.line(f"  {claim}")
    output.line(f"\nAll of it is in {result.page}; tables and figures in {out}")
