"""Deactivation: what is left with the route's channels set to zero (Fig. 4a of Li et al., 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from torch import nn

from attackroute.analysis.accuracy_table import AccuracyTable, Setting
from attackroute.analysis.interventions import deactivate
from attackroute.analysis.rankings import Rivals, check_shares, rank
from attackroute.analysis.trials import Change, Clean, plan, run
from attackroute.core.batches import Data
from attackroute.core.layers import OUTPUT
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress

SHARES = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def deactivation_accuracy(
    model: nn.Module,
    data: Data,
    route: Route,
    rivals: Rivals | None = None,
    *,
    seeds: Sequence[int] = range(5),
    layers: Iterable[str] | None = None,
    shares: Iterable[float] = SHARES,
    share: float = 0.3,
    together: Iterable[Sequence[str]] | None = None,
    at: str = OUTPUT,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> AccuracyTable:
    """Accuracy on clean images with channels set to zero: a growing share of each layer alone, and of several together.

    Sets of channels grow by rank, each within the next. Random channels are off the given route, so their sets end
    where those are used up. Rank channels on other samples than these.

    Args:
        model: The network.
        data: Labelled images; only those that the untouched network gets right count.
        route: The route; its frequencies rank the channels.
        rivals: Routes by other criteria, or their scores, which serve every share.
        seeds: One random ranking off the route for each.
        layers: The layers to change alone; None for all of the route's.
        shares: Shares of a layer's channels, in [0, 1].
        share: The share that the reading is about.
        together: Groups of layers to change together; None for all of ``layers``.
        at: Where channels are set to zero, see :func:`attackroute.deactivate`.
        batch_size: Rows per forward pass when ``data`` is tensors.
        progress: Called with (images times interventions done, in all or None).

    Raises:
        UserError: A layer is not on the route, a share is outside [0, 1], no sample is classified correctly, or a
            layer has no activation of its own, with ``at="activation"``.
    """
    (share,) = check_shares([share])
    levels = check_shares([*shares, share])
    single = tuple(route if layers is None else route.restrict(layers))
    whole = [single] if together is None else [tuple(route.restrict(group)) for group in together]
    groups = list(dict.fromkeys([*((layer,) for layer in single), *whole]))
    rankings = rank(route.restrict({layer for group in groups for layer in group}), rivals, seeds)

    def intervene(change: Change, _: Clean) -> AbstractContextManager[object]:
        assert change.channels is not None
        return deactivate(model, change.channels, at=at)

    trials = plan(rankings, [Setting(group, level) for group in groups for level in levels])
    rows, cost = run(model, data, trials, intervene, batch_size=batch_size, progress=progress)
    return AccuracyTable("deactivate", rows, share, False, at, cost, sum(route.channels.values()))
