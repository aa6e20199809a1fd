"""The parts of the page below the route: summary, occurrence, experiments, hardness, evaluation, how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attackroute.display import plural
from attackroute.instances import InstanceRoutes
from attackroute.report.figures import inlined_figures
from attackroute.report.fragments import Markup, folded, meter, missing, numbers, percent, sentence, table, terms, text
from attackroute.report.measuring import Measured
from attackroute.report.run_folder import Document, RunFolder
from attackroute.routes import Route
from attackroute.selection import kept

_SHOWN_FIRST = (
    "silencing", "occurrence", "sensitivity", "transplant", "deactivate", "weaken", "gradcam", "detect",
)  # fmt: skip  # the order of the paper's section 4
_JUDGED = 12


def summary(run: RunFolder, measured: Measured, route: Route | None) -> str:
    """Key numbers, and the readings of what was measured."""
    first = measured.clean if measured.clean is not None else measured.attacked
    pairs: list[tuple[str, object]] = []
    accuracy = None if run.summary is None else run.summary.get("accuracy")
    if first is not None:
        pairs.append(("samples traced", len(first)))
        pairs.append(("channels on a sample's route", percent(first.width)))
        if accuracy is None and first is measured.clean:
            accuracy = _accuracy(first)
    if isinstance(accuracy, (int, float)):
        pairs.append(("accuracy on them", percent(accuracy)))
    if route is not None:
        pairs.append(("layers", len(route)))
        pairs.append(("channels on the model's route", f"{route.size} of {sum(route.channels.values())}"))
    if measured.attacked is not None and measured.clean is not None:
        found = _accuracy(measured.attacked)
        if found is not None:
            pairs.append(("accuracy after the attack", percent(found)))
        width = 0.3 if route is None or route.provenance is None else route.provenance.width
        shared = measured.clean.aggregate(width).jaccard(measured.attacked.aggregate(width))
        pairs.append(("clean and attacked route, Jaccard index", sum(shared.values()) / len(shared)))
    parts = [numbers(pairs)] if pairs else []
    if first is None:
        parts.append(missing("No samples' routes are in this folder; attackroute trace makes them."))
    if first is not None and route is not None:
        parts.append(sentence(_words(first, route)))
    for document in (*_in_order(run.experiments), run.hardness, run.evaluation):
        reading = None if document is None else document.content.get("reading")
        if document is not None and reading:
            parts.append(f"<p><strong>{text(document.name)}</strong>: {text(reading)}</p>")
    return "".join(parts)


def occurrence(measured: Measured, route: Route | None, most: int) -> str:
    """How often a layer's most frequent channels are on a sample's route."""
    traces = {"clean": measured.clean, "attacked": measured.attacked}
    values = {name: trace.occurrence(trace.width) for name, trace in traces.items() if trace is not None}
    if not values and route is not None:
        values = _occurrence_of(route)
    if not values:
        return missing("There are no samples' routes here, so occurrence is unknown; attackroute trace writes them.")
    channels = next(item.channels for item in (*traces.values(), route) if item is not None)
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
        records = _records(content.get(name))
        if records:
            parts.append(folded(title, table(records, rows)))
    return "".join(parts)


def evaluation(found: Document | None, rows: int) -> str:
    """Accuracy under attacks, and the checks for masked gradients."""
    if found is None:
        return missing("Accuracy under attack was not measured; attackroute evaluate does it.")
    content = found.content
    shown = [
        {
            "model": row.get("model"),
            "attack": row.get("attack"),
            "accuracy": Markup(meter(row["accuracy"])) if isinstance(row.get("accuracy"), (int, float)) else None,
            "95 % interval": " to ".join(
                percent(row[end]) for end in ("accuracy_low", "accuracy_high") if isinstance(row.get(end), (int, float))
            ),
            "samples": row.get("samples"),
            "seconds": row.get("seconds"),
        }
        for row in _records(content.get("rows"))
    ]
    parts = [sentence(content.get("reading") or "The file gives no reading."), table(shown, rows)]
    checks = _records(content.get("checks"))
    if checks:
        parts += ["<h3>Signs of masked gradients</h3>", table(checks, rows)]
        parts.append(sentence("A check that stays silent proves nothing."))
    else:
        parts.append(missing("No check for masked gradients was made, so these accuracies may be too high."))
    return "".join(parts)


def made(run: RunFolder, measured: Measured, notes: Sequence[str], version: str) -> str:
    """Versions, seeds, sizes and times, as the files have them."""
    pairs: list[tuple[str, object]] = [("page", f"attackroute {version}")]
    for name, trace in (("clean trace", measured.clean), ("attacked trace", measured.attacked)):
        if trace is not None:
            known = {key: value for key, value in trace.provenance.to_json().items() if value is not None}
            pairs.append((name, known))
    if run.summary is not None:
        pairs += [(name, run.summary[name]) for name in ("seed", "seconds") if name in run.summary]
    pairs += [(name, value) for name, value in run.terms.items() if _is_setting(value)][:40]
    if run.evaluation is not None and isinstance(run.evaluation.content.get("libraries"), Mapping):
        pairs.append(("libraries", run.evaluation.content["libraries"]))
    for document in (*run.experiments, run.hardness, run.evaluation):
        if document is not None:
            seconds = document.content.get("seconds")
            took = f" ({seconds:.1f} s)" if isinstance(seconds, (int, float)) else ""
            pairs.append(("file", f"{document.path}{took}"))
    if run.left_out:
        pairs.append(("not shown", run.left_out))
    return terms({(name, text(value)): (name, value) for name, value in pairs}.values()) + "".join(map(sentence, notes))


def _occurrence_of(route: Route) -> dict[str, dict[str, float]]:
    """Occurrence from the frequencies in a route's file, by what its samples are; empty where it has none."""
    origin = route.provenance
    if route.frequency is None or origin is None or origin.instance_width is None:
        return {}
    width = origin.instance_width
    found = {
        layer: values.topk(kept(width, len(values))).values.mean().item() for layer, values in route.frequency.items()
    }
    return {"clean" if origin.attack is None else "attacked": found}


