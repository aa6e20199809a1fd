"""What all figures share: one colour and marker for each criterion, plain axes, and how they are saved."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib import axes, figure

Axes: TypeAlias = "axes.Axes"
Figure: TypeAlias = "figure.Figure"
"""Matplotlib's types, which is loaded when a figure is drawn."""

ROUTE_COLOUR = "#D55E00"
# Okabe and Ito's palette, which colour-blind readers can tell apart; the markers tell apart what is left
_LOOKS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(("route", "clean"), (ROUTE_COLOUR, "o")),
    **dict.fromkeys(("random off-route", "random routes"), ("#8A8A8A", "s")),
    "off-route": ("#000000", "X"),
    "activation": ("#0072B2", "^"),
    "weight": ("#009E73", "D"),
    "kernel": ("#1B5E20", "d"),
    "gradient": ("#CC79A7", "v"),
    "sensitivity": ("#B8860B", "P"),
    "attribution": ("#56B4E9", "<"),
}
_OTHERS = (("#6A3D9A", ">"), ("#A65628", "p"), ("#1B9E77", "*"), ("#444444", "h"))


def look(criterion: str) -> dict[str, Any]:
    """How a criterion is drawn in every figure, as arguments of a line with markers."""
    others = _OTHERS[sum(criterion.encode()) % len(_OTHERS)]  # by their name
    colour, marker = _LOOKS.get(criterion, others)
    size, width, order = (4.5, 1.8, 5) if colour == ROUTE_COLOUR else (3.5, 1.0, 3)
    return {"color": colour, "marker": marker, "markersize": size, "linewidth": width, "zorder": order}


def label(criterion: str, draws: int = 1) -> str:
    """A criterion as a legend has it."""
    if draws > 1:
        return f"{criterion} (mean, range of {draws})"
    return "critical attacking route" if criterion == "route" else criterion


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes) -> None:
    """Thin the frame, and draw light lines across."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E3E3E3", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=7.5)


def draw_spread(axes: Axes, places: Sequence[float], values: Sequence[Sequence[float]], criterion: str) -> Any:
    """A line of the means at several places, above the range of the values there; gives the line."""
    style = look(criterion)
    if any(len(each) > 1 for each in values):
        low, high = [min(each) for each in values], [max(each) for each in values]
        axes.fill_between(places, low, high, color=style["color"], alpha=0.25, linewidth=0)
    (line,) = axes.plot(places, [sum(each) / len(each) for each in values], **style)
    return line


def shared_legend(figure: Figure, handles: Mapping[str, Any], columns: int = 4) -> None:
    """One legend below everything."""
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", frameon=False, fontsize=8,
        ncols=columns, handlelength=2.2, columnspacing=1.4,
    )  # fmt: skip


def short_names(names: Sequence[str]) -> list[str]:
    """Long names cut at the front, to as many characters as tell them all apart, and no fewer than 20."""
    for width in range(20, max(map(len, names), default=0)):
        cut = [name if len(name) <= width else f"…{name[1 - width :]}" for name in names]
        if len(set(cut)) == len(set(names)):
            return cut
    return list(names)


def upright_layers(axes: Axes, names: Sequence[str]) -> None:
    """Layers along the horizontal axis, names turned where there are many or they are long."""
    turned: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    style = turned if len(names) > 4 or max(map(len, names)) > 12 else {}
    axes.set_xticks(range(len(names)), short_names(names), **style)
    axes.set_xlim(-0.6, len(names) - 0.4)


def save_figure(figure: Figure, folder: str | os.PathLike[str], name: str) -> tuple[Path, Path]:
    """Write a figure as PNG and SVG and return the paths; text stays text in the SVG."""
    from matplotlib import rc_context

    paths = Path(folder) / f"{name}.png", Path(folder) / f"{name}.svg"
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        try:
            figure.savefig(paths[0], dpi=200)
            figure.savefig(paths[1], metadata={"Date": None})
        except OSError as error:
            raise UserError(f"cannot write the figure {paths[0]}: {error.strerror}") from error
    return paths
