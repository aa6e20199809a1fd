"""``attackroute trace``: critical attacking routes of images, and the route of the model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attackroute.cli.arguments import integer, one_of, option, parse_share, switch
from attackroute.cli.console import Output
from attackroute.cli.options import (
    FILES,
    ROUTE,
    RUN,
    ImageOptions,
    NetworkOptions,
    RunOptions,
    Session,
    TracingOptions,
    open_folder,
)
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from attackroute.cli.comparison import Comparison
    from attackroute.cli.tracer import Tracer
    from attackroute.routes.folder import Missing, RouteWriter, StoredRoutes
    from attackroute.routes.instance_routes import InstanceRoutes
    from attackroute.routes.route import Route

TRACE_EXAMPLES = """
Examples:

  Routes of the test images of a network that was trained here
  $ attackroute trace --model runs/digits --data mnist-sample --out runs/digits/routes

  Compare the first four images with the brute-force oracle, in double precision (slow: for small networks)
  $ attackroute trace --model runs/digits --data mnist-sample --samples 100 --dtype float64 --check 4

  Routes of the same images after an attack, to compare with the clean ones
  $ attackroute trace --model runs/digits --data mnist-sample --attack pgd:eps=0.1 --out runs/digits/attacked

  Routes that follow what the attack changes, instead of what channels could do
  $ attackroute trace --model runs/digits --data mnist-sample --attack pgd:eps=0.1 --carrier noise \\
      --out runs/digits/noise

  A network of torchvision on 1,000 of your own images
  $ attackroute trace --model torchvision:resnet18 --weights resnet18.pth --classes 1000 \\
      --data folder:photos --image-size 224 --samples 1000 --out runs/photos

  A transformer: attention projections and MLPs, its mixing edges approximately, by 32 random products each
  $ attackroute trace --model torchvision:vit_b_16 --weights vit.pth --classes 1000 --linear --sketches 32 \\
      --data folder:photos --image-size 224 --samples 100 --batch-size 4 --out runs/vit

  Go on after an interruption: the same command with --resume, for the same result
  $ attackroute trace --model runs/vgg --data cifar10:~/data --out runs/vgg/routes --resume

  More images than one process can take: two processes, for the same files, byte for byte
  $ torchrun --nproc-per-node 2 -m attackroute trace --model runs/vgg --data imagenet:~/data --out runs/vgg/routes

  For another program
  $ attackroute trace --model runs/digits --data mnist-sample --json | jq '.about.layers[].occurrence'

The files:

  routes.safetensors   the route of each sample (attackroute.InstanceRoutes.load); of more than 8,192 samples in
                       several files, routes-00000-of-00005.safetensors, ... (attackroute.StoredRoutes.open)
  route.json           the route of the model (attackroute.Route.load)
  summary.json         the table, and the settings on which the result depends

The table:

  occurrence   How often a layer's most frequent channels are on a sample's route: 100 % where every sample uses
               the same channels, about the share of --width where samples have nothing in common.
  computed     How the edges into a layer were computed, and how many there are where it is not one.
               closed-form: exact, from the forward pass. autograd: exact, from vector-Jacobian products.
               sketch: approximate, from --sketches random products. replay: with --carrier noise, exact, from
               passes in which one channel at a time is as on the clean image.
  overlap      With --sketches: share of a sample's kept channels that exact scores are expected to keep as well, and
               of all channels those within two standard errors of the cut; for the critical channels of later
               layers as they were found.
