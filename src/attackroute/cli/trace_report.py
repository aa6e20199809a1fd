"""What ``attackroute trace`` found: a table, a few lines, JSON."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from attackroute.cli.comparison import Comparison
from attackroute.cli.console import Output
from attackroute.instances import InstanceRoutes
from attackroute.routes import Route
from attackroute.sketch_notes import SketchNotes


def summarise(routes: InstanceRoutes, route: Route) -> dict[str, Any]:
    """What the table shows, as JSON values; the same for every run with the same result."""
    occurrence = routes.occurrence(routes.width)
    assert routes.labels is not None and routes.predictions is not None  # every source of images has labels
    return {
        "samples": len(routes),
        "accuracy": (routes.labels == routes.predictions).double().mean().item(),
        "attack": routes.provenance.attack,
        "criterion": routes.provenance.criterion,
        "width": routes.width,
        "route_width": route.provenance.width if route.provenance is not None else None,
        "layers": [
            {
                "layer": layer,
                "channels": routes.channels[layer],
                "route_channels": route.indices[layer],
                "occurrence": occurrence[layer],
                "incoming": {source: method for (source, target), method in routes.methods.items() if target == layer},
                **_certainty(routes.sketched, layer),
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
        output.line(f"routes.safetensors, route.json and summary.json are in {out}")


def _certainty(notes: SketchNotes | None, layer: str) -> dict[str, float]:
    """How far a layer's routes can be trusted, where they rest on sketches: means over the samples."""
    if notes is None or layer not in notes.layers:
        return {}
    return {
        "sketches": notes.draws[layer].double().mean().item(),
        "expected_overlap": notes.overlap[layer].double().mean().item(),
        "undecided": notes.undecided(layer).double().mean().item(),
    }


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
