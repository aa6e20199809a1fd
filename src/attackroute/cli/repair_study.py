"""``attackroute repair-study``: which criterion finds the channels whose clean values repair most?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attackroute.cli import options, study_options
from attackroute.cli.console import Output
from attackroute.errors import UserError

if TYPE_CHECKING:
    from attackroute.experiments.repair_study import RepairStudy

EXAMPLES = """
 Examples:

   On a network that was trained here, under PGD, FGSM and Gaussian noise
   $ attackroute repair-study --model runs/digits --data mnist-sample --attack pgd:eps=0.1 --attack fgsm:eps=0.1 \\
       --attack gaussian-noise:std=0.2 --samples 200 --out runs/repair

   Go on after an interruption: the same command with --resume

 What is done:

   Three sets of images of --samples each are drawn. The first ranks each layer's channels by every criterion. On the
   second, under the first attack, a fixed rule picks the best variant of the route that follows the noise. On the
   third all criteria are judged under every attack: clean values go into growing shares of each layer, and into shares
   of all layers together; with channels ranked under the same attack, under the others, and by the second set.

 The files:

   repair.json, repair.csv    accuracies and areas; in the JSON also paired differences and what was picked
   repair.jsonl               every transplant, for --resume
"""


def repair_study(
    model: options.Model,
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
            help="Images in each of the three sets.",
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
    from attackroute.attacks import parse_attack
    from attackroute.cli.networks import find_card, open_network
    from attackroute.data import load_data
    from attackroute.experiments.repair_study import study_repair
    from attackroute.experiments.tables import save_result
    from attackroute.fingerprint import weights_digest

    output = Output(as_json, quiet)
    attacks = {str(found): found for found in map(parse_attack, attack or ("pgd", "fgsm", "gaussian-noise"))}
    home = options.resolve_device(device)
    if image_size is None and (card := find_card(model)) is not None:
        image_size = card[1].spec.image_size
    images = load_data(data, split=split.value, image_size=image_size, samples=3 * samples, seed=seed)
    if len(images) < 3 * samples:
        raise UserError(f"there are {len(images)} images for three sets of {samples}: give a smaller --samples")
    network = open_network(model, images, weights=weights, width=model_width).to(home)
    folder = options.open_folder(out)
    origin = {"model": model, "weights": weights_digest(network), "data": data, "split": images.split}
    with output.progress("transplants") as progress:
        study = study_repair(
            network, images.dataset, attacks, folder,
            samples=samples, seed=seed, resume=resume, origin=origin, progress=progress,
        )  # fmt: skip
    save_result(study, {}, folder, "repair", terms={**origin, "samples": samples, "seed": seed})
    output.result({**study.about(), "rows": study.records()})
    _show(output, study)
    output.line(f"all numbers are in {folder / 'repair.json'} and {folder / 'repair.csv'}")


def _show(output: Output, study: RepairStudy) -> None:
    from attackroute.experiments.repair import BUDGETS
    from attackroute.experiments.repair_criteria import ATTRIBUTION, INFLUENCE, NOISE_ROUTE, RANDOM, SENSITIVITY

    output.line(f"Picked: {study.picked}. The rule: {study.rule}.")
    shown = dict.fromkeys((INFLUENCE, NOISE_ROUTE, study.picked, ATTRIBUTION, SENSITIVITY, RANDOM))
    for attack, found in study.found.items():
        output.line(
            f"{attack}: {len(found.untouched)} images that are right when clean, {100 * found.untouched.mean():.1f} % "
            "of them under attack. Area under the curve of accuracy over the share of a layer replaced, in points:"
        )
        output.table(
            ["layer", *shown],
            [[layer, *(f"{100 * found.area(by, layer).mean():.1f}" for by in shown)] for layer in found.whole],
        )
        output.line("The mean of these over layers, and accuracy with shares of all layers replaced together:")
        output.table(
            ["criterion", "area", *(f"{share:.0%}" for share in BUDGETS)],
            [
                [by, f"{100 * found.areas(by).mean():.1f}", *(f"{100 * right.mean():.1f}" for right in rows)]
                for by, rows in found.budgets.items()
            ],
        )
    output.line("Differences in points, with 95 % intervals over images:")
    output.table(["attack", "first", "second", "what", "difference"], study.differences())
    output.line("Channels ranked elsewhere, under the attack on the left, in points of accuracy:")
    output.table(["attack", "criterion", "ranked by", "kept", *(f"{b:.0%} of all" for b in BUDGETS)], study.transfers())
