"""``attackroute hardness``: how hard the model is to fool on each image, and whether that is true."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from attackroute.cli.arguments import given, option, parse_path, switch
from attackroute.cli.options import (
    ROUTE,
    RUN,
    ImageOptions,
    NetworkOptions,
    RunOptions,
    Session,
    TracingOptions,
    out_option,
    results_in,
)
from attackroute.core.errors import UserError
from attackroute.tracing.config import UNIT, TraceConfig

if TYPE_CHECKING:
    from attackroute.robustness.attack import Perturbation
    from attackroute.routes.route import Route

_ATTACKS = ("fgsm:eps=1/255", "fgsm:eps=2/255", "gaussian-noise:std=0.05")
_WIDTH, _ROUTE_WIDTH = 0.2, 0.3  # the paper's


@dataclass(frozen=True, kw_only=True)
class HardnessOptions:
    """Say how hard the model is to fool on each image, without an attack, and then attack to see whether it is so.

    In each layer images are ranked by the loss gradient on the route's neurons; the lower it is, the more votes an
    image gets, and V is the sum of its votes. Rivals are judged by the same attacks. Ctrl-C keeps what is done;
    --resume goes on.
    """

    title: ClassVar[str] = "The judgement"
    out: Path = out_option("Where tables and figures go.")
    network: NetworkOptions
    images: ImageOptions
    route: Path | None = option(
        "--route", "The model's route, as attackroute trace writes it; else one is traced.", parse_path, "FILE",
        default=None, group=ROUTE,
    )  # fmt: skip
    tracing: TracingOptions
    attacks: tuple[str, ...] = option(
        "--attack", "What to judge the metric by, such as fgsm:eps=1/255 or gaussian-noise:std=0.05; may be repeated.",
        str, "ATTACK", default=None, repeat=True, unset=", ".join(_ATTACKS),
    )  # fmt: skip
    run: RunOptions
    resume: bool = switch(
        "--resume", "Go on with the run in --out: batches that were attacked are not attacked again.", group=RUN
    )


def hardness(options: HardnessOptions) -> None:
    """Rank images by hardness, judge the ranking by attacks, and write both."""
    from attackroute.analysis.figures.style import save_figure
    from attackroute.analysis.hardness_experiment import study_hardness
    from attackroute.core.distributed import leading
    from attackroute.core.files import replace_file
    from attackroute.core.journal import MEASUREMENTS, Journal
    from attackroute.core.model_state import weights_digest
    from attackroute.robustness.registry import parse_attack

    attacks = [parse_attack(text) for text in options.attacks or _ATTACKS]
    config = options.tracing.config(options.run.seed)
    session = Session.open(options.network, options.images, options.run)
    if options.route is not None and config != TraceConfig(seed=config.seed, units=config.units):
        raise UserError(
            "--route is there already; leave out --linear, --sketches and --carrier, or trace the route with them"
        )
    files = ("hardness*.*", MEASUREMENTS, *([] if options.route else ["route.json"]))
    settings = {**session.settings, **given(options.tracing), "attacks": list(map(str, attacks))}
    settings["route"] = options.route and str(options.route)
    with results_in(options.out, files, options.run, resume=options.resume) as folder:
        terms = {"weights": weights_digest(session.network), "batch-size": options.run.batch_size}
        journal = Journal(folder / MEASUREMENTS, settings | terms)
        if options.resume:
            journal.resume()
        config = session.measured(config)
        route = _route(session, options.route, config, attacks[0] if config.follows_noise else None)
        paper = _route(session, None, replace(config, carrier=UNIT), None) if config.follows_noise else None
        with session.reading("images") as (batches, progress):
            study = study_hardness(
                session.network, route, batches, attacks, paper=paper, deviations=config.deviations,
                seed=options.run.seed, journal=journal, progress=progress,
            )  # fmt: skip
        document = study.document(settings)
        if leading():
            if options.route is None:
                route.save(folder / "route.json")
            replace_file(folder / "hardness-images.csv", study.hardness.table.to_csv().encode())
            for name, figure in study.figures().items():
                save_figure(figure, folder, name)
            document.save(folder)
    options.run.output.result({**document.to_json(), "folder": str(options.out)})
    options.run.output.line(document.reading)
    options.run.output.line(f"tables and figures are in {options.out}; open {options.out / 'hardness.png'}")


def _route(session: Session, file: Path | None, config: TraceConfig, noise_of: Perturbation | None) -> Route:
    """The model's route, out of its file or traced from the images."""
    from attackroute.routes.route import Route
    from attackroute.tracing.trace import trace_routes

    if file is not None:
        return Route.load(file, model=session.network)
    followed = "" if noise_of is None else f", along the noise of {noise_of}"
    session.run.output.note(
        f"note: no --route is given, so one is traced from these {len(session.images)} images{followed} "
        f"(width {_WIDTH:g} for an image's route, {_ROUTE_WIDTH:g} for the model's)"
    )
    with session.reading("images traced") as (batches, progress):
        routes = trace_routes(session.network, batches, _WIDTH, attack=noise_of, config=config, progress=progress)
    return routes.aggregate(_ROUTE_WIDTH)
