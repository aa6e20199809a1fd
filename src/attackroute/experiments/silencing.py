"""Does the route matter? Accuracy with its channels silenced, layer by layer, beside controls of the same size.

The idea is Fig. 4(a) of Li et al. (2021); the controls are ours: several random draws off the route, and the channels
that simple criteria would pick.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from attackroute.accuracy import Accuracy, count_correct
from attackroute.interventions import deactivate
from attackroute.routes import Route

ROUTE = "route"
RANDOM = "random off-route"


@dataclass(frozen=True)
class Row:
    """One measurement: one layer's channels silenced.

    Attributes:
        layer: The layer.
        criterion: What chose the channels: ``"route"``, ``"random off-route"``, or the name of a rival.
        draw: Number of the random draw; None for other criteria.
        silenced: How many channels were set to zero.
        channels: How many the layer has.
        accuracy: What was left.
    """

    layer: str
    criterion: str
    draw: int | None
    silenced: int
    channels: int
    accuracy: Accuracy

    def to_json(self) -> dict[str, Any]:
        """The row as plain values."""
        low, high = self.accuracy.interval
        return {
            "layer": self.layer,
            "criterion": self.criterion,
            "draw": self.draw,
            "silenced": self.silenced,
            "channels": self.channels,
            "accuracy": self.accuracy.value,
            "accuracy_interval_95": [low, high],
            "samples": self.accuracy.total,
        }


@dataclass(frozen=True)
class Silencing:
    """Accuracy with one layer's channels silenced, for every layer and criterion.

    Attributes:
        rows: The measurements.
        baseline: Accuracy of the untouched network.
        at: Where channels were set to zero: ``"output"`` of the layer, or after its ``"activation"``.
    """

    rows: tuple[Row, ...]
    baseline: Accuracy
    at: str

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers in forward order."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    @property
    def criteria(self) -> tuple[str, ...]:
        """Criteria in the order in which they were measured."""
        return tuple(dict.fromkeys(row.criterion for row in self.rows))

    def values(self, layer: str, criterion: str) -> list[float]:
        """Accuracies of one layer and criterion, one for each draw."""
        return [row.accuracy.value for row in self.rows if (row.layer, row.criterion) == (layer, criterion)]

    def reading(self) -> str:
        """One sentence: where silencing the route costs more than silencing each control."""
        found = []
        for criterion in (name for name in self.criteria if name != ROUTE):
            beaten = [
                layer for layer in self.layers if self.values(layer, ROUTE)[0] < min(self.values(layer, criterion))
            ]
            found.append(f"{len(beaten)} of {len(self.layers)} against {_named(criterion)}")
        return "Layers in which silencing the route costs more accuracy: " + ", ".join(found) + "."

    def to_json(self) -> dict[str, Any]:
        """The table as plain values."""
        low, high = self.baseline.interval
        return {
            "at": self.at,
            "baseline": {
                "accuracy": self.baseline.value,
                "accuracy_interval_95": [low, high],
                "samples": self.baseline.total,
            },
            "rows": [row.to_json() for row in self.rows],
            "reading": self.reading(),
        }


def silence(
    model: nn.Module,
    data: Dataset[Any],
    route: Route,
    rivals: Mapping[str, Route],
    *,
    seeds: Sequence[int] = range(5),
    at: str = "activation",
    progress: Callable[[int, int | None], None] | None = None,
) -> Silencing:
    """Silence each layer's channels in turn: the route's, rivals' of the same size, and random ones off the route.

    Args:
        model: The network.
        data: Labelled images to measure accuracy on.
        route: The route.
        rivals: Routes of the same size by other criteria, by name.
        seeds: One random draw off the route for each.
        at: See :func:`attackroute.deactivate`.
        progress: Called with the measurements done and in all.
    """
    choices: list[tuple[str, int | None, Route]] = [(ROUTE, None, route)]
    choices += [(RANDOM, seed, route.random_like(seed)) for seed in seeds]
    choices += [(name, None, rival) for name, rival in rivals.items()]
    baseline = count_correct(model, data)
    rows: list[Row] = []
    for layer in route:
        for criterion, draw, choice in choices:
            with deactivate(model, choice, [layer], at=at):
                left = count_correct(model, data)
            rows.append(Row(layer, criterion, draw, len(choice[layer]), route.channels[layer], left))
            if progress is not None:
                progress(len(rows), len(route) * len(choices))
    return Silencing(tuple(rows), baseline, at)


def _named(criterion: str) -> str:
    return "every random draw" if criterion == RANDOM else f"the choice by {criterion}"


def spread(values: Sequence[float]) -> str:
    """Accuracies for a table: one value, or the mean and range of several draws."""
    if len(values) == 1:
        return f"{values[0]:.1%}"
    return f"{statistics.fmean(values):.1%} ({100 * min(values):.0f} to {100 * max(values):.0f})"
