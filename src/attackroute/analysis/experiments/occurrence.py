"""Occurrence: how much the routes of samples have in common (Table 1), and how much routes do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch

from attackroute.analysis.controls import ROUTE, sample_routes
from attackroute.analysis.experiment import ExperimentResult, Work, experiment
from attackroute.analysis.figures.style import draw_spread, look, new_figure, shared_legend, tidy, upright_layers
from attackroute.analysis.study import SAMPLE_WIDTH, Study
from attackroute.core.errors import UserError
from attackroute.core.table import Record, Table
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.layer_map import require_same
from attackroute.routes.masks import kept
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OCCURRENCE, OVERLAP, CLASSES = "occurrence", "overlap", "overlap of classes"
RANDOM_ROUTES = "random routes"


@dataclass(frozen=True, kw_only=True)
class Occurrence(ExperimentResult):
    """Occurrence and overlap, layer by layer.

    Attributes:
        table: One number a row. Its ``measure`` is ``"occurrence"``, mean frequency of the most frequent channels over
            samples, ``"overlap"``, Jaccard index of two model routes, or ``"overlap of classes"``, its mean over all
            pairs of classes' routes; ``of`` is whose routes, ``beside`` the other route of an overlap, ``draw`` the
            number of a random draw, and ``chance`` what an overlap is between random sets of the same sizes, in the
            mean.
    """

    kind = "occurrence"
    table: Table
    width: float  # share of a layer's channels on each sample's route, and of those that an occurrence is the mean over
    route_width: float  # and on a model route
    samples: int

    def names(self, measure: str) -> tuple[tuple[str, str | None], ...]:
        """Whose numbers there are of a measure, and beside what."""
        return tuple(dict.fromkeys((row["of"], row["beside"]) for row in self.table.select(measure=measure)))

    def values(self, layer: str, measure: str, of: str, beside: str | None = None) -> list[float]:
        """The numbers of one layer, one for each random draw."""
        return self.table.select(layer=layer, measure=measure, of=of, beside=beside).column("value")

    def reading(self) -> str:
        """One sentence: the range of occurrences, beside random routes, and the overlaps' means."""
        first = self.names(OCCURRENCE)[0][0]
        occurrence = {layer: self.values(layer, OCCURRENCE, first)[0] for layer in self.layers}
        low, high = min(occurrence, key=occurrence.__getitem__), max(occurrence, key=occurrence.__getitem__)
        exceeded = [
            f"{name} in {sum(occurrence[layer] > max(self.values(layer, OCCURRENCE, name)) for layer in self.layers)}"
            for name, _ in self.names(OCCURRENCE)[1:]
        ]
        overlaps = [
            f"{beside} {statistics.fmean(self.values(layer, OVERLAP, of, beside)[0] for layer in self.layers):.2f}"
            for of, beside in self.names(OVERLAP)
        ]
        clauses = [
            f"The most frequent {self.width:.0%} of channels are on {occurrence[low]:.0%} ({low}) to "
            f"{occurrence[high]:.0%} ({high}) of {first} samples' routes"
        ]
        if exceeded:
            clauses.append(f"more than those of {', '.join(exceeded)} of {len(self.layers)} layers")
        if overlaps:
            chance = self.table.mean("chance")
            clauses.append(f"Jaccard index with the route of {', '.join(overlaps)} (by chance {chance:.2f})")
        return "; ".join(clauses) + "."

    def about(self) -> dict[str, Any]:
        """What the numbers have in common."""
        return {"share": self.width, "width": self.width, "route_width": self.route_width, "samples": self.samples}

    def summary(self) -> Table:
        """Occurrence of the route, of random routes, and overlaps with routes of attacked images and of controls."""
        first = self.names(OCCURRENCE)[0][0]
        overlaps = self.names(OVERLAP)
        rows = []
        for layer in self.layers:
            shares = [statistics.fmean(self.values(layer, OCCURRENCE, name)) for name in (first, RANDOM_ROUTES)]
            beside = ", ".join(f"{other} {self.values(layer, OVERLAP, of, other)[0]:.2f}" for of, other in overlaps)
            rows.append((layer, *(f"{share:.1%}" for share in shares), beside or "-"))
        head = ("layer", f"occurrence, {first}", RANDOM_ROUTES, "Jaccard index with the route of")
        return Table(head, tuple(rows))

    def figures(self) -> dict[str, Figure]:
        """``occurrence``: Table 1 as lines over layers."""
        return {"occurrence": _figure(self)}


@experiment("occurrence", order=1, title="Occurrence, clean and attacked", work=Work(1, traces=1))
def run(study: Study, progress: Progress) -> Occurrence:
    """How much samples' routes have in common (Table 1), clean and attacked."""
    # where routes follow noise, there is no route of clean images, and that of the first attack is known
    follows = study.config.follows_noise
    attacks = study.named_attacks
    first, *others = attacks
    routes = {first if follows else "clean": study.routes[ROUTE]}
    for name in others if follows else attacks:
        routes[name] = sample_routes(
            study.model, study.reference, SAMPLE_WIDTH, attack=attacks[name], config=study.config, baselines=(),
            progress=progress,
        )[ROUTE]  # fmt: skip
    routes |= {by: each for by, each in study.routes.items() if by != ROUTE}
    others_by = {by: scores.route(study.share) for by, scores in study.baselines.items() if by not in routes}
    return measure_occurrence(routes, others_by, width=study.share, seeds=study.seeds)


