"""Weakened connections: what is left with those between the route's channels scaled down (Fig. 4b)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from attackroute.analysis.accuracy_table import AccuracyTable, Setting
from attackroute.analysis.interventions import weaken
from attackroute.analysis.rankings import Rivals, check_shares, rank
from attackroute.analysis.trials import Change, Clean, plan, run
from attackroute.core.batches import Data
from attackroute.core.errors import UserError
from attackroute.routes.route import Route
from attackroute.tracing.connections import Connections
from attackroute.tracing.trace import Progress

BETAS = (1.0, 0.75, 0.5, 0.25, 0.0)


WEIGHTS = "weights"


def weakening_accuracy(
    model: nn.Module,
    data: Data,
    route: Route,
    rivals: Rivals | None = None,
    *,
    seeds: Sequence[int] = range(5),
    layers: Iterable[str] | None = None,
    targets: Iterable[str] | None = None,
    betas: Iterable[float] = BETAS,
    share: float = 0.3,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> AccuracyTable:
    """Accuracy on clean images with the connections between chosen channels of adjacent layers multiplied by a factor.

    All layers are changed together, with a falling factor. The reading is about a factor of 0.5, or the one nearest
    to it. Rank channels on other samples than these.

    Args:
        model: The network.
        data: Labelled images; only those that the untouched network gets right count.
        route: The route; its frequencies rank the channels.
        rivals: Routes by other criteria, or their scores.
        seeds: One random ranking off the route for each.
        layers: Some of the route's layers; None for all.
        targets: Those of them whose kernels are weakened, as for :func:`attackroute.weaken`; None for all.
        betas: Factors in [0, 1].
        share: Share of each layer's channels.
        batch_size: Rows per forward pass when ``data`` is tensors.
        progress: Called with (images times interventions done, in all or None).

    Raises:
        UserError: A layer is not on the route, a share or factor is outside [0, 1], or no sample is classified
            correctly.
    """
    (share,) = check_shares([share])
    factors = sorted(set(betas), reverse=True)
    for beta in factors:
        if not 0 <= beta <= 1:
            raise UserError(f"beta {beta} is outside [0, 1]: give the factor on the connections, such as 0.5")
    if not factors:
        raise UserError("no beta is given: give some in [0, 1], such as 0.5")
    rankings = rank(route, rivals, seeds, layers)

    trials = plan(rankings, [Setting(rankings[0].layers, share, None, beta) for beta in factors])
    changed = [trial.change.channels for trial in trials if trial.change.channels is not None]
    found: list[Connections] = []  # one, the same for every batch
    chosen = None if targets is None else list(targets)

    def look(images: Tensor) -> None:
        found.extend(Connections.of_route(model, images, channels) for channels in changed[:1])

    def intervene(change: Change, _: Clean) -> AbstractContextManager[object]:
        assert change.channels is not None and change.beta is not None
        return weaken(model, change.channels, change.beta, chosen, connections=found[0])

    rows, cost = run(model, data, trials, intervene, look=look, batch_size=batch_size, progress=progress)
    main = min(factors, key=lambda beta: abs(beta - 0.5))
    return AccuracyTable("weaken", rows, share, False, WEIGHTS, cost, sum(route.channels.values()), main, chosen)
