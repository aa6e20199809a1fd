"""The page: a template filled with escaped parts, its data as JSON, and a limit on its size."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from attackroute.display import plural
from attackroute.report import sections
from attackroute.report.fragments import inlined_json, missing, text
from attackroute.report.measuring import Measured
from attackroute.report.route_view import Limits, route_view
from attackroute.report.run_folder import Document, RunFolder
from attackroute.routes import Route
from attackroute.version import __version__

MOST_BYTES = 10_000_000
FORMAT, VERSION = "attackroute report", 1

_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; base-uri 'none'; form-action 'none'"
)
_ROUTE_WIDTH = 0.3
_SCRIPTS = ("route_numbers.js", "route_view.js", "page.js")  # one after another, as one script


@dataclass(frozen=True)
class Content:
    """All that a page says.

    Attributes:
        run: The run's folder.
        measured: Traces and influence.
        classes: Names of the labels.
        notes: Sentences on what is missing, and why.
    """

    run: RunFolder
    measured: Measured
    classes: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def route(self) -> Route | None:
        """The model's route: the file's, else that of the traced samples."""
        if self.run.route is not None:
            return self.run.route
        return None if self.measured.clean is None else self.measured.clean.aggregate(_ROUTE_WIDTH)


@dataclass(frozen=True)
class Budget:
    """How much a page carries.

    Attributes:
        figure_bytes: The largest figure's file.
        table_rows: Rows of each table.
        data_rows: Whether the JSON holds the experiments' rows and verdicts.
        view: Whether the route is drawn.
        limits: How much the route view carries.
    """

    figure_bytes: int = 2_000_000
    table_rows: int = 400
    data_rows: bool = True
    view: bool = True
    limits: Limits = field(default_factory=Limits)


_BUDGETS = (
    Budget(),
    Budget(500_000, 200),
    Budget(200_000, 100, limits=Limits(pairs=20_000)),
    Budget(100_000, 100, False, limits=Limits(128, 8_000, 20)),
    Budget(0, 50, False, limits=Limits(32, 2_000, 5)),
    Budget(0, 20, False, False),
)


@dataclass(frozen=True)
class Page:
    """A finished page.

    Attributes:
        html: The page.
        data: The same as plain values, which the page holds as JSON.
        pruned: Whether something was left out for its size.
    """

    html: str
    data: Mapping[str, Any]
    pruned: bool


def build_page(content: Content, most_bytes: int = MOST_BYTES) -> Page:
    """Fill the template; where that is too large, with less and less, and a sentence that says so.

    Args:
        content: What the page says.
        most_bytes: Its largest size; the barest page may exceed a very small one.
    """
    page = _filled(content, _BUDGETS[0], pruned=False)
    for budget in _BUDGETS[1:]:
        if len(page.html.encode()) <= most_bytes:
            break
        page = _filled(content, budget, pruned=True)
    return page


def _filled(content: Content, budget: Budget, *, pruned: bool) -> Page:
    run, measured, route = content.run, content.measured, content.route
    view = route_view(measured, route, content.classes, budget.limits) if budget.view else None
    notes = list(content.notes)
    if pruned:
        notes.append("Some figures, rows or channels are left out to keep the page small; the run's files have them.")
    data = {
        "format": FORMAT,
        "version": VERSION,
        "attackroute": __version__,
        "run": run.path.resolve().name,
        "summary": run.summary,
        "experiments": {item.name: _values(item, budget) for item in run.experiments},
        "hardness": None if run.hardness is None else run.hardness.content,
        "evaluation": None if run.evaluation is None else run.evaluation.content,
        "route_view": view,
        "notes": notes,
    }
    rows, largest = budget.table_rows, budget.figure_bytes
    script, style = "\n".join(map(_asset, _SCRIPTS)), _asset("report.css")
    model = run.terms.get("model")
    parts = {
        "policy": text(_POLICY.format(script=_digest(script), style=_digest(style))),
        "title": text(f"Critical attacking route: {run.path.resolve().name}"),
        "subtitle": text(_subtitle(model, measured)),
        "style": style,
        "script": script,
        "data": inlined_json(data),
        "route": _route(view, content, budget),
        "summary": sections.summary(run, measured, route),
        "occurrence": sections.occurrence(measured, route, rows),
        "experiments": sections.experiments(run.experiments, rows, largest),
        "hardness": sections.hardness(run.hardness, rows, largest),
        "evaluation": sections.evaluation(run.evaluation, rows),
        "made": sections.made(run, measured, notes, __version__),
        "footer": text(f"Made by attackroute {__version__}. This page loads nothing and sends nothing."),
    }
    return Page(_fill(_asset("report.html"), parts), data, pruned)


def _fill(template: str, parts: Mapping[str, str]) -> str:
    """Put the parts in their places, in one pass: what looks like a place inside a part stays as it is."""
    return re.sub(r"\$\{(\w+)\}", lambda match: parts[match[1]], template)


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    """What the policy allows to run: this text and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _values(document: Document, budget: Budget) -> dict[str, Any]:
    if budget.data_rows:
        return dict(document.content)
    return {name: value for name, value in document.content.items() if name not in ("rows", "verdicts")}


def _subtitle(model: object, measured: Measured) -> str:
    parts = [] if model is None else [f"network {model}"]
    if measured.clean is not None:
        origin = measured.clean.provenance
        parts.append(f"{plural(origin.samples, 'sample')}{'' if origin.data is None else f' of {origin.data}'}")
    if measured.attacked is not None:
        parts.append(f"attacked by {measured.attacked.provenance.attack}")
    return "; ".join(parts)


def _route(view: Mapping[str, Any] | None, content: Content, budget: Budget) -> str:
    if view is None:
        return missing(
            "There is no route to draw: attackroute trace makes one."
            if budget.view
            else "The network is too large for a drawing in a page of this size; route.json has the route."
        )
    return f'{_asset("route.html")}<p class="notes">{text(" ".join(content.notes))}</p>'
