"""Figures, as matplotlib figures that a caller saves: no display, no global state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from attackroute.errors import UserError
from attackroute.experiments.silencing import RANDOM, ROUTE, Silencing
from attackroute.routes import Route

# Okabe and Ito's palette, which colour-blind readers can tell apart
_COLOURS = ("#D55E00", "#999999", "#0072B2", "#009E73", "#CC79A7", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def route_figure(route: Route, silencing: Silencing, title: str) -> Figure:
    """The route as a picture: how often samples use each channel, and what silencing the channels costs.

    Args:
        route: A route with its frequencies, as :meth:`InstanceRoutes.aggregate` gives it.
        silencing: What was measured for it.
        title: One line above the picture.
    """
    if route.frequency is None:
        raise UserError("the route has no frequencies to draw: aggregate it from instance routes")
    figure = Figure(figsize=(11, 0.55 * len(route) + 2.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_frequencies(left, route, route.frequency)
    _draw_silencing(right, silencing)
    figure.suptitle(title, fontsize=12)
    return figure


def _draw_frequencies(axes: Axes, route: Route, frequency: Mapping[str, Tensor]) -> None:
    """One strip per layer: channels by falling frequency, the route's share marked."""
    for row, layer in enumerate(route):
        shares = frequency[layer].sort(descending=True).values
        count = route.channels[layer]
        image = axes.imshow(
            shares[None].numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest",
            extent=(0, 1, row + 0.36, row - 0.36),
        )  # fmt: skip
        cut = len(route[layer]) / count
        axes.plot([cut, cut], [row - 0.46, row + 0.46], color=_COLOURS[0], linewidth=2.2)
        axes.text(1.015, row, str(count), va="center", ha="left", fontsize=8, color="#444444")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(route) - 0.4, -0.6)
    axes.set_yticks(range(len(route)), list(route))
    axes.set_xlabel("channels of the layer, most frequent first (share; count at the right)")
    axes.set_title("How often images use each channel\nleft of the orange line: the model's route", fontsize=10)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.035, pad=0.09)
    bar.ax.set_title("share of\nimages", fontsize=8)


def _draw_silencing(axes: Axes, silencing: Silencing) -> None:
    """One row per layer: accuracy that is left, for each criterion; random draws with their range."""
    for index, criterion in enumerate(silencing.criteria):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        shift = (index - (len(silencing.criteria) - 1) / 2) * 0.14
        for row, layer in enumerate(silencing.layers):
            values = [100 * value for value in silencing.values(layer, criterion)]
            label = None if row else _legend(criterion, len(values))
            if len(values) > 1:
                axes.plot([min(values), max(values)], [row + shift] * 2, color=colour, linewidth=2.5, alpha=0.6)
            axes.plot(
                sum(values) / len(values),
                row + shift,
                marker,
                color=colour,
                markersize=6.5 if criterion == ROUTE else 5,
                label=label,
            )
    axes.axvline(100 * silencing.baseline.value, color="black", linewidth=1, linestyle=":")
    axes.set_xlim(-2, 102)
    axes.set_ylim(len(silencing.layers) - 0.4, -0.6)
    axes.set_yticks(range(len(silencing.layers)), [])
    axes.set_xlabel(f"accuracy in % on {silencing.baseline.total} images (dotted: untouched)")
    where = "after its activation" if silencing.at == "activation" else "at its output, before batch norm"
    axes.set_title(f"What is left with a layer's channels set to zero\n{where}", fontsize=10)
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.figure.legend(fontsize=9, loc="outside lower center", ncols=len(silencing.criteria), frameon=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _legend(criterion: str, draws: int) -> str:
    if criterion == RANDOM:
        return f"{criterion} (mean and range of {draws})"
    return "critical attacking route" if criterion == ROUTE else f"by {criterion}"


def save_figure(figure: Figure, folder: str | os.PathLike[str], name: str) -> tuple[Path, Path]:
    """Write a figure as PNG and SVG and return the paths; text stays text in the SVG."""
    from matplotlib import rc_context

    paths = Path(folder) / f"{name}.png", Path(folder) / f"{name}.svg"
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        try:
            figure.savefig(paths[0], dpi=150)
            figure.savefig(paths[1], metadata={"Date": None})
        except OSError as error:
            raise UserError(f"cannot write the figure {paths[0]}: {error.strerror}") from error
    return paths
