"""The parts of the page below the route: summary, occurrence, responses, experiments, hardness, evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from attackroute.core.table import plural
from attackroute.report.accuracies import accuracy_table, records
from attackroute.report.figures import inlined_figures
from attackroute.report.fragments import Markup, folded, meter, missing, numbers, percent, sentence, table, text
from attackroute.report.measuring import Condition, Measured
from attackroute.report.run_folder import Document, RunFolder
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.masks import kept
from attackroute.routes.route import Route

_SHOWN_FIRST = (
    "silencing", "occurrence", "sensitivity", "transplant", "deactivate", "weaken", "gradcam", "detect",
)  # fmt: skip  # the order of the paper's section 4
_TITLES = {
    "silencing": "Silencing: channels set to zero",
    "occurrence": "Occurrence, clean and attacked",
    "sensitivity": "Sensitivity and gradients of the route's channels",
    "transplant": "Transplant: clean values in attacked images' channels",
    "deactivate": "Deactivation: channels set to zero",
    "weaken": "Weakening the connections along the route",
    "gradcam": "Grad-CAM: where the channels look",
    "detect": "Detection: whether an image's route gives an attack away",
}
_TOLD = {  # columns of the checks for masked gradients
    "model": "model", "check": "check", "verdict": "verdict", "samples": "images", "sentence": "what it says",
}  # fmt: skip


def summary(run: RunFolder, measured: Measured, route: Route | None) -> str:
    """Key numbers, and the readings of what was measured."""
    first = _first(measured)
    parts = []
    pairs = key_numbers(run, measured, route)
    if pairs:
        parts.append(numbers(pairs))
    if first is None:
        parts.append(missing("No samples' routes are in this folder; attackroute trace makes them."))
    if first is not None and route is not None:
        parts.append(sentence(_words(first, route)))
    found = [*_in_order(run.experiments), run.hardness, run.evaluation]
    readings = [(item.name, item.content.get("reading")) for item in found if item is not None]
    parts += [f"<p><strong>{text(name)}</strong>: {text(reading)}</p>" for name, reading in readings if reading]
    return "".join(parts)


def key_numbers(run: RunFolder, measured: Measured, route: Route | None) -> list[tuple[str, object]]:
    """What a reader wants to know first."""
    first = _first(measured)
    pairs: list[tuple[str, object]] = []
    accuracy = None if first is None or first is not measured.clean.routes else accuracy_of(first)
    if accuracy is None and run.summary is not None:
        accuracy = run.summary.get("accuracy")
    if first is not None:
        pairs.append(("samples traced", len(first)))
        pairs.append(("of a layer's channels on a sample's route", percent(first.width)))
    if isinstance(accuracy, (int, float)):
        pairs.append(("accuracy on them", percent(accuracy)))
    for item in measured.attacked:
        found = None if item.routes is None else accuracy_of(item.routes)
        if found is not None and item.routes is not None:
            pairs.append((f"accuracy on {len(item.routes)} {item.name}", percent(found)))
    if route is not None:
        pairs.append(("layers", len(route)))
        pairs.append(("channels on the model's route", f"{route.size} of {sum(route.channels.values())}"))
    shared = overlap(measured, route)
    if shared is not None:
        pairs.append(("of clean and attacked route shared (Jaccard index, mean over layers)", percent(shared)))
    return pairs


def overlap(measured: Measured, route: Route | None) -> float | None:
    """Mean Jaccard index of the clean route and that after the last attack."""
    clean, last = measured.clean.routes, measured.strongest
    if clean is None or last is None or last.routes is None:
        return None
    width = 0.3 if route is None or route.provenance is None else route.provenance.width
    rows = measured.clean.rows
    if rows is not None and len(rows) == len(last.routes) < len(clean):  # the same images
        clean = clean.select(list(rows))
    shared = clean.aggregate(width).jaccard(last.routes.aggregate(width))
    return sum(shared.values()) / len(shared)


def accuracy_of(routes: InstanceRoutes) -> float | None:
    """Share of the samples that the network gets right."""
    if routes.labels is None or routes.predictions is None:
        return None
    return (routes.labels == routes.predictions).double().mean().item()


def occurrence(measured: Measured, route: Route | None, most: int) -> str:
    """How often a layer's most frequent channels are on a sample's route."""
    values = occurrences(measured, route)
    if not values:
        return missing("There are no samples' routes here, so occurrence is unknown; attackroute trace writes them.")
    channels = next(item.channels for item in (*measured.conditions, route) if item is not None and item.channels)
    rows = [
        {
            "layer": layer,
            "channels": count,
            "on the route": None if route is None else len(route.indices[layer]),
            **{f"occurrence, {name}": Markup(meter(found[layer])) for name, found in values.items()},
        }
        for layer, count in channels.items()
    ]
    return sentence(
        "How often a layer's most frequent channels are on a sample's own route: 100 % where every sample uses the "
        "same channels, about the width of a sample's route where samples have nothing in common."
    ) + table(rows, most)


def occurrences(measured: Measured, route: Route | None) -> dict[str, Mapping[str, float]]:
    """Occurrence by layer, by what the images are; empty where it is unknown."""
    found: dict[str, Mapping[str, float]] = {
        item.name: item.routes.occurrence(item.routes.width) for item in measured.conditions if item.routes is not None
    }
    return found or ({} if route is None else _occurrence_of(route))


def responses(measured: Measured, route: Route | None, most: int) -> str:
    """Sensitivity and gradient of the route's channels beside those off it."""
    last = measured.strongest
    if measured.clean.gradient is None or route is None:
        return missing(
            "Sensitivity and gradients of single channels were not measured: the network and its images are needed."
        )
    kinds = {"gradient, clean images": measured.clean.gradient}
    if last is not None and last.sensitivity is not None:
        kinds = {f"sensitivity, {last.name}": last.sensitivity, **kinds}
    rows = [
        {
            "layer": layer,
            **{
                f"{name}: {where}": value
                for name, found in kinds.items()
                for where, value in zip(("on the route", "off it"), _means(found[layer], route, layer), strict=True)
            },
        }
        for layer in route
    ]
    return sentence(
        "Means over a layer's channels. Sensitivity is how far an attack moves a channel (mean over images and "
        "positions of |Z(x') - Z(x)|, Fig. 2a of the paper); the gradient is how much the loss depends on it (mean "
        "over images of the sum over positions of |dL/dZ|, Fig. 2b). Hover over a channel above for its own."
    ) + table(rows, most)


