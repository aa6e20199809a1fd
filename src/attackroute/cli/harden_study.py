"""``attackroute harden-study``: does a penalty on the route harden, and more than on other neurons?"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attackroute.cli import options, study_options, train_options
from attackroute.cli.console import Output

if TYPE_CHECKING:
    from attackroute.analysis.hardening_results import HardeningStudy

EXAMPLES = """
 Examples:

   On digits that an installed package carries: about 45 minutes on one processor core
   $ attackroute harden-study --data mnist-sample --out runs/study

   Go on after an interruption: the same command with --resume; --seeds may be raised
   $ attackroute harden-study --data mnist-sample --out runs/study --seeds 5 --resume

   The paper's network and radius
   $ attackroute harden-study --model vgg16 --data cifar10:~/data --width 1 --epochs 60 --fine-epochs 10 \\
       --eps 8/255 --noise 0.1 --out runs/study-cifar

   Along the route that follows the noise, with the noise itself punished too; the paper's route is a control then
   $ attackroute harden-study --data mnist-sample --carrier noise --penalty gradient --penalty stabilisation \\
       --out runs/study-noise

 What is done:

   For every seed a network is trained without and with PGD (Vanilla, PAT). Each is fine-tuned without a penalty, and
   with each penalty on the route's neurons, on random ones off it, and on all. Before that, the network of seed 0 has
   chosen each variant's lambda, on training images that were kept out. The test images decide nothing.
   With --carrier noise or --penalty stabilisation, which need an attack in the training, only PAT is fine-tuned.

 The files:

   study.json, study.csv    accuracies; in the JSON also paired differences, how lambda was chosen, and checks
   seed-N/NAME/             a variant's network and its evaluation
   tuning.jsonl             what the lambdas were chosen from
"""


class Penalties(str, Enum):
    """What is punished."""

    GRADIENT = "gradient"
    WEIGHT = "weight"
    STABILISATION = "stabilisation"


def harden_study(
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where everything goes.")],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME",
            rich_help_panel="The network",
            help="vgg_small, vgg16, alexnet, resnet18, or package.module:factory.",
        ),
    ] = "vgg_small",
    width: train_options.Width = 0.25,
    image_size: options.ImageSize = None,
    penalty: Annotated[
        list[Penalties] | None,
        typer.Option(
            "--penalty",
            rich_help_panel=study_options.STUDY,
            help="What is punished; may be repeated.",
            show_default="gradient, weight",
        ),
    ] = None,
    carrier: options.Carrier = options.Carriers.UNIT,
    seeds: study_options.Seeds = 3,
    epochs: study_options.Epochs = 8,
    fine_epochs: study_options.FineEpochs = 2,
    eps: Annotated[
        float,
        typer.Option(
            "--eps",
            metavar="RADIUS",
            parser=options.parse_number,
            rich_help_panel=study_options.STUDY,
            help="Of all attacks.",
        ),
    ] = 0.1,
    noise: Annotated[
        float,
        typer.Option(
            "--noise",
            metavar="STD",
            parser=options.parse_number,
            rich_help_panel=study_options.STUDY,
            help="Standard deviation of the Gaussian noise.",
        ),
    ] = 0.2,
    shares: Annotated[
        str,
        typer.Option(
            "--shares",
            metavar="F,F,...",
            rich_help_panel=study_options.STUDY,
            help="Try the lambdas that make the penalty's gradient these shares of the task's.",
        ),
    ] = "0.03,0.1,0.3,1,3",
    train_samples: Annotated[
        int | None,
        typer.Option(
            "--train-samples",
            metavar="N",
            min=2,
            rich_help_panel=study_options.STUDY,
            help="Only so many.",
            show_default="all",
        ),
    ] = None,
    test_samples: Annotated[
        int | None,
        typer.Option(
            "--test-samples",
            metavar="N",
            min=1,
            rich_help_panel=study_options.STUDY,
            help="Only so many.",
            show_default="all",
        ),
    ] = None,
    validation: Annotated[
        float,
        typer.Option(
            "--validation",
            metavar="SHARE",
            parser=options.parse_number,
            rich_help_panel=study_options.STUDY,
            help="Of the training images, to choose lambda by.",
        ),
    ] = 0.2,
    augment: train_options.Augment = train_options.Augmentations.CROP,
    channels_last: train_options.ChannelsLast = False,
    autoattack_samples: study_options.AutoattackSamples = 16,
    check_samples: Annotated[
        int,
        typer.Option(
            "--check-samples",
            metavar="N",
            min=0,
            rich_help_panel=study_options.STUDY,
            help="Test images on which the first seed's networks are checked for masked gradients.",
        ),
    ] = 96,
    resume: study_options.Resume = False,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare Vanilla, PAT and their hardened variants with penalties on random and on all neurons.

    Lambda is chosen for each variant by a fixed rule on images that the final numbers do not use.
    """
    from dataclasses import replace

    from attackroute.analysis.hardening_plan import StudyPlan
    from attackroute.cli.hardening_study_run import run_study
    from attackroute.hardening.settings import PENALTIES, TrainSettings
    from attackroute.zoo.sources import load_data

    output = Output(as_json, quiet)
    home = options.resolve_device(device)
    common = TrainSettings(augment=augment.value, channels_last=channels_last)
    plan = StudyPlan(
        eps=eps,
        seeds=tuple(range(1, seeds + 1)),
        shares=tuple(options.parse_number(text) for text in shares.split(",")),
        penalties=tuple(dict.fromkeys(each.value for each in penalty)) if penalty else PENALTIES,
        carrier=carrier.value,
        validation=validation,
        training=replace(common, epochs=epochs),
        fine_tuning=replace(common, epochs=fine_epochs, lr=0.01),
        noise=noise,
        autoattack_samples=autoattack_samples,
        check_samples=check_samples,
    )
    train = load_data(data, split="train", image_size=image_size, samples=train_samples)
    test = load_data(data, split="test", image_size=image_size, samples=test_samples)
    study = run_study(plan, model, width, data, train, test, out, resume=resume, device=home, output=output)
    output.result({**study.about(), "rows": study.records()})
    _show(output, study)
    output.line(f"all numbers are in {out / 'study.json'} and {out / 'study.csv'}")


