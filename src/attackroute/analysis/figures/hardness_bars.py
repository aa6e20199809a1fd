"""Fig. 6: how many samples an attack fools the model on, by hardness; below it V beside its rivals."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attackroute.analysis.figures.style import ROUTE_COLOUR, new_figure, tidy
from attackroute.analysis.hardness_study import LAYER, OURS, RANDOM, HardnessStudy
from attackroute.core.statistics import AUROC, SPEARMAN, Association

_TITLE = 36  # letters in a line over a panel


_PALE, _GREY, _RIVAL = "#E3E3E3", "#8A8A8A", "#0072B2"


_CHANCE = {AUROC: 0.5, SPEARMAN: 0.0}


_AXIS = {AUROC: "AUROC for being fooled", SPEARMAN: "Spearman's rank correlation with -eps"}


def hardness_figure(study: HardnessStudy, title: str) -> Figure:
    """One column for each attack, and one for the smallest eps where that was searched.

    Args:
        study: What was measured.
        title: One line above the picture.
    """
    targets = list(study.judgements)
    figure = new_figure(max(6.4, 3.1 * len(targets) + 1.2), 6.2)
    panels = figure.subplots(2, len(targets), squeeze=False, height_ratios=(1.15, 1))
    for column, target in enumerate(targets):
        upper, lower = panels[0, column], panels[1, column]
        if target in study.fooled:
            _draw_bins(upper, study, target)
        else:
            _draw_eps(upper, study)
        _draw_rivals(lower, study.judgements[target], study.rivals, named=column == 0)
    panels[0, 0].set_ylabel("samples", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_bins(axes: Axes, study: HardnessStudy, attack: str) -> None:
    bins = study.bins(attack)
    places = range(1, len(bins) + 1)
    axes.bar(places, [part.samples for part in bins], color=_PALE, width=0.86, label="correctly classified")
    axes.bar(places, [part.fooled for part in bins], color=ROUTE_COLOUR, width=0.86, label="of these fooled")
    for place, part in zip(places, bins, strict=True):
        axes.text(place, part.fooled, str(part.fooled), ha="center", va="bottom", fontsize=7)
    axes.set_title(textwrap.fill(attack.replace(",", ", "), _TITLE), fontsize=9)
    _name_bins(axes, len(bins), max(part.samples for part in bins))
    axes.legend(fontsize=7, loc="upper left", frameon=False, ncols=2, handlelength=1.2, columnspacing=1.0)


def _draw_eps(axes: Axes, study: HardnessStudy) -> None:
    """The smallest eps in each bin: median, and the range of the middle half."""
    import numpy as np

    assert study.smallest_eps is not None and study.search is not None
    order = np.argsort(study.predictors[OURS], kind="stable")
    capped = np.minimum(study.smallest_eps, study.search.largest) * 255
    parts = np.array_split(capped[order], min(10, len(order)))
    places = range(1, len(parts) + 1)
    low, middle, high = zip(*(np.percentile(part, (25, 50, 75)) for part in parts), strict=True)
    axes.vlines(places, low, high, color=ROUTE_COLOUR, linewidth=2.5, alpha=0.5, label="middle half")
    axes.plot(places, middle, "o", color=ROUTE_COLOUR, markersize=4.5, label="median")
    axes.set_title(f"smallest eps that fools (PGD, {study.search.steps} steps)", fontsize=9)
    axes.set_ylabel("eps x 255", fontsize=9)
    _name_bins(axes, len(parts), max(high))
    axes.legend(fontsize=7, loc="upper right", frameon=False)


def _name_bins(axes: Axes, bins: int, highest: float) -> None:
    tidy(axes)
    axes.set_xticks(range(1, bins + 1))
    axes.set_xlim(0.4, bins + 0.6)
    axes.set_ylim(0, 1.22 * highest)
    axes.set_xlabel("tenths by V: hardest (1) to weakest", fontsize=8.5)


def _draw_rivals(axes: Axes, found: Sequence[Association], rivals: Sequence[str], *, named: bool) -> None:
    """A row for each predictor with its interval; random neurons and single layers as dots in one row each."""
    statistic = found[0].statistic
    judged = [item for item in found if item.statistic == statistic and item.estimate.value is not None]
    groups: Mapping[str, list[Association]] = {
        **{name: [item for item in judged if item.predictor == name] for name in (OURS, *rivals)},
        RANDOM: [item for item in judged if item.predictor.startswith(RANDOM)],
        "votes of single layers": [item for item in judged if item.predictor.startswith(LAYER + " ")],
    }
    for row, (name, items) in enumerate(groups.items()):
        colour = ROUTE_COLOUR if name == OURS else _RIVAL if name in rivals else _GREY
        for item in items:
            if len(items) == 1 and item.estimate.interval is not None:
                axes.plot(item.estimate.interval, [row, row], color=colour, linewidth=2, alpha=0.5)
            axes.plot([item.estimate.value or 0.0], [row], "o", color=colour, markersize=5 if len(items) == 1 else 3)
    tidy(axes, "x")
    axes.set_yticks(range(len(groups)), list(groups) if named else [])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlabel(_AXIS[statistic], fontsize=8.5)
    low, high = axes.get_xlim()
    if low < _CHANCE[statistic] < high:  # elsewhere it would squeeze what differs
        axes.axvline(_CHANCE[statistic], color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"{_AXIS[statistic]} (dotted: chance)", fontsize=8.5)
    if not judged:
        axes.text(0.5, 0.5, "all alike: nothing to judge", transform=axes.transAxes, ha="center", fontsize=8)