def experiments(found: Sequence[Document], rows: int, largest: int) -> str:
    """What each experiment found, its figures, and its tables to open."""
    if not found:
        return missing("No experiment was run; attackroute analyze makes them.")
    return "".join(_experiment(document, rows, largest) for document in _in_order(found))


def hardness(found: Document | None, rows: int, largest: int) -> str:
    """How hard the model is to fool on each image."""
    if found is None:
        return missing("Hardness was not measured; attackroute hardness does it.")
    content = found.content
    parts = [
        sentence(content.get("reading") or "The file gives no reading."),
        inlined_figures(found.figures, largest),
    ]
    attacks = content.get("attacks")
    if isinstance(attacks, Mapping):
        bins = [
            {"attack": attack, "tenth, hardest first": place, "images": pair[0], "fooled": pair[1]}
            for attack, told in attacks.items()
            if isinstance(told, Mapping)
            for place, pair in enumerate(_pairs(told.get("bins_hardest_first")), start=1)
        ]
        parts.append(folded("Images fooled, by hardness", table(bins, rows)))
    for title, name in (("What tells best who is fooled", "judgements"), ("By class", "classes")):
        listed = records(content.get(name))
        if listed:
            parts.append(folded(title, table(listed, rows)))
    return "".join(parts)


def evaluation(found: Document | None, rows: int, above: Sequence[object] = ()) -> str:
    """Accuracy under attacks, and the checks for masked gradients.

    Args:
        found: What ``attackroute evaluate`` wrote.
        rows: Rows of each table.
        above: Rows of accuracies that another part of the page shows.
    """
    if found is None:
        return missing("Accuracy under attack was not measured; attackroute evaluate does it.")
    content = found.content
    parts = [sentence(content.get("reading") or "The file gives no reading.")]
    own = _counts(content.get("rows"))
    if own and any(own <= _counts(shown) for shown in above):
        parts.append(sentence("The table is that of the hardening above, and so are the checks for masked gradients."))
        return "".join(parts)
    parts.append(accuracy_table(records(content.get("rows")), rows))
    parts.append(masking(content.get("checks"), rows))
    return "".join(parts)


