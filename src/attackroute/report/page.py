"""The page of one run: the values of its sections, and its data as JSON.

What the page says stands in the templates in ``assets/``; here are the numbers and tables that they show.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from attackroute.core import __version__
from attackroute.core.errors import UserError
from attackroute.core.files import printable
from attackroute.core.table import Table, plural
from attackroute.report.measuring import Measured, Share, occurrence_table, response_table
from attackroute.report.pictures import inline_figures
from attackroute.report.route_view import route_view, run_setup
from attackroute.report.run_folder import RunFolder
from attackroute.routes.route import Route

SECTIONS = {
    "summary": "Summary",
    "occurrence": "Occurrence",
    "responses": "Sensitivity and gradients",
    "experiments": "Experiments",
    "hardening": "Hardening",
    "hardness": "Hardness",
    "evaluation": "Evaluation under attack",
    "made": "How it was made",
}
"""Headings of a run's sections below its route, by their addresses in the page."""
_FORMAT, _VERSION = "attackroute report", 3
_ROUTE_WIDTH = 0.3
_FIGURE_BYTES = 500_000  # of the largest figure's file
_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = (  # one after another, as one script
    "route_numbers.js", "route_columns.js", "route_drawing.js", "route_panel.js", "route_controls.js", "route_view.js",
    "page.js",
)  # fmt: skip
_STYLES = ("report.css",)
_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; base-uri 'none'; form-action 'none'"
)
_GENERATOR, _HEAD = '<meta name="generator" content="attackroute', 1000  # by which a page is known


@dataclass(frozen=True)
class Content:
    """All that a page says of a run."""

    run: RunFolder
    measured: Measured
    classes: Sequence[str] = ()  # names of the labels
    notes: Sequence[str] = ()  # on what is missing, and why

    @cached_property
    def route(self) -> Route | None:
        """The model's route: the file's, else that of the traced samples."""
        clean = self.measured.clean.routes
        return self.run.route or (None if clean is None else clean.aggregate(_ROUTE_WIDTH))

    @cached_property
    def overlap(self) -> float | None:
        """Mean Jaccard index of the clean route and that after the last attack."""
        origin = None if self.route is None else self.route.provenance
        return self.measured.overlap(_ROUTE_WIDTH if origin is None else origin.width)

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    @property
    def won(self) -> Table:
        """In how many comparisons the route beats each control, by experiment, as far as verdicts say."""
        rows = []
        for stored in self.run.experiments:
            verdicts = [row for row in records(stored.document.about.get("verdicts")) if row.get("control")]
            row = {"experiment": stored.title}
            for control in dict.fromkeys(str(verdict["control"]) for verdict in verdicts):
                same = [verdict for verdict in verdicts if str(verdict["control"]) == control]
                count = sum(each.get("beats") is True or each.get("verdict") == "beats" for each in same)
                row[f"beats {control}"] = f"{count} of {len(same)}"
            rows += [row] if verdicts else []
        return Table.of(rows)

    @property
    def one_lambda(self) -> float | None:
        """The lambda of all penalties that stand side by side, which was then not chosen for each."""
        every = [stored.facts for stored in self.run.hardenings]
        factors = [facts.get("lambda") for facts in every if mapping(facts.get("penalties"))]
        same = len(factors) > 1 and _is_number(factors[0]) and all(factor == factors[0] for factor in factors)
        return factors[0] if same else None

    @property
    def checked(self) -> set[str]:
        """Folders of networks whose checks for masked gradients stand with the evaluation."""
        stored = self.run.evaluation
        checks = records(None if stored is None else stored.document.about.get("checks"))
        return {str(check.get("model")).rstrip("/").rpartition("/")[2] for check in checks}

    @property
    def data(self) -> dict[str, Any]:
        """The run's files as plain values."""
        run = self.run
        return {
            "run": self.name,
            "summary": run.trace and run.trace.document.to_json(),
            "experiments": {item.document.kind: item.document.to_json() for item in run.experiments},
            "hardness": run.hardness and run.hardness.document.to_json(),
            "hardenings": {item.folder: item.document.to_json() for item in run.hardenings},
            "evaluation": run.evaluation and run.evaluation.document.to_json(),
        }


