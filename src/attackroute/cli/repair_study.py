"""``attackroute repair-study``: which criterion finds the channels whose clean values repair most?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attackroute.cli import options, study_options
from attackroute.cli.console import Output
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from attackroute.analysis.repair_results import RepairStudy

EXAMPLES = """
 Examples:

   On a network that was trained here, under PGD, FGSM and Gaussian noise
   $ attackroute repair-study --model runs/digits --data mnist-sample --attack pgd:eps=0.1 --attack fgsm:eps=0.1 \\
       --attack gaussian-noise:std=0.2 --samples 200 --out runs/repair

   On three networks of one architecture together, with the choice by true effects as an upper end
   $ attackroute repair-study --model runs/digits-1 --model runs/digits-2 --model runs/digits-3 --oracle \\
       --data mnist-sample --attack pgd:eps=0.1 --samples 200 --out runs/repair-seeds

   Go on after an interruption: the same command with --resume

 What is done:

   Three sets of images of --samples each are drawn, for each network its own. The first ranks each layer's channels by
   every criterion. On the second, under the first attack, a fixed rule picks the best variant of the route that follows
   the noise. On the third all criteria are judged under every attack: clean values go into growing shares of each
   layer, and into shares of all channels, the same of every layer or the best wherever they are; with channels ranked
   under the same attack, under the others, and by the second set.
   With --oracle, channels are also chosen by what they repair of the first set under the first attack, each alone, and
   one after the other: tens of thousands of passes for a network of 500 channels.

 The files:

   repair.json, repair.csv    accuracies and areas; in the JSON also paired differences and what was picked
   repair.jsonl               every transplant, for --resume
"""


def repair_study(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="MODEL",
            rich_help_panel="The network",
            help="A network, as other commands take it. Repeated: networks of one architecture, such as of several "
            "seeds, whose mean is taken.",
        ),
    ],
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where everything goes.")],
    weights: options.Weights = None,
    model_width: options.ModelWidth = None,
    split: options.Split = options.Splits.TEST,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            metavar="N",
            min=1,
            rich_help_panel=study_options.STUDY,
            help="Images in each of a network's three sets.",
        ),
    ] = 500,
    image_size: options.ImageSize = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            metavar="NAME",
            rich_help_panel=study_options.STUDY,
            help="An attack or corruption; may be repeated. The first one picks the variant.",
            show_default="pgd, fgsm, gaussian-noise",
        ),
    ] = None,
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle", rich_help_panel=study_options.STUDY, help="Choose by true effects too, which is slow."
        ),
    ] = False,
    resume: study_options.Resume = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare criteria by what transplanting clean values into their channels repairs, per channel replaced.

    Among them are the paper's route, the one that follows the noise and its variants, attribution patching,
    sensitivity, and random channels.
    """
    from itertools import combinations

    from attackroute.analysis.repair_study import study_repair
    from attackroute.analysis.tables import save_result
    from attackroute.core.model_state import weights_digest
    from attackroute.robustness.registry import parse_attack
    from attackroute.zoo.networks import open_network
    from attackroute.zoo.sources import load_data

    output = Output(as_json, quiet)
    names = list(dict.fromkeys(model))
    if weights is not None and len(names) > 1:
        raise UserError("--weights is one file, but there are several networks; give a folder with each --model")
    attacks = {str(found): found for found in map(parse_attack, attack or ("pgd", "fgsm", "gaussian-noise"))}
    home = options.resolve_device(device)
    size = _own_size(names) if image_size is None else image_size
    wanted = 3 * samples * len(names)
    images = load_data(data, split=split.value, image_size=size, samples=wanted, seed=seed)
    if len(images) < wanted:
        raise UserError(
            f"there are {len(images)} images for {len(names)} times three sets of {samples}: give a smaller --samples"
        )
    networks = {name: open_network(name, images, weights=weights, width=model_width).to(home) for name in names}
    digests = {name: weights_digest(network) for name, network in networks.items()}
    for name, other in combinations(names, 2):
        if digests[name] == digests[other]:
            raise UserError(f"{name} and {other} are the same network: give each once")
    folder = options.open_folder(out)
    # without the option, the networks' own size counts, which goes with their weights
    origin = {"weights": digests, "data": data, "split": images.split, "image_size": image_size}
    with output.progress("steps") as progress:
        study = study_repair(
            networks, images.dataset, attacks, folder,
            samples=samples, seed=seed, oracle=oracle, resume=resume, origin=origin, progress=progress,
        )  # fmt: skip
    save_result(study, {}, folder, "repair", terms={**origin, "samples": samples, "seed": seed})
    output.result({**study.about(), "rows": study.records()})
    _show(output, study)
    output.line(f"all numbers are in {folder / 'repair.json'} and {folder / 'repair.csv'}")


def _own_size(names: list[str]) -> int | None:
    """The size of the images that the networks were trained on, where one of them says so."""
    from attackroute.zoo.networks import find_card

    sizes = {name: card[1].spec.image_size for name in names if (card := find_card(name)) is not None}
    if len(set(sizes.values())) > 1:
        known = ", ".join(f"{name} of {size}" for name, size in sizes.items())
        raise UserError(
            f"the networks were trained on images of different sizes in pixels ({known}): compare them one by one, or "
            "give one --image-size"
        )
    return next(iter(sizes.values()), None)


def _show(output: Output, study: RepairStudy) -> None:
    from attackroute.analysis.paired import shown
    from attackroute.analysis.repair import BUDGETS, EVERY
    from attackroute.analysis.repair_results import AREA

    output.line(f"Picked: {study.picked}. The rule: {study.rule}.")
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
                attack,
                one,
                found.verdict,
                other,
                what if share is None else f"{share:.0%} in {what}",
                shown(found, "networks"),
            ]
            for attack, one, other, what, share, found in study.differences()
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
