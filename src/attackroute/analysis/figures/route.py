"""The route as one picture: how often samples use each channel, and what deactivated the channels costs."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from attackroute.analysis.controls import ROUTE
from attackroute.analysis.figures.style import ROUTE_COLOUR, label, look, new_figure
from attackroute.analysis.intervention_table import InterventionTable, Setting
from attackroute.core.errors import UserError
from attackroute.routes.route import Route


def route_figure(route: Route, deactivated: InterventionTable, title: str) -> Figure:
    """How often samples use each channel, and what deactivating the channels of single layers leaves.

    Raises:
        UserError: The route has no frequencies, as one that was not aggregated from routes of samples.
    """
    if route.frequency is None:
        raise UserError("the route has no frequencies to draw: aggregate it from instance routes")
    figure = new_figure(11, 0.55 * len(route) + 2.5)
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _draw_frequencies(left, route, route.frequency)
    _draw_accuracies(right, deactivated)
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
        axes.plot([cut, cut], [row - 0.46, row + 0.46], color=ROUTE_COLOUR, linewidth=2.2)
        axes.text(1.015, row, str(count), va="center", ha="left", fontsize=8, color="#444444")
    axes.set_xlim(0, 1)
    axes.set_ylim(len(route) - 0.4, -0.6)
    axes.set_yticks(range(len(route)), list(route))
    axes.set_xlabel("channels of the layer, most frequent first (share; count at the right)")
    axes.set_title("How often images use each channel\nleft of the orange line: the model's route", fontsize=10)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.035, pad=0.09)
    bar.ax.set_title("share of\nimages", fontsize=8)


def _draw_accuracies(axes: Axes, deactivated: InterventionTable) -> None:
    """One row per layer: accuracy that is left, for each criterion; random draws with their range."""
    for index, criterion in enumerate(deactivated.criteria):
        style = look(criterion)
        shift = (index - (len(deactivated.criteria) - 1) / 2) * 0.14
        for row, layer in enumerate(deactivated.layers):
            values = [100 * value for value in deactivated.values(Setting((layer,), deactivated.main_share), criterion)]
            if not values:
                continue
            text = None if row else label(criterion, len(values))
            if len(values) > 1:
                axes.plot([min(values), max(values)], [row + shift] * 2, color=style.colour, linewidth=2.5, alpha=0.6)
            mean, size = sum(values) / len(values), 6.5 if criterion == ROUTE else 5
            axes.plot(mean, row + shift, style.marker, color=style.colour, markersize=size, label=text)
    untouched = deactivated.untouched()
    axes.axvline(100 * untouched.value, color="black", linewidth=1, linestyle=":")
    axes.set_xlim(-2, 102)
    axes.set_ylim(len(deactivated.layers) - 0.4, -0.6)
    axes.set_yticks(range(len(deactivated.layers)), [])
    axes.set_xlabel(f"accuracy in %, on {untouched.total} images that\nthe untouched network gets right")
    where = "after its activation" if deactivated.at == "activation" else "at its output, before batch norm"
    axes.set_title(
        f"What is left with {deactivated.main_share:.0%} of a layer's channels set to zero\n{where}", fontsize=10
    )
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.figure.legend(fontsize=9, loc="outside lower center", ncols=len(deactivated.criteria), frameon=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
