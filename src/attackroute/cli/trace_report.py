"""What ``attackroute trace`` found: a table, a few lines, JSON."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from attackroute.cli.comparison import Comparison
from attackroute.cli.console import Output
from attackroute.routes.folder import StoredRoutes, frequency_of
from attackroute.routes.instance_routes import InstanceRoutes, aggregated, mean_of_most_frequent
from attackroute.routes.route import Route


def summarise(routes: InstanceRoutes | StoredRoutes, width: float) -> tuple[Route, dict[str, Any]]:
    """The model route of a width, and what the table shows, as JSON values.

    They are the same for every run with the same result; stored routes are read once, file by file.
    """
    seen = _Seen()
    frequency = frequency_of(map(seen.note, [routes] if isinstance(routes, InstanceRoutes) else routes.parts()))
    occurrence = mean_of_most_frequent(frequency, routes.width)
    route = aggregated(frequency, width, routes.provenance)
    return route, {
        "samples": len(routes),
        "accuracy": seen.right / len(routes),
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
                **seen.certainty(layer),
            }
            for layer in routes.layers
        ],
    }


def report(
    output: Output,
    summary: dict[str, Any],
    comparison: Comparison | None,
    out: Path | None,
    traced: int,
    seconds: float,
) -> None:
    checked = None
    if comparison is not None:
        checked = {
            "samples": comparison.samples,
            "samples_with_equal_routes": comparison.agreeing,
            "largest_relative_deviation": comparison.deviation,
            "layer": comparison.layer,
            "passed": comparison.passed,
        }
    files = None if out is None else str(out)
    output.result({**summary, "traced_now": traced, "seconds": seconds, "check": checked, "folder": files})
    sketched = any("expected_overlap" in row for row in summary["layers"])
    output.table(
        ["layer", "channels", "on route", "occurrence", "computed", *(["overlap, approximate"] if sketched else [])],
        [
            [
                row["layer"],
                str(row["channels"]),
                str(len(row["route_channels"])),
                f"{row['occurrence']:.1%}",
                _methods(row["incoming"]),
                *([_overlap(row)] if sketched else []),
            ]
            for row in summary["layers"]
        ],
    )
    pace = f" in {seconds:.1f} s ({1000 * seconds / traced:.1f} ms each)" if traced else ", all of them traced before"
    attacked = f" after {summary['attack']}" if summary["attack"] is not None else ""
    output.line(
        f"{summary['samples']} samples{attacked}{pace}; the network is right on {summary['accuracy']:.1%} of them"
    )
    if "approximate" in summary["criterion"]:
        output.line(f"criterion: {summary['criterion']}")
    if sketched:
        output.line("edges computed by sketch are estimates; how far they can be trusted is under overlap")
    if comparison is not None:
        output.line(_check_line(comparison))
    if out is not None:
        output.line(f"The routes (routes*.safetensors), route.json and summary.json are in {out}")


class _Seen:
    """What is counted of routes as they pass."""

    def __init__(self) -> None:
        self.right = 0
        self._samples = 0
        self._sums: dict[str, list[float]] = {}

    def note(self, part: InstanceRoutes) -> InstanceRoutes:
        """Count a part, and pass it on."""
        assert part.labels is not None and part.predictions is not None  # every source of images has labels
        self.right += int((part.labels == part.predictions).sum())
        self._samples += len(part)
        if part.sketched is not None:
            for layer in part.sketched.layers:
                undecided = part.sketched.undecided(layer).double().mean(1)
                values = (part.sketched.draws[layer], part.sketched.overlap[layer], undecided)
                sums = self._sums.setdefault(layer, [0.0, 0.0, 0.0])
                self._sums[layer] = [total + own.double().sum().item() for total, own in zip(sums, values, strict=True)]
        return part

    def certainty(self, layer: str) -> dict[str, float]:
        """How far the layer's routes can be trusted, where they rest on sketches: means over the samples."""
        if layer not in self._sums:
            return {}
        means = [total / self._samples for total in self._sums[layer]]
        return dict(zip(("sketches", "expected_overlap", "undecided"), means, strict=True))


def _overlap(row: dict[str, Any]) -> str:
    if "expected_overlap" not in row:
        return "exact"
    return f"{row['expected_overlap']:.1%}, undecided {row['undecided']:.1%}"


def _methods(incoming: dict[str, str]) -> str:
    counts = Counter(incoming.values())
    if not counts:
        return "no edge"
    return ", ".join(f"{method} ({count})" if len(incoming) > 1 else method for method, count in counts.items())


def _check_line(comparison: Comparison) -> str:
    verdict = "" if comparison.passed else f": MORE than the {comparison.tolerance:g} that rounding explains"
    return (
        f"check: routes of {comparison.agreeing} of {comparison.samples} samples equal the oracle's; scores deviate by "
        f"at most {comparison.deviation:.1e} ({comparison.layer}){verdict}"
    )
