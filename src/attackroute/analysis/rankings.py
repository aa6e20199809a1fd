"""The route and its controls as rankings of channels, from which sets of any size are taken, each within the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from attackroute.analysis.criteria import ChannelScores
from attackroute.core.errors import UserError
from attackroute.core.random import random_order
from attackroute.routes.masks import kept
from attackroute.routes.provenance import Provenance
from attackroute.routes.route import Route

ROUTE = "route"


RANDOM = "random off-route"


OFF_ROUTE = "off-route"


Rivals = Mapping[str, "Route | ChannelScores"]
"""Controls by name: routes by other criteria, or scores of channels that give routes of any size."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Channels of each layer, best first.

    Attributes:
        criterion: What ranked them: ``"route"``, ``"random off-route"``, or the name of a rival.
        draw: Seed of a random ranking; None for other criteria.
        order: For each layer, in forward order, the channels that may be chosen, best first.
        channels: For each layer, how many it has.
        whole: Only all of ``order`` can be chosen, since nothing ranks its channels.
    """

    criterion: str
    draw: int | None
    order: Mapping[str, Sequence[int]]
    channels: Mapping[str, int]
    whole: bool = False

    @classmethod
    def of_route(cls, route: Route, criterion: str = ROUTE) -> Ranking:
        """Channels by falling frequency, ties to the lower index, so that sets are those of ``aggregate(width)``.

        A route without frequencies, such as one that :func:`attackroute.rank_channels` gives, is taken whole.
        """
        if route.frequency is None:
            return cls(criterion, None, route.indices, route.channels, whole=True)
        return cls(criterion, None, _descending(route.frequency), route.channels)

    @classmethod
    def of_scores(cls, scores: ChannelScores, criterion: str) -> Ranking:
        """Channels by falling score, ties to the lower index."""
        channels = {layer: len(values) for layer, values in scores.values.items()}
        return cls(criterion, None, _descending(scores.values), channels)

    @classmethod
    def off_route(cls, route: Route, seed: int) -> Ranking:
        """The channels off a route in random order; its first ones are ``route.random_like(seed)``."""
        rest = route.complement()
        order = {layer: random_order(seed, layer, rest.indices[layer]) for layer in route}
        return cls(RANDOM, seed, order, route.channels)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers' names in forward order."""
        return tuple(self.channels)

    def size(self, layer: str, share: float) -> int | None:
        """How many channels a share of the layer is; None where fewer may be chosen."""
        count = 0 if share == 0 else kept(share, self.channels[layer])
        available = len(self.order[layer])
        return None if count > available or (self.whole and count != available) else count

    def route(self, share: float, layers: Iterable[str]) -> Route | None:
        """The best share of the layers' channels as a route; None where one of them does not have as many.

        Args:
            share: Of each layer's channels, in [0, 1]; above 0, ``max(1, round(share * C))`` channels.
            layers: Names of layers.
        """
        wanted = set(layers)
        indices: dict[str, Sequence[int]] = {}
        for layer in (name for name in self.channels if name in wanted):
            count = self.size(layer, share)
            if count is None:
                return None
            indices[layer] = self.order[layer][:count]
        origin = Provenance(0, share, seed=self.draw, criterion=self.criterion) if share else None
        return Route(indices, {layer: self.channels[layer] for layer in indices}, None, origin)


def rank(
    route: Route, rivals: Rivals | None = None, seeds: Sequence[int] = range(5), layers: Iterable[str] | None = None
) -> list[Ranking]:
    """The route, random rankings off it, and rivals, on the same layers.

    Args:
        route: The route, first in the list.
        rivals: Controls by name.
        seeds: One random ranking of the channels off the route for each.
        layers: Some of the route's layers; None for all.

    Raises:
        UserError: A layer is not on the route, a rival lacks a layer or has it in another size, or a layer has no
            channel off the route.
    """
    route = route if layers is None else route.restrict(layers)
    found = [Ranking.of_route(route)]
    for layer in route if len(seeds) else ():
        if len(route.indices[layer]) == route.channels[layer]:
            raise UserError(
                f"all {route.channels[layer]} channels of layer {layer!r} are on the route, so there is no control "
                "off it: use a narrower route, or leave the layer out"
            )
    found += [Ranking.off_route(route, seed) for seed in seeds]
    for name, rival in (rivals or {}).items():
        if name in (ROUTE, RANDOM, OFF_ROUTE):
            raise UserError(f"a rival must not be called {name!r}: give it the name of its criterion")
        sizes = rival.channels if isinstance(rival, Route) else {at: len(v) for at, v in rival.values.items()}
        route.check(sizes, f"rival {name!r}")
        if isinstance(rival, Route):
            found.append(Ranking.of_route(rival.restrict(route), name))
        else:
            values = {layer: rival.values[layer] for layer in route}
            found.append(Ranking.of_scores(ChannelScores(rival.by, values, rival.samples, rival.seed), name))
    return found


def layer_sets(rankings: Sequence[Ranking], layer: str, share: float) -> dict[tuple[str, int | None], Tensor]:
    """Bool masks (C,) of one layer by criterion and draw: the route, all others as ``"off-route"``, then the controls.

    Raises:
        UserError: The route cannot give this share.
    """
    chosen = {(each.criterion, each.draw): each.route(share, [layer]) for each in rankings}
    masks = {label: found.mask(layer) for label, found in chosen.items() if found is not None}
    if (ROUTE, None) not in masks:
        raise UserError(
            f"the route has no frequencies, so that it cannot give a share of {share} of layer {layer!r}: aggregate it "
            "from instance routes, or ask for the share that it has"
        )
    ours = masks.pop((ROUTE, None))
    return {(ROUTE, None): ours, (OFF_ROUTE, None): ~ours, **masks}


def check_shares(shares: Iterable[float]) -> tuple[float, ...]:
    """The shares in ascending order, each once.

    Raises:
        UserError: There is none, or one is outside [0, 1].
    """
    found = sorted(set(shares))
    if not found:
        raise UserError("no share is given: give some in [0, 1], such as 0.3")
    for share in found:
        if not 0 <= share <= 1:  # false for NaN too
            raise UserError(f"share {share} is outside [0, 1]: give the share of a layer's channels, such as 0.3")
    return tuple(found)


def _descending(scores: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    return {layer: values.sort(descending=True, stable=True).indices.tolist() for layer, values in scores.items()}
