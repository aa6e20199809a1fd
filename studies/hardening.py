"""``python -m studies.hardening``: does a penalty on the route harden, and more than on other neurons?

The study itself is that of the paper's Tables 2 and 3, :mod:`attackroute.paper.hardening_study`, here with any network,
data, radius and penalties.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from attackroute.cli.console import Output
from attackroute.cli.options import open_folder, resolve_device
from attackroute.hardening.settings import PENALTIES, STABILISATION, TrainSettings
from attackroute.paper.hardening_plan import StudyPlan, compared, judged
from attackroute.paper.hardening_results import HardeningStudy
from attackroute.paper.hardening_study import STUDY, study_networks
from attackroute.tracing.config import CARRIERS, UNIT
from attackroute.zoo.data import load_data
from studies.command import Parser, at_least, number, output_of, run_command

_ABOUT = """Compare Vanilla, PAT and their hardened variants with penalties on random and on all neurons.

Lambda is chosen for each variant by a fixed rule on images that the final numbers do not use.
"""
_EXAMPLES = """
examples:

  On digits that an installed package carries: about 45 minutes on one processor core
  $ python -m studies.hardening --data mnist-sample --out runs/study

  Go on after an interruption: the same command with --resume; --seeds may be raised
  $ python -m studies.hardening --data mnist-sample --out runs/study --seeds 5 --resume

  The paper's network and radius
  $ python -m studies.hardening --model vgg16 --data cifar10:~/data --width 1 --epochs 60 --fine-epochs 10 \\
      --eps 8/255 --noise 0.1 --out runs/study-cifar

  Along the route that follows the noise, with the noise itself punished too; the paper's route is a control then
  $ python -m studies.hardening --data mnist-sample --carrier noise --penalty gradient --penalty stabilisation \\
      --out runs/study-noise

what is done:

  For every seed a network is trained without and with PGD (Vanilla, PAT). Each is fine-tuned without a penalty, and
  with each penalty on the route's neurons, on random ones off it, and on all. Before that, the network of seed 0 has
  chosen each variant's lambda, on training images that were kept out. The test images decide nothing.
  With --carrier noise or --penalty stabilisation, which need an attack in the training, only PAT is fine-tuned.

the files:

  study.json, study.csv    accuracies; in the JSON also paired differences, how lambda was chosen, and checks
  seed-N/NAME/             a variant's network and its evaluation
  tuning.jsonl             what the lambdas were chosen from
