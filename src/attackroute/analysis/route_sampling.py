"""How few samples give a model's route: the part of the full route that a random part of the samples finds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attackroute.analysis.tables import Record
from attackroute.core.errors import UserError
from attackroute.hardening.route_source import RouteOverlap
from attackroute.routes.instance_routes import InstanceRoutes

SHARES = (0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Draw:
    """One random part of the samples.

    Attributes:
        share: Share of the samples.
        seed: Which draw.
        samples: How many these are.
        overlap: The route of these samples beside that of all.
    """

    share: float
    seed: int
    samples: int
    overlap: RouteOverlap


@dataclass(frozen=True)
class RouteSampling:
    """Model routes of random parts of the samples beside that of all of them.

    Attributes:
        draws: The parts.
        width: Share of a layer's channels on the model routes.
        samples: How many samples there are.
    """

    draws: tuple[Draw, ...]
    width: float
    samples: int

    def shared(self, share: float) -> list[float]:
        """Share of neurons on both routes, one number for each draw."""
        return [draw.overlap.share for draw in self.draws if draw.share == share]

    def reading(self) -> str:
        """One sentence with the mean at each share."""
        parts = [
            f"{share:.0%} of them {statistics.fmean(self.shared(share)):.1%}"
            for share in dict.fromkeys(draw.share for draw in self.draws)
        ]
        return f"Of the route of {self.samples} samples, the route of {', '.join(parts)} has the same neurons."

    def records(self) -> list[Record]:
        """The draws as a tidy table."""
        return [
            {
                "share": draw.share,
                "draw": draw.seed,
                "samples": draw.samples,
                "shared": draw.overlap.shared,
                "neurons": draw.overlap.size,
                "share_of_neurons": draw.overlap.share,
                "least_in_a_layer": draw.overlap.least,
            }
            for draw in self.draws
        ]

    def about(self) -> dict[str, Any]:
        """What the draws have in common."""
        return {"experiment": "route sampling", "width": self.width, "samples": self.samples}


def sample_route(
    routes: InstanceRoutes, shares: Sequence[float] = SHARES, *, width: float = 0.3, seeds: Sequence[int] = range(5)
) -> RouteSampling:
    """Compare model routes of random parts of the samples with the model route of all.

    Args:
        routes: Routes of all samples.
        shares: Shares of the samples, in (0, 1].
        width: Width of the model routes.
        seeds: One random part of each size for each.

    Raises:
        UserError: There are no routes, or a share is out of range.
    """
    if not len(routes) or not seeds:
        raise UserError("no routes, or no seeds, so there is nothing to compare")
    full = routes.aggregate(width)
    draws = []
    for share in shares:
        if not 0 < share <= 1:
            raise UserError(f"a share of {share} of the samples is outside (0, 1]")
        count = max(1, round(share * len(routes)))
        for seed in seeds:
            order = torch.randperm(len(routes), generator=torch.Generator().manual_seed(seed))
            part = routes.select(order[:count].sort().values).aggregate(width)
            draws.append(Draw(share, seed, count, RouteOverlap.between(part, full)))
    return RouteSampling(tuple(draws), width, len(routes))
