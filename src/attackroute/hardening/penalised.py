"""The objective of hardening: a training loss plus penalties on a route's neurons (Eqs. (11), (12), (14), (15))."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from attackroute.core.batches import count_samples, derived_generator, load
from attackroute.core.checks import check_logits, checked
from attackroute.core.errors import UserError, did_you_mean
from attackroute.core.model_state import kept_modes, placement, spared_buffers
from attackroute.hardening.gradient_penalty import APPROXIMATE, EXACT, METHODS, GradientPenalty
from attackroute.hardening.objective import Batch, Objective, StepLosses, task_loss
from attackroute.hardening.route_tracing import (
    TARGETS,
    RouteChange,
    RouteOverlap,
    RouteTracing,
    route_from_state,
    route_state,
    targeted,
)
from attackroute.hardening.stabilisation_penalty import StabilisationPenalty
from attackroute.hardening.weight_penalty import WeightPenalty
from attackroute.robustness.contract import Perturbation
from attackroute.routes.layer_map import require_model
from attackroute.routes.route import Route
from attackroute.tracing.connections import Connections

GRADIENT, WEIGHT, STABILISATION = "gradient", "weight", "stabilisation"


PENALTIES = (GRADIENT, WEIGHT)
"""The paper's."""


_TRAIN = "training data"


_STRENGTH_SAMPLES = 128


@dataclass(frozen=True)
class PenaltySettings:
    """What is punished, and how much.

    Attributes:
        factors: Lambda for each penalty, ``"gradient"``, ``"weight"`` or ``"stabilisation"``.
        target: ``"route"``, or for controls ``"random"`` (as many neurons off it) or ``"all"`` of its layers' neurons.
        method: As :class:`attackroute.penalties.GradientPenalty` has it.
        folded: As :class:`attackroute.penalties.WeightPenalty` has it.

    Raises:
        UserError: A name is unknown, or a factor is not a number of at least 0.
    """

    factors: Mapping[str, float]
    target: str = "route"
    method: str = EXACT
    folded: bool = True

    def __post_init__(self) -> None:
        for name, factor in self.factors.items():
            _require_known("penalty", name, (*PENALTIES, STABILISATION))
            if isinstance(factor, bool) or not (isinstance(factor, (int, float)) and 0 <= factor < float("inf")):
                raise UserError(f"the factor lambda of the {name} penalty is {factor!r}; give a number of at least 0")
        _require_known("target", self.target, TARGETS)
        _require_known("method", self.method, METHODS)


