"""Hardening: fine-tuning a network with penalties on its critical attacking route (paper, section 5.1)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from attackroute.core.batches import count_samples, load
from attackroute.core.checks import check_logits, checked_batch
from attackroute.core.distributed import leading
from attackroute.core.errors import UserError
from attackroute.core.model_state import kept_modes, placement, spared_buffers
from attackroute.core.random import derived_generator
from attackroute.hardening.gradient_penalty import GradientPenalty
from attackroute.hardening.history import EpochRecord, TrainResult
from attackroute.hardening.objective import Batch, Objective, StepLosses, task_loss
from attackroute.hardening.route_source import RouteChange, RouteOverlap, RouteSource, targeted
from attackroute.hardening.settings import (
    APPROXIMATE,
    FINE_TUNING,
    GRADIENT,
    PENALTIES,
    STABILISATION,
    WEIGHT,
    HardenSettings,
    TrainSettings,
    require_known,
)
from attackroute.hardening.stabilisation_penalty import StabilisationPenalty
from attackroute.hardening.training import Progress, fit
from attackroute.hardening.weight_penalty import WeightPenalty
from attackroute.robustness.attack import Perturbation
from attackroute.routes.layer_map import require_model
from attackroute.routes.route import Route
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.connections import Connections
from attackroute.zoo.data import ImageData

ROUTE_FILE = "route.json"


Samples = Dataset[Any] | DataLoader[Any] | ImageData | tuple[Tensor, Tensor]
"""A data set, a DataLoader (for its data set), the images of ``ar.load_data``, or a pair of tensors."""


Factor = float | Mapping[str, float]
"""Lambda: one for all penalties, or one for each by its name."""


_TRAIN = "training data"


_STRENGTH_SAMPLES = 128


@dataclass(frozen=True)
class HardenResult:
    """A finished hardening.

    Attributes:
        training: The epochs; their ``penalties`` are without the factor lambda.
        route: The route, as it was traced last; None if nothing was punished.
        changes: What each new trace of the route changed.
        strengths: For each penalty, the norm of its gradient over that of the task's, before the first step and for a
            lambda of 1. Lambda times this number is the penalty's share in the first step.
        overlap: How much of the first route that of all the training samples has too; None where it was not traced from
            a part of them, or the comparison was not asked for.
    """

    training: TrainResult
    route: Route | None = None
    changes: tuple[RouteChange, ...] = ()
    strengths: Mapping[str, float] = field(default_factory=dict)
    overlap: RouteOverlap | None = None


def harden(
    model: nn.Module,
    train_data: Samples,
    test_data: Samples | None = None,
    *,
    penalty: str | tuple[str, ...] | None = GRADIENT,
    lam: Factor = 0.01,
    attack: str | Perturbation | None = None,
    route: Route | str | os.PathLike[str] | None = None,
    settings: HardenSettings | None = None,
    train: TrainSettings = FINE_TUNING,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: Progress | None = None,
) -> HardenResult:
    """Fine-tune a network in place with a penalty on its critical attacking route.

    Without an attack this trains the paper's Vanilla_g (``penalty="gradient"``, Eq. (11)) and Vanilla_w (``"weight"``,
    Eq. (14)); with ``attack="pgd"``, PAT_g (Eq. (12)) and PAT_w (Eq. (15)). All that
    :func:`attackroute.hardening.train` promises holds: runs repeat bit for bit, and go on after a kill.

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
        attack: What to train against, as :func:`attackroute.attacks.parse_attack` reads it; None for clean images.
        route: A route or its file; None traces one (width 0.2 a sample, 0.3 for the model), as ``settings`` say.
        settings: Whose neurons are punished, how their route is traced, and how penalties are computed; None for the
            paper's way, ``HardenSettings()``.
        train: Epochs, learning rate and the like.
        folder: Where checkpoints, log and the route are kept; None keeps nothing.
        resume: Go on with the run in the folder; an empty folder starts one.
        on_epoch: Called after every epoch, when its checkpoint is on disk.
        progress: Called after every step with the steps done, the steps in all and a message.

    Returns:
        The history, the route and how it changed.

    Raises:
        UserError: As for training and tracing, or a setting is unknown or out of range.
    """
    settings = settings or HardenSettings()
    names = (penalty,) if isinstance(penalty, str) else tuple(penalty or ())
    if route is not None and settings.trace != TraceConfig():
        raise UserError(
            "a route is given, so none is traced; leave out linear, sketches and carrier, or trace it with them"
        )
    if not names and route is not None:
        raise UserError("a route is given but no penalty, so nothing would be done with it; leave out one")
    if isinstance(route, (str, os.PathLike)):
        route = Route.load(route, model)
    data, tests = as_dataset(train_data), None if test_data is None else as_dataset(test_data)
    factors = {name: factor_of(name, lam) for name in names}
    hardening = RouteObjective(factors, attack, settings, route) if names else None

    def finish_epoch(record: EpochRecord) -> None:
        if folder is not None and leading() and hardening is not None and hardening.route is not None:
            hardening.route.save(Path(folder) / ROUTE_FILE)
        if on_epoch is not None:
            on_epoch(record)

    result = fit(
        model, data, tests, train, hardening or Objective(attack),
        folder=folder, resume=resume, on_epoch=finish_epoch, progress=progress,
    )  # fmt: skip
    if hardening is None:
        return HardenResult(result)
    return HardenResult(
        result,
        hardening.route,
        changes=tuple(hardening.changes),
        strengths=hardening.strengths,
        overlap=hardening.overlap,
    )


class RouteObjective(Objective):
    """Plain or adversarial training plus penalties on a route's neurons (Eqs. (11), (12), (14), (15)).

    The gradient penalty takes the images that the network learns from, and with an attack the clean ones too (Eq.
    (12)), in a pass of their own that leaves the batch norms' running statistics alone. So does stabilisation, which
    compares the two and needs an attack.

    Args:
        factors: Lambda for each penalty, ``"gradient"``, ``"weight"`` or ``"stabilisation"``.
        attack: As for :class:`Objective`.
        settings: What is punished.
        route: The route; None traces it when the run starts.

    Attributes:
        route: The route, once it is known.
        changes: What each new trace changed.
        strengths: For each penalty, the norm of its gradient over that of the task's, both by the parameters and on
            some of the training samples before the first step; infinite where the task has no gradient left.
        overlap: How much of the route that of all the training samples has too, both for the initial network; None
            where they are not compared, and for a route that is given or traced from all of them.

    Raises:
        UserError: A penalty is unknown, a factor is not a number of at least 0, or these do not go together.
    """

    def __init__(
        self,
        factors: Mapping[str, float],
        attack: str | Perturbation | None = None,
        settings: HardenSettings | None = None,
        route: Route | None = None,
    ) -> None:
        super().__init__(attack)
        for name, factor in factors.items():
            require_known("penalty", name, (*PENALTIES, STABILISATION))
            if isinstance(factor, bool) or not (isinstance(factor, (int, float)) and 0 <= factor < float("inf")):
                raise UserError(f"the factor lambda of the {name} penalty is {factor!r}; give a number of at least 0")
        if STABILISATION in factors and self.attack is None:
            raise UserError(
                "the stabilisation penalty is on what an attack changes: name one to train against, such as "
                "attack='pgd' (--attack pgd)"
            )
        self.route, self.changes, self.strengths = route, list[RouteChange](), dict[str, float]()
        self.overlap: RouteOverlap | None = None
        self._factors, self._hardening = dict(factors), settings or HardenSettings()
        self._source = RouteSource(self._hardening, self.attack, route)
        self._gradient: GradientPenalty | None = None
        self._weight: WeightPenalty | None = None
        self._stabilisation: StabilisationPenalty | None = None
        self._seed = 0

    @property
    def settings(self) -> dict[str, Any]:
        """See :class:`Objective`."""
        return {
            **super().settings,
            "factors": self._factors,
            "target": self._hardening.target,
            "method": self._hardening.method,
            "folded": self._hardening.folded,
            "route": self._source.description,
        }

    def start(self, model: nn.Module, data: Dataset[Any], seed: int) -> None:
        """Trace the route and compare the penalties' gradients with the task's."""
        self._seed = seed
        self.route, self.overlap = self._source.first(model, data, seed)
        self._aim(self.route, model, data)
        self.strengths = self._measured_strengths(model, data)

    def begin_epoch(self, model: nn.Module, data: Dataset[Any], epoch: int) -> None:
        """Trace the route anew, where that is due."""
        if self._source.due(epoch):
            assert self.route is not None
            old, self.route = self.route, self._source.trace(model, data, self._seed, self._hardening.route_samples)
            self.changes.append(RouteChange.between(old, self.route, epoch))
            self._aim(self.route, model, data)

    def state(self) -> dict[str, Any]:
        """The route and what is known about it."""
        assert self.route is not None
        return {
            "seed": self._seed,
            "route": self.route.to_json(),
            "changes": [asdict(change) for change in self.changes],
            "strengths": dict(self.strengths),
            "overlap": None if self.overlap is None else asdict(self.overlap),
        }

    def restore(self, model: nn.Module, data: Dataset[Any], state: Mapping[str, Any]) -> None:
        """Take the route back."""
        self._seed = state["seed"]
        self.route = Route.from_json(state["route"])
        self.changes = [RouteChange(**change) for change in state["changes"]]
        self.strengths = dict(state["strengths"])
        self.overlap = None if state["overlap"] is None else RouteOverlap(**state["overlap"])
        self._aim(self.route, model, data)

    def losses(self, model: nn.Module, batch: Batch) -> StepLosses:
        """Eq. (11), (12), (14) or (15), or the same with the noise on the route punished."""
        images = self.attacked(model, batch)
        factors = self._factors
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

    def _aim(self, route: Route, model: nn.Module, data: Dataset[Any]) -> None:
        """Make the penalties for the route as it is."""
        require_model(route.channels, model)
        punished = targeted(route, self._hardening.target, self._seed)
        if GRADIENT in self._factors:
            self._gradient = GradientPenalty(model, punished, method=self._hardening.method)
        if WEIGHT in self._factors:
            device, dtype = placement(model)
            (probe,) = load(data, [[0, 0]], generator=torch.Generator())
            images = checked_batch(probe, _TRAIN)[0].to(device, dtype)
            connections = Connections.of_route(model, images, punished)
            self._weight = WeightPenalty(
                model,
                punished,
                images,
                folded=self._hardening.folded,
                layers=connections.joined(punished) or None,
                connections=connections,
            )
        if STABILISATION in self._factors:
            self._stabilisation = StabilisationPenalty(model, punished)

    def _measured_strengths(self, model: nn.Module, data: Dataset[Any]) -> dict[str, float]:
        """See the attribute; the model and the generators come back as they were."""
        count = min(_STRENGTH_SAMPLES, count_samples(data, _TRAIN))
        (batch,) = load(data, [list(range(count))], generator=torch.Generator())
        images, labels = checked_batch(batch, _TRAIN)
        device, dtype = placement(model)
        images, targets = images.to(device, dtype), labels.to(device)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def norm(loss: Tensor) -> float:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            return float(torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm())

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


def as_dataset(data: Samples) -> Dataset[Any]:
    """The data set behind what a user has.

    Raises:
        UserError: It is something else.
    """
    if isinstance(data, ImageData):
        return data.dataset
    if isinstance(data, DataLoader):
        return data.dataset
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        if len(data[0]) != len(data[1]):
            raise UserError(f"there are {len(data[0])} images but {len(data[1])} labels; give one for each")
        return TensorDataset(*data)
    if isinstance(data, Dataset):
        return data
    raise UserError(f"data to train on is {type(data).__name__}; give a data set, a DataLoader or (images, labels)")


def factor_of(name: str, lam: Factor) -> float:
    """Lambda of the penalty of that name.

    Raises:
        UserError: There is none for it.
    """
    if not isinstance(lam, Mapping):
        return lam
    if name not in lam:
        raise UserError(f"lam has no factor for the {name} penalty; it has {', '.join(lam) or 'none'}")
    return lam[name]
