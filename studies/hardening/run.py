"""``python -m studies.hardening``: does a penalty on the route harden, and more than on other neurons?"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from attackroute.cli.console import Output
from attackroute.cli.options import resolve_device
from attackroute.core.files import made_folder
from attackroute.hardening.settings import PENALTIES, STABILISATION
from attackroute.paper.hardening_tables import STUDY
from attackroute.tracing.config import CARRIERS
from attackroute.zoo.data import load_data
from studies.command import Parser, at_least, number, output_of, run_command
from studies.hardening.plan import DIGITS, PAPER, StudyPlan, compared, judged
from studies.hardening.results import HardeningStudy
from studies.hardening.study import study_networks

_ABOUT = """Compare Vanilla, PAT and their hardened variants with penalties on random and on all neurons.

Lambda is chosen for each variant by a fixed rule on images that the final numbers do not use.
"""
_EXAMPLES = """
examples:

  Table 2, for attackroute reproduce table2 --out runs/paper: 63 networks at an eighth of the width, on half of the
  images; hours on one core
  $ python -m studies.hardening --data cifar10:~/data --train-samples 25000 --out runs/paper/table2

  On digits that an installed package carries: about 45 minutes on one processor core
  $ python -m studies.hardening --settings digits --data mnist-sample --out runs/study

  Go on after an interruption: the same command with --resume; --seeds may be raised
  $ python -m studies.hardening --settings digits --data mnist-sample --out runs/study --seeds 5 --resume

  Along the route that follows the noise, with the noise itself punished too; the paper's route is a control then
  $ python -m studies.hardening --settings digits --data mnist-sample --carrier noise --penalty gradient \\
      --penalty stabilisation --out runs/study-noise

the settings:

  --settings paper is what Tables 2 and 3 of the paper are about, with the route of all training images beside that of
  a tenth. --settings digits tries more lambdas. What is given beside it is taken instead; brackets have the default of
  paper, then that of digits.

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


@dataclass(frozen=True)
class Preset:
    """What is studied where the options do not say otherwise.

    Attributes:
        plan: What is decided beforehand.
        model: Name of the network.
        width: Factor on its channels.
        test_samples: Test images; None takes all.
    """

    plan: StudyPlan
    model: str
    width: float
    test_samples: int | None


PRESETS = {"paper": Preset(PAPER, "vgg16", 0.125, 2000), "digits": Preset(DIGITS, "vgg_small", 0.25, None)}


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(number, text.split(",")))


def _parser() -> Parser:
    parser = Parser("python -m studies.hardening", _ABOUT, _EXAMPLES)
    add = parser.add_argument
    count, positive = at_least(0), at_least(1)
    add("--settings", choices=tuple(PRESETS), default="paper", help="What holds where no option says so. [paper]")
    add("--data", required=True, metavar="DATA", help="mnist-sample, cifar10:PATH, svhn:PATH or folder:PATH.")
    add("--out", required=True, type=Path, metavar="FOLDER", help="Where everything goes.")
    add(
        "--model",
        metavar="NAME",
        help="vgg_small, vgg16, alexnet, resnet18, or package.module:factory. [vgg16; vgg_small]",
    )
    add("--width", type=number, metavar="FACTOR", help="Factor on its channels. [0.125; 0.25]")
    add("--image-size", type=positive, metavar="PIXELS", help="Resize the images to this size. [the data set's own]")
    penalties = (*PENALTIES, STABILISATION)
    add("--penalty", action="append", choices=penalties, help="What is punished; may be repeated. [gradient, weight]")
    add("--carrier", choices=CARRIERS, help="What a traced route follows. [unit]")
    add("--seeds", type=positive, metavar="N", help="Networks that are judged. [3]")
    add("--epochs", type=positive, metavar="N", help="Passes of the training. [10; 8]")
    add("--fine-epochs", type=positive, metavar="N", help="Of the fine-tuning. [1; 2]")
    add("--eps", type=number, metavar="RADIUS", help="Of all attacks. [8/255; 0.1]")
    add("--noise", type=number, metavar="STD", help="Standard deviation of the Gaussian noise. [0.1; 0.2]")
    shares = (
        "Try 0 and the lambdas that make the penalty's gradient these shares of the task's. [0.1,0.3; 0.03,0.1,0.3,1,3]"
    )
    add("--shares", type=_numbers, metavar="F,F,...", help=shares)
    add("--train-samples", type=at_least(2), metavar="N", help="Only so many. [all]")
    add("--test-samples", type=positive, metavar="N", help="Only so many. [2000; all]")
    add("--validation", type=number, metavar="SHARE", help="Of the training images, to choose lambda by. [0.1; 0.2]")
    add("--augment", choices=("none", "crop", "crop-flip"), help="Of the training images. [crop-flip; crop]")
    add("--channels-last", action="store_true", help="Train in the channels_last memory format, as paper does.")
    slow = "Test images for AutoAttack, which is slow and needs the extra autoattack; 0 leaves it out. [64; 16]"
    add("--autoattack-samples", type=count, metavar="N", help=slow)
    checked = "Test images on which the first seed's networks are checked for masked gradients. [128; 96]"
    add("--check-samples", type=count, metavar="N", help=checked)
    add("--resume", action="store_true", help="Go on with the study in --out.")
    return parser


def carry_out(arguments: Sequence[str] | None) -> None:
    """Carry out the study, and show what was found."""
    options = _parser().parse_args(arguments)
    output = output_of(options)
    device = resolve_device(options.device)
    given = {name: value for name, value in vars(options).items() if value is not None}
    preset = PRESETS[options.settings]
    names = ("eps", "shares", "carrier", "validation", "noise", "autoattack_samples", "check_samples")
    training = {"augment": given["augment"]} if "augment" in given else {}
    training |= {"channels_last": True} if options.channels_last else {}
    plan = preset.plan
    plan = replace(
        plan,
        **{name: given[name] for name in names if name in given},
        seeds=tuple(range(1, given.get("seeds", len(plan.seeds)) + 1)),
        penalties=tuple(dict.fromkeys(given.get("penalty", plan.penalties))),
        training=replace(plan.training, epochs=given.get("epochs", plan.training.epochs), **training),
        fine_tuning=replace(plan.fine_tuning, epochs=given.get("fine_epochs", plan.fine_tuning.epochs), **training),
    )
    tests = given.get("test_samples", preset.test_samples)
    train = load_data(options.data, split="train", image_size=options.image_size, samples=options.train_samples)
    test = load_data(options.data, split="test", image_size=options.image_size, samples=tests)
    folder = made_folder(options.out)
    with output.progress("networks") as progress:
        study = study_networks(
            plan, given.get("model", preset.model), given.get("width", preset.width), options.data, train, test, folder,
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
        if outcome.overlap is not None:
            title = f"{outcome.variant.name}, seed {outcome.seed}"
            output.line(f"{title}: the route of all training images shares {outcome.overlap}")


def _over_seeds(values: Sequence[float]) -> str:
    """A mean over seeds, with the lowest and the highest."""
    if len(values) == 1:
        return f"{values[0]:.1%}"
    return f"{statistics.fmean(values):.1%} ({100 * min(values):.1f}-{100 * max(values):.1f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(carry_out, arguments)
