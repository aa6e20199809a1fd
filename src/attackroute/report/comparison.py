"""The page of two runs: routes side by side, which channels left and entered, and what became of the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attackroute.core.table import plural
from attackroute.core.version import __version__
from attackroute.report import differences
from attackroute.report.fragments import missing, text
from attackroute.report.frame import Frame, Part, framed, view_html
from attackroute.report.measuring import Condition, Measured
from attackroute.report.page import (
    FORMAT,
    MOST_BYTES,
    PRUNED,
    VERSION,
    WHAT,
    Budget,
    Content,
    Page,
    fitting,
    network_of,
    no_view,
    run_data,
    run_parts,
    subtitle,
)
from attackroute.report.route_setup import Pair, RouteSetup, run_setup
from attackroute.report.route_view import route_view
from attackroute.robustness.attack_order import brief


@dataclass(frozen=True)
class Comparison:
    """Two runs and what they are called.

    Attributes:
        first: The one run, such as the network before hardening.
        second: The other.
        names: What the page calls them.
        notes: Sentences on how they were made comparable.
    """

    first: Content
    second: Content
    names: tuple[str, str]
    notes: Sequence[str] = ()

    @property
    def alike(self) -> bool:
        """Whether both networks have the same layers, so that their channels correspond."""
        ours, theirs = (_channels(content.measured) for content in (self.first, self.second))
        return bool(ours) and list(ours.items()) == list(theirs.items())


def build_comparison(comparison: Comparison, most_bytes: int = MOST_BYTES) -> Page:
    """Fill the page; where that is too large, with less and less, and a sentence that says so.

    Args:
        comparison: The runs.
        most_bytes: Its largest size; the barest page may exceed a very small one.
    """
    return fitting(lambda budget, pruned: _filled(comparison, budget, pruned=pruned), most_bytes)


def _filled(comparison: Comparison, budget: Budget, *, pruned: bool) -> Page:
    first, second = comparison.first, comparison.second
    one, other = comparison.names
    data_sets, setups = _views(comparison, budget) if budget.view else ([], [])
    notes = [*comparison.notes, *([PRUNED] if pruned else [])]
    data = {
        "format": FORMAT,
        "version": VERSION,
        "attackroute": __version__,
        "runs": [{"name": name, **run_data(content, budget)} for name, content in zip(comparison.names, (first, second),
                 strict=True)],
        "differences": differences.numbers_of(first, second),
        "route_data": data_sets,
        "route_views": [setup.to_json() for setup in setups],
        "notes": notes,
    }  # fmt: skip
    parts = [
        Part("route", "The routes", _routes(comparison, setups, budget)),
        Part("differences", "What changed", differences.summary(first, second, comparison.names, budget.table_rows)),
    ]
    if comparison.alike:
        changed = differences.channels(first, second, comparison.names, budget.table_rows)
        parts.insert(1, Part("channels", "Channels that left and entered", changed))
    sides = (run_parts(content, replace(budget, figure_bytes=budget.figure_bytes // 2), content.notes)
             for content in (first, second))  # fmt: skip
    for mine, theirs in zip(*sides, strict=True):
        parts.append(Part(mine.key, mine.title, _side_by_side(comparison.names, mine.html, theirs.html)))
    frame = Frame(
        f"Critical attacking routes: {one} and {other}",
        "; ".join(
            f"{name}: {subtitle(content.run.network, content.measured)}"
            for name, content in zip(comparison.names, (first, second), strict=True)
        ),
        f"{WHAT} This page lays the routes of two networks over one another: columns are layers, marks are channels, "
        f"colours say which of them left the route, entered it or stayed. {differences.finding(first, second)}",
        f"Made by attackroute {__version__}. This page loads nothing and sends nothing.",
    )
    return Page(framed(frame, parts, data), data, pruned)


def _views(comparison: Comparison, budget: Budget) -> tuple[list[dict[str, Any]], list[RouteSetup]]:
    """Data sets and the views on them: both over one another where channels correspond, then each by itself."""
    first, second = comparison.first, comparison.second
    ours, theirs = first.measured.conditions, second.measured.conditions
    if not comparison.alike:
        found = [
            route_view([network_of(content, budget)], content.classes, budget.limits) for content in (first, second)
        ]
        kept = [(view, item) for view, item in zip(found, (ours, theirs), strict=True) if view is not None]
        return [view for view, _ in kept], [run_setup(item, number) for number, (_, item) in enumerate(kept)]
    networks = [
        network_of(content, budget, name) for name, content in zip(comparison.names, (first, second), strict=True)
    ]
    view = route_view(networks, first.classes, budget.limits)
    if view is None:
        return [], []
    one, other = comparison.names
    over = RouteSetup(
        0, _pairs(ours, theirs), "images", f"left: on the route of {one} only", f"entered: on that of {other} only",
        "stayed: on both",
    )  # fmt: skip
    return [view], [over, run_setup(ours, linked=True), run_setup(theirs, start=len(ours), linked=True)]


def _pairs(ours: Sequence[Condition], theirs: Sequence[Condition]) -> tuple[Pair, ...]:
    """The same kind of images on both networks."""
    places = {item.attack: number for number, item in enumerate(theirs, start=len(ours))}
    found = [
        Pair(number, places[item.attack], "clean" if item.attack is None else f"after {brief(item.attack)}")
        for number, item in enumerate(ours)
        if item.attack in places
    ]
    return tuple(found)


def _routes(comparison: Comparison, setups: Sequence[RouteSetup], budget: Budget) -> str:
    if not setups:
        return missing(no_view(budget))
    notes = f'<p class="notes">{text(" ".join(comparison.notes))}</p>'
    if comparison.alike:
        sides = _side_by_side(comparison.names, view_html(1), view_html(2))
        return f"{view_html(0)}{notes}<h3>Side by side</h3>{sides}"
    if len(setups) < 2:
        return f"{view_html(0)}{missing('The other run has no route to draw.')}{notes}"
    note = missing(
        "The two networks have other layers or other numbers of channels, so that no channel of one corresponds to one "
        "of the other."
    )
    return f"{note}{_side_by_side(comparison.names, view_html(0), view_html(1))}{notes}"


def _side_by_side(names: tuple[str, str], first: str, second: str) -> str:
    """Two pieces beside one another, below one another on a narrow screen."""
    return "".join(
        [
            '<div class="sides">',
            *(f"<div><h3>{text(name)}</h3>{piece}</div>" for name, piece in zip(names, (first, second), strict=True)),
            "</div>",
        ]
    )


def _channels(measured: Measured) -> Mapping[str, int]:
    found = next((item for item in measured.conditions if not item.is_empty), None)
    return {} if found is None else found.channels


def told_apart(first: str, second: str) -> tuple[str, str]:
    """Two names of runs, with a number where they are the same."""
    return (first, second) if first != second else (f"{first} (1)", f"{second} (2)")


def comparable_notes(samples: int, attacks: Sequence[str], *, traced: bool) -> list[str]:
    """How two runs were made comparable.

    Args:
        samples: Images of the traces.
        attacks: The attacks on both.
        traced: Whether both were traced for the page.
    """
    told = ", ".join(brief(attack) for attack in attacks)
    after = f", as they are and after {told} made for each network by itself" if attacks else ""
    how = "were traced for this page" if traced else "are the runs' own traces"
    return [f"Both routes {how}, on the same {plural(samples, 'image')}{after}."]