def _experiment(document: Document, rows: int, largest: int) -> str:
    content = document.content
    reading = content.get("reading") or "The file gives no reading."
    parts = [f"<h3>{text(document.name)}</h3>", sentence(reading), inlined_figures(document.figures, largest)]
    for title, name in (("Verdicts", "verdicts"), ("Table", "rows")):
        records = _records(content.get(name))
        if records:
            parts.append(folded(f"{title} ({plural(len(records), 'row')})", table(records, rows)))
    return "".join(parts)


def _in_order(found: Sequence[Document]) -> list[Document]:
    return sorted(found, key=lambda item: _SHOWN_FIRST.index(item.name) if item.name in _SHOWN_FIRST else 99)


def _records(value: object) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _is_setting(value: object) -> bool:
    """Whether it can stand in one line: plain, or a list of plain values."""
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(part, (str, int, float)) for part in parts)


def _pairs(value: object) -> list[list[Any]]:
    return [pair for pair in value if isinstance(pair, list) and len(pair) == 2] if isinstance(value, list) else []


def _accuracy(routes: InstanceRoutes) -> float | None:
    if routes.labels is None or routes.predictions is None:
        return None
    return (routes.labels == routes.predictions).double().mean().item()


def _words(routes: InstanceRoutes, route: Route) -> str:
    values = routes.occurrence(routes.width)
    low, high = min(values, key=lambda layer: values[layer]), max(values, key=lambda layer: values[layer])
    return (
        f"The route of the model holds {route.share:.0%} of the channels of {plural(len(route), 'layer')}. "
        f"The most frequent {routes.width:.0%} of a layer's channels are on {values[low]:.0%} ({low}) to "
        f"{values[high]:.0%} ({high}) of the samples' own routes."
    )
