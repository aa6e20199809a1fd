"""What a page needs beyond the files of a run: measurements of channels, and traces that are not there yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.analysis.channel_statistics import loss_gradient, sensitivity
from attackroute.core.batches import Data, batches
from attackroute.core.model_state import frozen
from attackroute.core.table import Table
from attackroute.report.pictures import take_pictures
from attackroute.robustness.attack import Attack, attack_name, attacked
from attackroute.robustness.registry import by_radius
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.layer_map import require_same
from attackroute.routes.route import Route
from attackroute.tracing.config import RAW, STD, TraceConfig
from attackroute.tracing.influence import MeanInfluence, mean_influence
from attackroute.tracing.trace import Progress, trace_routes

_BATCH = 128


@dataclass(frozen=True)
class Condition:
    """What is known of a network on one kind of images: as they are, or after one attack; None for what is not."""

    attack: str | None  # its name; None for images as they are
    routes: InstanceRoutes | None = None  # of samples
    route: Route | None = None  # the model's as a file has it, whose frequencies serve where there are no samples'
    rows: Sequence[int] | None = None  # which of the routes' samples the page shows
    influence: MeanInfluence | None = None
    gradient: Mapping[str, Tensor] | None = None  # mean loss gradient at each channel, by layer (Fig. 2b)
    sensitivity: Mapping[str, Tensor] | None = None  # what the attack changes of each channel, by layer (Fig. 2a)
    traced: bool = False  # for the page

    @property
    def name(self) -> str:
        """What the images are, in short."""
        return "clean images" if self.attack is None else f"images after {self.attack}"

    @property
    def channels(self) -> Mapping[str, int]:
        """Channels of each layer, in forward order; empty where nothing is known."""
        routes = self.routes if self.routes is not None else self.route
        return {} if routes is None else routes.channels

    @property
    def accuracy(self) -> float | None:
        """Share of the samples that the network gets right; None where it is not known."""
        if self.routes is None or self.routes.labels is None or self.routes.predictions is None:
            return None
        return (self.routes.labels == self.routes.predictions).double().mean().item()

    @property
    def occurrence(self) -> Mapping[str, float]:
        """How often a layer's most frequent channels are on a sample's route; empty without samples' routes."""
        return {} if self.routes is None else self.routes.occurrence(self.routes.width)

    def model_route(self, width: float) -> Route | None:
        """The model's route of these samples, else that of the file."""
        return self.route if self.routes is None else self.routes.aggregate(width)


@dataclass(frozen=True)
class Measured:
    """A network on images as they are, and after attacks, those of one kind by rising radius."""

    clean: Condition
    attacked: tuple[Condition, ...] = ()
    pictures: tuple[str, ...] = ()  # the first images, as data: addresses

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """All of them, clean images first."""
        return (self.clean, *self.attacked)

    @property
    def channels(self) -> Mapping[str, int]:
        """Channels of each layer, in forward order; empty where nothing is known."""
        return next((condition.channels for condition in self.conditions if condition.channels), {})

    @property
    def traced(self) -> InstanceRoutes | None:
        """Routes of samples under the first condition that has them."""
        return next((condition.routes for condition in self.conditions if condition.routes is not None), None)

    def overlap(self, width: float) -> float | None:
        """Mean Jaccard index over layers of the routes of a width, clean and after the last attack."""
        clean, last = self.clean.routes, self.conditions[-1]
        if clean is None or not self.attacked or last.routes is None:
            return None
        rows = self.clean.rows
        if rows is not None and len(rows) == len(last.routes) < len(clean):  # the same images
            clean = clean.select(list(rows))
        shared = clean.aggregate(width).jaccard(last.routes.aggregate(width))
        return sum(shared.values()) / len(shared)


@dataclass(frozen=True)
class Share:
    """A share and its 95 % interval, which a table of a page shows as a bar and in per cent."""

    value: float
    interval: tuple[float, float] | None = None


def occurrence_table(measured: Measured, route: Route | None) -> Table:
    """How often a layer's most frequent channels are on a sample's route, by layer; without rows where unknown."""
    columns = {condition.name: condition.occurrence for condition in measured.conditions if condition.occurrence}
    return Table.of(
        {
            "layer": layer,
            "channels": count,
            "on the route": None if route is None else len(route.indices[layer]),
            **{f"occurrence, {name}": Share(values[layer]) for name, values in columns.items()},
        }
        for layer, count in (measured.channels.items() if columns else ())
    )


