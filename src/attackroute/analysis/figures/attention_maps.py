"""Fig. 5: Grad-CAM of the route's channels and of the others, over the image; and its measures as dots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from attackroute.analysis.attention import CLEAN, ENTROPY, INSIDE, PART, SHIFT, Attention
from attackroute.analysis.figures.style import label, look, new_figure, shared_legend, tidy
from attackroute.analysis.gradcam import enlarged, evidence, jointly_normalised
from attackroute.core.layers import OUTPUT
from attackroute.core.model_state import frozen
from attackroute.robustness.attack import Attack, attacked
from attackroute.routes.route import Route

_MEASURES = {
    INSIDE: "share of the map's energy inside {box}",
    ENTROPY: "entropy of the map (1: even)",
    PART: "share of the set's and its complement's energy",
    SHIFT: "shift from the clean image's map",
}


@dataclass(frozen=True, eq=False)
class Panels:
    """Maps of a few images, ready to draw.

    Attributes:
        images: Clean and attacked images, ``(2, n, C, H, W)`` in [0, 1].
        cams: Maps of the route and of all other channels, ``(2, 2, n, H, W)``: clean and attacked, then the set. All
            four of an image share one scale, whose largest value is 1.
        classes: The class that the network sees, ``(2, n)``.
        attack: Name of the attack.
        layer: The layer.
        at: Where the maps are taken.
        size: Their own resolution.
    """

    images: Tensor
    cams: Tensor
    classes: Tensor
    attack: str
    layer: str
    at: str
    size: tuple[int, int]


def attention_panels(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    route: Route,
    layer: str,
    attack: Attack,
    name: str,
    *,
    at: str = OUTPUT,
) -> Panels:
    """Maps of a batch, clean and attacked, of the route's channels of a layer and of all others.

    Args:
        model: The network.
        images: ``(n, C, H, W)`` on its device.
        labels: ``(n,)``.
        route: The route.
        layer: A convolution of it.
        attack: The attack.
        name: Its name.
        at: Whether the maps are the layer's ``"output"`` or those after its ``"activation"``.
    """
    mask = route.mask(layer)
    with frozen(model):
        changed, _ = attacked(model, attack, images, labels)
    both = torch.stack([images, changed])
    found = [evidence(model, each, layer, at=at) for each in both]
    cams = torch.cat([each.cams(torch.stack([mask, ~mask])) for each in found])
    size = (int(cams.shape[2]), int(cams.shape[3]))
    large = jointly_normalised(enlarged(cams, (int(images.shape[2]), int(images.shape[3]))))
    classes = torch.stack([each.target for each in found])
    return Panels(both.cpu(), large.unflatten(0, (2, 2)).cpu(), classes.cpu(), name, layer, at, size)


def panels_figure(panels: Panels, names: Sequence[str] | None = None) -> Figure:
    """Each image as two rows, clean and attacked: the image, then the route's map and the others' over it.

    Args:
        panels: The maps.
        names: Names of the classes.
    """
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
            shown = image.expand(-1, -1, 3) if image.shape[2] == 1 else image[..., :3]
            own = grid[line, column : column + 3]
            own[0].imshow(shown.numpy())
            seen = int(panels.classes[state, index])
            text = names[seen] if names is not None and seen < len(names) else f"class {seen}"
            own[0].set_title(f"{'attacked' if state else 'clean'}: {text}", fontsize=7.5, pad=2)
            for place in range(2):
                own[1 + place].imshow(shown.mean(2).numpy(), cmap="gray", vmin=0, vmax=1)
                picture = own[1 + place].imshow(
                    panels.cams[state, place, index].float().numpy(), cmap="inferno", alpha=0.62, vmin=0, vmax=1
                )
                own[1 + place].set_title("route" if place == 0 else "off-route", fontsize=7.5, pad=2)
    if picture is not None:
        bar = figure.colorbar(picture, ax=grid, fraction=0.02, pad=0.01)
        bar.ax.tick_params(labelsize=7)
    figure.suptitle(
        f"Grad-CAM of {panels.layer} ({panels.size[0]}x{panels.size[1]}), at its {panels.at}; {panels.attack}\n"
        "the four maps of an image share one scale",
        fontsize=9,
    )
    return figure


def attention_figure(found: Attention) -> Figure:
    """The measures of all sets of channels: one panel each, means with 95 % intervals."""
    cases = (CLEAN, *found.attacks)
    figure = new_figure(7.2, 1.9 + 0.42 * len(found.criteria))
    panels = figure.subplots(1, 4, sharey=True)
    box = "the object's box" if found.boxed else "the middle"
    for axes, (measure, text) in zip(panels, _MEASURES.items(), strict=True):
        _dots(axes, found, measure, cases)
        axes.set_xlabel("\n".join(_wrapped(text.format(box=box), 20)), fontsize=7.5)
        tidy(axes, "x")
    panels[0].set_yticks(range(len(found.criteria)), [label(name) for name in found.criteria])
    panels[0].set_ylim(len(found.criteria) - 0.4, -0.6)
    handles: dict[str, Any] = {}
    for index, name in enumerate(cases):
        face = "white" if index == 0 else "#222222"
        shape = "os^Dv"[index % 5]
        handles[name] = panels[0].plot([], [], shape, color="#222222", markerfacecolor=face, markersize=4.5)[0]
    figure.suptitle(
        f"Grad-CAM of {found.layer} at its {found.at},\n{found.counted} images that the network gets right", fontsize=9
    )
    shared_legend(figure, handles)
    return figure


def _dots(axes: Axes, found: Attention, measure: str, cases: Sequence[str]) -> None:
    for row, criterion in enumerate(found.criteria):
        colour = look(criterion).colour
        for index, images in enumerate(cases):
            at = row + (index - (len(cases) - 1) / 2) * 0.2
            face = "white" if images == CLEAN else colour
            for each in found.values(images, criterion, measure):
                axes.errorbar(
                    each.mean.value, at, xerr=each.mean.half_width, fmt="os^Dv"[index % 5], color=colour, markersize=4,
                    markerfacecolor=face, elinewidth=1, alpha=0.6 if each.draw is not None else 1,
                )  # fmt: skip
    if measure == SHIFT:
        axes.set_xlim(left=0)


def _wrapped(text: str, width: int) -> list[str]:
    from textwrap import wrap

    return wrap(text, width)
