"""``attackroute trace``: critical attacking routes of images, and the route of the model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attackroute.cli.arguments import integer, one_of, option, parse_share, switch
from attackroute.cli.console import Output
from attackroute.cli.options import FILES, ROUTE, RUN, ImageOptions, NetworkOptions, RunOptions, Session, TracingOptions
from attackroute.core.errors import UserError
from attackroute.core.files import made_folder

if TYPE_CHECKING:
    import torch

    from attackroute.core.document import Document
    from attackroute.robustness.attack import Perturbation
    from attackroute.routes.folder import RouteFolder
    from attackroute.routes.instance_routes import InstanceRoutes
    from attackroute.tracing.config import TraceConfig
    from attackroute.tracing.oracle_check import OracleCheck


_DOUBLE, _REDUCED = "float64", ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Find the critical attacking routes of images, exactly unless --sketches or --freeze-gates are given.

    A sample's route holds the channels of each layer that pass on the most of what changes its loss; the model's route
    holds those that are on most samples' routes. Ctrl-C keeps the samples that are done; --resume goes on.
    """

    out: Path | None = option(
        "--out", "Where the routes go; without it they are only shown.", Path, "FOLDER", default=None, group=FILES
    )
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
        "--attack", "Trace the images after this attack or corruption: fgsm, pgd, pgd:eps=4/255,steps=20, ...", str,
        "NAME", default=None, group=ROUTE,
    )  # fmt: skip
    tracing: TracingOptions
    freeze_gates: bool = switch(
        "--freeze-gates", "Take statistics of layer and group norm, attention weights and squeeze-excite gates as "
        "constants: approximate, and more edges have a closed form.", group=ROUTE,
    )  # fmt: skip
    keep_scores: bool = switch("--keep-scores", "Keep each channel's score too; files grow 32-fold.", group=ROUTE)
    check: int | None = option(
        "--check", "Compare the first N samples with the brute-force oracle; exit code 1 if they differ beyond "
        "rounding.", integer(1), "N", default=None, group=ROUTE,
    )  # fmt: skip
    resume: bool = switch(
        "--resume", "Go on with the trace in --out: samples that are done are not traced again.", group=RUN
    )
    dtype: str = option(
        "--dtype", "Precision; bfloat16 and float16 are faster, and not exact.", one_of("float32", _DOUBLE, *_REDUCED),
        default="float32", group=RUN,
    )  # fmt: skip
    run: RunOptions

    @property
    def autocast(self) -> torch.dtype | None:
        """The precision where it is reduced."""
        import torch

        return getattr(torch, self.dtype) if self.dtype in _REDUCED else None


def trace(options: TraceOptions) -> int:
    """Trace images, and write or show their routes; the exit code is 1 if a check fails."""
    from attackroute.core.distributed import current
    from attackroute.robustness.registry import parse_attack
    from attackroute.tracing.trace import trace_routes

    if options.resume and options.out is None:
        raise UserError("--resume goes on with the trace in a folder; name it with --out")
    attack = None if options.attack is None else parse_attack(options.attack)
    config = options.tracing.config(options.run.seed, freeze_gates=options.freeze_gates)
    config.check_attack(attack)
    session = Session.open(options.network, options.images, options.run)
    output = options.run.output
    network = session.network.double() if options.dtype == _DOUBLE else session.network
    if options.out is not None:
        made_folder(options.out)
    started, counts = time.perf_counter(), [] if options.out else [0]  # into a folder, what is done is counted first
    kept = "finished samples are kept; go on with --resume" if options.out else "nothing is kept without --out"
    with session.reading("images", kept) as (batches, progress):

        def advance(count: int, total: int | None) -> None:
            counts.append(count)
            progress(count, total)

        routes = trace_routes(
            network, batches, options.width, attack=attack, config=config, keep_scores=options.keep_scores,
            batch_size=options.run.batch_size, autocast=options.autocast, folder=options.out, resume=options.resume,
            settings=session.settings, note=output.note, progress=advance,
        )  # fmt: skip
    seconds, traced = time.perf_counter() - started, counts[-1] - counts[0]
    team = current()
    document = team.first(lambda: _document(routes, options.route_width, session.settings))
    comparison = None if options.check is None else team.first(lambda: _compare(session, options, attack, config))
    output.result(
        {
            **document.to_json(),
            "traced_now": traced,
            "seconds": seconds,
            "check": None if comparison is None else _check_values(comparison),
            "folder": None if options.out is None else str(options.out),
        }
    )
    _show(output, document.about, traced, seconds)
    if comparison is not None:
        output.line(_check_line(comparison))
    if options.out is not None:
        output.line(f"The routes (routes*.safetensors), route.json and summary.json are in {options.out}")
    return 0 if comparison is None or comparison.passed else 1


