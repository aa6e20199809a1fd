"""Responses: how much neurons move under attack, and how much the loss moves with them (Figs. 2a and 2b)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.analysis.channel_means import Measured, RunningMean, changes, gradients
from attackroute.analysis.passes import counted_passes
from attackroute.analysis.rankings import RANDOM, ROUTE, Rivals, layer_sets, rank
from attackroute.analysis.tables import Record
from attackroute.core.batches import BatchStream, Data
from attackroute.core.errors import UserError
from attackroute.core.model_state import frozen
from attackroute.robustness.attack import Attack, attacked
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress

SENSITIVITY, GRADIENT = "sensitivity", "gradient"


_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


_NAMES = ("minimum", "q05", "q25", "median", "q75", "q95", "maximum")


@dataclass(frozen=True)
class Row:
    """How one quantity is distributed over one set of neurons of a layer.

    Attributes:
        layer: The layer.
        quantity: ``"sensitivity"`` to an attack, or ``"gradient"`` of the loss.
        attack: The attack; None for gradients, which are those of clean images.
        criterion: What chose the neurons; ``"off-route"`` are all that are not on the route.
        draw: Seed of the random draw; None for other criteria.
        neurons: How many there are.
        mean: Mean over the neurons, of their means over samples.
        quantiles: Over the neurons: minimum, 5, 25, 50, 75 and 95 %, maximum.
    """

    layer: str
    quantity: str
    attack: str | None
    criterion: str
    draw: int | None
    neurons: int
    mean: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Responses:
    """Sensitivities and gradients of the route's neurons and of others.

    Attributes:
        rows: The distributions.
        share: Share of each layer's channels in a set.
        samples: Samples that were read; all of them count.
        forward_passes: Forward passes of the model, one for a batch, those of attacks included.
    """

    rows: tuple[Row, ...]
    share: float
    samples: int
    forward_passes: int

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers in forward order."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))

    @property
    def criteria(self) -> tuple[str, ...]:
        """Criteria in the order in which they were measured."""
        return tuple(dict.fromkeys(row.criterion for row in self.rows))

    @property
    def quantities(self) -> tuple[tuple[str, str | None], ...]:
        """Quantities, each with its attack."""
        return tuple(dict.fromkeys((row.quantity, row.attack) for row in self.rows))

    def of(self, layer: str, quantity: str, attack: str | None, criterion: str) -> list[Row]:
        """The distributions of one set, one for each draw."""
        wanted = (layer, quantity, attack, criterion)
        return [row for row in self.rows if (row.layer, row.quantity, row.attack, row.criterion) == wanted]

    def verdicts(self) -> list[dict[str, Any]]:
        """For each layer and control: the route's mean over the control's, and whether it beats every draw."""
        found = []
        for quantity, attack in self.quantities:
            for layer in self.layers:
                (ours,) = self.of(layer, quantity, attack, ROUTE)
                for criterion in (name for name in self.criteria if name != ROUTE):
                    theirs = [row.mean for row in self.of(layer, quantity, attack, criterion)]
                    if theirs:
                        mean = statistics.fmean(theirs)
                        found.append(
                            {
                                "layer": layer,
                                "quantity": quantity,
                                "attack": attack,
                                "control": criterion,
                                "route_over_control": ours.mean / mean if mean else None,
                                "beats": ours.mean > max(theirs),
                                "loses": ours.mean < min(theirs),
                            }
                        )
        return found

    def reading(self) -> str:
        """One sentence: in how many layers the route's mean is higher than the others', by quantity and control."""
        verdicts = self.verdicts()
        texts = []
        for quantity, attack in self.quantities:
            parts = []
            for criterion in (name for name in self.criteria if name != ROUTE):
                own = [
                    each
                    for each in verdicts
                    if (each["quantity"], each["attack"], each["control"]) == (quantity, attack, criterion)
                ]
                name = "every random draw" if criterion == RANDOM else criterion
                parts.append(f"{name} in {sum(each['beats'] for each in own)} of {len(own)}")
            texts.append(f"{quantity}{f' to {attack}' if attack else ''} is higher than {', '.join(parts)}")
        return f"Mean over the route's neurons, by layers: {'; '.join(texts)}."

    def records(self) -> list[Record]:
        """The distributions as a tidy table."""
        return [
            {
                "layer": row.layer,
                "quantity": row.quantity,
                "attack": row.attack,
                "criterion": row.criterion,
                "draw": row.draw,
                "neurons": row.neurons,
                "mean": row.mean,
                **dict(zip(_NAMES, row.quantiles, strict=True)),
            }
            for row in self.rows
        ]

    def about(self) -> dict[str, Any]:
        """What the distributions have in common."""
        return {
            "experiment": "sensitivity",
            "sensitivity_is": "mean over samples of |Z(x) - Z(x')|, mean over positions, at the layer's own output",
            "gradient_is": "mean over clean samples of |dL/dZ|, summed over positions",
            "share": self.share,
            "samples": self.samples,
            "forward_passes": self.forward_passes,
            "verdicts": self.verdicts(),
        }


def compare_responses(
    model: nn.Module,
    data: Data,
    route: Route,
    attacks: Mapping[str, Attack],
    rivals: Rivals | None = None,
    *,
    layers: Sequence[str] | None = None,
    share: float = 0.3,
    seeds: Sequence[int] = range(5),
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Responses:
    """Distributions of sensitivity and gradient over the route's neurons, over all others, and over controls.

    Rank channels on other samples than these.

    Args:
        model: The network.
        data: Labelled images in [0, 1]; all count, also those that the network gets wrong.
        route: The route; its frequencies rank the channels.
        attacks: Attacks by name.
        rivals: Routes by other criteria, or their scores.
        layers: Some of the route's layers; None for all.
        share: Share of each layer's channels.
        seeds: One random set off the route for each.
        batch_size: Rows per forward pass when ``data`` is tensors.
        progress: Called with (samples done, in all or None) after every batch.

    Raises:
        UserError: No attack, no labels, a layer is not on the route, or the route cannot give this share.
    """
    if not attacks:
        raise UserError("no attack is given: pass one by name, such as pgd")
    rankings = rank(route, rivals, seeds, layers)
    names = rankings[0].layers
    means = {(SENSITIVITY, attack): RunningMean() for attack in attacks}
    gradient_mean = RunningMean()

    def once(images: Tensor, labels: Tensor | None) -> tuple[RunningMean, dict[str, RunningMean]]:
        if labels is None:
            raise UserError("the data have no labels: give (images, labels)")
        slope = RunningMean.of(_of_layers(gradients(model, images, labels, linear=True), names))
        moves = {}
        for name, attack in attacks.items():
            moved, _ = attacked(model, attack, images, labels)
            moves[name] = RunningMean.of(_of_layers(changes(model, images, moved, linear=True), names))
        return slope, moves

    with frozen(model), torch.inference_mode(False), counted_passes(model) as count:
        stream = BatchStream(model, data, batch_size)
        for slope, moves in count.map(stream, once):
            gradient_mean.add(slope)
            for name, part in moves.items():
                means[SENSITIVITY, name].add(part)
            if progress is not None:
                progress(gradient_mean.samples, stream.total)
    if not gradient_mean.samples:
        raise UserError("the data hold no sample: the loader is empty")
    values: dict[tuple[str, str | None], dict[str, Tensor]] = {
        (quantity, name): mean.by_layer() for (quantity, name), mean in means.items()
    }
    values[GRADIENT, None] = gradient_mean.by_layer()
    rows = []
    for (quantity, name_of_attack), by_layer in values.items():
        for layer in names:
            for (criterion, draw), chosen in layer_sets(rankings, layer, share).items():
                own_values = by_layer[layer][chosen]
                if len(own_values):
                    rows.append(_row(layer, quantity, name_of_attack, criterion, draw, own_values))
    return Responses(tuple(rows), share, gradient_mean.samples, count.passes)


def _of_layers(measured: Measured, layers: Sequence[str]) -> Measured:
    for layer in layers:
        if layer not in measured.values:
            raise UserError(f"layer {layer!r} of the route did not run: use the model that the route was made for")
    return Measured({layer: measured.values[layer] for layer in layers}, measured.log_factor)


def _row(layer: str, quantity: str, attack: str | None, criterion: str, draw: int | None, values: Tensor) -> Row:
    points = torch.quantile(values, torch.tensor(_QUANTILES, dtype=torch.float64)).tolist()
    return Row(layer, quantity, attack, criterion, draw, len(values), float(values.mean()), tuple(points))
