"""Table 1 as a figure: how much samples' routes have in common in each layer, and how much routes do."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from attackroute.analysis.experiments.occurrence import CLASSES, OCCURRENCE, OVERLAP, Occurrence
from attackroute.analysis.figures.style import look, new_figure, shared_legend, tidy, upright_layers


def occurrence_figure(result: Occurrence) -> Figure:
    """Occurrence of routes by several criteria; Jaccard index of the route with others, and of classes' routes."""
    layers = result.layers
    figure = new_figure(max(6.4, 0.42 * len(layers) + 1.5), 5.4)
    upper, lower = figure.subplots(2, 1, sharex=True)
    handles: dict[str, Any] = {}
    for name, _ in result.names(OCCURRENCE):
        values = [[100 * value for value in result.values(layer, OCCURRENCE, name)] for layer in layers]
        style = look(name)
        if len(values[0]) > 1:
            low, high = [min(each) for each in values], [max(each) for each in values]
            upper.fill_between(range(len(layers)), low, high, color=style.colour, alpha=0.3, linewidth=0)
        draws = f" (mean, range of {len(values[0])})" if len(values[0]) > 1 else ""
        (line,) = upper.plot([sum(each) / len(each) for each in values], **style.line)
        handles[f"{name}{' images' if not handles else ''}{draws}"] = line
    upper.set_ylim(0, 104)
    upper.set_ylabel("occurrence in %", fontsize=9)
    upper.set_title(
        f"Mean frequency of the most frequent {result.share:.0%} of channels on {result.samples} images' routes",
        fontsize=9,
    )
    for of, beside in result.names(OVERLAP):
        assert beside is not None
        (line,) = lower.plot([result.values(layer, OVERLAP, of, beside)[0] for layer in layers], **look(beside).line)
        handles.setdefault(beside, line)
    for of, _ in result.names(CLASSES):
        values_of = [result.values(layer, CLASSES, of)[0] for layer in layers]
        (line,) = lower.plot(values_of, color="#555555", linewidth=1, linestyle="--")
        handles["pairs of classes (mean)"] = line
    chance = {row["layer"]: row["chance"] for row in result.table if row["chance"] is not None}
    if chance:
        (line,) = lower.plot([chance[layer] for layer in layers], color="black", linewidth=0.9, linestyle=":")
        handles["by chance"] = line
    lower.set_ylim(0, 1.04)
    lower.set_ylabel("Jaccard index", fontsize=9)
    lower.set_title(f"Overlap of the route ({result.route_width:.0%} of the channels) with other routes", fontsize=9)
    for axes in (upper, lower):
        tidy(axes)
    upright_layers(lower, layers)
    shared_legend(figure, handles, 4)
    return figure