def _document(routes: InstanceRoutes | RouteFolder, width: float, settings: Mapping[str, Any]) -> Document:
    """What is said of the trace; in a folder it is written, with the model's route."""
    from attackroute.routes.folder import RouteFolder, trace_document

    if isinstance(routes, RouteFolder):
        return routes.save_route(width)
    return trace_document(routes, routes.aggregate(width), settings)


def _compare(session: Session, options: TraceOptions, attack: Perturbation | None, config: TraceConfig) -> OracleCheck:
    """The first samples, against the oracle."""
    import torch

    from attackroute.core.model_state import placement
    from attackroute.tracing.oracle_check import verify
    from attackroute.zoo.data import ImageBatches

    chosen = [[row] for row in range(min(options.check or 0, len(session.images)))]
    batches = ImageBatches(session.images, 1, batches=chosen)
    images, labels = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    device, dtype = placement(session.network)
    return verify(
        session.network, images.to(device, dtype), labels.to(device), options.width, attack=attack, config=config,
        autocast=options.autocast,
    )  # fmt: skip


def _show(output: Output, summary: Mapping[str, Any], count: int, seconds: float) -> None:
    layers = summary["layers"]
    sketched = any("expected_overlap" in layer for layer in layers)
    output.table(
        ["layer", "channels", "on route", "occurrence", "computed", *(["overlap, approximate"] if sketched else [])],
        [
            [
                layer["layer"],
                layer["channels"],
                len(layer["route_channels"]),
                f"{layer['occurrence']:.1%}",
                _methods(layer["incoming"]),
                *([_overlap(layer)] if sketched else []),
            ]
            for layer in layers
        ],
    )
    pace = f" in {seconds:.1f} s ({1000 * seconds / count:.1f} ms each)" if count else ", all of them traced before"
    attacked = f" after {summary['attack']}" if summary["attack"] is not None else ""
    output.line(
        f"{summary['samples']} samples{attacked}{pace}; the network is right on {summary['accuracy']:.1%} of them"
    )
    if "approximate" in summary["criterion"]:
        output.line(f"criterion: {summary['criterion']}")
    if sketched:
        output.line("edges computed by sketch are estimates; how far they can be trusted is under overlap")


def _overlap(layer: Mapping[str, Any]) -> str:
    if "expected_overlap" not in layer:
        return "exact"
    return f"{layer['expected_overlap']:.1%}, undecided {layer['undecided']:.1%}"


def _methods(incoming: Mapping[str, str]) -> str:
    counts = Counter(incoming.values())
    if not counts:
        return "no edge"
    return ", ".join(f"{method} ({count})" if len(incoming) > 1 else method for method, count in counts.items())


def _check_values(comparison: OracleCheck) -> dict[str, Any]:
    return {
        "samples": comparison.samples,
        "samples_with_equal_routes": comparison.agreeing,
        "largest_relative_deviation": comparison.deviation,
        "layer": comparison.layer,
        "passed": comparison.passed,
    }


def _check_line(comparison: OracleCheck) -> str:
    verdict = "" if comparison.passed else f": MORE than the {comparison.tolerance:g} that rounding explains"
    return (
        f"check: routes of {comparison.agreeing} of {comparison.samples} samples equal the oracle's; scores deviate by "
        f"at most {comparison.deviation:.1e} ({comparison.layer}){verdict}"
    )
