"""Images by V: those that the model has learned best and worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from attackroute.analysis.figures.style import new_figure
from attackroute.analysis.hardness import Hardness
from attackroute.core.batches import Data, batches
from attackroute.core.errors import UserError

_LONGEST = 12  # letters of a class's name
_WRONG = "#B00020"


def pick_images(model: nn.Module, data: Data, hardness: Hardness, indices: Tensor, *, batch_size: int = 128) -> Tensor:
    """The ``(k,)`` images behind a hardness, read again from the same data: ``(k, C, H, W)`` float32 on the CPU.

    The model decides device and dtype, as it did when the hardness was measured.

    Raises:
        UserError: The data hold other samples, or in another order, as a loader that shuffles gives them.
    """
    pictures: dict[int, Tensor] = {}
    start = 0
    for images, labels in batches(model, data, batch_size):
        stop = start + len(images)
        if labels is None or not torch.equal(labels.cpu().long(), hardness.labels[start:stop]):
            raise UserError(
                f"samples {start} to {stop - 1} have other labels than when their hardness was measured: "
                "give the same data again, from a loader that does not shuffle"
            )
        pictures |= {at: images[at - start].float().cpu().clone() for at in indices.tolist() if start <= at < stop}
        start = stop
    if start != len(hardness):
        raise UserError(f"the data hold {start} samples now, but hardness was measured for {len(hardness)}")
    return torch.stack([pictures[at] for at in indices.tolist()])


def images_figure(
    hardness: Hardness, rows: Mapping[str, Tensor], images: Mapping[str, Tensor], classes: Sequence[str]
) -> Figure:
    """Rows of images, each with its place in the data, its V, its class, and the model's class where that is another.

    By each row's title come indices ``(k,)`` among the samples of the hardness, and images ``(k, C, H, W)`` in [0, 1].
    """
    columns = max(map(len, rows.values()))
    figure = new_figure(max(5.0, 1.15 * columns), 1.9 * len(rows))
    halves = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for half, (title, indices) in zip(halves, rows.items(), strict=True):
        half.suptitle(title, fontsize=10)
        panels = half.subplots(1, columns, squeeze=False)[0]
        for panel in panels:
            panel.set_axis_off()
        for panel, index, image in zip(panels, indices.tolist(), images[title], strict=False):
            pixels = image[0] if len(image) == 1 else image[:3].movedim(0, -1)
            panel.imshow(pixels.clamp(0, 1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            colour = "black" if hardness.correct[index] else _WRONG
            panel.set_title(_caption(hardness, index, classes), fontsize=6.5, color=colour)
    return figure


def _caption(hardness: Hardness, index: int, classes: Sequence[str]) -> str:
    label, prediction = (_name(int(values[index]), classes) for values in (hardness.labels, hardness.predictions))
    mistaken = "" if hardness.correct[index] else f"\nseen as {prediction}"
    return f"#{index}: V {float(hardness.values[index]):.0f}\n{label}{mistaken}"


def _name(label: int, classes: Sequence[str]) -> str:
    name = classes[label] if label < len(classes) else str(label)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
