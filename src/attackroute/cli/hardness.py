"""``attackroute hardness``: how hard the model is to fool on each image, and whether that is true."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from attackroute.cli.arguments import option, switch
from attackroute.cli.console import Output
from attackroute.cli.options import (
    FILES,
    ROUTE,
    ImageOptions,
    NetworkOptions,
    RunOptions,
    Session,
    TracingOptions,
    open_folder,
)
from attackroute.core.errors import UserError
from attackroute.tracing.config import UNIT, TraceConfig

if TYPE_CHECKING:
    from attackroute.analysis.hardness_experiment import HardnessStudy
    from attackroute.robustness.attack import Perturbation
    from attackroute.routes.route import Route

HARDNESS_EXAMPLES = """
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

  hardness-images.csv              V and the votes of each layer, one row an image
  hardness.safetensors             the same and what other images are scored against (attackroute.Hardness.load)
  hardness.png, hardness.svg       images that are fooled, by hardness, and V beside its rivals
  hardness-images.png              the images that the model has learned best and worst
  hardness.json                    the tables, and gradients of hard and weak images in each layer
  route.json                       the route, where none was given

The tables:

  Only images that the model classifies correctly count: no other can be fooled. Tenths are by V, hardest first.
  A rival's number is the probability that an image on which the attack succeeds comes before one on which it fails
  (AUROC; for the smallest eps Spearman's correlation), with its 95 % bootstrap interval.
"""

_KIND = "hardness"
_IMAGES_CSV, _IMAGES_PNG = "hardness-images.csv", "hardness-images.png"
_ATTACKS = ("fgsm:eps=1/255", "fgsm:eps=2/255", "gaussian-noise:std=0.05")
_WIDTH, _ROUTE_WIDTH = 0.2, 0.3  # the paper's
_LISTED = 10  # images by V, at either end
_DRAWN = 10


@dataclass(frozen=True, kw_only=True)
class HardnessOptions:
    """Say how hard the model is to fool on each image, without an attack, and then attack to see whether it is so.

    In each layer images are ranked by the loss gradient on the route's neurons; the lower it is, the more votes an
    image gets, and V is the sum of its votes. Rivals are judged by the same attacks.
    """

    title: ClassVar[str] = "The judgement"
    out: Path = option("--out", "Where tables and figures go.", Path, "FOLDER", group=FILES)
    network: NetworkOptions
    images: ImageOptions
    route: Path | None = option(
        "--route", "The model's route, as attackroute trace writes it; else one is traced from these images.", Path,
        "FILE", default=None, group=ROUTE,
    )  # fmt: skip
    tracing: TracingOptions
    attacks: tuple[str, ...] = option(
        "--attack", "What to judge the metric by, such as fgsm:eps=1/255 or gaussian-noise:std=0.05; may be repeated.",
        str, "ATTACK", default=None, repeat=True, shown=", ".join(_ATTACKS),
    )  # fmt: skip
    smallest_eps: bool = switch(
        "--smallest-eps", "Search the smallest eps at which PGD fools the model on each image, too; slow."
    )
    run: RunOptions


def hardness(options: HardnessOptions) -> None:
    """Rank images by hardness, judge the ranking by attacks, and write both."""
    from attackroute.analysis.hardness_experiment import EpsSearch, study_hardness
    from attackroute.core.distributed import leading
    from attackroute.robustness.registry import parse_attack

    attacks = [parse_attack(text) for text in options.attacks or _ATTACKS]
    config = options.tracing.config(options.run.seed)
    session = Session.open(options.network, options.images, options.run)
    if options.route is not None and config != TraceConfig(seed=config.seed):
        raise UserError(
            "--route is there already; leave out --linear, --sketches and --carrier, or trace the route with them"
        )
    route = _route(session, options.route, config, attacks[0] if config.follows_noise else None)
    paper = _route(session, None, replace(config, carrier=UNIT), None) if config.follows_noise else None
    folder = open_folder(options.out)
    batches = session.batches
    with session.output.progress("images") as progress:
        study = study_hardness(
            session.network,
            route,
            batches,
            attacks,
            paper=paper,
            search=EpsSearch() if options.smallest_eps else None,
            seed=options.run.seed,
            progress=lambda done, total: progress(done, total, batches.reading),
        )
    if not leading():
        return
    if options.route is None:
        route.save(folder / "route.json")
    settings = {
        **session.settings,
        "attacks": [str(attack) for attack in attacks],
        "route": None if options.route is None else str(options.route),
        "carrier": config.carrier,
        "linear": config.linear,
        "sketches": config.sketches,
    }
    document = study.document(settings)
    _write(folder, session, study)
    document.save(folder)
    session.output.result({**document.to_json(), "folder": str(folder)})
    _show(session.output, study, folder)


def _route(session: Session, file: Path | None, config: TraceConfig, noise_of: Perturbation | None) -> Route:
    """The model's route, out of its file or traced from the images."""
    from attackroute.routes.route import Route
    from attackroute.tracing.trace import trace_routes

    if file is not None:
        return Route.load(file, model=session.network)
    followed = "" if noise_of is None else f", along the noise of {noise_of}"
    session.output.note(
        f"note: no --route is given, so one is traced from these {len(session.images)} images{followed} "
        f"(width {_WIDTH:g} for an image's route, {_ROUTE_WIDTH:g} for the model's)"
    )
    batches = session.batches
    with session.output.progress("images traced") as progress:
        routes = trace_routes(
            session.network,
            batches,
            _WIDTH,
            attack=noise_of,
            config=config,
            progress=lambda done, total: progress(done, total, batches.reading),
        )
    return routes.aggregate(_ROUTE_WIDTH)


def _write(folder: Path, session: Session, study: HardnessStudy) -> None:
    """Write the tables of all images and the figures."""
    import torch

    from attackroute.analysis.figures.hardness import images_figure, pick_images
    from attackroute.analysis.figures.style import save_figure
    from attackroute.core.files import replace_file

    ranked = study.hardness
    replace_file(folder / _IMAGES_CSV, ranked.table.to_csv().encode())
    ranked.save(folder / f"{_KIND}.safetensors")
    for name, figure in study.figures().items():
        save_figure(figure, folder, name)
    count, correct = min(_DRAWN, len(ranked)), min(_DRAWN, study.correct)
    rows = {
        "Learned best: the largest V": ranked.hardest(count),
        "Learned worst: the smallest V": ranked.weakest(count),
        "The smallest V of those classified correctly": ranked.weakest(correct, ranked.correct),
    }
    picked = pick_images(session.network, session.batches, ranked, torch.cat(list(rows.values())))
    pictures = dict(zip(rows, picked.split([len(row) for row in rows.values()]), strict=True))
    file = io.BytesIO()
    images_figure(ranked, rows, pictures, session.images.classes).savefig(file, dpi=200)
    replace_file(folder / _IMAGES_PNG, file.getvalue())


def _show(output: Output, study: HardnessStudy, folder: Path) -> None:
    output.line(
        f"Images by V, hardest first, and how many are fooled, of the {study.correct} of {len(study.hardness)} "
        "that the model classifies correctly:"
    )
    tenths = zip(*(study.bins(attack) for attack in study.fooled), strict=True)
    output.table(
        ["tenth", "images", *study.fooled],
        [
            [str(number), str(bins[0].samples), *(str(each.fooled) for each in bins)]
            for number, bins in enumerate(tenths, start=1)
        ],
    )
    output.line("What tells best who is fooled? (1: always, 0.5 or Spearman's 0: chance)")
    summary = study.summary()
    output.table(summary.columns, summary.rows)
    for sentence in study.sentences():
        output.line(f"{sentence}.")
    output.line(f"tables and figures are in {folder}; open {folder / 'hardness.png'} and {folder / _IMAGES_PNG}")