"""

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


def trace(options: TraceOptions) -> int:
    """Trace images, and write or show their routes; the exit code is 1 if a check fails."""
    import torch

    from attackroute.cli.tracer import Tracer
    from attackroute.core.distributed import current
    from attackroute.core.document import Document
    from attackroute.core.model_state import weights_digest
    from attackroute.robustness.registry import parse_attack
    from attackroute.routes.folder import TRACE, Missing, RouteWriter, StoredRoutes, TraceFolder

    if options.resume and options.out is None:
        raise UserError("--resume goes on with the trace in a folder; name it with --out")
    attack = None if options.attack is None else parse_attack(options.attack)
    config = options.tracing.config(options.run.seed, freeze_gates=options.freeze_gates)
    config.check_attack(attack)
    session = Session.open(options.network, options.images, options.run)
    output, images = session.output, session.images
    network = session.network.double() if options.dtype == _DOUBLE else session.network
    tracer = Tracer(
        network=network,
        data=images,
        width=options.width,
        batch_size=options.run.batch_size,
        keep_scores=options.keep_scores,
        config=config,
        autocast=getattr(torch, options.dtype) if options.dtype in _REDUCED else None,
        attack=attack,
        origin=(options.network.model, f"{options.images.data} {images.split}"),
    )
    folder = None
    if options.out is not None:
        terms = {
            **session.settings,
            "weights": weights_digest(network),
            "width": options.width,
            "attack": None if attack is None else str(attack),
            "carrier": config.carrier,
            "linear": config.linear,
            "sketches": config.sketches,
            "freeze-gates": config.freeze_gates,
            "keep-scores": options.keep_scores,
            "batch-size": options.run.batch_size,
            "dtype": options.dtype,
        }
        folder = TraceFolder(options.out, terms, len(images), options.run.batch_size)
    team = current()

    def begin() -> tuple[Missing, ...]:
        if folder is None:
            return (Missing(0, 0, len(images)),)
        open_folder(folder.path)
        return folder.open(network, resume=options.resume)

    missing = team.first(begin)
    for note in (note for part in missing for note in part.notes):
        output.note(f"note: {note}")
    started = time.perf_counter()
    writer = RouteWriter(folder, missing) if team.leads else None
    count = _trace_missing(tracer, missing, options.run.workers, writer, output, kept=folder is not None)
    seconds = time.perf_counter() - started

    def finish() -> Document:
        assert writer is not None
        routes = writer.routes if folder is None else StoredRoutes.open(folder.path)
        route, summary = summarise(routes, options.route_width)
        reading = f"The network is right on {summary['accuracy']:.1%} of {summary['samples']} samples."
        if folder is not None:
            return folder.finish(route, reading, summary)
        return Document(TRACE, session.settings, reading, about=summary)

    document = team.first(finish)
    check = options.check
    comparison = None if check is None else team.first(lambda: tracer.compare(check))
    output.result(
        {
            **document.to_json(),
            "traced_now": count,
            "seconds": seconds,
            "check": None if comparison is None else _check_values(comparison),
            "folder": None if options.out is None else str(options.out),
        }
    )
    _show(output, document.about, count, seconds)
    if comparison is not None:
        output.line(_check_line(comparison))
    if options.out is not None:
        output.line(f"The routes (routes*.safetensors), route.json and summary.json are in {options.out}")
    return 0 if comparison is None or comparison.passed else 1


def _trace_missing(
    tracer: Tracer, missing: Sequence[Missing], workers: int, writer: RouteWriter | None, output: Output, *, kept: bool
) -> int:
    """Trace what is not done, and say what is kept where that is broken off.

    Returns:
        How many samples were traced.
    """
    total = sum(part.stop - part.start for part in missing)
    if total < len(tracer.data):
        output.note(f"{len(tracer.data) - total} of {len(tracer.data)} samples are done already")
    try:
        with output.progress("images") as progress:
            for part in tracer.trace(missing, workers, progress) if total else ():
                if writer is not None:
                    writer.add(part)
    except BaseException as error:  # an interruption too
        if writer is not None:
            writer.keep()
        if isinstance(error, KeyboardInterrupt):
            kept_now = "finished samples are kept; go on with --resume" if kept else "nothing is kept without --out"
            output.note(f"interrupted: {kept_now}")
        raise
    return total


def summarise(routes: InstanceRoutes | StoredRoutes, width: float) -> tuple[Route, dict[str, Any]]:
    """The model route of a width, and what the table shows, as JSON values.

    They are the same for every run with the same result; stored routes are read once, file by file.
    """
    from attackroute.routes.folder import frequency_of
    from attackroute.routes.instance_routes import InstanceRoutes, aggregated, mean_of_most_frequent

    counts = _Counts()
    frequency = frequency_of(map(counts.add, [routes] if isinstance(routes, InstanceRoutes) else routes.parts()))
    occurrence = mean_of_most_frequent(frequency, routes.width)
    route = aggregated(frequency, width, routes.provenance)
    return route, {
        "samples": len(routes),
        "accuracy": counts.correct / len(routes),
        "attack": routes.provenance.attack,
        "criterion": routes.provenance.criterion,
        "width": routes.width,
        "route_width": width,
        "layers": [
            {
                "layer": layer,
                "channels": routes.channels[layer],
                "route_channels": route.indices[layer],
                "occurrence": occurrence[layer],
                "incoming": {source: method for (source, target), method in routes.methods.items() if target == layer},
                **counts.sketch_errors(layer),
            }
            for layer in routes.layers
        ],
    }


class _Counts:
    """What is counted of routes as they pass."""

    def __init__(self) -> None:
        self.correct = 0
        self._samples = 0
        self._sums: dict[str, list[float]] = {}

    def add(self, routes: InstanceRoutes) -> InstanceRoutes:
        """Count some samples, and pass them on."""
        assert routes.labels is not None and routes.predictions is not None  # every source of images has labels
        self.correct += int((routes.labels == routes.predictions).sum())
        self._samples += len(routes)
        if routes.sketched is not None:
            for layer in routes.sketched.layers:
                undecided = routes.sketched.undecided(layer).double().mean(1)
                values = (routes.sketched.draws[layer], routes.sketched.overlap[layer], undecided)
                sums = self._sums.setdefault(layer, [0.0, 0.0, 0.0])
                self._sums[layer] = [total + own.double().sum().item() for total, own in zip(sums, values, strict=True)]
        return routes

    def sketch_errors(self, layer: str) -> dict[str, float]:
        """How far the layer's routes can be trusted, where they rest on sketches: means over the samples."""
        if layer not in self._sums:
            return {}
        means = [total / self._samples for total in self._sums[layer]]
        return dict(zip(("sketches", "expected_overlap", "undecided"), means, strict=True))


def _show(output: Output, summary: Mapping[str, Any], count: int, seconds: float) -> None:
    layers = summary["layers"]
    sketched = any("expected_overlap" in layer for layer in layers)
    output.table(
        ["layer", "channels", "on route", "occurrence", "computed", *(["overlap, approximate"] if sketched else [])],
        [
            [
                layer["layer"],
                str(layer["channels"]),
                str(len(layer["route_channels"])),
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


def _check_values(comparison: Comparison) -> dict[str, Any]:
    return {
        "samples": comparison.samples,
        "samples_with_equal_routes": comparison.agreeing,
        "largest_relative_deviation": comparison.deviation,
        "layer": comparison.layer,
        "passed": comparison.passed,
    }


def _check_line(comparison: Comparison) -> str:
    verdict = "" if comparison.passed else f": MORE than the {comparison.tolerance:g} that rounding explains"
    return (
        f"check: routes of {comparison.agreeing} of {comparison.samples} samples equal the oracle's; scores deviate by "
        f"at most {comparison.deviation:.1e} ({comparison.layer}){verdict}"
    )