def _counts(rows: object) -> set[tuple[str, ...]]:
    """What the rows of an evaluation come to, whatever columns other attacks add."""
    return {tuple(str(row.get(name)) for name in ("model", "attack", "correct", "samples")) for row in records(rows)}


def masking(checks: object, rows: int) -> str:
    """What the checks for masked gradients said."""
    found = records(checks)
    if not found:
        return missing("No check for masked gradients was made, so these accuracies may be too high.")
    told = [{title: check.get(name) for name, title in _TOLD.items()} for check in found]
    return "".join(
        [
            "<h3>Signs of masked gradients</h3>",
            table(told, rows),
            sentence("A check that stays silent proves nothing."),
            folded("Numbers of the checks", table([_numbers_of(check) for check in found], rows)),
        ]
    )


def _first(measured: Measured) -> InstanceRoutes | None:
    return next((item.routes for item in measured.conditions if item.routes is not None), None)


def _means(values: Tensor, route: Route, layer: str) -> tuple[float | None, float | None]:
    mask = route.mask(layer)
    sets = values[mask], values[~mask]
    on, off = (found.mean().item() if len(found) else None for found in sets)
    return on, off


def _numbers_of(check: Mapping[str, Any]) -> dict[str, Any]:
    return {name: check.get(name) for name in ("model", "check", "numbers", "p")}


def _occurrence_of(route: Route) -> dict[str, Mapping[str, float]]:
    """Occurrence from the frequencies in a route's file, by what its samples are; empty where it has none."""
    origin = route.provenance
    if route.frequency is None or origin is None or origin.instance_width is None:
        return {}
    width = origin.instance_width
    found = {
        layer: values.topk(kept(width, len(values))).values.mean().item() for layer, values in route.frequency.items()
    }
    return {Condition(origin.attack).name: found}


def _experiment(document: Document, rows: int, largest: int) -> str:
    content = document.content
    reading = content.get("reading") or "The file gives no reading."
    title = _TITLES.get(document.name, document.name)
    parts = [f"<h3>{text(title)}</h3>", sentence(reading), inlined_figures(document.figures, largest)]
    for heading, name in (("Verdicts", "verdicts"), ("Table", "rows")):
        listed = records(content.get(name))
        if listed:
            parts.append(folded(f"{heading} ({plural(len(listed), 'row')})", table(listed, rows)))
    return "".join(parts)


def _in_order(found: Sequence[Document]) -> list[Document]:
    return sorted(found, key=lambda item: _SHOWN_FIRST.index(item.name) if item.name in _SHOWN_FIRST else 99)


def _pairs(value: object) -> list[list[Any]]:
    return [pair for pair in value if isinstance(pair, list) and len(pair) == 2] if isinstance(value, list) else []


def _words(routes: InstanceRoutes, route: Route) -> str:
    values = routes.occurrence(routes.width)
    low, high = min(values, key=lambda layer: values[layer]), max(values, key=lambda layer: values[layer])
    return (
        f"The route of the model holds {route.share:.0%} of the channels of {plural(len(route), 'layer')}. "
        f"The most frequent {routes.width:.0%} of a layer's channels are on {values[low]:.0%} ({low}) to "
        f"{values[high]:.0%} ({high}) of the samples' own routes."
    )
