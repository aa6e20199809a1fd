"""The page of one run: its parts, its data as JSON, and a limit on its size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attackroute.core.table import plural
from attackroute.core.version import __version__
from attackroute.report import sections
from attackroute.report.fragments import missing, percent, text
from attackroute.report.frame import Frame, Part, framed, view_html
from attackroute.report.hardening_section import compared_rows, hardening
from attackroute.report.measuring import Measured
from attackroute.report.origin_section import made
from attackroute.report.route_setup import run_setup
from attackroute.report.route_view import Limits, Network, route_view
from attackroute.report.run_folder import Document, RunFolder
from attackroute.routes.route import Route

MOST_BYTES = 10_000_000
FORMAT, VERSION = "attackroute report", 2

_ROUTE_WIDTH = 0.3
PRUNED = "Some figures, rows, channels or images are left out to keep the page small; the run's files have them."


@dataclass(frozen=True)
class Content:
    """All that a page says of a run.

    Attributes:
        run: The run's folder.
        measured: Traces, influence, gradients.
        classes: Names of the labels.
        notes: Sentences on what is missing, and why.
        command: The command line that makes the page.
        seconds: How long its measurements took.
    """

    run: RunFolder
    measured: Measured
    classes: Sequence[str] = ()
    notes: Sequence[str] = ()
    command: str | None = None
    seconds: float | None = None

    @property
    def route(self) -> Route | None:
        """The model's route: the file's, else that of the traced samples."""
        if self.run.route is not None:
            return self.run.route
        clean = self.measured.clean.routes
        return None if clean is None else clean.aggregate(_ROUTE_WIDTH)

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.run.path.resolve().name


@dataclass(frozen=True)
class Budget:
    """How much a page carries.

    Attributes:
        figure_bytes: The largest figure's file.
        table_rows: Rows of each table.
        data_rows: Whether the JSON holds the experiments' rows and verdicts.
        pictures: Whether images of the samples are in it.
        view: Whether the route is drawn.
        limits: How much the route view carries.
    """

    figure_bytes: int = 2_000_000
    table_rows: int = 400
    data_rows: bool = True
    pictures: bool = True
    view: bool = True
    limits: Limits = field(default_factory=Limits)


_BUDGETS = (
    Budget(),
    Budget(500_000, 200),
    Budget(200_000, 100, limits=Limits(pairs=40_000, samples=40)),
    Budget(100_000, 100, False, limits=Limits(128, 16_000, 20)),
    Budget(0, 50, False, False, limits=Limits(32, 4_000, 5)),
    Budget(0, 20, False, False, False),
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
    """Fill the page; where that is too large, with less and less, and a sentence that says so.

    Args:
        content: What the page says.
        most_bytes: Its largest size; the barest page may exceed a very small one.
    """
    return fitting(lambda budget, pruned: _filled(content, budget, pruned=pruned), most_bytes)


def fitting(fill: Callable[[Budget, bool], Page], most_bytes: int) -> Page:
    """The page with the largest budget that fits, or the barest one.

    Args:
        fill: Makes the page of a budget; the second argument says whether it leaves something out.
        most_bytes: The largest size.
    """
    page = fill(_BUDGETS[0], False)
    for budget in _BUDGETS[1:]:
        if len(page.html.encode()) <= most_bytes:
            break
        page = fill(budget, True)
    return page


def _filled(content: Content, budget: Budget, *, pruned: bool) -> Page:
    run, measured = content.run, content.measured
    view = None
    if budget.view:
        view = route_view([network_of(content, budget)], content.classes, budget.limits)
    setups = [] if view is None else [run_setup(measured.conditions)]
    notes = [*content.notes, *([PRUNED] if pruned else [])]
    data = {
        "format": FORMAT,
        "version": VERSION,
        "attackroute": __version__,
        **run_data(content, budget),
        "route_data": [] if view is None else [view],
        "route_views": [setup.to_json() for setup in setups],
        "notes": notes,
    }
    drawing = (
        f'{view_html(0)}<p class="notes">{text(" ".join(content.notes))}</p>'
        if view is not None
        else missing(no_view(budget))
    )
    parts = [Part("route", "The route", drawing), *run_parts(content, budget, notes)]
    frame = Frame(
        f"Critical attacking route: {content.name}",
        subtitle(run.network, measured),
        f"{WHAT} {HOW}",
        f"Made by attackroute {__version__}. This page loads nothing and sends nothing.",
    )
    return Page(framed(frame, parts, data), data, pruned)


def network_of(content: Content, budget: Budget, name: str = "") -> Network:
    """A run's network as the route view takes it."""
    measured = content.measured
    return Network(name, measured.conditions, measured.pictures if budget.pictures else None)


