"""The page of two runs: routes side by side, which channels left and entered, and what became of the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from attackroute.core.table import Table, plural
from attackroute.report.measuring import Condition, Measured
from attackroute.report.page import MOST_BYTES, SECTIONS, Budget, Content, Page, fitting, interval, percent, render
from attackroute.report.route_view import Pair, RouteSetup, route_view, run_setup
from attackroute.routes.route import Route

_WIDTH = 0.3  # the paper's
_POINTS, _FACTOR = "points", "factor"  # how a difference is told


@dataclass(frozen=True)
class RunComparison:
    """Two runs, such as before and after hardening, what the page calls them, and how they were made comparable."""

    first: Content
    second: Content
    names: tuple[str, str]
    notes: Sequence[str] = ()

    @property
    def runs(self) -> tuple[Content, Content]:
        return self.first, self.second

    @property
    def alike(self) -> bool:
        """Whether both networks have the same layers, so that their channels correspond."""
        first, second = (list(run.measured.channels.items()) for run in self.runs)
        return bool(first) and first == second

    @property
    def matched(self) -> list[tuple[Condition, Condition]]:
        """Conditions of the same kind of images."""
        others = {condition.attack: condition for condition in self.second.measured.conditions}
        return [
            (condition, others[condition.attack])
            for condition in self.first.measured.conditions
            if condition.attack in others
        ]


@dataclass(frozen=True)
class LayerChange:
    """What became of the route on one kind of images: channels that left it, entered it and stayed."""

    images: str
    before: Route
    after: Route

    @property
    def stayed(self) -> Route:
        return self.before & self.after

    @property
    def left(self) -> Route:
        return self.before - self.after

    @property
    def entered(self) -> Route:
        return self.after - self.before

    @property
    def counts(self) -> Table:
        """How many, by layer."""
        rows, routes = [], (self.before, self.after, self.stayed, self.left, self.entered)
        for layer, count in self.before.channels.items():
            before, after, stayed, left, entered = (len(route.indices[layer]) for route in routes)
            rows.append(
                {
                    "layer": layer,
                    "channels": count,
                    "on the route": max(before, after),
                    "stayed": stayed,
                    "left": left,
                    "entered": entered,
                    "shared (Jaccard index)": percent(stayed / max(1, stayed + left + entered)),
                    "stayed by chance, expected": round(before * after / count, 1),
                }
            )
        return Table.of(rows)

    @property
    def channels(self) -> Table:
        """Which, by layer."""
        left, entered = self.left.indices, self.entered.indices
        return Table.of({"layer": layer, "left": left[layer], "entered": entered[layer]} for layer in self.before)


def build_comparison(comparison: RunComparison, most_bytes: int = MOST_BYTES) -> Page:
    """Fill the page; where that is too large, with less and less, and a sentence that says so."""
    return fitting(lambda budget, pruned: _filled(comparison, budget, pruned=pruned), most_bytes)


def comparable_note(first: Measured, *, traced: bool) -> str:
    """How two runs were made comparable: by traces, the page's or their own, of as many images and the same attacks."""
    names = ", ".join(item.attack for item in first.attacked if item.attack is not None)
    after = f", as they are and after {names} made for each network by itself" if names else ""
    how = "were traced for this page" if traced else "are the runs' own traces"
    count = 0 if first.clean.routes is None else len(first.clean.routes)
    return f"Both routes {how}, on the same {plural(count, 'image')}{after}."


