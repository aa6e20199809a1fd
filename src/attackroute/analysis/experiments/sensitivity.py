"""Sensitivity: how much neurons move under attack, and how much the loss moves with them (Figs. 2a and 2b)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attackroute.analysis.channel_statistics import Measured, RunningMean, changes, gradients
from attackroute.analysis.controls import OFF_ROUTE, RANDOM, ROUTE, Comparison, layer_sets
from attackroute.analysis.experiment import ExperimentResult, experiment
from attackroute.analysis.study import Study
from attackroute.core.batches import BatchStream
from attackroute.core.errors import UserError
from attackroute.core.model_state import frozen
from attackroute.core.table import Record, Table
from attackroute.robustness.attack import Attack, attacked
from attackroute.tracing.trace import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SENSITIVITY, GRADIENT = "sensitivity", "gradient"
_QUANTILES = {
    "minimum": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "maximum": 1.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sensitivity(ExperimentResult):
    """Sensitivities and gradients of the route's neurons and of others.

    Attributes:
        table: How a quantity is distributed over a set of neurons of a layer, a row each. Its ``quantity`` is
            ``"sensitivity"`` to an attack, or ``"gradient"`` of the loss on clean images, whose ``attack`` is None;
            ``criterion`` is what chose the neurons, ``"off-route"`` all that are not on the route; mean and quantiles
            are over the neurons, of their means over samples.
        share: Share of each layer's channels in a set.
        samples: Samples that were read; all of them count.
    """

    kind = "sensitivity"
    table: Table
    share: float
    samples: int

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers in forward order."""
        return tuple(self.table.distinct("layer"))

    @property
    def criteria(self) -> tuple[str, ...]:
        """Criteria in the order in which they were measured."""
        return tuple(self.table.distinct("criterion"))

    @property
    def quantities(self) -> tuple[tuple[str, str | None], ...]:
        """Quantities, each with its attack."""
        return tuple(dict.fromkeys((row["quantity"], row["attack"]) for row in self.table))

    def rows(self, layer: str, quantity: str, attack: str | None, criterion: str) -> list[Record]:
        """The distributions of one set, one for each draw."""
        return list(self.table.select(layer=layer, quantity=quantity, attack=attack, criterion=criterion))

    @cached_property
    def verdicts(self) -> list[Record]:
        """For each layer and control: the route's mean over the control's, and whether it beats every draw."""
        verdicts = []
        for quantity, attack in self.quantities:
            for layer in self.layers:
                (route,) = (row["mean"] for row in self.rows(layer, quantity, attack, ROUTE))
                for criterion in (name for name in self.criteria if name != ROUTE):
                    means = [row["mean"] for row in self.rows(layer, quantity, attack, criterion)]
                    if means:
                        mean = statistics.fmean(means)
                        verdicts.append(
                            {
                                "layer": layer,
                                "quantity": quantity,
                                "attack": attack,
                                "control": criterion,
                                "route_over_control": route / mean if mean else None,
                                "beats": route > max(means),
                                "loses": route < min(means),
                            }
                        )
        return verdicts

    def reading(self) -> str:
        """One sentence: in how many layers the route's mean is higher than the others', by quantity and control."""
        verdicts = Table.of(self.verdicts)
        clauses = []
        for quantity, attack in self.quantities:
            counts = []
            for criterion in (name for name in self.criteria if name != ROUTE):
                beats = verdicts.select(quantity=quantity, attack=attack, control=criterion).column("beats")
                name = "every random draw" if criterion == RANDOM else criterion
                counts.append(f"{name} in {sum(beats)} of {len(beats)}")
            clauses.append(f"{_title(quantity, attack)} is higher than {', '.join(counts)}")
        return f"Mean over the route's neurons, by layers: {'; '.join(clauses)}."

    def about(self) -> dict[str, Any]:
        """What the distributions have in common."""
        return {
            "sensitivity_is": "mean over samples of |Z(x) - Z(x')|, mean over positions, at the layer's own output",
            "gradient_is": "mean over clean samples of |dL/dZ|, summed over positions",
            "share": self.share,
            "samples": self.samples,
            "verdicts": self.verdicts,
        }

    def summary(self) -> Table:
        """The route's mean over that of all other neurons."""
        head = ["layer", *(f"{_title(*each)}, route / off-route" for each in self.quantities)]
        rows = []
        for layer in self.layers:
            ratios = []
            for each in self.quantities:
                on_route, off_route = (self.rows(layer, *each, by)[0]["mean"] for by in (ROUTE, OFF_ROUTE))
                ratios.append(f"{on_route / off_route:.2f}" if off_route else "-")
            rows.append((layer, *ratios))
        return Table(tuple(head), tuple(rows))

    def figures(self) -> dict[str, Figure]:
        """``sensitivity``: Fig. 2 as boxes."""
        from attackroute.analysis.figures.sensitivity import sensitivity_figure

        return {"sensitivity": sensitivity_figure(self)}