WHAT = (
    "Noise that fools a network does not travel through all of it alike: the channels that pass on the most of what "
    "changes the loss form its critical attacking route."
)
HOW = (
    "Below, columns are layers from the image to the logits, marks are channels of the route with the most used on "
    "top, and the width of a line is the mean influence of a channel on one of the next layer."
)


def run_data(content: Content, budget: Budget) -> dict[str, Any]:
    """A run's files as plain values."""
    run = content.run
    return {
        "run": content.name,
        "summary": run.summary,
        "experiments": {item.name: _values(item, budget) for item in run.experiments},
        "hardness": None if run.hardness is None else run.hardness.content,
        "hardenings": {item.name: item.content for item in run.hardenings},
        "evaluation": None if run.evaluation is None else run.evaluation.content,
    }


def run_parts(content: Content, budget: Budget, notes: Sequence[str]) -> list[Part]:
    """The parts of the page below the route."""
    run, measured, route = content.run, content.measured, content.route
    rows, largest = budget.table_rows, budget.figure_bytes
    above = compared_rows(run.hardenings)
    return [
        Part("summary", "Summary", sections.summary(run, measured, route)),
        Part("occurrence", "Occurrence", sections.occurrence(measured, route, rows)),
        Part("responses", "Sensitivity and gradients", sections.responses(measured, route, rows)),
        Part("experiments", "Experiments", sections.experiments(run.experiments, rows, largest)),
        Part("hardening", "Hardening", hardening(run.hardenings, rows)),
        Part("hardness", "Hardness", sections.hardness(run.hardness, rows, largest)),
        Part("evaluation", "Evaluation under attack", sections.evaluation(run.evaluation, rows, above)),
        Part("made", "How it was made", made(run, measured, notes, __version__, content.command, content.seconds)),
    ]


def no_view(budget: Budget) -> str:
    """What stands where no route is drawn."""
    if budget.view:
        return "There is no route to draw: attackroute trace makes one."
    return "The network is too large for a drawing in a page of this size; route.json has the route."


def subtitle(network: str | None, measured: Measured) -> str:
    """The network, the samples, and what became of them, in one line."""
    parts = [] if network is None else [f"network {network}"]
    clean = measured.clean.routes
    if clean is not None:
        origin = clean.provenance
        right = sections.accuracy_of(clean)
        told = "" if right is None else f", {percent(right)} classified correctly"
        parts.append(f"{plural(len(clean), 'sample')}{'' if origin.data is None else f' of {origin.data}'}{told}")
        if "approximate" in origin.criterion:
            parts.append(f"routes by {origin.criterion}")
    for item in measured.attacked:
        right = None if item.routes is None else sections.accuracy_of(item.routes)
        parts.append(f"{item.name.removeprefix('images ')}{'' if right is None else f': {percent(right)}'}")
    return "; ".join(parts)


def _values(document: Document, budget: Budget) -> dict[str, Any]:
    if budget.data_rows:
        return dict(document.content)
    return {name: value for name, value in document.content.items() if name not in ("rows", "verdicts")}
