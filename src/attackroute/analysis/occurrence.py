"""Occurrence: how much the routes of samples have in common (Table 1), and how much routes do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from attackroute.analysis.tables import Record
from attackroute.core.errors import UserError
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.layer_map import require_same
from attackroute.routes.masks import kept
from attackroute.routes.route import Route

OCCURRENCE, OVERLAP, CLASSES = "occurrence", "overlap", "overlap of classes"


RANDOM_ROUTES = "random routes"


@dataclass(frozen=True)
class Row:
    """One number of one layer.

    Attributes:
        layer: The layer.
        channels: How many channels it has.
        measure: ``"occurrence"``: mean frequency of the most frequent channels over samples; ``"overlap"``: Jaccard
            index of two model routes; ``"overlap of classes"``: its mean over all pairs of classes' routes.
        of: Whose routes.
        beside: The other route of an overlap; else None.
        draw: Number of a random draw; else None.
        value: The number.
        chance: What an overlap is between random sets of the same sizes, in the mean; None for an occurrence, whose
            chance level is measured on random routes.
    """

    layer: str
    channels: int
    measure: str
    of: str
    beside: str | None
    draw: int | None
    value: float
    chance: float | None


@dataclass(frozen=True)
class Occurrence:
    """Occurrence and overlap, layer by layer.

    Attributes:
        rows: The numbers.
        share: Share of a layer's channels that an occurrence is the mean over.
        width: Share of a layer's channels on each sample's route.
        route_width: Share of a layer's channels on a model route.
        samples: Samples whose routes there are.
    """

    rows: tuple[Row, ...]
    share: float
    width: float
    route_width: float
    samples: int

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers in forward order."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    def names(self, measure: str) -> tuple[tuple[str, str | None], ...]:
        """Whose numbers there are of a measure, and beside what."""
        return tuple(dict.fromkeys((row.of, row.beside) for row in self.rows if row.measure == measure))

    def values(self, layer: str, measure: str, of: str, beside: str | None = None) -> list[float]:
        """The numbers of one layer, one for each random draw."""
        wanted = (layer, measure, of, beside)
        return [row.value for row in self.rows if (row.layer, row.measure, row.of, row.beside) == wanted]

    def reading(self) -> str:
        """One sentence: the range of occurrences, beside random routes, and the overlaps' means."""
        first = self.names(OCCURRENCE)[0][0]
        own = {layer: self.values(layer, OCCURRENCE, first)[0] for layer in self.layers}
        low, high = min(own, key=own.__getitem__), max(own, key=own.__getitem__)
        others = [
            f"{name} in {sum(own[layer] > max(self.values(layer, OCCURRENCE, name)) for layer in self.layers)}"
            for name, _ in self.names(OCCURRENCE)[1:]
        ]
        overlaps = [
            f"{beside} {statistics.fmean(self.values(layer, OVERLAP, of, beside)[0] for layer in self.layers):.2f}"
            for of, beside in self.names(OVERLAP)
        ]
        parts = [
            f"The most frequent {self.share:.0%} of channels are on {own[low]:.0%} ({low}) to {own[high]:.0%} ({high}) "
            f"of {first} samples' routes"
        ]
        if others:
            parts.append(f"more than those of {', '.join(others)} of {len(self.layers)} layers")
        if overlaps:
            chance = statistics.fmean(row.chance for row in self.rows if row.chance is not None)
            parts.append(f"Jaccard index with the route of {', '.join(overlaps)} (by chance {chance:.2f})")
        return "; ".join(parts) + "."

    def records(self) -> list[Record]:
        """The numbers as a tidy table."""
        return [
            {
                "layer": row.layer,
                "channels": row.channels,
                "measure": row.measure,
                "of": row.of,
                "beside": row.beside,
                "draw": row.draw,
                "value": row.value,
                "chance": row.chance,
            }
            for row in self.rows
        ]

    def about(self) -> dict[str, Any]:
        """What the numbers have in common."""
        return {
            "experiment": "occurrence",
            "share": self.share,
            "width": self.width,
            "route_width": self.route_width,
            "samples": self.samples,
            "forward_passes": 0,
        }


