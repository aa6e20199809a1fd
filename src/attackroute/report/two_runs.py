"""The page of two runs: routes side by side, which channels left and entered, and what became of the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from attackroute.core.table import Table, plural
from attackroute.report.measuring import Measured
from attackroute.report.page import SECTIONS, Content, Page, percent, render
from attackroute.report.route_view import route_view, run_setup, setup
from attackroute.routes.route import Route

_WIDTH = 0.3  # the paper's
_POINTS, _FACTOR = "points", "factor"  # how a difference is told
_RESPONSES = ("sensitivity", "gradient")  # their differences are factors


@dataclass(frozen=True)
class RunComparison:
    """Two runs, such as before and after hardening, what the page calls them, and how they were made comparable."""

    runs: tuple[Content, Content]
    names: tuple[str, str]
    notes: Sequence[str] = ()

    @property
    def alike(self) -> bool:
        """Whether both networks have the same layers, so that their channels correspond."""
        first, second = (list(run.measured.channels.items()) for run in self.runs)
        return bool(first) and first == second

    @cached_property
    def changes(self) -> list[LayerChange]:
        """What became of the route on each kind of images of which both runs have one, in networks that are alike."""
        first, second = ({item.name: item.model_route(_WIDTH) for item in run.measured.conditions} for run in self.runs)
        return [
            LayerChange(images, before, after)
            for images, before in (first.items() if self.alike else ())
            if before is not None and (after := second.get(images)) is not None
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


def comparable_note(first: Measured, *, traced: bool) -> str:
    """How two runs were made comparable: by traces, the page's or their own, of as many images and the same attacks."""
    names = ", ".join(item.attack for item in first.attacked if item.attack is not None)
    after = f", as they are and after {names} made for each network by itself" if names else ""
    how = "were traced for this page" if traced else "are the runs' own traces"
    count = 0 if first.clean.routes is None else len(first.clean.routes)
    return f"Both routes {how}, on the same {plural(count, 'image')}{after}."


def build_comparison(comparison: RunComparison) -> Page:
    """Fill the page."""
    first, second = comparison.names
    data_sets, views = _views(comparison) if comparison.alike else ([], [])
    differences = _differences(comparison)
    runs = zip(comparison.names, comparison.runs, strict=True)
    data = {
        "runs": [{"name": name, **run.data} for name, run in runs],
        "differences": differences,
        "route_data": data_sets,
        "route_views": views,
    }
    channels = {"channels": "Channels that left and entered"} if comparison.alike else {}
    return render(
        "two_runs.html.j2", data, comparison.notes,
        title=f"Critical attacking routes: {first} and {second}", comparison=comparison, views=bool(views),
        sections={"route": "The routes", **channels, "differences": "What changed", **SECTIONS},
        differences=difference_table(differences, comparison.names),
    )  # fmt: skip


def _views(comparison: RunComparison) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The data set and the views on it, of networks whose channels correspond: over one another, then singly."""
    conditions = [run.measured.conditions for run in comparison.runs]
    networks = {name: run.measured for name, run in zip(comparison.names, comparison.runs, strict=True)}
    both = route_view(networks, comparison.runs[0].classes)
    if both is None:
        return [], []
    first, second = comparison.names
    start = len(conditions[0])
    places = {condition.attack: number for number, condition in enumerate(conditions[1], start=start)}
    pairs = [
        (number, places[item.attack], "clean" if item.attack is None else f"after {item.attack}")
        for number, item in enumerate(conditions[0])
        if item.attack in places
    ]
    words = (f"left: on the route of {first} only", f"entered: on that of {second} only", "stayed: on both")
    over_one_another = setup(pairs, "images", words)
    singly = run_setup(conditions[0], linked=True), run_setup(conditions[1], start=start, linked=True)
    return [both], [over_one_another, *singly]


def _differences(comparison: RunComparison) -> list[dict[str, Any]]:
    """Numbers that both runs have, and what became of the first's: points of per cent, or a factor."""
    first, second = map(_numbers, comparison.runs)
    rows = []
    for number in (number for number in first if number in second):
        before, after = first[number], second[number]
        kind = _FACTOR if number.startswith(_RESPONSES) else _POINTS
        change = 100 * (after - before) if kind == _POINTS else after / before if before else None
        rows.append({"number": number, "values": [before, after], "change": change, "kind": kind})
    return rows


def _numbers(run: Content) -> dict[str, float]:
    """What is known of a run, by name; accuracies that were evaluated are of one network."""
    numbers: dict[str, float] = {}
    for condition in run.measured.conditions:
        if condition.routes is not None and condition.accuracy is not None:
            numbers[f"accuracy on the {len(condition.routes)} {condition.name} traced"] = condition.accuracy
        layers = {"occurrence": list(condition.occurrence.values())}
        for name, responses in zip(_RESPONSES, (condition.sensitivity, condition.gradient), strict=True):
            layers[name] = [channels.mean().item() for channels in (responses or {}).values()]
        for name, values in layers.items():
            if values:
                numbers[f"{name}, mean over layers, {condition.name}"] = statistics.fmean(values)
    if run.overlap is not None:
        numbers["of clean and attacked route shared (Jaccard index)"] = run.overlap
    evaluated = () if run.run.evaluation is None else run.run.evaluation.document.table
    if len({str(row.get("model")) for row in evaluated}) == 1:
        for row in evaluated:
            if isinstance(accuracy := row.get("accuracy"), (int, float)):
                numbers[f"accuracy under {row.get('attack')}, {row.get('samples')} images evaluated"] = accuracy
    return numbers


def difference_table(differences: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> Table:
    """Differences as a table shows them."""
    rows = []
    for each in differences:
        in_points, change = each["kind"] == _POINTS, each["change"]
        texts = [percent(value) if in_points else f"{value:.3g}" for value in each["values"]]
        told = None if change is None else f"{change:+.1f} points" if in_points else f"times {change:.3g}"
        rows.append({"number": each["number"], **dict(zip(names, texts, strict=True)), "change": told})
    return Table.of(rows)
