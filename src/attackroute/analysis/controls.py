"""Controls of a route's size: rankings of channels, nested sets of any size, routes of samples by simple rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from attackroute.analysis.channel_statistics import MEASURES, worked_on
from attackroute.analysis.criteria import ChannelScores
from attackroute.core.batches import BatchStream, Data
from attackroute.core.errors import UserError
from attackroute.core.layers import OUTPUT
from attackroute.core.model_state import frozen
from attackroute.core.random import random_order
from attackroute.robustness.attack import Attack
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.masks import kept, top_k
from attackroute.routes.provenance import Provenance
from attackroute.routes.route import Route
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.trace import Progress, Tracer

T = TypeVar("T")
ROUTE, RANDOM, OFF_ROUTE = "route", "random off-route", "off-route"


@dataclass(frozen=True, eq=False)
class Ranking:
    """Channels of each layer, best first."""

    criterion: str  # what ranked them: "route", "random off-route", or the name of a baseline
    draw: int | None  # seed of a random ranking; None for other criteria
    order: Mapping[str, Sequence[int]]  # for each layer, in forward order, the channels that may be chosen, best first
    channels: Mapping[str, int]  # for each layer, how many it has

    @classmethod
    def of_scores(cls, scores: Mapping[str, Tensor], criterion: str) -> Ranking:
        """Channels by falling score, ties to the lower index: a route's frequencies give sets as ``aggregate`` does."""
        order = {layer: values.sort(descending=True, stable=True).indices.tolist() for layer, values in scores.items()}
        return cls(criterion, None, order, {layer: len(values) for layer, values in scores.items()})

    @classmethod
    def off_route(cls, route: Route, seed: int, repeats: Mapping[str, str] | None = None) -> Ranking:
        """The channels off a route in random order; its first ones are ``route.random_like(seed)``.

        A layer that ``repeats`` another one has that one's order, as it has on the route.
        """
        rest, drawn = route.complement(), {layer: layer for layer in route} | dict(repeats or {})
        order = {layer: random_order(seed, drawn[layer], rest.indices[layer]) for layer in route}
        return cls(RANDOM, seed, order, route.channels)

    def route(self, share: float, layers: Iterable[str]) -> Route | None:
        """The best share of the layers' channels as a route; None where one of them does not have as many.

        A share in (0, 1] is ``max(1, round(share * C))`` channels.
        """
        chosen = set(layers)
        channels = {layer: count for layer, count in self.channels.items() if layer in chosen}
        sizes = {layer: kept(share, count) if share else 0 for layer, count in channels.items()}
        if any(size > len(self.order[layer]) for layer, size in sizes.items()):
            return None
        origin = Provenance(0, share, seed=self.draw, criterion=self.criterion) if share else None
        return Route({layer: self.order[layer][:size] for layer, size in sizes.items()}, channels, None, origin)


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """A route beside its controls on one network's images: what every experiment with a route takes."""

    model: nn.Module
    data: Data  # labelled images in [0, 1] to measure on, other ones than those that decided on the route and baselines
    route: Route  # its frequencies rank the channels
    baselines: Mapping[str, Route | ChannelScores] = field(default_factory=dict)  # what else ranks channels, by name
    share: float = 0.3  # of each layer's channels, in [0, 1], for the route and for every control
    seeds: Sequence[int] = range(5)  # one random ranking of the channels off the route for each
    at: str = OUTPUT  # where channels are changed and maps taken: the layers' output, or after their activation
    batch_size: int = 128
    progress: Progress | None = None

    def rankings(self, layers: Iterable[str] | None = None) -> list[Ranking]:
        """The route's ranking first, then random ones off it, then the baselines'; on some of the route's layers."""
        route = self.route if layers is None else self.route.restrict(layers)
        rankings = [Ranking.of_scores(_frequencies(route), ROUTE)]
        for layer in route if len(self.seeds) else ():
            if len(route.indices[layer]) == route.channels[layer]:
                raise UserError(
                    f"all {route.channels[layer]} channels of layer {layer!r} are on the route, so there is no control "
                    "off it: use a narrower route, or leave the layer out"
                )
        repeats = repeated_layers(self.model, route)
        rankings += [Ranking.off_route(route, seed, repeats) for seed in self.seeds]
        for name, other in self.baselines.items():
            scores = _frequencies(other) if isinstance(other, Route) else other.values
            route.check({at: len(values) for at, values in scores.items()}, f"baseline {name!r}")
            rankings.append(Ranking.of_scores({at: scores[at] for at in route}, name))
        return rankings

    def measured(self, work: Callable[[Tensor, Tensor | None], T]) -> Iterator[tuple[int, T]]:
        """Of each batch, how many samples it has and what ``work(images, labels)`` gives, the model frozen."""
        with frozen(self.model), torch.inference_mode(False):
            yield from worked_on(BatchStream(self.model, self.data, self.batch_size), work, self.progress)


