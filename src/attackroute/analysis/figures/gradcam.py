"""Fig. 5: Grad-CAM of the route's channels and of the others, over the image; and its measures as dots."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attackroute.analysis.experiments.gradcam import CLEAN, ENTROPY, INSIDE, PART, SHIFT, GradCam, MapPanels
from attackroute.analysis.figures.style import grid_of, label, look, new_figure, shared_legend, tidy

_MEASURES = {
    INSIDE: "share of the map's energy inside the middle",
    ENTROPY: "entropy of the map (1: even)",
    PART: "share of the set's and its complement's energy",
    SHIFT: "shift from the clean image's map",
}


def maps_figure(result: GradCam, panels: MapPanels) -> Figure:
    """Each image as two rows, clean and attacked: the image, then the route's map and the others' over it."""
    count = panels.images.shape[1]
    rows, pairs = grid_of(count, 2)
    figure = new_figure(3.5 * pairs + 0.6, 2.45 * rows + 0.9)
    grid = figure.subplots(2 * rows, 3 * pairs, squeeze=False)
    for axes in grid.flatten():
        axes.set_axis_off()
    for index, state in product(range(count), range(2)):
        image = panels.images[state, index].permute(1, 2, 0).float().clamp(0, 1)
        pixels = image.expand(-1, -1, 3) if image.shape[2] == 1 else image[..., :3]
        column = 3 * (index % pairs)
        first, *others = grid[2 * (index // pairs) + state, column : column + 3]
        first.imshow(pixels.numpy())
        predicted = int(panels.classes[state, index])
        text = panels.names[predicted] if predicted < len(panels.names) else f"class {predicted}"
        first.set_title(f"{'attacked' if state else 'clean'}: {text}", fontsize=7.5, pad=2)
        for axes, title, cams in zip(others, ("route", "off-route"), panels.cams[state], strict=True):
            axes.imshow(pixels.mean(2).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.imshow(cams[index].float().numpy(), cmap="inferno", alpha=0.62, vmin=0, vmax=1)
            axes.set_title(title, fontsize=7.5, pad=2)
    bar = figure.colorbar(grid[0, -1].images[-1], ax=grid, fraction=0.02, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(
        f"Grad-CAM of {result.layer} ({result.size[0]}x{result.size[1]}), at its {result.at}; {result.attacks[0]}\n"
        "the four maps of an image share one scale",
        fontsize=9,
    )
    return figure


def measures_figure(result: GradCam) -> Figure:
    """The measures of all sets of channels: one panel each, means with 95 % intervals."""
    cases = (CLEAN, *result.attacks)
    figure = new_figure(7.2, 1.9 + 0.42 * len(result.criteria))
    panels = figure.subplots(1, 4, sharey=True)
    for axes, (measure, text) in zip(panels, _MEASURES.items(), strict=True):
        _dots(axes, result, measure, cases)
        axes.set_xlabel("\n".join(wrap(text, 20)), fontsize=7.5)
        tidy(axes, "x")
    panels[0].set_yticks(range(len(result.criteria)), [label(name) for name in result.criteria])
    panels[0].set_ylim(len(result.criteria) - 0.4, -0.6)
    handles: dict[str, Any] = {}
    for index, name in enumerate(cases):
        face = "white" if index == 0 else "#222222"
        shape = "os^Dv"[index % 5]
        handles[name] = panels[0].plot([], [], shape, color="#222222", markerfacecolor=face, markersize=4.5)[0]
    figure.suptitle(
        f"Grad-CAM of {result.layer} at its {result.at},\n{result.counted} images that the network gets right",
        fontsize=9,
    )
    shared_legend(figure, handles)
    return figure


def _dots(axes: Axes, result: GradCam, measure: str, cases: Sequence[str]) -> None:
    for row, criterion in enumerate(result.criteria):
        colour = look(criterion).colour
        for index, images in enumerate(cases):
            at = row + (index - (len(cases) - 1) / 2) * 0.2
            face = "white" if images == CLEAN else colour
            for each in result.rows(images, criterion, measure):
                axes.errorbar(
                    each["mean"], at, xerr=each["mean"] - each["low"], fmt="os^Dv"[index % 5], color=colour,
                    markersize=4, markerfacecolor=face, elinewidth=1, alpha=0.6 if each["draw"] is not None else 1,
                )  # fmt: skip
    if measure == SHIFT:
        axes.set_xlim(left=0)
