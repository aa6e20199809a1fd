"""``attackroute hardness``: how hard the model is to fool on each image, and whether that is true."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attackroute.cli import options
from attackroute.cli.console import Output
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from attackroute.robustness.attack import Perturbation
    from attackroute.routes.route import Route
    from attackroute.tracing.sketches import Sketches
    from attackroute.zoo.data import ImageBatches

EXAMPLES = """
 Examples:

   Hardness of the test images of a network that was trained here
   $ attackroute hardness --model runs/digits --data mnist-sample --attack fgsm:eps=16/255 --out runs/hardness

   On a route that attackroute trace wrote, for 1,000 images
   $ attackroute hardness --model runs/vgg --data cifar10:~/data --route runs/vgg/routes/route.json \\
       --samples 1000 --out runs/hardness

   Other attacks, and the smallest eps that fools the model on each image (slow: some 100 passes an image)
   $ attackroute hardness --model runs/vgg --data cifar10:~/data --attack pgd:eps=2/255 \\
       --attack gaussian-noise:std=0.1 --smallest-eps --samples 500 --out runs/hardness

   On the route that follows the noise of the first attack, beside the paper's
   $ attackroute hardness --model runs/digits --data mnist-sample --carrier noise --attack fgsm:eps=16/255 \\
       --out runs/hardness-noise

   For another program
   $ attackroute hardness --model runs/digits --data mnist-sample --out runs/hardness --json | jq '.reading'

 The files:

   hardness.csv, hardness.parquet   V and the votes of each layer, one row an image (Parquet with pyarrow)
   hardness.safetensors             the same and what other images are scored against (attackroute.Hardness.load)
   hardness.png, hardness.svg       images that are fooled, by hardness, and V beside its rivals
   images.png                       the images that the model has learned best and worst
   hardness.json                    the tables, and gradients of hard and weak images in each layer
   route.json                       the route, where none was given

 The tables:

   Only images that the model classifies correctly count: no other can be fooled. Tenths are by V, hardest first.
   A rival's number is the probability that an image on which the attack succeeds comes before one on which it fails
   (AUROC; for the smallest eps Spearman's correlation), with its 95 % bootstrap interval.
"""

_ATTACKS = ("fgsm:eps=1/255", "fgsm:eps=2/255", "gaussian-noise:std=0.05")
_WIDTH, _ROUTE_WIDTH = 0.2, 0.3  # the paper's
_METRIC = "The metric"


def hardness(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where tables and figures go.")],
    weights: options.Weights = None,
    model_width: options.ModelWidth = None,
    classes: options.Classes = None,
    split: options.Split = options.Splits.TEST,
    samples: options.Samples = None,
    image_size: options.ImageSize = None,
    skip_unreadable: options.SkipUnreadable = False,
    route: Annotated[
        Path | None,
        typer.Option(
            "--route",
            metavar="FILE",
            rich_help_panel=_METRIC,
            help="The model's route, as attackroute trace writes it; else one is traced from these images.",
        ),
    ] = None,
    carrier: options.Carrier = options.Carriers.UNIT,
    linear: options.Linear = False,
    sketches: options.Sketches = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            metavar="ATTACK",
            rich_help_panel=_METRIC,
            help="What to judge the metric by, such as fgsm:eps=1/255 or gaussian-noise:std=0.05; may be repeated. "
            f"Without it: {', '.join(_ATTACKS)}.",
        ),
    ] = None,
    smallest_eps: Annotated[
        bool,
        typer.Option(
            "--smallest-eps",
            rich_help_panel=_METRIC,
            help="Search the smallest eps at which PGD fools the model on each image, too; slow.",
        ),
    ] = False,
    batch_size: options.BatchSize = 128,
    workers: options.Workers = 0,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Say how hard the model is to fool on each image, without an attack, and then attack to see whether it is so.

    In each layer images are ranked by the loss gradient on the route's neurons; the lower it is, the more votes an
    image gets, and V is the sum of its votes. Rivals are judged by the same attacks.
    """
    from functools import partial

    from attackroute.analysis.hardness_radius import EpsSearch
    from attackroute.analysis.hardness_study import study_hardness
    from attackroute.cli.hardness_files import write_study
    from attackroute.cli.hardness_report import report
    from attackroute.core.distributed import leading
    from attackroute.robustness.registry import parse_attack
    from attackroute.tracing.noise import check_carrier
    from attackroute.zoo.data import ImageBatches
    from attackroute.zoo.sources import load_data
    from attackroute.zoo.weights import find_card, open_network

    output = Output(as_json, quiet)
    attacks = [parse_attack(text) for text in (attack or _ATTACKS)]
    home = options.resolve_device(device)
    if image_size is None and (card := find_card(model)) is not None:
        image_size = card[1].spec.image_size
    images = load_data(
        data, split=split.value, image_size=image_size, samples=samples, seed=seed, skip_unreadable=skip_unreadable
    )
    options.report_skipped(images, output)
    network = open_network(model, images, weights=weights, width=model_width, classes=classes).to(home)
    if route is not None and (linear or sketches is not None or carrier is not options.Carriers.UNIT):
        raise UserError(
            "--route is there already; leave out --linear, --sketches and --carrier, or trace the route with them"
        )
    check_carrier(carrier.value, attacks, sketches)
    follow = attacks[0] if carrier is options.Carriers.NOISE else None
    batches = ImageBatches(images, batch_size, workers=workers)
    traced = partial(_route, network, batches, route, output, linear=linear, sketches=sketches, seed=seed)
    chosen = traced(noise_of=follow)
    paper = None if follow is None else traced(noise_of=None)
    folder = options.open_folder(out)
    with output.progress("images") as progress:
        study = study_hardness(
            network,
            chosen,
            batches,
            attacks,
            paper=paper,
            search=EpsSearch() if smallest_eps else None,
            seed=seed,
            progress=lambda done, total: progress(done, total, batches.reading),
        )
    if not leading():
        return
    if route is None:
        chosen.save(folder / "route.json")
    origin = {
        "model": model,
        "data": f"{data} {images.split}",
        "route": None if route is None else str(route),
        "carrier": carrier.value,
        "linear": linear,
        "sketches": sketches,
        "seed": seed,
    }
    write_study(folder, network, images, study, origin, batch_size, output)
    report(output, study, folder, origin)


def _route(
    network: nn.Module,
    batches: ImageBatches,
    file: Path | None,
    output: Output,
    *,
    noise_of: Perturbation | None,
    linear: bool,
    sketches: Sketches,
    seed: int,
) -> Route:
    from attackroute.routes.route import Route
    from attackroute.tracing.noise import NOISE, UNIT
    from attackroute.tracing.trace import trace_routes

    if file is not None:
        return Route.load(file, model=network)
    followed = "" if noise_of is None else f", along the noise of {noise_of}"
    output.note(
        f"note: no --route is given, so one is traced from these {len(batches.sampler)} images{followed} "
        f"(width {_WIDTH:g} for an image's route, {_ROUTE_WIDTH:g} for the model's)"
    )
    with output.progress("images traced") as progress:
        routes = trace_routes(
            network,
            batches,
            _WIDTH,
            attack=noise_of,
            carrier=UNIT if noise_of is None else NOISE,
            linear=linear,
            sketches=sketches,
            seed=seed,
            progress=lambda done, total: progress(done, total, batches.reading),
        )
    return routes.aggregate(_ROUTE_WIDTH)
