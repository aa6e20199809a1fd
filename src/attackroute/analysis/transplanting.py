"""Transplants: do clean values in the route's channels bring attacked images back (Fig. 3 of Li et al., 2021)?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

from torch import nn

from attackroute.analysis.accuracy_table import AccuracyTable, Setting
from attackroute.analysis.interventions import transplant
from attackroute.analysis.rankings import Rivals, check_shares, rank
from attackroute.analysis.trials import Change, Clean, plan, run
from attackroute.core.batches import Data
from attackroute.core.errors import UserError
from attackroute.core.layers import OUTPUT
from attackroute.robustness.attack import Attack
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress

SHARES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


def transplant_accuracy(
    model: nn.Module,
    data: Data,
    route: Route,
    attacks: Mapping[str, Attack],
    rivals: Rivals | None = None,
    *,
    seeds: Sequence[int] = range(5),
    layers: Iterable[str] | None = None,
    shares: Iterable[float] = SHARES,
    share: float = 0.3,
    together: Iterable[Sequence[str]] | None = None,
    swept: Iterable[str] | None = None,
    at: str = OUTPUT,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> AccuracyTable:
    """Accuracy on attacked images with clean values in some channels: the route's, and controls of the same size.

    Every layer alone at a growing share (Fig. 3a), and single layers and several together at one share (Fig. 3b).
    Sets of channels grow by rank, each within the next. Random channels are off the given route, so their sets end
    where those are used up. Rank channels on other samples than these.

    Args:
        model: The network.
        data: Labelled images in [0, 1]; only those that the network gets right when clean count.
        route: The route; its frequencies rank the channels.
        attacks: Attacks and corruptions by name, each made once per image.
        rivals: Routes by other criteria, or their scores, which serve every share.
        seeds: One random ranking off the route for each.
        layers: The layers to change alone; None for all of the route's.
        shares: Shares of one layer's channels, in [0, 1].
        share: The share at which all attacks and several layers are tried, and which the reading is about.
        together: Groups of layers to change together; None for the first two, three, ... half, and all of ``layers``.
        swept: Attacks with which the shares grow; None for the first one.
        at: Where channels are replaced, see :func:`attackroute.deactivate`.
        batch_size: Rows per forward pass when ``data`` is tensors.
        progress: Called with (images times interventions done, in all or None).

    Raises:
        UserError: There is no attack, a layer is not on the route, a share is outside [0, 1], no sample is classified
            correctly, or an input does not fit the model.
    """
    if not attacks:
        raise UserError("no attack is given: pass one by name, such as pgd")
    levels = check_shares(shares)
    (share,) = check_shares([share])
    single = tuple(route if layers is None else route.restrict(layers))
    groups = leading_groups(single) if together is None else [tuple(route.restrict(group)) for group in together]
    rankings = rank(route.restrict({*single, *(layer for group in groups for layer in group)}), rivals, seeds)
    growing = set(list(attacks)[:1] if swept is None else swept)
    settings = []
    for attack in attacks:
        for layer in single:
            used = sorted({*levels, share}) if attack in growing else [share]
            settings += [Setting((layer,), level, attack) for level in used]
        settings += [Setting(group, share, attack) for group in groups]

    def intervene(change: Change, clean: Clean) -> AbstractContextManager[object]:
        assert change.channels is not None
        return transplant(model, clean.outputs, change.channels, at=at)

    trials = plan(rankings, settings)
    rows, cost = run(
        model,
        data,
        trials,
        intervene,
        attacks=attacks,
        record=rankings[0].layers,
        at=at,
        batch_size=batch_size,
        progress=progress,
    )
    return AccuracyTable("transplant", rows, share, True, at, cost, sum(route.channels.values()))


def leading_groups(layers: Sequence[str]) -> list[tuple[str, ...]]:
    """The first two, the first three, the first half, and all of the layers; each once."""
    sizes = sorted({2, 3, len(layers) // 2, len(layers)})
    return [tuple(layers[:size]) for size in sizes if 2 <= size <= len(layers)]
