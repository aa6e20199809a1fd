"""``python -m studies.repair``: which criterion finds the channels whose clean values repair most?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from attackroute.cli.console import Output
from attackroute.cli.options import resolve_device
from attackroute.core.errors import UserError
from attackroute.core.files import made_folder
from attackroute.core.model_state import weights_digest
from attackroute.robustness.registry import parse_attack
from attackroute.zoo.data import load_data
from attackroute.zoo.weights import find_card, open_network
from studies.command import Parser, at_least, number, output_of, run_command
from studies.repair.repair import BUDGETS, CRITERIA, EVERY, PATH_RULE, RULE
from studies.repair.results import AREA, RepairStudy
from studies.repair.study import study_repair

STUDY = "repair"
"""What the files of the numbers are called."""

_ABOUT = """Compare criteria by what transplanting clean values into their channels repairs, per channel replaced.

Among them are the paper's route, the one that follows the noise and its variants, attribution patching, path,
sensitivity, and random channels.
"""
_EXAMPLES = """
examples:

  On a network that was trained here, under PGD, FGSM and Gaussian noise
  $ python -m studies.repair --model runs/digits --data mnist-sample --attack pgd:eps=0.1 --attack fgsm:eps=0.1 \\
      --attack gaussian-noise:std=0.2 --samples 200 --out runs/repair

  On three networks of one architecture together, with the choice by true effects as an upper end
  $ python -m studies.repair --model runs/digits-1 --model runs/digits-2 --model runs/digits-3 --oracle \\
      --data mnist-sample --attack pgd:eps=0.1 --samples 200 --out runs/repair-seeds

  Go on after an interruption: the same command with --resume

what is done:

  Three sets of images of --samples each are drawn, for each network its own. The first ranks each layer's channels by
  every criterion. On the second, under the first attack, a fixed rule picks the best variant of the route that follows
  the noise. On the third all criteria are judged under every attack: clean values go into growing shares of each
  layer, and into shares of all channels, the same of every layer or the best wherever they are; with channels ranked
  under the same attack, under the others, and by the second set.
  With --oracle, channels are also chosen by what they repair of the first set under the first attack, each alone, and
  one after the other: tens of thousands of passes for a network of 500 channels.

the files:

  repair.json, repair.csv    accuracies and areas; in the JSON also paired differences and what was picked
  repair.jsonl               every transplant, for --resume