@dataclass(frozen=True)
class Page:
    """A finished page, and its data as plain values."""

    html: str
    data: Mapping[str, Any]


def render(template: str, data: Mapping[str, Any], notes: Sequence[str], **values: Any) -> Page:
    """A whole page of a template, which shows ``values`` and loads and sends nothing."""
    marked = {"format": _FORMAT, "version": _VERSION, "attackroute": __version__, **data, "notes": list(notes)}
    script, style = ("\n".join((_ASSETS / name).read_text("utf-8") for name in names) for names in (_SCRIPTS, _STYLES))
    policy = _POLICY.format(script=_digest(script), style=_digest(style))
    html = _environment().get_template(template).render(
        data=marked, policy=policy, script=Markup(script), style=Markup(style), version=__version__, notes=notes,
        **values,
    )  # fmt: skip
    return Page(html, marked)


def require_page(path: Path) -> None:
    """Raise a `UserError` unless nothing is there, or a page that may be replaced: no device, link or other file."""
    head = b""
    if path.is_file() and not path.is_symlink():
        with suppress(OSError), path.open("rb") as file:
            head = file.read(_HEAD)
    if os.path.lexists(path) and _GENERATOR.encode() not in head:
        raise UserError(f"{printable(path)} is there already and no page of attackroute; name another with --out")


def percent(share: float | None, digits: int = 1) -> str:
    """``0.125`` as ``12.5 %``, with a space that does not break."""
    return "" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def records(value: object) -> Table:
    """A table in a document, without what is no row of it."""
    return Table.of(row for row in value if isinstance(row, Mapping)) if isinstance(value, list) else Table((), ())


def mapping(value: object) -> Mapping[str, Any]:
    """An object in a document; empty where it is something else."""
    return value if isinstance(value, Mapping) else {}


def accuracy_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Accuracies of an evaluation's rows with their 95 % intervals: a row an attack, a column a network."""
    attacks: dict[str, dict[str, Any]] = {}
    for row in rows:
        attack, accuracy = str(row.get("attack")), row.get("accuracy")
        low, high = row.get("accuracy_low"), row.get("accuracy_high")
        ends = (low, high) if _is_number(low) and _is_number(high) else None
        cells = attacks.setdefault(attack, {"attack": attack, "images": row.get("samples")})
        cells[str(row.get("model"))] = Share(accuracy, ends) if _is_number(accuracy) else None
    return Table.of(attacks.values())


def build_page(content: Content) -> Page:
    """Fill the page."""
    view = route_view({"": content.measured}, content.classes)
    data = {
        **content.data,
        "route_data": [] if view is None else [view],
        "route_views": [] if view is None else [run_setup(content.measured.conditions)],
    }
    return render(
        "run.html.j2", data, content.notes, title=f"Critical attacking route: {content.name}",
        sections={"route": "The route", **SECTIONS}, view=view is not None, content=content,
    )  # fmt: skip


@cache
def _environment() -> Environment:
    """Templates in which every value is escaped, and a misspelt name is an error."""
    environment = Environment(
        loader=FileSystemLoader(_ASSETS), autoescape=True, undefined=StrictUndefined, finalize=_readable,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "percent": percent, "records": records, "mapping": mapping, "plural": plural, "zip": zip,
        "inlined": partial(inline_figures, largest=_FIGURE_BYTES), "accuracies": accuracy_table,
        "occurrence": occurrence_table, "responses": response_table,
    }  # fmt: skip
    environment.tests |= {"numeric": _is_number, "share": lambda cell: isinstance(cell, Share)}
    return environment


def _digest(source: str) -> str:
    """What the policy allows to run: this text and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _readable(value: object) -> object:
    """A value as a template shows it: numbers short, nothing for None."""
    if isinstance(value, Markup):
        return value
    return _text(value).encode(errors="replace").decode()  # half a surrogate pair has no place in a file


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    return str(value)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
