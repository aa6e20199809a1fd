"""Fig. 5: Grad-CAM of the route's channels and of the others, over the image; and its measures as dots."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attackroute.analysis.experiments.gradcam import CLEAN, ENTROPY, INSIDE, PART, SHIFT, GradCam, MapPanels
from attackroute.analysis.figures.style import label, look, new_figure, shared_legend, tidy

_MEASURES = {
    INSIDE: "share of the map's energy inside {box}",
    ENTROPY: "entropy of the map (1: even)",
    PART: "share of the set's and its complement's energy",
    SHIFT: "shift from the clean image's map",
}


def maps_figure(panels: MapPanels) -> Figure:
    """Each image as two rows, clean and attacked: the image, then the route's map and the others' over it."""
    count = panels.images.shape[1]
    pairs = 2 if count > 1 else 1
    rows = -(-count // pairs)
    figure = new_figure(3.5 * pairs + 0.6, 2.45 * rows + 0.9)
    grid = figure.subplots(2 * rows, 3 * pairs, squeeze=False)
    picture = None
    for axes in grid.flatten():
        axes.set_axis_off()
    for index in range(count):
        for state in range(2):
            line, column = 2 * (index // pairs) + state, 3 * (index % pairs)
            image = panels.images[state, index].permute(1, 2, 0).float().clamp(0, 1)
            pixels = image.expand(-1, -1, 3) if image.shape[2] == 1 else image[..., :3]
            trio = grid[line, column : column + 3]
            trio[0].imshow(pixels.numpy())
            seen = int(panels.classes[state, index])
            text = panels.names[seen] if seen < len(panels.names) else f"class {seen}"
            trio[0].set_title(f"{'attacked' if state else 'clean'}: {text}", fontsize=7.5, pad=2)
            for place in range(2):
                trio[1 + place].imshow(pixels.mean(2).numpy(), cmap="gray", vmin=0, vmax=1)
                picture = trio[1 + place].imshow(
                    panels.cams[state, place, index].float().numpy(), cmap="inferno", alpha=0.62, vmin=0, vmax=1
                )
                trio[1 + place].set_title("route" if place == 0 else "off-route", fontsize=7.5, pad=2)
    if picture is not None:
        bar = figure.colorbar(picture, ax=grid, fraction=0.02, pad=0.01)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle(
        f"Grad-CAM of {panels.layer} ({panels.size[0]}x{panels.size[1]}), at its {panels.at}; {panels.attack}\n"
        "the four maps of an image share one scale",
        fontsize=9,
    )
    return figure


def measures_figure(result: GradCam) -> Figure:
    """The measures of all sets of channels: one panel each, means with 95 % intervals."""
    cases = (CLEAN, *result.attacks)
    figure = new_figure(7.2, 1.9 + 0.42 * len(result.criteria))
    panels = figure.subplots(1, 4, sharey=True)
    box = "the object's box" if result.boxed else "the middle"
    for axes, (measure, text) in zip(panels, _MEASURES.items(), strict=True):
        _dots(axes, result, measure, cases)
        axes.set_xlabel("\n".join(wrap(text.format(box=box), 20)), fontsize=7.5)
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
