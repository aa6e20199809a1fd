"""What differs between two runs: channels that left and entered the route, and numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attackroute.report import sections
from attackroute.report.accuracies import records
from attackroute.report.fragments import folded, missing, percent, sentence, table, text
from attackroute.report.measuring import Condition
from attackroute.report.page import Content
from attackroute.robustness.attack_order import brief
from attackroute.routes.route import Route

_WIDTH = 0.3  # the paper's


def channels(first: Content, second: Content, names: tuple[str, str], most: int) -> str:
    """By layer, how many channels stayed on the route, left it and entered it; and which."""
    parts = []
    for mine, theirs in _matched(first, second):
        ours, others = _route(mine), _route(theirs)
        if ours is None or others is None:
            continue
        stayed, left, entered = ours & others, ours - others, others - ours
        rows, lists = [], []
        for layer in ours:
            both, gone, new = (route.indices[layer] for route in (stayed, left, entered))
            size = max(len(ours.indices[layer]), len(others.indices[layer]))
            rows.append(
                {
                    "layer": layer,
                    "channels": ours.channels[layer],
                    "on the route": size,
                    "stayed": len(both),
                    "left": len(gone),
                    "entered": len(new),
                    "shared (Jaccard index)": percent(len(both) / max(1, len(both) + len(gone) + len(new))),
                    "stayed by chance, expected": round(
                        len(ours.indices[layer]) * len(others.indices[layer]) / ours.channels[layer], 1
                    ),
                }
            )
            lists.append({"layer": layer, "left": list(gone), "entered": list(new)})
        parts.append(f"<h3>{text(mine.name[0].upper() + mine.name[1:])}</h3>")
        parts.append(
            sentence(
                f"Of {ours.size} channels on the route of {names[0]}, {stayed.size} are on that of {names[1]} too: "
                f"{left.size} left and {entered.size} entered."
            )
        )
        parts.append(table(rows, most))
        parts.append(folded("Which channels left and entered", table(lists, most)))
    if not parts:
        return missing("One of the runs has no route, so nothing can be said of what left and entered.")
    return "".join(parts)


def finding(first: Content, second: Content) -> str:
    """What changed, in a sentence or two for the top of the page."""
    parts = []
    for mine, theirs in _matched(first, second):
        ours, others = _route(mine), _route(theirs)
        if ours is not None and others is not None and dict(ours.channels) == dict(others.channels):
            left = (ours - others).size
            parts.append(f"Of {ours.size} channels on the route of {mine.name}, {left} left and "
                         f"{(others - ours).size} entered.")  # fmt: skip
        if mine.routes is not None and theirs.routes is not None:
            before, after = sections.accuracy_of(mine.routes), sections.accuracy_of(theirs.routes)
            if before is not None and after is not None:
                parts.append(f"Accuracy on {mine.name} went from {percent(before)} to {percent(after)}.")
    return " ".join(parts)


def summary(first: Content, second: Content, names: tuple[str, str], most: int) -> str:
    """Key numbers of both, accuracies under attack, and by layer occurrence, sensitivity and gradient."""
    found = numbers_of(first, second)
    parts = []
    if found["numbers"]:
        parts.append(table([_row(row, names) for row in found["numbers"]], most))
    else:
        parts.append(missing("The runs have no number in common; trace both networks on the same images."))
    if found["accuracies"]:
        parts.append("<h3>Accuracy under attack, as evaluated</h3>")
        parts.append(table([_row(row, names) for row in found["accuracies"]], most))
        parts.append(
            sentence("Points are of per cent. Where intervals (95 %) overlap, the difference may be that of chance.")
        )
    else:
        parts.append(
            missing(
                "The runs hold no evaluations that can be compared: one network in each, under the same attacks, on as "
                "many images; attackroute evaluate makes them."
            )
        )
    if found["layers"]:
        parts.append("<h3>By layer</h3>")
        parts.append(
            sentence(
                "Occurrence is the mean frequency of the most frequent channels; sensitivity and gradient are means "
                "over all channels of the layer, so that a route cannot choose what they are measured on."
            )
        )
        parts.append(table([_row(row, names) for row in found["layers"]], most))
    return "".join(parts)


def numbers_of(first: Content, second: Content) -> dict[str, list[dict[str, Any]]]:
    """The differences as plain values: of the whole, under attack, and by layer."""
    return {
        "numbers": _whole(first, second),
        "accuracies": _accuracies(first, second),
        "layers": _by_layer(first, second),
    }


def _whole(first: Content, second: Content) -> list[dict[str, Any]]:
    rows = []
    for mine, theirs in _matched(first, second):
        if mine.routes is not None and theirs.routes is not None:
            pair = sections.accuracy_of(mine.routes), sections.accuracy_of(theirs.routes)
            rows.append(
                _difference({"number": f"accuracy on the {len(mine.routes)} {mine.name} traced"}, pair, "points")
            )
            pair = tuple(statistics.fmean(item.routes.occurrence(item.routes.width).values()) for item in (mine, theirs)
                         if item.routes is not None)  # type: ignore[assignment]  # fmt: skip
            rows.append(_difference({"number": f"occurrence, mean over layers, {mine.name}"}, pair, "points"))
        for name, a, b in (
            ("sensitivity", mine.sensitivity, theirs.sensitivity),
            ("gradient", mine.gradient, theirs.gradient),
        ):
            if a is not None and b is not None:
                rows.append(
                    _difference({"number": f"{name}, mean over layers, {mine.name}"}, (_mean(a), _mean(b)), "factor")
                )
    pair = sections.overlap(first.measured, first.route), sections.overlap(second.measured, second.route)
    if None not in pair:
        rows.append(_difference({"number": "of clean and attacked route shared (Jaccard index)"}, pair, "points"))
    return rows


def _accuracies(first: Content, second: Content) -> list[dict[str, Any]]:
    """Rows of both evaluations, where each is of one network."""
    sides = []
    for content in (first, second):
        found = records(None if content.run.evaluation is None else content.run.evaluation.content.get("rows"))
        if len({str(row.get("model")) for row in found}) != 1:
            return []
        sides.append({(row.get("attack"), row.get("samples")): row for row in found})
    rows = []
    for key, mine in sides[0].items():
        theirs = sides[1].get(key)
        values = [row.get("accuracy") for row in (mine, theirs) if row is not None]
        if theirs is not None and all(isinstance(value, (int, float)) for value in values):
            row = _difference({"attack": brief(str(key[0])), "images": key[1]}, tuple(values), "points")
            rows.append({**row, "intervals": [_interval(mine), _interval(theirs)]})
    return rows


def _by_layer(first: Content, second: Content) -> list[dict[str, Any]]:
    rows = []
    for mine, theirs in _matched(first, second):
        pairs = [
            ("occurrence", _occurrence(mine), _occurrence(theirs), "points"),
            ("sensitivity", _means(mine.sensitivity), _means(theirs.sensitivity), "factor"),
            ("gradient", _means(mine.gradient), _means(theirs.gradient), "factor"),
        ]
        for name, a, b, kind in pairs:
            for layer in a:
                if layer in b:
                    about = {"number": name, "images": mine.name, "layer": layer}
                    rows.append(_difference(about, (a[layer], b[layer]), kind))
    return rows


def _difference(about: Mapping[str, Any], pair: tuple[float | None, ...], kind: str) -> dict[str, Any]:
    one, other = pair
    change = None
    if one is not None and other is not None:
        change = 100 * (other - one) if kind == "points" else other / one if one else None
    return {**about, "values": [one, other], "change": change, "kind": kind}


def _row(row: Mapping[str, Any], names: tuple[str, str]) -> dict[str, Any]:
    """A difference as a table shows it."""
    kind, intervals = row["kind"], row.get("intervals", ["", ""])
    shown = {key: value for key, value in row.items() if key not in ("values", "change", "kind", "intervals")}
    for name, value, interval in zip(names, row["values"], intervals, strict=True):
        told = None if value is None else percent(value) if kind == "points" else f"{value:.3g}"
        shown[name] = told and f"{told}{interval}"
    change = row["change"]
    shown["change"] = None if change is None else f"{change:+.1f} points" if kind == "points" else f"times {change:.3g}"
    return shown


def _interval(row: Mapping[str, Any]) -> str:
    ends = [row.get(name) for name in ("accuracy_low", "accuracy_high")]
    known = [end for end in ends if isinstance(end, (int, float))]
    return f" ({percent(known[0], 0)} to {percent(known[1], 0)})" if len(known) == 2 else ""


def _matched(first: Content, second: Content) -> list[tuple[Condition, Condition]]:
    """Conditions of the same kind of images."""
    theirs = {item.attack: item for item in second.measured.conditions}
    return [(item, theirs[item.attack]) for item in first.measured.conditions if item.attack in theirs]


def _route(condition: Condition) -> Route | None:
    return condition.routes.aggregate(_WIDTH) if condition.routes is not None else condition.route


def _occurrence(condition: Condition) -> Mapping[str, float]:
    return {} if condition.routes is None else condition.routes.occurrence(condition.routes.width)


def _means(values: Mapping[str, Tensor] | None) -> dict[str, float]:
    return {} if values is None else {layer: found.mean().item() for layer, found in values.items()}


def _mean(values: Mapping[str, Tensor]) -> float:
    return statistics.fmean(_means(values).values())