def repeated_layers(model: nn.Module, route: Route) -> dict[str, str]:
    """Depthwise layers that repeat the route before them, each with the layer that it repeats.

    Each of their channels reads one channel, so that they are critical together, and one choice is both layers' choice.
    """
    repeats: dict[str, str] = {}
    modules = dict(model.named_modules())
    for before, layer in pairwise(route.layers):
        module, count = modules.get(layer.partition("#")[0]), route.channels[before]
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.out_channels == count > 1
        if depthwise and route.channels[layer] == count and route.indices[layer] == route.indices[before]:
            repeats[layer] = repeats.get(before, before)
    return repeats


def layer_sets(rankings: Sequence[Ranking], layer: str, share: float) -> dict[tuple[str, int | None], Tensor]:
    """Bool masks (C,) of a layer by criterion and draw: the route, all others as ``"off-route"``, then controls."""
    routes = {(each.criterion, each.draw): each.route(share, [layer]) for each in rankings}
    masks = {label: route.mask(layer) for label, route in routes.items() if route is not None}
    on_route = masks.pop((ROUTE, None))
    return {(ROUTE, None): on_route, (OFF_ROUTE, None): ~on_route, **masks}


def _frequencies(route: Route) -> Mapping[str, Tensor]:
    if route.frequency is None:
        raise UserError("the route has no frequencies by which to rank its channels: aggregate it from instance routes")
    return route.frequency


def sample_routes(
    model: nn.Module,
    data: Data,
    width: float = 0.2,
    *,
    attack: Attack | None = None,
    config: TraceConfig | None = None,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> dict[str, InstanceRoutes]:
    """The routes of samples by several criteria, the paper's under ``"route"``, of the same samples in the same order.

    Without labels the model's own predictions take their place. The attack is the one whose noise the routes follow,
    where they do; the others, by :data:`MEASURES`, are of the images themselves and cost one more forward pass each.
    """
    config = (config or TraceConfig()).measured(model, data, batch_size)
    with frozen(model), torch.inference_mode(False):
        stream = BatchStream(model, data, batch_size)
        tracer = Tracer(model, stream.first[0], width, attack=attack, config=config)

        def routes_of(images: Tensor, labels: Tensor | None) -> dict[str, InstanceRoutes]:
            routes = {ROUTE: tracer.trace(images, labels)}
            answers = None if labels is None else labels.detach().to("cpu", torch.int64, copy=True)
            for by, measure in MEASURES.items():
                values = measure(model, images, labels, linear=config.linear).values
                masks = {layer: top_k(sizes, width) for layer, sizes in values.items()}
                origin = Provenance(len(images), width, criterion=by)
                routes[by] = InstanceRoutes.from_masks(masks, origin, labels=answers)
            return routes

        batches = [routes for _, routes in worked_on(stream, routes_of, progress)]
    return {by: InstanceRoutes.concatenate([routes[by] for routes in batches]) for by in batches[0]}


def require_right(right: int, samples: int) -> None:
    """Some of the samples must be classified correctly, since these alone count."""
    if not right:
        raise UserError(
            f"the network gets none of the {samples} samples right when they are clean, so that nothing can be "
            "counted: check its weights and its labels, or give more samples"
        )
