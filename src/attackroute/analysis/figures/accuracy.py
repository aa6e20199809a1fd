"""Figs. 3 and 4: accuracy under transplants, deactivation and weakened connections, the route beside its controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from attackroute.analysis.figures import style
from attackroute.analysis.intervention_table import InterventionTable, Setting
from attackroute.routes.route import Route

_PLACES = {
    "output": "at the layer's output, before batch norm",
    "activation": "after the layer's activation",
    "weights": "kernel slices between them multiplied by a factor",
}


def curves_figure(table: InterventionTable, attack: str | None = None) -> style.Figure:
    """One panel for each group of layers: accuracy over the share of channels, or over the factor on connections."""
    weakened = table.main_beta is not None
    groups: dict[tuple[str, ...], list[tuple[float, Setting]]] = {}
    for setting in table.settings:
        if setting.attack == attack:
            at = 100 * setting.share if setting.beta is None else setting.beta
            groups.setdefault(setting.layers, []).append((at, setting))
    swept = {layers: sorted(cases, key=itemgetter(0)) for layers, cases in groups.items() if len(cases) > 1}
    swept = swept or {layers: cases for layers, cases in groups.items() if len(layers) == 1}
    rows = -(-len(swept) // 5)
    columns = -(-len(swept) // rows)
    figure = style.new_figure(max(4.5, 1.45 * columns + 0.6), 2.6 * rows + 1.4 if rows == 1 else 1.4 * rows + 1.3)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    untouched = table.untouched(attack).value
    handles: dict[str, Any] = {}
    for axes, (layers, cases) in zip(panels, swept.items(), strict=False):
        start = None if weakened else untouched if table.helps else 1.0
        handles = _curves(axes, table, cases, start) | handles
        axes.axhline(100 * untouched, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(table.group_name(layers), fontsize=8, pad=3)
        style.tidy(axes)
    if weakened:
        panels[0].invert_xaxis()
    for axes in panels[len(swept) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(swept) - columns) : len(swept)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(r"factor $\beta$" if weakened else "share in %", fontsize=8)
    title = f"A share of the channels {table.done}{f', {attack}' if attack else ''}"
    title = f"{table.main_share:.0%} of the channels" if weakened else title
    return _framed(figure, table, title, handles, attacked=attack is not None)


def layers_figure(table: InterventionTable) -> style.Figure:
    """One panel for each attack: single layers, then several together, at the main share."""
    groups = list(dict.fromkeys(setting.layers for setting in table.settings if setting.share == table.main_share))
    figure = style.new_figure(max(4.5, 0.09 * len(groups) * len(table.criteria) + 1.2), 1.55 * len(table.attacks) + 1.9)
    panels = figure.subplots(len(table.attacks), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    handles: dict[str, Any] = {}
    for axes, attack in zip(panels, table.attacks, strict=True):
        handles = _points(axes, table, [Setting(layers, table.main_share, attack) for layers in groups]) | handles
        axes.axhline(100 * table.untouched(attack).value, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(str(attack), fontsize=8.5, loc="left", pad=3)
        style.tidy(axes)
        axes.set_ylim(-4, 104)
    style.upright_layers(panels[-1], [table.group_name(layers) for layers in groups])
    title = f"{table.main_share:.0%} of the channels {table.done},"
    return _framed(figure, table, title, handles, attacked=True)


def _framed(
    figure: style.Figure, table: InterventionTable, title: str, handles: Mapping[str, Any], *, attacked: bool
) -> style.Figure:
    """The figure with what stands around its panels."""
    dotted = f"dotted: untouched network{', attacked images' if attacked else ''}"
    figure.suptitle(f"{title}\n{_PLACES[table.at]}\n{dotted}", fontsize=9.5)
    accuracy = f"accuracy in %\n({table.counted} images right when clean)"
    figure.supylabel(accuracy, fontsize=8.5, multialignment="center")
    style.shared_legend(figure, handles, 3)
    return figure


def route_figure(route: Route, table: InterventionTable, title: str) -> style.Figure:
    """How often samples use each channel of a route with frequencies, and what deactivating those of a layer leaves.

    One row per layer: the accuracy that is left, for each criterion; random draws with their range.
    """
    figure = style.new_figure(11, 0.55 * len(route) + 2.5)
    used, axes = figure.subplots(1, 2, width_ratios=(1.25, 1))
    route.plot(used)
    cases = [Setting((layer,), table.main_share) for layer in table.layers]
    handles = _points(axes, table, cases, horizontal=True)
    untouched = table.untouched()
    axes.axvline(100 * untouched.value, color="black", linewidth=1, linestyle=":")
    axes.set_xlim(-2, 102)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_yticks(range(len(cases)), [])
    axes.set_xlabel(f"accuracy in %, on {untouched.total} images that\nthe untouched network gets right")
    left = f"What is left with {table.main_share:.0%} of a layer's channels set to zero\n{_PLACES[table.at]}"
    axes.set_title(left, fontsize=10)
    style.tidy(axes)
    axes.spines["left"].set_visible(False)
    figure.suptitle(title, fontsize=12)
    style.shared_legend(figure, handles, len(handles))
    return figure


def _points(
    axes: style.Axes, table: InterventionTable, cases: Sequence[Setting], *, horizontal: bool = False
) -> dict[str, Any]:
    """Side by side at each setting's place: each criterion's mean, above the range of its draws; the legend's marks."""
    marks: dict[str, Any] = {}
    for index, criterion in reversed(list(enumerate(table.criteria))):  # the route last, on top
        look = style.look(criterion) | {"linestyle": "none"}
        for place, setting in enumerate(cases):
            values = [100 * value for value in table.values(setting, criterion)]
            if not values:
                continue
            at = place + (index / max(1, len(table.criteria) - 1) - 0.5) * 0.6
            reach, mean = ([at, at], [min(values), max(values)]), ([at], [sum(values) / len(values)])
            if len(values) > 1:
                axes.plot(*(reach[::-1] if horizontal else reach), color=look["color"], linewidth=1.5)
            (marks[criterion],) = axes.plot(*(mean[::-1] if horizontal else mean), **look)
    return {style.label(name, _draws(table, name)): marks[name] for name in table.criteria if name in marks}


def _curves(
    axes: style.Axes, table: InterventionTable, cases: Sequence[tuple[float, Setting]], start: float | None = None
) -> dict[str, Any]:
    """A line for each criterion, from the accuracy without any channel if it is given; gives the legend's lines."""
    handles: dict[str, Any] = {}
    for criterion in table.criteria:
        points = [(at, [100 * value for value in table.values(setting, criterion)]) for at, setting in cases]
        points = [(at, values) for at, values in points if values]
        if start is not None and 0 not in (at for at, _ in points):
            points = [(0.0, [100 * start]), *points]
        if not points:
            continue
        places, values_at = zip(*points, strict=True)
        line = style.draw_spread(axes, places, values_at, criterion)
        handles[style.label(criterion, _draws(table, criterion))] = line
    axes.set_ylim(-4, 104)
    return handles


def _draws(table: InterventionTable, criterion: str) -> int:
    return len(table.table.select(criterion=criterion).distinct("draw"))