class Penalised(Objective):
    """Plain or adversarial training plus penalties; the route is traced when the run starts, unless it is given.

    The gradient penalty takes the images that the network learns from, and with an attack the clean ones too (Eq.
    (12)), in a pass of their own that leaves the batch norms' running statistics alone. So does stabilisation, which
    compares the two and needs an attack.

    Args:
        settings: What is punished.
        attack: As for :class:`Objective`.
        route: The route; None traces it.
        tracing: How it is traced.

    Attributes:
        route: The route, once it is known.
        changes: What each new trace changed.
        strengths: For each penalty, the norm of its gradient over that of the task's, both by the parameters and on
            some of the training samples before the first step; infinite where the task has no gradient left.
        overlap: How much of the route that of all the training samples has too, both for the initial network; None
            where they are not compared, and for a route that is given or traced from all of them.
    """

    def __init__(
        self,
        settings: PenaltySettings,
        attack: str | Perturbation | None,
        route: Route | None,
        tracing: RouteTracing,
    ) -> None:
        super().__init__(attack)
        if route is not None and tracing.refresh is not None:
            raise UserError("a route that is given is not traced anew: leave out the route, or refresh")
        self.route, self.changes, self.strengths = route, list[RouteChange](), dict[str, float]()
        self.overlap: RouteOverlap | None = None
        if STABILISATION in settings.factors and self.attack is None:
            raise UserError(
                "the stabilisation penalty is on what an attack changes: name one to train against, such as "
                "attack='pgd' (--attack pgd)"
            )
        self._settings, self._given, self._tracing = settings, route, tracing
        self._gradient: GradientPenalty | None = None
        self._weight: WeightPenalty | None = None
        self._stabilisation: StabilisationPenalty | None = None
        self._seed = 0

    @property
    def terms(self) -> dict[str, Any]:
        """See :class:`Objective`."""
        settings = asdict(self._settings)
        route = asdict(self._tracing) if self._given is None else _digest(self._given)
        return {**super().terms, **settings, "factors": dict(self._settings.factors), "route": route}

    def start(self, model: nn.Module, data: Dataset[Any], seed: int) -> None:
        """Trace the route and compare the penalties' gradients with the task's."""
        self._seed = seed
        if self.route is None:
            self.route = self._tracing.trace(model, data, seed)
            if self._tracing.compare_full and self._tracing.share < 1:
                full = replace(self._tracing, share=1.0).trace(model, data, seed)
                self.overlap = RouteOverlap.between(self.route, full)
        self._aim(model, data)
        self.strengths = self._measured_strengths(model, data)

    def begin_epoch(self, model: nn.Module, data: Dataset[Any], epoch: int) -> None:
        """Trace the route anew, where that is due."""
        if self._tracing.due(epoch):
            assert self.route is not None
            old, self.route = self.route, self._tracing.trace(model, data, self._seed)
            self.changes.append(RouteChange.between(old, self.route, epoch))
            self._aim(model, data)

    def state(self) -> dict[str, Any]:
        """The route and what is known about it."""
        assert self.route is not None
        return {
            "seed": self._seed,
            "route": route_state(self.route),
            "changes": [asdict(change) for change in self.changes],
            "strengths": dict(self.strengths),
            "overlap": None if self.overlap is None else asdict(self.overlap),
        }

    def restore(self, model: nn.Module, data: Dataset[Any], state: Mapping[str, Any]) -> None:
        """Take the route back."""
        self._seed = state["seed"]
        self.route = route_from_state(state["route"], model)
        self.changes = [RouteChange(**change) for change in state["changes"]]
        self.strengths = dict(state["strengths"])
        self.overlap = None if state["overlap"] is None else RouteOverlap(**state["overlap"])
        self._aim(model, data)

    def losses(self, model: nn.Module, batch: Batch) -> StepLosses:
        """Eq. (11), (12), (14) or (15), or the same with the noise on the route punished."""
        images = self.attacked(model, batch)
        factors = self._settings.factors
        watches = [penalty.watch() for penalty in (self._gradient, self._stabilisation) if penalty is not None]
        with ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch)
            stack.enter_context(batch.autocast())
            logits = model(images)
        check_logits(logits, batch.labels, _TRAIN)
        values: dict[str, Tensor] = {}
        task = task_loss(logits, batch.targets)
        total = task
        if self._gradient is not None and self._stabilisation is not None:  # which needs the pass's graph, too
            value = self._gradient(logits, batch.targets)
            total, values[GRADIENT] = task + factors[GRADIENT] * value, value.detach()
        elif self._gradient is not None:
            total, values[GRADIENT] = self._gradient.with_task(logits, batch.targets, factors[GRADIENT])
        if self._gradient is not None and self.attack is not None:
            clean = self._clean_penalty(self._gradient, model, batch)
            total = total + factors[GRADIENT] * clean
            values[GRADIENT] = values[GRADIENT] + clean.detach()
        if self._weight is not None:
            value = self._weight()
            total = total + factors[WEIGHT] * value
            values[WEIGHT] = value.detach()
        if self._stabilisation is not None:
            value = self._stabilisation(batch.images)
            total = total + factors[STABILISATION] * value
            values[STABILISATION] = value.detach()
        return StepLosses(total, task.detach(), logits.detach(), values)

    def _clean_penalty(self, penalty: GradientPenalty, model: nn.Module, batch: Batch) -> Tensor:
        """``L_g(x, y)`` of Eq. (12), at no cost to statistics and random numbers."""
        devices = [batch.images.device] if batch.images.device.type == "cuda" else []
        with torch.random.fork_rng(devices), spared_buffers(model):
            with penalty.watch(), batch.autocast():
                logits = model(batch.images)
            return penalty(logits, batch.targets)

    def _aim(self, model: nn.Module, data: Dataset[Any]) -> None:
        """Make the penalties for the route as it is."""
        assert self.route is not None
        require_model(self.route.channels, model)
        settings = self._settings
        punished = targeted(self.route, settings.target, self._seed)
        if GRADIENT in settings.factors:
            self._gradient = GradientPenalty(model, punished, method=settings.method)
        if WEIGHT in settings.factors:
            device, dtype = placement(model)
            (probe,) = load(data, [[0, 0]], generator=torch.Generator())
            images = checked(probe, _TRAIN)[0].to(device, dtype)
            joined = Connections.of_route(model, images, punished).joined(punished)
            self._weight = WeightPenalty(model, punished, images, folded=settings.folded, layers=joined or None)
        if STABILISATION in settings.factors:
            self._stabilisation = StabilisationPenalty(model, punished)

    def _measured_strengths(self, model: nn.Module, data: Dataset[Any]) -> dict[str, float]:
        """See the attribute; the model and the generators come back as they were."""
        count = min(_STRENGTH_SAMPLES, count_samples(data, _TRAIN))
        (batch,) = load(data, [list(range(count))], generator=torch.Generator())
        images, labels = checked(batch, _TRAIN)
        device, dtype = placement(model)
        images, targets = images.to(device, dtype), labels.to(device)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def norm(loss: Tensor) -> float:
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            return float(torch.stack([part.norm() for part in found if part is not None]).norm())

        norms = {}
        if self._weight is not None:
            norms[WEIGHT] = norm(self._weight())  # before any pass in training mode moves running variances
        with torch.random.fork_rng([device] if device.type == "cuda" else []), kept_modes(model), spared_buffers(model):
            model.train()
            draws = derived_generator(self._seed, "strength", 0)
            clean = images
            images = self.attacked(model, Batch(images, labels, targets, draws, nullcontext))
            if self._gradient is not None:
                with self._gradient.watch():
                    logits = model(images)
                try:
                    norms[GRADIENT] = norm(self._gradient(logits, targets))
                except RuntimeError as error:
                    if "is not implemented" not in str(error):
                        raise
                    raise UserError(
                        f"the network has an operation without a second derivative ({str(error).splitlines()[0]}); "
                        f"take the method {APPROXIMATE!r} (--approximate)"
                    ) from error
            if self._stabilisation is not None:
                with self._stabilisation.watch():
                    model(images)
                norms[STABILISATION] = norm(self._stabilisation(clean))
            task = norm(task_loss(model(images), targets))
        return {name: value / task if task > 0 else math.inf for name, value in norms.items()}


def _digest(route: Route) -> str:
    return hashlib.sha256(json.dumps(route_state(route)["indices"]).encode()).hexdigest()


def _require_known(what: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UserError(f"unknown {what} {name!r}{did_you_mean(name, known)}; choose from {', '.join(known)}")
