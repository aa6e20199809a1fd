"""What the routes of many samples come to together: counts that add up exactly, whichever files they are in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attackroute.core.document import Document
from attackroute.routes.instance_routes import (
    Edge,
    InstanceRoutes,
    joined_methods,
    mean_of_most_frequent,
)
from attackroute.routes.layer_map import require_same
from attackroute.routes.masks import usage_counts
from attackroute.routes.provenance import Provenance
from attackroute.routes.route import Route

TRACE = "trace"
"""Kind of the document in which a trace is summed up."""


@dataclass(frozen=True, eq=False)
class RouteTotals:
    """Sums over the samples of some routes.

    Attributes:
        channels: Channel count of each layer, in forward order.
        provenance: Where the routes come from.
        methods: For each edge (source, target), how its influence was computed.
        usage: For each layer, how many samples' routes use each channel, int64 (C,).
        correct: Samples whose prediction is their label; None where there are no labels.
        sketches: For each layer with sketched edges the sums over the samples of their draws, of their expected overlap
            and of the share of their channels that is undecided.
    """

    channels: Mapping[str, int]
    provenance: Provenance
    methods: Mapping[Edge, str]
    usage: Mapping[str, Tensor]
    correct: int | None
    sketches: Mapping[str, tuple[float, ...]]

    @classmethod
    def of(cls, routes: InstanceRoutes) -> RouteTotals:
        """The totals of routes in memory."""
        sketches: dict[str, tuple[float, ...]] = {}
        if routes.sketched is not None:
            for layer in routes.sketched.layers:
                undecided = routes.sketched.undecided(layer).double().mean(1)
                values = (routes.sketched.draws[layer], routes.sketched.overlap[layer], undecided)
                sketches[layer] = tuple(value.double().sum().item() for value in values)
        labels, predictions = routes.labels, routes.predictions
        return cls(
            routes.channels,
            routes.provenance,
            routes.methods,
            usage={layer: usage_counts(routes.packed[layer], count) for layer, count in routes.channels.items()},
            correct=None if labels is None or predictions is None else int((labels == predictions).sum().item()),
            sketches=sketches,
        )

    @classmethod
    def sum(cls, parts: Sequence[RouteTotals]) -> RouteTotals:
        """The totals of several sets of samples together, in their order.

        Raises:
            UserError: They have different layers.
        """
        first = parts[0]
        for number, totals in enumerate(parts[1:], start=2):
            require_same(first.channels, totals.channels, f"part {number}")
        correct = [totals.correct for totals in parts if totals.correct is not None]
        return cls(
            first.channels,
            Provenance.merge([totals.provenance for totals in parts]),
            joined_methods([totals.methods for totals in parts]),
            usage={layer: sum(totals.usage[layer] for totals in parts) for layer in first.channels},  # type: ignore[misc]
            correct=sum(correct) if len(correct) == len(parts) else None,
            sketches={
                layer: tuple(map(sum, zip(*(totals.sketches[layer] for totals in parts), strict=True)))
                for layer in first.sketches
            },
        )

    def __len__(self) -> int:
        return self.provenance.samples

    def frequency(self) -> dict[str, Tensor]:
        """Share of the samples whose route uses each channel, float64 (C,) for each layer."""
        return {layer: counts.double() / len(self) for layer, counts in self.usage.items()}

    def aggregate(self, width: float) -> Route:
        """The model route (Eqs. (7)-(8))."""
        return Route.from_frequency(self.frequency(), width, self.provenance)

    def document(self, route: Route, settings: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> Document:
        """What is to be said of a trace: the same for every run with the same result.

        Args:
            route: The model's route.
            settings: All on which the routes depend, as JSON values.
            about: More to be said.
        """
        occurrence = mean_of_most_frequent(self.frequency(), self.provenance.width)
        accuracy = None if self.correct is None else self.correct / len(self)
        layers = [
            {
                "layer": layer,
                "channels": count,
                "route_channels": list(route.indices[layer]),
                "occurrence": occurrence[layer],
                "incoming": {source: method for (source, target), method in self.methods.items() if target == layer},
                **self._certainty(layer),
            }
            for layer, count in self.channels.items()
        ]
        summary = {
            "samples": len(self),
            "accuracy": accuracy,
            "attack": self.provenance.attack,
            "criterion": self.provenance.criterion,
            "width": self.provenance.width,
            "route_width": None if route.provenance is None else route.provenance.width,
            "layers": layers,
        }
        reading = f"The network is right on {accuracy:.1%} of {len(self)} samples." if accuracy is not None else ""
        return Document(TRACE, settings, reading, about={**(about or {}), **summary})

    def _certainty(self, layer: str) -> dict[str, float]:
        """How far the layer's routes can be trusted, where they rest on sketches: means over the samples."""
        if layer not in self.sketches:
            return {}
        means = [total / len(self) for total in self.sketches[layer]]
        return dict(zip(("sketches", "expected_overlap", "undecided"), means, strict=True))
