"""``attackroute trace``: critical attacking routes of images, and the route of the model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attackroute.cli.arguments import one_of, option, parse_share, switch
from attackroute.cli.console import Output
from attackroute.cli.options import (
    ROUTE,
    RUN,
    ImageOptions,
    NetworkOptions,
    RunOptions,
    Session,
    TracingOptions,
    count,
    out_option,
    results_in,
)
from attackroute.core.errors import UserError
from attackroute.core.table import Table

if TYPE_CHECKING:
    import torch

    from attackroute.core.document import Document
    from attackroute.robustness.attack import Perturbation
    from attackroute.routes.instance_routes import InstanceRoutes
    from attackroute.tracing.config import TraceConfig
    from attackroute.tracing.oracle_check import OracleCheck


_FILES = ("summary.json", "route.json", "routes*.safetensors")
_DOUBLE, _REDUCED = "float64", ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Find the critical attacking routes of images, exactly unless --sketches is given.

    A sample's route holds the channels of each layer that pass on the most of what changes its loss; the model's route
    holds those that are on most samples' routes. Ctrl-C keeps the samples that are done; --resume goes on.
    """

    out: Path | None = out_option("Where the routes go; without it they are only shown.", default=None)
    network: NetworkOptions
    images: ImageOptions
    width: float = option(
        "--width", "Share of each layer's channels on a sample's route.", parse_share, "SHARE", default=0.2, group=ROUTE
    )
    route_width: float = option(
        "--route-width", "Share of each layer's channels on the model's route: those that are on most samples' routes.",
        parse_share, "SHARE", default=0.3, group=ROUTE,
    )  # fmt: skip
    attack: str | None = option(
        "--attack", "Trace the images after this attack: fgsm, pgd, pgd:eps=4/255,steps=20, ...", str,
        "NAME", default=None, group=ROUTE,
    )  # fmt: skip
    tracing: TracingOptions
    keep_scores: bool = switch("--keep-scores", "Keep each channel's score too; files grow 32-fold.", group=ROUTE)
    check: int | None = count(
        "--check", "Compare the first N samples with the brute-force oracle; exit code 1 if they differ beyond "
        "rounding.", group=ROUTE,
    )  # fmt: skip
    resume: bool = switch(
        "--resume", "Go on with the trace in --out: samples that are done are not traced again.", group=RUN
    )
    dtype: str = option(
        "--dtype", "Precision; bfloat16 and float16 are faster, and not exact.", one_of("float32", _DOUBLE, *_REDUCED),
        default="float32", group=RUN,
    )  # fmt: skip
    run: RunOptions


def trace(options: TraceOptions) -> int:
    """Trace images, and write or show their routes; the exit code is 1 if a check fails."""
    import torch

    from attackroute.core.distributed import current
    from attackroute.robustness.registry import parse_attack
    from attackroute.routes.folder import RouteFolder, trace_document
    from attackroute.tracing.trace import trace_routes

    if options.resume and options.out is None:
        raise UserError("--resume goes on with the trace in a folder; name it with --out")
    attack = None if options.attack is None else parse_attack(options.attack)
    config = options.tracing.config(options.run.seed)
    config.check_attack(attack)
    session = Session.open(options.network, options.images, options.run)
    output, team = options.run.output, current()
    network = session.network.double() if options.dtype == _DOUBLE else session.network
    autocast: torch.dtype | None = getattr(torch, options.dtype) if options.dtype in _REDUCED else None
    config = session.measured(config)
    started, counts = time.perf_counter(), [] if options.out else [0]  # into a folder, what is done is counted first
    kept = "finished samples are kept; go on with --resume" if options.out else "nothing is kept without --out"
    out = options.out
    with nullcontext() if out is None else results_in(out, _FILES, options.run, resume=options.resume) as folder:
        with session.reading("images", kept) as (batches, progress):

            def advance(count: int, total: int | None) -> None:
                counts.append(count)
                progress(count, total)

            routes = trace_routes(
                network, batches, options.width, attack=attack, config=config, keep_scores=options.keep_scores,
                batch_size=options.run.batch_size, autocast=autocast, folder=folder, resume=options.resume,
                settings=session.settings, note=output.note, progress=advance,
            )  # fmt: skip
        seconds, traced = time.perf_counter() - started, counts[-1] - counts[0]

        def documented() -> Document:
            """What is said of the trace; in a folder it is written, with the model's route."""
            if isinstance(routes, RouteFolder):
                return routes.save_route(options.route_width)
            return trace_document(routes, routes.aggregate(options.route_width), session.settings)

        document = team.first(documented)
        check = None
        if options.check is not None:
            first = next(routes.parts()) if isinstance(routes, RouteFolder) else routes
            written = first.select(slice(options.check))
            check = team.first(lambda: _compare(session, options, attack, config, autocast, written))
    output.result(
        {
            **document.to_json(),
            "traced_now": traced,
            "seconds": seconds,
            "check": None if check is None else {**asdict(check), "passed": check.passed},
            "folder": None if options.out is None else str(options.out),
        }
    )
    _show(output, document.about, traced, seconds)
    if check is not None:
        verdict = "" if check.passed else f": MORE than the {check.tolerance:g} that rounding explains"
        equal = f"routes of {check.agreeing} of {check.samples} samples equal the oracle's"
        ties = check.samples - check.agreeing - check.faults
        if check.tolerance is not None and check.agreeing < check.samples:
            equal += f", {ties} differ where scores tie within rounding, {check.faults} where they do not"
        output.line(f"check: {equal}; scores deviate by at most {check.deviation:.1e} ({check.layer}){verdict}")
    if options.out is not None:
        output.line(f"The routes (routes*.safetensors), route.json and summary.json are in {options.out}")
    return 0 if check is None or check.passed else 1


def _compare(
    session: Session, options: TraceOptions, attack: Perturbation | None, config: TraceConfig,
    autocast: torch.dtype | None, written: InstanceRoutes,
) -> OracleCheck:  # fmt: skip
    """The routes of the first samples, against the oracle."""
    import torch

    from attackroute.core.model_state import placement
    from attackroute.tracing.oracle_check import verify
    from attackroute.zoo.data import ImageBatches

    batches = islice(ImageBatches(session.images, 1), len(written))
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    device, dtype = placement(session.network)
    return verify(
        session.network, images.to(device, dtype), labels.to(device), options.width, attack=attack, config=config,
        autocast=autocast, written=written,
    )  # fmt: skip


def _show(output: Output, summary: Mapping[str, Any], count: int, seconds: float) -> None:
    counts = [Counter(layer["incoming"].values()) for layer in summary["layers"]]  # how edges into it were computed
    layers = Table.of(
        {
            "layer": layer["layer"],
            "channels": layer["channels"],
            "on route": len(layer["route_channels"]),
            "occurrence": f"{layer['occurrence']:.1%}",
            "computed": ", ".join(f"{how} ({n})" if ways.total() > 1 else how for how, n in ways.items()) or "no edge",
        }
        for layer, ways in zip(summary["layers"], counts, strict=True)
    )
    output.table(layers.columns, layers.rows)
    pace = f" in {seconds:.1f} s ({1000 * seconds / count:.1f} ms each)" if count else ", all of them traced before"
    attacked = f" after {summary['attack']}" if summary["attack"] is not None else ""
    output.line(
        f"{summary['samples']} samples{attacked}{pace}; the network is right on {summary['accuracy']:.1%} of them"
    )
    if "approximate" in summary["criterion"]:
        output.line(f"criterion: {summary['criterion']}")