"""


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(number, text.split(",")))


def _parser() -> Parser:
    parser = Parser("python -m studies.hardening", _ABOUT, _EXAMPLES)
    add = parser.add_argument
    add("--data", required=True, metavar="DATA", help="mnist-sample, cifar10:PATH, svhn:PATH or folder:PATH.")
    add("--out", required=True, type=Path, metavar="FOLDER", help="Where everything goes.")
    add(
        "--model",
        default="vgg_small",
        metavar="NAME",
        help="vgg_small, vgg16, alexnet, resnet18, or package.module:factory. [vgg_small]",
    )
    add("--width", type=number, default=0.25, metavar="FACTOR", help="Factor on its channels. [0.25]")
    add("--image-size", type=at_least(1), metavar="PIXELS", help="Resize the images to this size. [the data set's own]")
    add(
        "--penalty",
        action="append",
        choices=(*PENALTIES, STABILISATION),
        help="What is punished; may be repeated. [gradient, weight]",
    )
    add("--carrier", choices=CARRIERS, default=UNIT, help="What a traced route follows. [unit]")
    add("--seeds", type=at_least(1), default=3, metavar="N", help="Networks that are judged. [3]")
    add("--epochs", type=at_least(1), default=8, metavar="N", help="Passes of the training. [8]")
    add("--fine-epochs", type=at_least(1), default=2, metavar="N", help="Of the fine-tuning. [2]")
    add("--eps", type=number, default=0.1, metavar="RADIUS", help="Of all attacks. [0.1]")
    add("--noise", type=number, default=0.2, metavar="STD", help="Standard deviation of the Gaussian noise. [0.2]")
    add(
        "--shares",
        type=_numbers,
        default="0.03,0.1,0.3,1,3",
        metavar="F,F,...",
        help="Try the lambdas that make the penalty's gradient these shares of the task's. [0.03,0.1,0.3,1,3]",
    )
    add("--train-samples", type=at_least(2), metavar="N", help="Only so many. [all]")
    add("--test-samples", type=at_least(1), metavar="N", help="Only so many. [all]")
    add(
        "--validation",
        type=number,
        default=0.2,
        metavar="SHARE",
        help="Of the training images, to choose lambda by. [0.2]",
    )
    add("--augment", choices=("none", "crop", "crop-flip"), default="crop", help="Of the training images. [crop]")
    add("--channels-last", action="store_true", help="Train in the channels_last memory format.")
    add(
        "--autoattack-samples",
        type=at_least(0),
        default=16,
        metavar="N",
        help="Test images for AutoAttack, which is slow and needs the extra autoattack; 0 leaves it out. [16]",
    )
    add(
        "--check-samples",
        type=at_least(0),
        default=96,
        metavar="N",
        help="Test images on which the first seed's networks are checked for masked gradients. [96]",
    )
    add("--resume", action="store_true", help="Go on with the study in --out.")
    return parser  # fmt: skip


def harden(arguments: Sequence[str] | None) -> None:
    """Carry out the study, and show what was found."""
    options = _parser().parse_args(arguments)
    output = output_of(options)
    device = resolve_device(options.device)
    common = TrainSettings(augment=options.augment, channels_last=options.channels_last)
    plan = StudyPlan(
        eps=options.eps,
        seeds=tuple(range(1, options.seeds + 1)),
        shares=options.shares,
        penalties=tuple(dict.fromkeys(options.penalty or PENALTIES)),
        carrier=options.carrier,
        validation=options.validation,
        training=replace(common, epochs=options.epochs),
        fine_tuning=replace(common, epochs=options.fine_epochs, lr=0.01),
        noise=options.noise,
        autoattack_samples=options.autoattack_samples,
        check_samples=options.check_samples,
    )
    train = load_data(options.data, split="train", image_size=options.image_size, samples=options.train_samples)
    test = load_data(options.data, split="test", image_size=options.image_size, samples=options.test_samples)
    folder = open_folder(options.out)
    with output.progress("networks") as progress:
        study = study_networks(
            plan, options.model, options.width, options.data, train, test, folder,
            resume=options.resume, device=device, progress=progress,
        )  # fmt: skip
    output.result(study.document().to_json())
    _show(output, study)
    output.line(f"all numbers are in {folder / STUDY}.json and {folder / STUDY}.csv")


def _show(output: Output, study: HardeningStudy) -> None:
    output.line(f"Lambda, chosen on {study.tuning[0].reference.clean.total} validation images: {study.plan.rule}.")
    output.table(
        ["variant", "chosen", "lambda: clean / attacked (0: no penalty)"],
        [
            [
                tuning.variant.name,
                f"{tuning.chosen.lam:g}",
                ", ".join(
                    f"{trial.lam:g}: {100 * trial.clean.value:.1f} / {100 * trial.attacked.value:.1f}"
                    for trial in (tuning.reference, *tuning.trials)
                ),
            ]
            for tuning in study.tuning
        ],
    )
    output.line(f"Test images, mean of {len(study.plan.seeds)} seeds (lowest-highest), eps {study.plan.eps:g}:")
    output.table(
        ["variant", *study.attacks, "signs of masking"],
        [
            [
                variant.name,
                *(_over_seeds(study.accuracies(variant, attack)) for attack in study.attacks),
                ", ".join(check.name for check in study.suspicious(variant)) or "none",
            ]
            for variant in judged(study.plan)
        ],
    )
    output.line(f"Paired differences under {study.plan.judge} in points, with 95 % intervals over images and seeds:")
    output.table(
        ["first", "verdict", "second", "difference"],
        [
            [first.name, difference.verdict, second.name, str(difference)]
            for first, second in compared(study.plan)
            for difference in [study.difference(first, second, study.judge)]
        ],
    )
    for outcome in study.outcomes:
        title = f"{outcome.variant.name}, seed {outcome.seed}"
        if outcome.overlap is not None:
            output.line(f"{title}: the route of all training images shares {outcome.overlap}")
        if outcome.departure is not None:
            output.line(
                f"{title}: its weights are away from those of the exact gradient by {outcome.departure:.1%} of what "
                "the penalty changed"
            )


def _over_seeds(values: Sequence[float]) -> str:
    """A mean over seeds, with the lowest and the highest."""
    if len(values) == 1:
        return f"{values[0]:.1%}"
    return f"{statistics.fmean(values):.1%} ({100 * min(values):.1f}-{100 * max(values):.1f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(harden, arguments)


if __name__ == "__main__":
    sys.exit(main())