"""


def _parser() -> Parser:
    parser = Parser("python -m studies.repair", _ABOUT, _EXAMPLES)
    add = parser.add_argument
    add(
        "--model",
        action="append",
        required=True,
        metavar="MODEL",
        help="A network, as attackroute's commands take it. Repeated: networks of one architecture, such as of several "
        "seeds, whose mean is taken.",
    )
    add("--data", required=True, metavar="DATA", help="mnist-sample, cifar10:PATH, svhn:PATH or folder:PATH.")
    add("--out", required=True, type=Path, metavar="FOLDER", help="Where everything goes.")
    add("--weights", type=Path, metavar="FILE", help="A state dict. A train folder brings its own.")
    add("--model-width", type=number, metavar="FACTOR", help="Factor on the channels of a built-in network.")
    add("--split", choices=("train", "test"), default="test", help="Which part of the data. [test]")
    add("--samples", type=at_least(1), default=500, metavar="N", help="Images in each of a network's three sets. [500]")
    add("--image-size", type=at_least(1), metavar="PIXELS", help="Resize the images to this size. [the networks' own]")
    add(
        "--attack",
        action="append",
        metavar="NAME",
        help="An attack or corruption; may be repeated. The first one picks the variant. [pgd, fgsm, gaussian-noise]",
    )
    only = "Judge this criterion, beside noise and random; may be repeated. [all]"
    add("--criterion", action="append", choices=CRITERIA, metavar="NAME", help=only)
    add("--oracle", action="store_true", help="Choose by true effects too, which is slow.")
    add("--resume", action="store_true", help="Go on with the study in --out.")
    add("--seed", type=at_least(0), default=0, metavar="N", help="Which images are drawn. [0]")
    return parser  # fmt: skip


def repair(arguments: Sequence[str] | None) -> None:
    """Carry out the study, and show what was found."""
    options = _parser().parse_args(arguments)
    output = output_of(options)
    models = list(dict.fromkeys(options.model))
    if options.weights is not None and len(models) > 1:
        raise UserError("--weights is one file, but there are several networks; give a folder with each --model")
    attacks = {str(attack): attack for attack in map(parse_attack, options.attack or ("pgd", "fgsm", "gaussian-noise"))}
    device = resolve_device(options.device)
    size = _trained_size(models) if options.image_size is None else options.image_size
    count = 3 * options.samples * len(models)
    images = load_data(options.data, split=options.split, image_size=size, samples=count, seed=options.seed)
    if len(images) < count:
        raise UserError(
            f"there are {len(images)} images for {len(models)} times three sets of {options.samples}: give a smaller "
            "--samples"
        )
    networks = {
        model: open_network(model, images, weights=options.weights, width=options.model_width).to(device)
        for model in models
    }
    digests = {name: weights_digest(network) for name, network in networks.items()}
    for name, other in combinations(models, 2):
        if digests[name] == digests[other]:
            raise UserError(f"{name} and {other} are the same network: give each once")
    folder = made_folder(options.out)
    # without the option, the networks' own size counts, which goes with their weights
    origin = {"weights": digests, "data": options.data, "split": images.split, "image_size": options.image_size}
    with output.progress("steps") as progress:
        study = study_repair(
            networks, images.dataset, attacks, folder, samples=options.samples, seed=options.seed,
            criteria=options.criterion or CRITERIA, oracle=options.oracle, resume=options.resume, origin=origin,
            progress=progress,
        )  # fmt: skip
    document = study.document()
    document.save(folder, STUDY)
    output.result(document.to_json())
    _show(output, study)
    output.line(f"all numbers are in {folder / STUDY}.json and {folder / STUDY}.csv")


def _trained_size(models: Sequence[str]) -> int | None:
    """The size of the images that the networks were trained on, where one of them says so."""
    sizes = {model: card[1].spec.image_size for model in models if (card := find_card(model)) is not None}
    if len(set(sizes.values())) > 1:
        named = ", ".join(f"{model} of {size}" for model, size in sizes.items())
        raise UserError(
            f"the networks were trained on images of different sizes in pixels ({named}): compare them one by one, or "
            "give one --image-size"
        )
    return next(iter(sizes.values()), None)


def _show(output: Output, study: RepairStudy) -> None:
    output.line(f"Picked: {study.picked}. The rule: {RULE}.")
    budgets = [f"{share:.0%}" for share in BUDGETS]
    for attack in study.attacks:
        criteria = study.criteria(attack)
        output.line(
            f"{attack}: {study.images(attack)} images that are right when clean, {100 * study.untouched(attack):.1f} % "
            "of them under attack. Area under the curve of accuracy over the share of a layer replaced, in points:"
        )
        output.table(
            ["layer", *criteria],
            [[layer, *(f"{100 * study.area(attack, by, layer):.1f}" for by in criteria)] for layer in study.layers],
        )
        output.line(
            "The mean of these over layers, and accuracy with shares of all channels replaced, the same of every "
            "layer, and the best of any:"
        )
        output.table(
            ["criterion", AREA, *(f"every {share}" for share in budgets), *(f"any {share}" for share in budgets)],
            [
                [
                    by,
                    f"{100 * study.area(attack, by):.1f}" if by in criteria else "",
                    *([""] * len(budgets) if EVERY not in places else []),
                    *(f"{100 * value:.1f}" for place in places for value in study.accuracies(attack, by, place)),
                ]
                for by, places in study.places(attack).items()
            ],
        )
    output.line("Differences in points, with 95 % intervals:")
    output.table(
        ["attack", "first", "verdict", "second", "what", "difference"],
        [
            [
                attack, one, difference.verdict, other, what if share is None else f"{share:.0%} in {what}",
                difference.text("networks"),
            ]
            for attack, one, other, what, share, difference in study.differences()
        ],
    )  # fmt: skip
    output.line(f"Mean area of path less others in points, network by network, with 95 % intervals. {PATH_RULE}:")
    output.table(
        ["attack", "verdict", "second", *study.networks],
        [
            [attack, verdict, other, *(gain.text() for gain in gains)]
            for attack, verdict, other, gains in study.path_verdicts()
        ],
    )
    output.line("Channels ranked elsewhere, under the attack on the left, in points of accuracy:")
    output.table(
        ["attack", "criterion", "ranked by", "kept", *(f"{share} of every layer" for share in budgets)],
        [
            [attack, by, origin, f"{kept:.0%}", *(f"{100 * value:.1f}" for value in values)]
            for attack, by, origin, kept, values in study.transfers()
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(repair, arguments)
