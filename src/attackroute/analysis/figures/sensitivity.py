"""Fig. 2: distributions of sensitivity and gradient over the neurons on the route and off it, and controls' means."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attackroute.analysis.controls import OFF_ROUTE, ROUTE
from attackroute.analysis.experiments.sensitivity import Sensitivity
from attackroute.analysis.figures.style import label, look, new_figure, shared_legend, tidy, upright_layers
from attackroute.core.table import Record

_FACES = {ROUTE: "#F6C7A3", OFF_ROUTE: "#D9D9D9"}


def sensitivity_figure(result: Sensitivity) -> Figure:
    """One panel for each quantity: boxes of the route and of all other neurons, marks for the means of controls."""
    quantities, layers = result.quantities, result.layers
    figure = new_figure(max(5.0, 0.52 * len(layers) + 1.2), 2.2 * len(quantities) + 1.3)
    panels = figure.subplots(len(quantities), 1, sharex=True, squeeze=False)[:, 0]
    controls = [name for name in result.criteria if name not in _FACES]
    handles: dict[str, Any] = {}
    for axes, (quantity, attack) in zip(panels, quantities, strict=True):
        for place, layer in enumerate(layers):
            for side, criterion in enumerate(_FACES):
                for row in result.rows(layer, quantity, attack, criterion):
                    handles[label(criterion)] = _box(axes, row, place - 0.27 + 0.2 * side)
            for index, criterion in enumerate(controls):
                rows = result.rows(layer, quantity, attack, criterion)
                if rows:
                    at = place + 0.1 + 0.34 * index / max(1, len(controls) - 1)
                    mean = sum(row["mean"] for row in rows) / len(rows)
                    style = {**look(criterion).point, "markersize": 3.5}
                    suffix = f"mean of {len(rows)}" if len(rows) > 1 else "mean"
                    handles[f"{criterion} ({suffix})"] = axes.plot(at, mean, **style)[0]
        for place in range(len(layers) - 1):
            axes.axvline(place + 0.5, color="#EEEEEE", linewidth=0.8, zorder=0)
        axes.set_yscale("log")
        axes.set_title(
            f"{quantity} to {attack}" if attack else f"{quantity} of the loss, clean images", fontsize=8.5, loc="left"
        )
        tidy(axes)
    upright_layers(panels[-1], layers)
    figure.suptitle(
        f"Neurons on the route ({result.share:.0%} of each layer) and off it, {result.samples} images\n"
        "boxes: quartiles, whiskers: 5 to 95 % of the neurons, diamond: mean",
        fontsize=9,
    )
    shared_legend(figure, handles, 3)
    return figure


def _box(axes: Axes, row: Record, at: float) -> Any:
    numbers = {
        "med": row["median"], "q1": row["q25"], "q3": row["q75"], "whislo": row["q05"], "whishi": row["q95"],
        "mean": row["mean"], "fliers": [],
    }  # fmt: skip
    edge = look(row["criterion"]).colour
    drawn = axes.bxp(
        [numbers], positions=[at], widths=0.17, showfliers=False, showmeans=True, patch_artist=True,
        manage_ticks=False, boxprops={"facecolor": _FACES[row["criterion"]], "edgecolor": edge},
        medianprops={"color": edge}, whiskerprops={"color": edge}, capprops={"color": edge},
        meanprops={"marker": "D", "markersize": 2.5, "markerfacecolor": edge, "markeredgecolor": "none"},
    )  # fmt: skip
    return drawn["boxes"][0]