def _show(output: Output, study: HardeningStudy) -> None:
    from attackroute.analysis.hardening_plan import compared, judged
    from attackroute.analysis.hardening_results import over_seeds
    from attackroute.analysis.paired import shown

    output.line(f"Lambda, chosen on {study.tuning[0].reference.clean.total} validation images: {study.plan.rule}.")
    output.table(
        ["variant", "chosen", "lambda: clean / attacked (0: no penalty)"],
        [
            [
                found.variant.name,
                f"{found.chosen.lam:g}",
                ", ".join(
                    f"{trial.lam:g}: {100 * trial.clean.value:.1f} / {100 * trial.attacked.value:.1f}"
                    for trial in (found.reference, *found.trials)
                ),
            ]
            for found in study.tuning
        ],
    )
    output.line(f"Test images, mean of {len(study.plan.seeds)} seeds (lowest-highest), eps {study.plan.eps:g}:")
    output.table(
        ["variant", *study.attacks, "signs of masking"],
        [
            [
                variant.name,
                *(over_seeds(study.accuracies(variant, attack)) for attack in study.attacks),
                ", ".join(check.name for check in study.suspicious(variant)) or "none",
            ]
            for variant in judged(study.plan)
        ],
    )
    output.line(f"Paired differences under {study.plan.judge} in points, with 95 % intervals over images and seeds:")
    output.table(
        ["first", "verdict", "second", "difference"],
        [
            [first.name, found.verdict, second.name, shown(found)]
            for first, second in compared(study.plan)
            for found in [study.difference(first, second, study.judge)]
        ],
    )
    for found in study.outcomes:
        title = f"{found.variant.name}, seed {found.seed}"
        if found.overlap is not None:
            output.line(f"{title}: the route of all training images shares {found.overlap}")
        if found.departure is not None:
            output.line(
                f"{title}: its weights are away from those of the exact gradient by {found.departure:.1%} of what the "
                "penalty changed"
            )
