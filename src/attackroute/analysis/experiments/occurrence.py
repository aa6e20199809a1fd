"""Occurrence: how much the routes of samples have in common (Table 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attackroute.analysis.controls import ROUTE
from attackroute.analysis.experiment import ExperimentResult, Work, experiment
from attackroute.analysis.figures import style
from attackroute.analysis.study import SAMPLE_WIDTH, Study
from attackroute.core.errors import UserError
from attackroute.core.table import Table
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.layer_map import require_same
from attackroute.routes.masks import kept
from attackroute.tracing.trace import Progress, trace_routes

OCCURRENCE = "occurrence"
RANDOM_ROUTES = "random routes"


@dataclass(frozen=True, kw_only=True)
class Occurrence(ExperimentResult):
    """Occurrence, layer by layer.

    Attributes:
        table: One ``value`` a row, mean frequency of the most frequent channels over samples; ``of`` is whose routes,
            ``draw`` the number of a random draw.
    """

    kind = "occurrence"
    width: float  # share of a layer's channels on each sample's route, and of those that an occurrence is the mean over
    samples: int

    @property
    def names(self) -> tuple[str, ...]:
        """Whose numbers there are, those of the route first."""
        return tuple(self.table.distinct("of"))

    def values(self, layer: str, of: str) -> list[float]:
        """The numbers of one layer, one for each random draw."""
        return self.table.select(layer=layer, of=of).column("value")

    def reading(self) -> str:
        """One sentence: the range of occurrences, and in how many layers they exceed the others'."""
        first, *others = self.names
        occurrence = {layer: self.values(layer, first)[0] for layer in self.layers}
        low, high = min(occurrence, key=occurrence.__getitem__), max(occurrence, key=occurrence.__getitem__)
        exceeded = [
            f"{name} in {sum(occurrence[layer] > max(self.values(layer, name)) for layer in self.layers)}"
            for name in others
        ]
        more = f"; more than those of {', '.join(exceeded)} of {len(self.layers)} layers" if exceeded else ""
        return (
            f"The most frequent {self.width:.0%} of channels are on {occurrence[low]:.0%} ({low}) to "
            f"{occurrence[high]:.0%} ({high}) of {first} samples' routes{more}."
        )

    def figures(self) -> dict[str, style.Figure]:
        """``occurrence``: Table 1 as lines over layers, of routes by several criteria."""
        layers = self.layers
        figure = style.new_figure(max(6.4, 0.42 * len(layers) + 1.5), 3.9)
        axes = figure.subplots()
        handles: dict[str, Any] = {}
        for name in self.names:
            values = [[100 * value for value in self.values(layer, name)] for layer in layers]
            line = style.draw_spread(axes, range(len(layers)), values, name)
            handles[style.label(f"{name}{' images' if not handles else ''}", len(values[0]))] = line
        axes.set_ylim(0, 104)
        axes.set_ylabel("occurrence in %", fontsize=9)
        title = f"Mean frequency of the most frequent {self.width:.0%} of channels on {self.samples} images' routes"
        axes.set_title(title, fontsize=9)
        style.tidy(axes)
        style.upright_layers(axes, layers)
        style.shared_legend(figure, handles, 4)
        return {"occurrence": figure}


@experiment("occurrence", order=1, title="Occurrence, clean and attacked", work=Work(1, traces=1))
def run(study: Study, progress: Progress) -> Occurrence:
    """How much samples' routes have in common (Table 1), clean and attacked."""
    # where routes follow noise, there is no route of clean images, and that of the first attack is known
    follows = study.config.follows_noise
    attacks = study.named_attacks
    first, *others = attacks
    routes = {first if follows else "clean": study.routes[ROUTE]}
    for name in others if follows else attacks:
        routes[name] = trace_routes(
            study.model, study.reference, SAMPLE_WIDTH, attack=attacks[name], config=study.traced, progress=progress
        )
    routes |= {by: each for by, each in study.routes.items() if by != ROUTE}
    return measure_occurrence(routes, seeds=study.seeds)


def measure_occurrence(routes: Mapping[str, InstanceRoutes], *, seeds: Sequence[int] = range(5)) -> Occurrence:
    """Table 1 and its controls, from routes alone.

    ``routes`` are instance routes by name, of the same width and layers: those of clean samples first, then, say, of
    attacked ones, or by another criterion. An occurrence is the mean over the most frequent channels, as many as are on
    each route. What it is by chance, random routes say, as many as the first has samples, drawn once for each seed.
    """
    if not routes:
        raise UserError("no instance routes are given")
    first = next(iter(routes.values()))
    for name, other in routes.items():
        require_same(first.channels, other.channels, f"the routes {name!r}")
    series = [
        *((name, None, each.occurrence(first.width)) for name, each in routes.items()),
        *((RANDOM_ROUTES, seed, _random_occurrence(first, seed)) for seed in seeds),
    ]
    table = Table.of(
        {"layer": layer, "channels": count, "measure": OCCURRENCE, "of": name, "draw": draw, "value": values[layer]}
        for name, draw, values in series
        for layer, count in first.channels.items()
    )
    return Occurrence(table=table, width=first.width, samples=len(first))


def _random_occurrence(routes: InstanceRoutes, seed: int) -> dict[str, float]:
    """Occurrence of as many random routes of the same width."""
    generator = torch.Generator().manual_seed(seed)
    occurrence = {}
    for layer, count in routes.channels.items():
        chosen = torch.rand(len(routes), count, generator=generator).topk(kept(routes.width, count), dim=1).indices
        frequency = torch.bincount(chosen.flatten(), minlength=count).double()
        occurrence[layer] = float(frequency.topk(kept(routes.width, count)).values.mean()) / len(routes)
    return occurrence
