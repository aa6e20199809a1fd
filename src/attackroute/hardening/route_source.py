"""Which neurons a hardening run punishes: a route that is given, or traced from some samples, anew every few epochs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from attackroute.core.batches import count_samples, in_order, load
from attackroute.core.errors import UserError
from attackroute.core.random import derived_generator, derived_seed
from attackroute.hardening.settings import ALL, RANDOM, HardenSettings
from attackroute.robustness.attack import Perturbation
from attackroute.routes.route import Route
from attackroute.tracing.trace import trace_routes

_INSTANCE_WIDTH, _WIDTH = 0.2, 0.3  # the paper's
_TRACED_BATCH = 128


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
    def between(cls, sampled: Route, full: Route) -> RouteOverlap:
        """Compare two routes of one network."""
        return cls((sampled & full).size, sampled.size, min(sampled.overlap(full).values()))

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


@dataclass(frozen=True)
class RouteSource:
    """Where the route comes from: it is given, or traced from some of the training samples.

    Attributes:
        settings: How it is traced.
        attack: What training is against.
        given: The route, if it is given.

    Raises:
        UserError: These do not go together.
    """

    settings: HardenSettings
    attack: Perturbation | None = None
    given: Route | None = None

    def __post_init__(self) -> None:
        if self.given is not None and self.settings.refresh is not None:
            raise UserError("a route that is given is not traced anew: leave out the route, or refresh")
        if self.settings.trace.follows_noise and self.attack is None:
            raise UserError(
                "carrier 'noise' follows what an attack changes: train against one (attack=..., --attack), or give a "
                "route that was traced so (route=..., --route)"
            )

    @property
    def description(self) -> dict[str, Any] | str:
        """All on which the route depends, besides data and seed, as plain values."""
        if self.given is not None:
            indices = {layer: list(chosen) for layer, chosen in self.given.indices.items()}
            return hashlib.sha256(json.dumps(indices).encode()).hexdigest()
        settings = self.settings
        return {
            "share": settings.route_samples,
            "refresh": settings.refresh,
            "compare_full": settings.compare_full,
            **asdict(settings.trace),
            "attack": str(self.attack) if settings.trace.follows_noise else None,
        }

    def due(self, epoch: int) -> bool:
        """Whether the route is traced anew before this epoch; the one before the first is no renewal."""
        refresh = self.settings.refresh
        return refresh is not None and epoch > 1 and (epoch - 1) % refresh == 0

    def first(self, model: nn.Module, data: Dataset[Any], seed: int) -> tuple[Route, RouteOverlap | None]:
        """The route to begin with, and its overlap with that of all samples, where they are to be compared."""
        if self.given is not None:
            return self.given, None
        route = self.trace(model, data, seed, self.settings.route_samples)
        if not self.settings.compare_full or self.settings.route_samples == 1:
            return route, None
        return route, RouteOverlap.between(route, self.trace(model, data, seed, 1.0))

    def trace(self, model: nn.Module, data: Dataset[Any], seed: int, share: float) -> Route:
        """The model route of a share of the samples (Eqs. (1)-(8))."""
        total = count_samples(data, "training data")
        samples = max(1, round(share * total))
        order = torch.randperm(total, generator=derived_generator(seed, "route", 0))
        drawn = Subset(data, order[:samples].sort().values.tolist())
        loader = load(drawn, in_order(samples, _TRACED_BATCH), generator=torch.Generator())
        config = replace(self.settings.trace, seed=seed)
        attack = self.attack if config.follows_noise else None
        return trace_routes(model, loader, _INSTANCE_WIDTH, attack=attack, config=config).aggregate(_WIDTH)


def targeted(route: Route, target: str, seed: int) -> Route:
    """The neurons to punish: the route's, as many random ones off it in each layer, or all of its layers."""
    if target == RANDOM:
        return route.random_like(derived_seed(seed, "random target", 0))
    if target == ALL:
        return Route({layer: range(count) for layer, count in route.channels.items()}, route.channels)
    return route