@experiment(
    "sensitivity",
    order=2,
    title="Sensitivity and gradients of the route's channels",
    help="how much neurons move under attack, and the loss with them (Fig. 2)",
)
def run(study: Study, progress: Progress) -> Sensitivity:
    """The experiment on a study's images."""
    return measure_sensitivity(study.comparison(progress), study.attacks)


def measure_sensitivity(
    compared: Comparison, attacks: Mapping[str, Attack], layers: Sequence[str] | None = None
) -> Sensitivity:
    """Distributions of sensitivity and gradient over the route's neurons, over all others, and over controls.

    Args:
        compared: The route and its controls; all images count, also those that the network gets wrong.
        attacks: Attacks by name.
        layers: Some of the route's layers; None for all.

    Raises:
        UserError: No attack, no labels, a layer is not on the route, or the route cannot give this share.
    """
    if not attacks:
        raise UserError("no attack is given: pass one by name, such as pgd")
    model, share, rankings = compared.model, compared.share, compared.rankings(layers)
    names = rankings[0].layers
    change_means = {attack: RunningMean() for attack in attacks}
    gradient_mean = RunningMean()

    def batch_means(images: Tensor, labels: Tensor | None) -> tuple[RunningMean, dict[str, RunningMean]]:
        if labels is None:
            raise UserError("the data have no labels: give (images, labels)")
        slope = RunningMean.of(_of_layers(gradients(model, images, labels, linear=True), names))
        moves = {}
        for name, attack in attacks.items():
            moved, _ = attacked(model, attack, images, labels)
            moves[name] = RunningMean.of(_of_layers(changes(model, images, moved, linear=True), names))
        return slope, moves

    with frozen(model), torch.inference_mode(False):
        stream = BatchStream(model, compared.data, compared.batch_size)
        for slope, moves in stream.map(batch_means):
            gradient_mean.add(slope)
            for name, move in moves.items():
                change_means[name].add(move)
            if compared.progress is not None:
                compared.progress(gradient_mean.samples, stream.total)
    if not gradient_mean.samples:
        raise UserError("the data hold no sample: the loader is empty")
    values: dict[tuple[str, str | None], dict[str, Tensor]] = {
        (SENSITIVITY, attack): mean.by_layer() for attack, mean in change_means.items()
    }
    values[GRADIENT, None] = gradient_mean.by_layer()
    rows: list[Record] = []
    for (quantity, under), by_layer in values.items():
        for layer in names:
            for (criterion, draw), mask in layer_sets(rankings, layer, share).items():
                numbers = by_layer[layer][mask]
                if len(numbers):
                    label = {"quantity": quantity, "attack": under, "criterion": criterion, "draw": draw}
                    rows.append({"layer": layer, **label, **_distribution(numbers)})
    return Sensitivity(table=Table.of(rows), share=share, samples=gradient_mean.samples)


def _of_layers(measured: Measured, layers: Sequence[str]) -> Measured:
    for layer in layers:
        if layer not in measured.values:
            raise UserError(f"layer {layer!r} of the route did not run: use the model that the route was made for")
    return Measured({layer: measured.values[layer] for layer in layers}, measured.log_factor)


def _distribution(numbers: Tensor) -> Record:
    """How many numbers there are, their mean and their quantiles."""
    quantiles = torch.quantile(numbers, torch.tensor(list(_QUANTILES.values()), dtype=torch.float64)).tolist()
    return {"neurons": len(numbers), "mean": float(numbers.mean()), **dict(zip(_QUANTILES, quantiles, strict=True))}


def _title(quantity: str, attack: str | None) -> str:
    return f"{quantity} to {attack}" if attack else quantity
