"""Which neurons a hardening run punishes: a route that is given, or traced from some samples, anew every few epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from attackroute.core.batches import count_samples, derived_generator, derived_seed, in_order, load
from attackroute.core.errors import UserError
from attackroute.robustness.registry import parse_attack
from attackroute.routes.layer_map import require_model
from attackroute.routes.provenance import Provenance
from attackroute.routes.route import Route
from attackroute.tracing.noise import UNIT, check_carrier
from attackroute.tracing.sketches import Sketches, check_sketches
from attackroute.tracing.trace import trace_routes

ROUTE, RANDOM, ALL = "route", "random", "all"


TARGETS = (ROUTE, RANDOM, ALL)


_INSTANCE_WIDTH, _WIDTH = 0.2, 0.3  # the paper's


_BATCH = 128


@dataclass(frozen=True)
class RouteTracing:
    """How the route is traced.

    Attributes:
        share: Share of the training samples, drawn with the seed, in (0, 1]; the paper's is a tenth.
        refresh: Trace anew before every so manyth epoch; None traces once, before the first.
        compare_full: Compare the first route with that of all training samples, which takes one more trace.
        linear: Whether linear maps are layers of the route too.
        sketches: As :func:`attackroute.trace_routes` takes them: approximate; None for exact routes.
        carrier: ``"unit"`` for the paper's route, of clean images, or ``"noise"``.
        attack: Specification of the attack whose noise is followed; None for the paper's.

    Raises:
        UserError: A value is out of range.
    """

    share: float = 0.1
    refresh: int | None = None
    compare_full: bool = True
    linear: bool = False
    sketches: Sketches = None
    carrier: str = UNIT
    attack: str | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.share, (int, float)) and 0 < self.share <= 1):
            raise UserError(f"a share of {self.share} of the samples is outside (0, 1]; the paper takes 0.1")
        if self.refresh is not None and (not isinstance(self.refresh, int) or self.refresh < 1):
            raise UserError(f"refresh {self.refresh!r} is not a number of epochs; give 1 or more, or None")
        check_sketches(self.sketches)
        check_carrier(self.carrier, self.attack, self.sketches)

    def due(self, epoch: int) -> bool:
        """Whether the route is traced anew before this epoch; the one before the first is no renewal."""
        return self.refresh is not None and epoch > 1 and (epoch - 1) % self.refresh == 0

    def trace(self, model: nn.Module, data: Dataset[Any], seed: int) -> Route:
        """The model route of the drawn samples (Eqs. (1)-(8))."""
        total = count_samples(data, "training data")
        samples = max(1, round(self.share * total))
        order = torch.randperm(total, generator=derived_generator(seed, "route", 0))
        part = Subset(data, order[:samples].sort().values.tolist())
        loader = load(part, in_order(samples, _BATCH), generator=torch.Generator())
        routes = trace_routes(
            model, loader, _INSTANCE_WIDTH, attack=None if self.attack is None else parse_attack(self.attack),
            carrier=self.carrier, linear=self.linear, sketches=self.sketches, seed=seed,
        )  # fmt: skip
        return routes.aggregate(_WIDTH)


@dataclass(frozen=True)
class RouteOverlap:
    """How much of a route from some samples the route from all of them has too.

    Attributes:
        shared: Neurons on both; the two are of one size.
        size: Neurons of either.
        least: The least share of neurons on both, over layers.
    """

    shared: int
    size: int
    least: float

    @classmethod
    def between(cls, part: Route, full: Route) -> RouteOverlap:
        """Compare two routes of one network."""
        return cls((part & full).size, part.size, min(part.overlap(full).values()))

    @property
    def share(self) -> float:
        """Share of the neurons on both; the paper reports 94.6 % for a tenth of the samples."""
        return self.shared / self.size

    def to_json(self) -> dict[str, float]:
        """Counts and shares."""
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        return f"{self.share:.1%} of its neurons ({self.shared} of {self.size}; least in a layer {self.least:.0%})"


@dataclass(frozen=True)
class RouteChange:
    """What a new trace changed.

    Attributes:
        epoch: Before which epoch it was made.
        changed: Neurons of the new route that were not on the old one.
        size: Neurons of the new route.
        overlap: The least share of the old route, over layers, that is still on the new one.
    """

    epoch: int
    changed: int
    size: int
    overlap: float

    @classmethod
    def between(cls, old: Route, new: Route, epoch: int) -> RouteChange:
        """Compare two routes of one network."""
        return cls(epoch, (new - old).size, new.size, min(old.overlap(new).values()))


def targeted(route: Route, target: str, seed: int) -> Route:
    """The neurons to punish: the route's, as many random ones off it in each layer, or all of its layers."""
    if target == RANDOM:
        return route.random_like(derived_seed(seed, "random target", 0))
    if target == ALL:
        return Route({layer: range(count) for layer, count in route.channels.items()}, route.channels)
    return route


def route_state(route: Route) -> dict[str, Any]:
    """A route as plain values, its frequencies left out, for :func:`route_from_state`."""
    origin = None if route.provenance is None else route.provenance.to_json()
    indices = {layer: list(chosen) for layer, chosen in route.indices.items()}
    return {"indices": indices, "channels": dict(route.channels), "provenance": origin}


def route_from_state(state: Mapping[str, Any], model: nn.Module) -> Route:
    """The route that :func:`route_state` took apart."""
    origin = state["provenance"]
    route = Route(state["indices"], state["channels"], None, None if origin is None else Provenance.from_json(origin))
    require_model(route.channels, model)
    return route
