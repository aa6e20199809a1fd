"""Fig. 6: how many samples an attack fools the model on, by hardness, V beside its baselines, and images by V."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from attackroute.analysis.figures.style import ROUTE_COLOUR, new_figure, tidy
from attackroute.analysis.hardness import Hardness
from attackroute.analysis.hardness_experiment import LAYER, OURS, RANDOM, HardnessStudy
from attackroute.core.batches import Data, batches
from attackroute.core.errors import UserError
from attackroute.core.statistics import AUROC, SPEARMAN
from attackroute.core.table import Record

_TITLE = 36  # letters in a line over a panel
_LONGEST = 12  # letters of a class's name
_PALE, _GREY, _BASELINE, _WRONG = "#E3E3E3", "#8A8A8A", "#0072B2", "#B00020"
_CHANCE = {AUROC: 0.5, SPEARMAN: 0.0}
_AXIS = {AUROC: "AUROC for being fooled", SPEARMAN: "Spearman's rank correlation with -eps"}


def hardness_figure(study: HardnessStudy, title: str) -> Figure:
    """One column for each attack, and one for the smallest eps where that was searched, below a line of title."""
    targets = study.targets
    figure = new_figure(max(6.4, 3.1 * len(targets) + 1.2), 6.2)
    panels = figure.subplots(2, len(targets), squeeze=False, height_ratios=(1.15, 1))
    for column, target in enumerate(targets):
        if target in study.fooled:
            _draw_bins(panels[0, column], study, target)
        else:
            _draw_eps(panels[0, column], study)
        _draw_baselines(panels[1, column], study.judged(target), study.baselines, named=column == 0)
    panels[0, 0].set_ylabel("samples", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_bins(axes: Axes, study: HardnessStudy, attack: str) -> None:
    bins = study.bins(attack)
    places = range(1, len(bins) + 1)
    axes.bar(places, [tenth.samples for tenth in bins], color=_PALE, width=0.86, label="correctly classified")
    axes.bar(places, [tenth.fooled for tenth in bins], color=ROUTE_COLOUR, width=0.86, label="of these fooled")
    for place, tenth in zip(places, bins, strict=True):
        axes.text(place, tenth.fooled, str(tenth.fooled), ha="center", va="bottom", fontsize=7)
    axes.set_title(textwrap.fill(attack.replace(",", ", "), _TITLE), fontsize=9)
    _name_bins(axes, len(bins), max(tenth.samples for tenth in bins))
    axes.legend(fontsize=7, loc="upper left", frameon=False, ncols=2, handlelength=1.2, columnspacing=1.0)


def _draw_eps(axes: Axes, study: HardnessStudy) -> None:
    """The smallest eps in each bin: median, and the range of the middle half."""
    assert study.smallest_eps is not None and study.search is not None
    tenths = study.tenths(np.minimum(study.smallest_eps, study.search.largest) * 255)
    places = range(1, len(tenths) + 1)
    low, middle, high = zip(*(np.percentile(tenth, (25, 50, 75)) for tenth in tenths), strict=True)
    axes.vlines(places, low, high, color=ROUTE_COLOUR, linewidth=2.5, alpha=0.5, label="middle half")
    axes.plot(places, middle, "o", color=ROUTE_COLOUR, markersize=4.5, label="median")
    axes.set_title(f"smallest eps that fools (PGD, {study.search.steps} steps)", fontsize=9)
    axes.set_ylabel("eps x 255", fontsize=9)
    _name_bins(axes, len(tenths), max(high))
    axes.legend(fontsize=7, loc="upper right", frameon=False)


def _name_bins(axes: Axes, bins: int, highest: float) -> None:
    tidy(axes)
    axes.set_xticks(range(1, bins + 1))
    axes.set_xlim(0.4, bins + 0.6)
    axes.set_ylim(0, 1.22 * highest)
    axes.set_xlabel("tenths by V: hardest (1) to weakest", fontsize=8.5)


def _draw_baselines(axes: Axes, judged: Mapping[str, Record], baselines: Sequence[str], *, named: bool) -> None:
    """A row for each predictor with its interval; random neurons and single layers as dots in one row each."""
    statistic = judged[OURS]["statistic"]
    defined = {name: row for name, row in judged.items() if row["value"] is not None}
    groups: Mapping[str, list[Record]] = {
        **{name: [defined[name]] if name in defined else [] for name in (OURS, *baselines)},
        RANDOM: [row for name, row in defined.items() if name.startswith(RANDOM)],
        "votes of single layers": [row for name, row in defined.items() if name.startswith(f"{LAYER} ")],
    }
    for place, (name, rows) in enumerate(groups.items()):
        colour = ROUTE_COLOUR if name == OURS else _BASELINE if name in baselines else _GREY
        for row in rows:
            if len(rows) == 1:
                axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2, alpha=0.5)
            axes.plot([row["value"]], [place], "o", color=colour, markersize=5 if len(rows) == 1 else 3)
    tidy(axes, "x")
    axes.set_yticks(range(len(groups)), list(groups) if named else [])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    low, high = axes.get_xlim()
    within = low < _CHANCE[statistic] < high  # elsewhere the line would squeeze what differs
    if within:
        axes.axvline(_CHANCE[statistic], color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel(_AXIS[statistic] + (" (dotted: chance)" if within else ""), fontsize=8.5)
    if not defined:
        axes.text(0.5, 0.5, "all alike: nothing to judge", transform=axes.transAxes, ha="center", fontsize=8)


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
