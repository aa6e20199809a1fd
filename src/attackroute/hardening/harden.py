"""Hardening: fine-tuning a network with penalties on its critical attacking route (paper, section 5.1)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from attackroute.core.batches import Data, as_dataset, count_samples, drawn_over_classes
from attackroute.core.checks import check_logits
from attackroute.core.errors import UserError, require_known
from attackroute.core.model_state import kept_modes, spared_buffers
from attackroute.core.random import derived_generator, derived_seed, seeded
from attackroute.hardening.checkpoint import EpochRecord
from attackroute.hardening.gradient_penalty import GradientPenalty
from attackroute.hardening.objective import Batch, Objective, StepLosses, samples_of, task_loss
from attackroute.hardening.settings import (
    ALL,
    FINE_TUNING,
    GRADIENT,
    PENALTIES,
    RANDOM,
    STABILISATION,
    WEIGHT,
    HardenSettings,
    TrainSettings,
)
from attackroute.hardening.stabilisation_penalty import StabilisationPenalty
from attackroute.hardening.training import Progress, TrainResult
from attackroute.hardening.training import train as train_network
from attackroute.hardening.weight_penalty import WeightPenalty
from attackroute.robustness.attack import Attack
from attackroute.routes.layer_map import require_model
from attackroute.routes.route import Route
from attackroute.tracing.config import UNITS, TraceConfig
from attackroute.tracing.connections import Connections
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.data import ImageData, drawn

ROUTE_FILE = "route.json"
Samples = Data | ImageData
"""A data set, a DataLoader (for its data set), the images of ``ar.load_data``, or a pair of tensors."""

Factor = float | Mapping[str, float]
"""Lambda: one for all penalties, or one for each by its name."""

_TRAIN = "training data"
_INSTANCE_WIDTH, _WIDTH = 0.2, 0.3  # the paper's
_STRENGTH_SAMPLES = 128


@dataclass(frozen=True)
class RouteOverlap:
    """How much of a route from some samples the route from all of them has too."""

    shared: int  # neurons on both; the two are of one size
    size: int  # neurons of either
    least: float  # the least share of neurons on both, over layers

    @classmethod
    def between(cls, sampled: Route, full: Route) -> RouteOverlap:
        """Compare two routes of one network."""
        return cls((sampled & full).size, sampled.size, min(sampled.overlap(full).values()))

    @property
    def share(self) -> float:
        """Share of the neurons on both; the paper reports 94.6 % for a tenth of the samples."""
        return self.shared / self.size

    def to_json(self) -> dict[str, float]:
        """Counts and shares."""
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        return f"{self.share:.1%} of its neurons ({self.shared} of {self.size}; least in a layer {self.least:.0%})"


@dataclass(frozen=True)
class HardenResult:
    """A finished hardening.

    Attributes:
        training: The epochs; their ``penalties`` are without the factor lambda.
        route: The route; None if nothing was punished.
        strengths: For each penalty, the norm of its gradient over that of the task's, before the first step and for a
            lambda of 1. Lambda times this number is the penalty's share in the first step.
        overlap: How much of the route that of all the training samples has too; None where it was not traced from
            a part of them, or the comparison was not asked for.
    """

    training: TrainResult
    route: Route | None = None
    strengths: Mapping[str, float] = field(default_factory=dict)
    overlap: RouteOverlap | None = None


def harden(
    model: nn.Module,
    train_data: Samples,
    test_data: Samples | None = None,
    *,
    penalty: str | tuple[str, ...] | None = GRADIENT,
    lam: Factor = 0.01,
    attack: Attack | str | None = None,
    route: Route | str | os.PathLike[str] | None = None,
    settings: HardenSettings | None = None,
    train: TrainSettings = FINE_TUNING,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> HardenResult:
    """Fine-tune a network in place with a penalty on its critical attacking route.

    Without an attack this trains the paper's Vanilla_g (``penalty="gradient"``, Eq. (11)) and Vanilla_w (``"weight"``,
    Eq. (14)); with ``attack="pgd"``, PAT_g (Eq. (12)) and PAT_w (Eq. (15)). All that
    :func:`attackroute.train` promises holds: runs repeat bit for bit, and go on after a kill.

    To choose lambda, look at the result's ``strengths``: lambda times the strength is the penalty's share in the first
    step's gradient. Begin where that is about 0.1 and go up by factors of 3 until clean accuracy suffers.

    Args:
        model: Maps images (N, C, H, W) in [0, 1] to logits. It holds the last epoch's weights at the end.
        train_data: What to train on, and to trace the route from, see :data:`Samples`. Order and size of the batches
            are those of ``train``.
        test_data: The same; tested after every epoch.
        penalty: ``"gradient"``, ``"weight"``, ``"stabilisation"`` (what the attack changes on the route, which is not
            the paper's, see :class:`StabilisationPenalty`), a tuple of some, or None for training alone.
        lam: The factor lambda, or one for each penalty by name.
        attack: What to train against, as :func:`attackroute.parse_attack` reads it, or any callable
            ``(model, images, labels) -> images``; None for clean images.
        route: A route or its file; None traces one (width 0.2 a sample, 0.3 for the model), as ``settings`` say.
        settings: Whose neurons are punished, how their route is traced, and how penalties are computed; None for the
            paper's way, ``HardenSettings()``.
        train: Epochs, learning rate and the like.
        folder: Where checkpoints, log and the route are kept; None keeps nothing.
        resume: Go on with the run in the folder; an empty folder starts one.
        on_epoch: Called after every epoch, when its checkpoint is on disk.
        progress: Called after every step with the steps done, the steps in all and a message.
        note: As for training.

    Returns:
        The history and the route.

    Raises:
        UserError: As for training and tracing, or a setting is unknown or out of range.
    """
    settings = settings or HardenSettings()
    names = (penalty,) if isinstance(penalty, str) else tuple(penalty or ())
    if route is not None and settings.trace != TraceConfig(units=settings.trace.units):
        raise UserError(
            "a route is given, so none is traced; leave out linear, sketches and carrier, or trace it with them"
        )
    if not names and route is not None:
        raise UserError("a route is given but no penalty, so nothing would be done with it; leave out one")
    if isinstance(route, (str, os.PathLike)):
        route = Route.load(route, model)
    data, tests = as_dataset(train_data), None if test_data is None else as_dataset(test_data)
    factors = {name: lam.get(name, math.nan) if isinstance(lam, Mapping) else lam for name in names}
    hardening = RouteObjective(factors, attack, settings, route) if names else None
    result = train_network(
        model, data, tests, train,
        objective=hardening or Objective(attack),
        folder=folder, resume=resume, on_epoch=on_epoch, progress=progress, note=note,
    )  # fmt: skip
    if hardening is None:
        return HardenResult(result)
    return HardenResult(result, hardening.route, hardening.strengths, hardening.overlap)


class RouteObjective(Objective):
    """Plain or adversarial training plus penalties on a route's neurons (Eqs. (11), (12), (14), (15)).

    The gradient penalty takes the images that the network learns from, and with an attack the clean ones too (Eq.
    (12)), in a pass of their own that leaves the batch norms' running statistics alone. So does stabilisation, which
    compares the two and needs an attack. Without a route, one is traced from some of the training samples when the run
    starts. ``strengths`` (infinite where the task has no gradient left) and ``overlap`` are those of
    :class:`HardenResult`.

    Raises:
        UserError: A penalty is unknown, a factor is not a number of at least 0, or these do not go together.
    """

    def __init__(
        self,
        factors: Mapping[str, float],
        attack: Attack | str | None = None,
        settings: HardenSettings | None = None,
        route: Route | None = None,
    ) -> None:
        super().__init__(attack)
        settings = settings or HardenSettings()
        for name, factor in factors.items():
            require_known("penalty", name, (*PENALTIES, STABILISATION))
            if isinstance(factor, bool) or not (isinstance(factor, (int, float)) and 0 <= factor < float("inf")):
                raise UserError(f"the factor lambda of the {name} penalty is {factor!r}; give a number of at least 0")
        if STABILISATION in factors and self.attack is None:
            raise UserError(
                "the stabilisation penalty is on what an attack changes: name one to train against, such as "
                "attack='pgd' (--attack pgd)"
            )
        if settings.trace.follows_noise and self.attack is None:
            raise UserError(
                "carrier 'noise' follows what an attack changes: train against one (attack=..., --attack), or give a "
                "route that was traced so (route=..., --route)"
            )
        if settings.trace.units not in UNITS:
            raise UserError("hardening measures deviations by itself: give units='raw' or units='std'")
        self.route, self.strengths = route, dict[str, float]()
        self.overlap: RouteOverlap | None = None
        self._factors, self._hardening, self._seed = dict(factors), settings, 0
        self._given = route
        self._gradient: GradientPenalty | None = None
        self._weight: WeightPenalty | None = None
        self._stabilisation: StabilisationPenalty | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """See :class:`Objective`; a route that is traced depends on these, on the data and the seed."""
        route = None
        if self._given is not None:
            indices = {layer: list(chosen) for layer, chosen in self._given.indices.items()}
            route = hashlib.sha256(json.dumps(indices).encode()).hexdigest()
        return {**super().settings, "factors": self._factors, **asdict(self._hardening), "route": route}

    def start(self, model: nn.Module, data: Dataset[Any], seed: int, state: Mapping[str, Any] | None = None) -> None:
        """Trace the route and compare the penalties' gradients with the task's, or take both back."""
        settings, self._seed = self._hardening, seed
        if state is not None:
            self.route = Route.from_json(state["route"])
            self.overlap = None if state["overlap"] is None else RouteOverlap(**state["overlap"])
        elif self.route is None:
            self.route = self._traced(model, data, settings.route_samples)
            if settings.compare_full and settings.route_samples < 1:
                self.overlap = RouteOverlap.between(self.route, self._traced(model, data, 1.0))
        self._aim(self.route, model, data)
        self.strengths = self._measured_strengths(model, data) if state is None else dict(state["strengths"])

    def state(self) -> dict[str, Any]:
        """The route and what is known about it."""
        assert self.route is not None
        return {
            "route": self.route.to_json(),
            "strengths": dict(self.strengths),
            "overlap": None if self.overlap is None else asdict(self.overlap),
        }

    def save(self, folder: Path) -> None:
        """Write the route."""
        if self.route is not None:
            self.route.save(folder / ROUTE_FILE)

    def losses(self, model: nn.Module, batch: Batch) -> StepLosses:
        """Eq. (11), (12), (14) or (15), or the same with the noise on the route punished."""
        images = self.attacked(model, batch)
        with ExitStack() as stack:
            for penalty in (self._gradient, self._stabilisation):
                if penalty is not None:
                    stack.enter_context(penalty.watch())
            stack.enter_context(batch.autocast())
            output = model(images)
        logits = check_logits(output, batch.labels, _TRAIN)
        factors, values = self._factors, dict[str, Tensor]()
        task = total = task_loss(logits, batch.targets)

        def punish(name: str, value: Tensor) -> None:
            nonlocal total
            total = total + factors[name] * value
            values[name] = values.get(name, 0) + value.detach()

        if self._gradient is not None:
            punish(GRADIENT, self._gradient(logits, batch.targets))
            if self.attack is not None:
                punish(GRADIENT, self._clean_penalty(self._gradient, model, batch))
        if self._weight is not None:
            punish(WEIGHT, self._weight())
        if self._stabilisation is not None:
            punish(STABILISATION, self._stabilisation(batch.images))
        return StepLosses(total, task.detach(), logits.detach(), values)

    def _clean_penalty(self, penalty: GradientPenalty, model: nn.Module, batch: Batch) -> Tensor:
        """``L_g(x, y)`` of Eq. (12), at no cost to statistics and random numbers."""
        devices = [batch.images.device] if batch.images.device.type == "cuda" else []
        with torch.random.fork_rng(devices), spared_buffers(model):
            with penalty.watch(), batch.autocast():
                output = model(batch.images)
            return penalty(output, batch.targets)

    def _traced(self, model: nn.Module, data: Dataset[Any], share: float) -> Route:
        """The model route of a share of the samples, drawn with the seed (Eqs. (1)-(8))."""
        count = max(1, round(share * count_samples(data, _TRAIN)))
        samples = drawn(data, count, derived_seed(self._seed, "route", 0))
        config = replace(self._hardening.trace, seed=self._seed)
        attack = self.attack if config.follows_noise else None
        return trace_routes(model, samples, _INSTANCE_WIDTH, attack=attack, config=config).aggregate(_WIDTH)

    def _aim(self, route: Route, model: nn.Module, data: Dataset[Any]) -> None:
        """Make the penalties for the route as it is, or for its control."""
        require_model(route.channels, model)
        if self._hardening.target == RANDOM:
            route = route.random_like(derived_seed(self._seed, "random target", 0))
        elif self._hardening.target == ALL:
            route = Route({layer: range(count) for layer, count in route.channels.items()}, route.channels)
        if GRADIENT in self._factors:
            self._gradient = GradientPenalty(model, route, units=self._hardening.trace.units_name)
        if WEIGHT in self._factors:
            images, _ = samples_of(model, data, [0, 0])
            connections, folded = Connections.of_route(model, images, route), self._hardening.folded
            layers = connections.joined(route) or None
            self._weight = WeightPenalty(model, route, images, folded=folded, layers=layers, connections=connections)
        if STABILISATION in self._factors:
            self._stabilisation = StabilisationPenalty(model, route, units=self._hardening.trace.units_name)

    def _measured_strengths(self, model: nn.Module, data: Dataset[Any]) -> dict[str, float]:
        """For each penalty, the norm of its gradient over that of the task's; the model and the generators stay."""
        clean, labels = samples_of(model, data, drawn_over_classes(data, _STRENGTH_SAMPLES, self._seed))
        targets = labels.to(clean.device)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def norm(loss: Tensor) -> float:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            return float(torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm())

        norms = {}
        if self._weight is not None:
            norms[WEIGHT] = norm(self._weight())  # before any pass in training mode moves running variances
        dropout = derived_seed(self._seed, "strength", 0)
        with seeded(dropout), kept_modes(model), spared_buffers(model):
            model.train()
            draws = derived_generator(self._seed, "strength", 0)
            images = self.attacked(model, Batch(clean, labels, targets, draws=draws, autocast=nullcontext))
            if self._gradient is not None:
                with self._gradient.watch():
                    output = model(images)
                norms[GRADIENT] = norm(self._gradient(output, targets))
            if self._stabilisation is not None:
                with self._stabilisation.watch():
                    model(images)
                norms[STABILISATION] = norm(self._stabilisation(clean))
            task = norm(task_loss(check_logits(model(images), labels, _TRAIN), targets))
        return {name: value / task if task > 0 else math.inf for name, value in norms.items()}