def measure_occurrence(
    routes: Mapping[str, InstanceRoutes],
    baselines: Mapping[str, Route] | None = None,
    *,
    width: float = 0.3,
    seeds: Sequence[int] = range(5),
) -> Occurrence:
    """Table 1 and its controls, from routes alone.

    ``routes`` are instance routes by name, of the same width and layers: those of clean samples first, then, say, of
    attacked ones, or by another criterion. The first one's model route of ``width`` is compared with the others', and
    with ``baselines``. An occurrence is the mean over the most frequent channels, as many as are on each route. What it
    is by chance, random routes say, as many as the first has samples, drawn once for each seed.
    """
    if not routes:
        raise UserError("no instance routes are given")
    first_name, first = next(iter(routes.items()))
    for name, other in routes.items():
        require_same(first.channels, other.channels, f"the routes {name!r}")
    rows: list[Record] = []

    def add(
        measure: str,
        values: Mapping[str, float],
        of: str,
        beside: str | None = None,
        draw: int | None = None,
        chance: Mapping[str, float] | None = None,
    ) -> None:
        for layer, value in values.items():
            label = {"measure": measure, "of": of, "beside": beside, "draw": draw, "value": value}
            by_chance = None if chance is None else chance[layer]
            rows.append({"layer": layer, "channels": first.channels[layer], **label, "chance": by_chance})

    for name, each in routes.items():
        add(OCCURRENCE, each.occurrence(first.width), name)
    for seed in seeds:
        add(OCCURRENCE, _random_occurrence(first, seed), RANDOM_ROUTES, draw=seed)
    model_routes = {name: each.aggregate(width) for name, each in routes.items()}
    route = model_routes.pop(first_name)
    for name, beside in {**model_routes, **(baselines or {})}.items():
        add(OVERLAP, route.jaccard(beside), first_name, beside=name, chance=_chance(route, beside))
    pairs = [] if first.labels is None else list(combinations(first.by_label(width).values(), 2))
    if pairs:
        overlaps = [left.jaccard(right) for left, right in pairs]
        means = {layer: statistics.fmean(values[layer] for values in overlaps) for layer in first.layers}
        add(CLASSES, means, first_name, chance=_chance(*pairs[0]))
    return Occurrence(table=Table.of(rows), width=first.width, route_width=width, samples=len(first))


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


def _random_occurrence(routes: InstanceRoutes, seed: int) -> dict[str, float]:
    """Occurrence of as many random routes of the same width."""
    generator = torch.Generator().manual_seed(seed)
    occurrence = {}
    for layer, count in routes.channels.items():
        frequency = torch.zeros(count, dtype=torch.float64)
        for start in range(0, len(routes), 4096):
            block = min(4096, len(routes) - start)
            chosen = torch.rand(block, count, generator=generator).topk(kept(routes.width, count), dim=1).indices
            frequency += torch.bincount(chosen.flatten(), minlength=count)
        occurrence[layer] = float(frequency.topk(kept(routes.width, count)).values.mean()) / len(routes)
    return occurrence


def _figure(result: Occurrence) -> Figure:
    """Occurrence of routes by several criteria; Jaccard index of the route with others, and of classes' routes."""
    layers = result.layers
    figure = new_figure(max(6.4, 0.42 * len(layers) + 1.5), 5.4)
    upper, lower = figure.subplots(2, 1, sharex=True)
    handles: dict[str, Any] = {}
    for name, _ in result.names(OCCURRENCE):
        values = [[100 * value for value in result.values(layer, OCCURRENCE, name)] for layer in layers]
        draws = f" (mean, range of {len(values[0])})" if len(values[0]) > 1 else ""
        line = draw_spread(upper, range(len(layers)), values, name)
        handles[f"{name}{' images' if not handles else ''}{draws}"] = line
    upper.set_ylim(0, 104)
    upper.set_ylabel("occurrence in %", fontsize=9)
    title = f"Mean frequency of the most frequent {result.width:.0%} of channels on {result.samples} images' routes"
    upper.set_title(title, fontsize=9)
    classes: dict[str, Any] = {"color": "#555555", "linewidth": 1, "linestyle": "--"}
    overlaps = [(OVERLAP, of, beside, beside, look(str(beside))) for of, beside in result.names(OVERLAP)]
    overlaps += [(CLASSES, of, None, "pairs of classes (mean)", classes) for of, _ in result.names(CLASSES)]
    for measure, of, beside, text, style in overlaps:
        (line,) = lower.plot([result.values(layer, measure, of, beside)[0] for layer in layers], **style)
        handles.setdefault(str(text), line)
    chance = {row["layer"]: row["chance"] for row in result.table if row["chance"] is not None}
    if chance:
        (line,) = lower.plot([chance[layer] for layer in layers], color="black", linewidth=0.9, linestyle=":")
        handles["by chance"] = line
    lower.set_ylim(0, 1.04)
    lower.set_ylabel("Jaccard index", fontsize=9)
    lower.set_title(f"Overlap of the route ({result.route_width:.0%} of the channels) with other routes", fontsize=9)
    for axes in (upper, lower):
        tidy(axes)
    upright_layers(lower, layers)
    shared_legend(figure, handles, 4)
    return figure