def tabulate_occurrence(
    routes: Mapping[str, InstanceRoutes],
    rivals: Mapping[str, Route] | None = None,
    *,
    share: float | None = None,
    width: float = 0.3,
    seeds: Sequence[int] = range(5),
) -> Occurrence:
    """Table 1 and its controls, from routes alone.

    Args:
        routes: Instance routes by name, of the same width and layers: those of clean samples first, then, say, of
            attacked ones, of another model, or by another criterion.
        rivals: Further model routes to compare the first one's with.
        share: Share of a layer's channels that an occurrence is the mean over; None for the routes' own width.
        width: Width of the model routes that are compared.
        seeds: One set of random routes for each, as many as the first has samples: what occurrence is by chance.

    Raises:
        UserError: There are no routes, or layers or channel counts differ.
    """
    if not routes:
        raise UserError("no instance routes are given")
    first_name, first = next(iter(routes.items()))
    for name, other in routes.items():
        require_same(first.channels, other.channels, f"the routes {name!r}")
    share = first.width if share is None else share
    rows: list[Row] = []

    def add(
        measure: str,
        values: Mapping[str, float],
        of: str,
        beside: str | None,
        draw: int | None = None,
        chance: Mapping[str, float] | None = None,
    ) -> None:
        rows.extend(
            Row(
                layer,
                first.channels[layer],
                measure,
                of,
                beside,
                draw,
                value,
                None if chance is None else chance[layer],
            )
            for layer, value in values.items()
        )

    for name, own in routes.items():
        add(OCCURRENCE, own.occurrence(share), name, None)
    for seed in seeds:
        add(OCCURRENCE, _random_occurrence(first, share, seed), RANDOM_ROUTES, None, seed)
    model_routes = {name: own.aggregate(width) for name, own in routes.items()}
    route = model_routes.pop(first_name)
    for name, beside in {**model_routes, **(rivals or {})}.items():
        add(OVERLAP, route.jaccard(beside), first_name, name, None, _chance(route, beside))
    if first.labels is not None:
        pairs = list(combinations(first.by_label(width).values(), 2))
        if pairs:
            each = [left.jaccard(right) for left, right in pairs]
            means = {layer: statistics.fmean(values[layer] for values in each) for layer in first.layers}
            add(CLASSES, means, first_name, None, None, _chance(*pairs[0]))
    return Occurrence(tuple(rows), share, first.width, width, len(first))


def chance_jaccard(left: int, right: int, channels: int) -> float:
    """Mean Jaccard index of two independent random sets of these sizes: a sum over the hypergeometric distribution."""
    if left + right == 0:
        return 1.0
    ways = math.comb(channels, right)
    return math.fsum(
        math.comb(left, both) * math.comb(channels - left, right - both) / ways * both / (left + right - both)
        for both in range(max(0, left + right - channels), min(left, right) + 1)
    )


def _chance(left: Route, right: Route) -> dict[str, float]:
    return {
        layer: chance_jaccard(len(left.indices[layer]), len(right.indices[layer]), left.channels[layer])
        for layer in left
    }


def _random_occurrence(routes: InstanceRoutes, share: float, seed: int) -> dict[str, float]:
    """Occurrence of as many random routes of the same width."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer, count in routes.channels.items():
        frequency = torch.zeros(count, dtype=torch.float64)
        for start in range(0, len(routes), _ROWS):
            rows = min(_ROWS, len(routes) - start)
            chosen = torch.rand(rows, count, generator=generator).topk(kept(routes.width, count), dim=1).indices
            frequency += torch.bincount(chosen.flatten(), minlength=count)
        top = frequency.topk(kept(share, count)).values
        found[layer] = float(top.mean()) / len(routes)
    return found


_ROWS = 4096
