"""Sensitivity: how much neurons move under attack, and how much the loss moves with them (Figs. 2a and 2b)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor

from attackroute.analysis.channel_statistics import ChannelMeans, RunningMean, changes, gradients, in_units, labelled
from attackroute.analysis.controls import RANDOM, ROUTE, Comparison, layer_sets
from attackroute.analysis.experiment import ExperimentResult, Work, experiment
from attackroute.analysis.figures import style
from attackroute.analysis.study import Study
from attackroute.core.errors import UserError
from attackroute.core.table import Record, Table
from attackroute.robustness.attack import Attack, attacked
from attackroute.robustness.registry import named_attacks
from attackroute.tracing.deviations import Deviations
from attackroute.tracing.trace import Progress

SENSITIVITY, GRADIENT = "sensitivity", "gradient"
_QUANTILES = {"minimum": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "maximum": 1.0}
_Quantity = tuple[str, "str | None"]  # with its attack


@dataclass(frozen=True, kw_only=True)
class Sensitivity(ExperimentResult):
    """Sensitivities and gradients of the route's neurons and of others.

    Attributes:
        table: How a quantity is distributed over a set of neurons of a layer, a row each. Its ``quantity`` is
            ``"sensitivity"`` to an attack, or ``"gradient"`` of the loss on clean images, whose ``attack`` is None;
            ``criterion`` is what chose the neurons, ``"off-route"`` all that are not on the route; mean and quantiles
            are over the neurons, of their means over samples.
    """

    kind = "sensitivity"
    share: float  # of each layer's channels in a set
    samples: int  # that were read; all of them count

    @property
    def quantities(self) -> tuple[_Quantity, ...]:
        """Quantities, each with its attack."""
        return tuple(dict.fromkeys((row["quantity"], row["attack"]) for row in self.table))

    def rows(self, layer: str, quantity: str, attack: str | None, criterion: str) -> list[Record]:
        """The distributions of one set, one for each draw."""
        return list(self.table.select(layer=layer, quantity=quantity, attack=attack, criterion=criterion))

    @cached_property
    def verdicts(self) -> Table:
        """For each layer and control: the route's mean over the control's, and whether it beats every draw."""
        verdicts = []
        for (quantity, attack), layer, criterion in product(self.quantities, self.layers, self.criteria[1:]):
            (route,) = (row["mean"] for row in self.rows(layer, quantity, attack, ROUTE))
            means = [row["mean"] for row in self.rows(layer, quantity, attack, criterion)]
            if means:
                mean = statistics.fmean(means)
                label = {"layer": layer, "quantity": quantity, "attack": attack, "control": criterion}
                verdict = {"beats": route > max(means), "loses": route < min(means)}
                verdicts.append({**label, "route_over_control": route / mean if mean else None, **verdict})
        return Table.of(verdicts)

    def reading(self) -> str:
        """One sentence: in how many layers the route's mean is higher than the others', by quantity and control."""
        clauses = []
        for quantity, attack in self.quantities:
            counts = []
            for criterion in self.criteria[1:]:
                beats = self.verdicts.select(quantity=quantity, attack=attack, control=criterion).column("beats")
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
            "verdicts": self.verdicts.to_json(),
        }

    def figures(self) -> dict[str, style.Figure]:
        """``sensitivity`` (Fig. 2): for each quantity the means over each set's neurons, draws with their range."""
        layers, panels = self.layers, self.quantities
        figure = style.new_figure(max(5.0, 0.52 * len(layers) + 1.2), 2.2 * len(panels) + 1.3)
        handles: dict[str, Any] = {}
        column = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, quantity in zip(column, panels, strict=True):
            for criterion in self.criteria:
                rows = {place: self.rows(layer, *quantity, criterion) for place, layer in enumerate(layers)}
                means = {place: [row["mean"] for row in of_layer] for place, of_layer in rows.items() if of_layer}
                line = style.draw_spread(axes, list(means), list(means.values()), criterion)
                handles[style.label(criterion, max(map(len, means.values())))] = line
            axes.set_yscale("log")
            axes.set_title(_title(*quantity), fontsize=8.5, loc="left")
            style.tidy(axes)
        style.upright_layers(axes, layers)
        title = f"Means over the neurons on the route ({self.share:.0%} of each layer) and off it"
        figure.suptitle(f"{title}\n{self.samples} images", fontsize=9)
        style.shared_legend(figure, handles, 3)
        return {"sensitivity": figure}


@experiment("sensitivity", order=2, title="Sensitivity and gradients of the route's channels", work=Work(1))
def run(study: Study, progress: Progress) -> Sensitivity:
    """How much neurons move under attack, and the loss with them (Fig. 2)."""
    return measure_sensitivity(study.comparison(progress), study.named_attacks, study.traced.deviations)


def measure_sensitivity(
    compared: Comparison, attacks: Mapping[str, Attack | str], deviations: Deviations | None = None
) -> Sensitivity:
    """Distributions of sensitivity and gradient over the route's neurons, over all others, and over controls.

    All images count, also those that the network gets wrong. With deviations, both are in units of these.
    """
    named = named_attacks(attacks)
    model, share, rankings = compared.model, compared.share, compared.rankings()
    means: dict[_Quantity, RunningMean] = {(SENSITIVITY, attack): RunningMean() for attack in named}
    means[GRADIENT, None] = RunningMean()
    samples = 0

    def batch_means(images: Tensor, labels: Tensor | None) -> dict[_Quantity, RunningMean]:
        labels = labelled(labels)
        measured: dict[_Quantity, ChannelMeans] = {(GRADIENT, None): gradients(model, images, labels, linear=True)}
        for name, attack in named.items():
            moved, _ = attacked(model, attack, images, labels)
            measured[SENSITIVITY, name] = changes(model, images, moved, linear=True)
        return {key: RunningMean.of(each.on(rankings[0].channels)) for key, each in measured.items()}

    for number, batch in compared.measured(batch_means):
        samples += number
        for key, mean in batch.items():
            means[key].add(mean)
    if not samples:
        raise UserError("the data hold no sample: the loader is empty")
    levels = torch.tensor(list(_QUANTILES.values()), dtype=torch.float64)
    rows: list[Record] = []
    for (quantity, under), mean in means.items():
        by_layer = in_units(mean.by_layer(), deviations, 1 if quantity == GRADIENT else -1)
        for layer in rankings[0].channels:
            for (criterion, draw), mask in layer_sets(rankings, layer, share).items():
                numbers = by_layer[layer][mask]
                if len(numbers):
                    label: Record = {"quantity": quantity, "attack": under, "criterion": criterion, "draw": draw}
                    quantiles = dict(zip(_QUANTILES, torch.quantile(numbers, levels).tolist(), strict=True))
                    label |= {"neurons": len(numbers), "mean": float(numbers.mean())}
                    rows.append({"layer": layer, **label, **quantiles})
    return Sensitivity(table=Table.of(rows), share=share, samples=samples)


def _title(quantity: str, attack: str | None) -> str:
    return f"{quantity} to {attack}" if attack else quantity