def response_table(measured: Measured, route: Route | None) -> Table:
    """Mean sensitivity after the last attack and clean gradient, on the route and off it, by layer; or no rows."""
    last, gradient = measured.conditions[-1], measured.clean.gradient
    if gradient is None or route is None:
        return Table((), ())
    kinds = {} if last.sensitivity is None else {f"sensitivity, {last.name}": last.sensitivity}
    kinds["gradient, clean images"] = gradient
    rows = []
    for layer in route:
        mask = route.mask(layer)
        row: dict[str, object] = {"layer": layer}
        for name, values in kinds.items():
            for where, channels in (("on the route", values[layer][mask]), ("off it", values[layer][~mask])):
                row[f"{name}: {where}"] = channels.mean().item() if len(channels) else None
        rows.append(row)
    return Table.of(rows)


def unmeasured(
    clean: InstanceRoutes | None, attacked: Sequence[InstanceRoutes] = (), route: Route | None = None
) -> Measured:
    """What the files of a run say without its network."""
    return Measured(
        Condition(None, clean, route), tuple(Condition(routes.provenance.attack, routes) for routes in attacked)
    )


def same_samples(ours: InstanceRoutes | None, theirs: InstanceRoutes | None) -> bool:
    """Whether row i of both is the same image, as far as can be told: as many, and their labels agree."""
    if ours is None or theirs is None or len(ours) != len(theirs):
        return False
    labels = ours.labels is not None and theirs.labels is not None and torch.equal(ours.labels, theirs.labels)
    first, second = ours.provenance, theirs.provenance
    return labels and (first.data, first.seed) == (second.data, second.seed)


def measure(
    model: nn.Module,
    data: Data,
    run: Measured,
    attacks: Mapping[str, Attack],
    *,
    rows: Sequence[int] | None = None,
    linear: bool = False,
    width: float = 0.2,
    shown: int = 0,
    progress: Progress | None = None,
) -> Measured:
    """Influence, gradients and sensitivities on clean and on attacked images, and the traces that the run lacks.

    The data are a few images, whose attacked twins are held in memory for one attack at a time: those ``rows`` of the
    run's traced samples, where they are some of them. Attacks bear the names that they have in the run's traces. New
    traces take a ``width``, and the first ``shown`` images become pictures.
    """
    routes_of = [each for condition in run.conditions for each in (condition.routes, condition.route) if each]
    std = any(each.provenance and each.provenance.criterion.endswith(STD) for each in routes_of)
    config = TraceConfig(linear=linear, units=STD if std else RAW).measured(model, data)
    how: dict[str, Any] = {"linear": linear, "units": config.units, "progress": progress}
    influence = mean_influence(model, data, **how)
    for each in routes_of:
        require_same(each.channels, influence.channels, "the model")
    trace = partial(trace_routes, model, width=width, config=config, progress=progress)
    is_traced = run.clean.routes is not None
    clean = replace(
        run.clean,
        routes=run.clean.routes if is_traced else trace(data),
        rows=rows if is_traced else range(influence.samples),
        influence=influence,
        gradient=loss_gradient(model, data, **how),
        traced=not is_traced,
    )
    stored = {condition.attack: condition for condition in run.attacked if condition.routes is not None}
    clean_images = data[0] if isinstance(data, tuple) else data  # of batches, labels do not matter
    measured = []
    for name, attack in attacks.items():
        with frozen(model):
            images = [attacked(model, attack, x, y) for x, y in batches(model, data, _BATCH)]
        if name in stored:
            condition = stored.pop(name)
            condition = replace(condition, rows=rows if same_samples(clean.routes, condition.routes) else None)
        else:
            routes = trace(images)
            routes = replace(routes, provenance=replace(routes.provenance, attack=attack_name(attack)))
            condition = Condition(name, routes, rows=range(influence.samples), traced=True)
        responses: dict[str, Any] = {
            "influence": mean_influence(model, images, **how),
            "gradient": loss_gradient(model, images, **how),
            "sensitivity": sensitivity(model, clean_images, images, **how),
        }
        measured.append(replace(condition, **responses))
    attacked_conditions = sorted([*stored.values(), *measured], key=lambda condition: by_radius(condition.attack or ""))
    return Measured(clean, tuple(attacked_conditions), take_pictures(model, data, shown) if shown else ())
