"""How well scores tell attacked images from clean ones, by attack and by layer."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attackroute.analysis.experiments.detect import Detection
from attackroute.analysis.figures.style import look, new_figure, shared_legend, tidy, upright_layers


def detection_figure(result: Detection) -> Figure:
    """Areas under the ROC curve: over all layers with intervals on the left, of single layers' routes on the right."""
    layers, attacks = result.layers, result.attacks
    figure = new_figure(max(6.5, 0.36 * len(layers) + 3.6), 1.9 * len(attacks) + 1.6)
    panels = figure.subplots(len(attacks), 2, squeeze=False, sharey=True, width_ratios=(1, max(1.2, len(layers) / 7)))
    handles: dict[str, Any] = {}
    for (left, right), attack in zip(panels, attacks, strict=True):
        handles |= _all_layers(left, result, attack)
        _single_layers(right, result, attack, layers)
        counts = result.rows(attack, result.scores[0])[0]
        left.set_title(f"{attack}\n{counts['attacked']} attacked, {counts['clean']} clean", fontsize=8, loc="left")
        right.set_title("by the routes of one layer", fontsize=8, loc="left")
        for axes in (left, right):
            axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
            axes.set_ylim(-0.02, 1.04)
            tidy(axes)
    for axes in panels[:-1].flatten():
        axes.tick_params(labelbottom=False)
    upright_layers(panels[-1][0], result.scores)
    upright_layers(panels[-1][1], layers)
    figure.supylabel("AUROC (dotted: chance)", fontsize=9)
    figure.suptitle("Attacked images told by the distance of their routes from the predicted class's", fontsize=9.5)
    shared_legend(figure, handles)
    return figure


def _all_layers(axes: Axes, result: Detection, attack: str) -> dict[str, Any]:
    handles: dict[str, Any] = {}
    for place, score in enumerate(result.scores):
        style = look(score)
        rows = result.rows(attack, score)
        for index, row in enumerate(rows):
            at = place + (index - (len(rows) - 1) / 2) * 0.14
            errors = [[row["auroc"] - row["auroc_low"]], [row["auroc_high"] - row["auroc"]]]
            axes.errorbar(at, row["auroc"], errors, elinewidth=1.2, capsize=2, **style.point)
        handles[score + (f" ({len(rows)} draws)" if len(rows) > 1 else "")] = axes.plot([], [], **style.point)[0]
    axes.set_xticks(range(len(result.scores)))
    axes.set_xlim(-0.6, len(result.scores) - 0.4)
    return handles


def _single_layers(axes: Axes, result: Detection, attack: str, layers: tuple[str, ...]) -> None:
    for score in result.scores:
        rows = [result.rows(attack, score, layer) for layer in layers]
        if not all(rows):
            continue
        style = look(score)
        values = [[row["auroc"] for row in each] for each in rows]
        if len(values[0]) > 1:
            low, high = [min(each) for each in values], [max(each) for each in values]
            axes.fill_between(range(len(layers)), low, high, color=style.colour, alpha=0.25, linewidth=0)
        axes.plot([sum(each) / len(each) for each in values], **style.line)
    axes.set_xticks(range(len(layers)))