def _filled(comparison: RunComparison, budget: Budget, *, pruned: bool) -> Page:
    first, second = comparison.names
    data_sets, views = _views(comparison, budget) if budget.view and comparison.alike else ([], [])
    changes = _route_changes(comparison) if comparison.alike else []
    differences = {"numbers": _number_differences(comparison), "accuracies": _accuracy_differences(comparison)}
    runs = zip(comparison.names, comparison.runs, strict=True)
    data = {
        "runs": [{"name": name, **run.data(budget)} for name, run in runs],
        "differences": differences,
        "route_data": data_sets,
        "route_views": [asdict(view) for view in views],
    }
    channels = {"channels": "Channels that left and entered"} if comparison.alike else {}
    return render(
        "two_runs.html.j2", data, comparison.notes, pruned=pruned,
        title=f"Critical attacking routes: {first} and {second}", comparison=comparison, views=bool(views),
        sections={"route": "The routes", **channels, "differences": "What changed", **SECTIONS}, route_changes=changes,
        differences={name: difference_table(rows, comparison.names) for name, rows in differences.items()},
        budget=replace(budget, figure_bytes=budget.figure_bytes // 2),
    )  # fmt: skip


def _views(comparison: RunComparison, budget: Budget) -> tuple[list[dict[str, Any]], list[RouteSetup]]:
    """The data set and the views on it, of networks whose channels correspond: over one another, then singly."""
    conditions = [run.measured.conditions for run in comparison.runs]
    networks = [run.network(budget, name) for name, run in zip(comparison.names, comparison.runs, strict=True)]
    both = route_view(networks, comparison.first.classes, budget.limits)
    if both is None:
        return [], []
    first, second = comparison.names
    start = len(conditions[0])
    places = {condition.attack: number for number, condition in enumerate(conditions[1], start=start)}
    over_one_another = RouteSetup(
        data=0,
        pairs=tuple(
            Pair(number, places[item.attack], "clean" if item.attack is None else f"after {item.attack}")
            for number, item in enumerate(conditions[0])
            if item.attack in places
        ),
        control="images",
        first=f"left: on the route of {first} only",
        second=f"entered: on that of {second} only",
        both="stayed: on both",
    )
    singly = run_setup(conditions[0], linked=True), run_setup(conditions[1], start=start, linked=True)
    return [both], [over_one_another, *singly]


def _route_changes(comparison: RunComparison) -> list[LayerChange]:
    """Which channels stayed on the route, left it and entered it, under each condition that both runs have."""
    pairs = ((ours, ours.model_route(_WIDTH), theirs.model_route(_WIDTH)) for ours, theirs in comparison.matched)
    return [
        LayerChange(condition.name, before, after)
        for condition, before, after in pairs
        if before is not None and after is not None
    ]


def _number_differences(comparison: RunComparison) -> list[dict[str, Any]]:
    """Differences of the whole."""
    rows = []
    for ours, theirs in comparison.matched:
        if ours.routes is not None and theirs.routes is not None:
            about = {"number": f"accuracy on the {len(ours.routes)} {ours.name} traced"}
            rows.append(_difference(about, (ours.accuracy, theirs.accuracy)))
        before, after = _means(ours), _means(theirs)
        for name in (name for name in before if name in after):
            kind = _POINTS if name == "occurrence" else _FACTOR
            about = {"number": f"{name}, mean over layers, {ours.name}"}
            rows.append(_difference(about, (before[name], after[name]), kind))
    overlaps = comparison.first.overlap, comparison.second.overlap
    if None not in overlaps:
        rows.append(_difference({"number": "of clean and attacked route shared (Jaccard index)"}, overlaps))
    return rows


def _accuracy_differences(comparison: RunComparison) -> list[dict[str, Any]]:
    """Differences under attack, where both evaluations are of one network."""
    sides = []
    for run in comparison.runs:
        table = Table((), ()) if run.run.evaluation is None else run.run.evaluation.document.table
        if len({str(row.get("model")) for row in table}) != 1:
            return []
        sides.append({(row.get("attack"), row.get("samples")): row for row in table})
    rows = []
    for attack, images in (key for key in sides[0] if key in sides[1]):
        pair = [side[attack, images] for side in sides]
        values = [row.get("accuracy") for row in pair]
        if all(isinstance(value, (int, float)) for value in values):
            row = _difference({"attack": str(attack), "images": images}, values)
            rows.append({**row, "intervals": [interval(row) for row in pair]})
    return rows


def _means(condition: Condition) -> dict[str, float]:
    """Means over layers of what is known; responses are means over all of a layer's channels."""
    layers = {"occurrence": list(condition.occurrence.values())}
    for name, responses in (("sensitivity", condition.sensitivity), ("gradient", condition.gradient)):
        layers[name] = [channels.mean().item() for channels in (responses or {}).values()]
    return {name: statistics.fmean(values) for name, values in layers.items() if values}


def _difference(about: Mapping[str, Any], pair: Sequence[float | None], kind: str = _POINTS) -> dict[str, Any]:
    """Two values, and what became of the first: points of per cent, or a factor."""
    before, after = pair
    change = None
    if before is not None and after is not None:
        change = 100 * (after - before) if kind == _POINTS else after / before if before else None
    return {**about, "values": [before, after], "change": change, "kind": kind}


def difference_table(differences: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> Table:
    """Differences as a table shows them."""
    rows = []
    for difference in differences:
        in_points, change = difference["kind"] == _POINTS, difference["change"]
        row = {name: difference[name] for name in ("number", "attack", "images") if name in difference}
        for name, value, ends in zip(
            names, difference["values"], difference.get("intervals", (None, None)), strict=True
        ):
            text = None if value is None else percent(value) if in_points else f"{value:.3g}"
            row[name] = text if ends is None else f"{text} ({percent(ends[0], 0)} to {percent(ends[1], 0)})"
        row["change"] = None if change is None else f"{change:+.1f} points" if in_points else f"times {change:.3g}"
        rows.append(row)
    return Table.of(rows)
