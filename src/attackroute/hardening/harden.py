"""Hardening: fine-tuning a network with penalties on its critical attacking route (paper, section 5.1)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from attackroute.core.distributed import leading
from attackroute.core.errors import UserError
from attackroute.hardening.gradient_penalty import EXACT
from attackroute.hardening.history import EpochRecord, TrainResult
from attackroute.hardening.objective import Objective
from attackroute.hardening.penalised import Penalised, PenaltySettings
from attackroute.hardening.route_tracing import ROUTE, RouteChange, RouteOverlap, RouteTracing
from attackroute.hardening.settings import TrainSettings
from attackroute.hardening.training import fit
from attackroute.robustness.contract import Perturbation
from attackroute.robustness.registry import parse_attack
from attackroute.routes.route import Route
from attackroute.tracing.noise import NOISE, UNIT
from attackroute.tracing.sketches import Sketches
from attackroute.zoo.images import ImageData

FINE_TUNING = TrainSettings(epochs=10, lr=0.01)


ROUTE_FILE = "route.json"


Samples = Dataset[Any] | DataLoader[Any] | ImageData | tuple[Tensor, Tensor]
"""A data set, a DataLoader (for its data set), the images of ``ar.load_data``, or a pair of tensors."""


Factor = float | Mapping[str, float]
"""Lambda: one for all penalties, or one for each by its name."""


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
    route: Route | None
    changes: tuple[RouteChange, ...]
    strengths: Mapping[str, float]
    overlap: RouteOverlap | None


def harden(
    model: nn.Module,
    train_data: Samples,
    test_data: Samples | None = None,
    *,
    penalty: str | tuple[str, ...] | None = "gradient",
    lam: Factor = 0.01,
    target: str = ROUTE,
    attack: str | Perturbation | None = None,
    route: Route | str | os.PathLike[str] | None = None,
    route_samples: float = 0.1,
    linear: bool = False,
    sketches: Sketches = None,
    carrier: str = UNIT,
    refresh: int | None = None,
    compare_full: bool = True,
    method: str = EXACT,
    folded: bool = True,
    settings: TrainSettings = FINE_TUNING,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> HardenResult:
    """Fine-tune a network in place with a penalty on its critical attacking route.

    Without an attack this trains the paper's Vanilla_g (``penalty="gradient"``, Eq. (11)) and Vanilla_w (``"weight"``,
    Eq. (14)); with ``attack="pgd"``, PAT_g (Eq. (12)) and PAT_w (Eq. (15)). All that :func:`attackroute.training.train`
    promises holds: runs repeat bit for bit, and go on after a kill as if nothing had happened.

    To choose lambda, look at the result's ``strengths``: lambda times the strength is the penalty's share in the first
    step's gradient. Begin where that is about 0.1 and go up by factors of 3 until clean accuracy suffers.

    Args:
        model: Maps images (N, C, H, W) in [0, 1] to logits. It holds the last epoch's weights at the end.
        train_data: What to train on, and to trace the route from, see :data:`Samples`. Order and size of the batches
            are the settings'.
        test_data: The same; tested after every epoch.
        penalty: ``"gradient"``, ``"weight"``, ``"stabilisation"`` (what the attack changes on the route, which is not
            the paper's, see :class:`attackroute.penalties.StabilisationPenalty`), a tuple of some, or None for training
            alone.
        lam: The factor lambda, or one for each penalty by name.
        target: Whose neurons: those of the ``"route"``, or for controls as many ``"random"`` ones off it, or ``"all"``.
        attack: What to train against, as :func:`attackroute.attacks.parse_attack` reads it; None for clean images.
        route: A route or its file; None traces one (width 0.2 a sample, 0.3 for the model).
        route_samples: Share of the training samples to trace.
        linear: Whether linear maps are layers of a traced route too; a route that is given has its own layers.
        sketches: As :func:`attackroute.trace_routes` takes them, for a traced route: approximate.
        carrier: What a traced route follows: ``"unit"``, or ``"noise"``, that of ``attack`` on the network as it is
            when the route is traced.
        refresh: Trace the route anew before every so manyth epoch; None keeps the first.
        compare_full: Trace all training samples too, and compare; False saves that trace.
        method: For the gradient penalty, ``"exact"`` or ``"finite-difference (approximation)"``.
        folded: For the weight penalty, which leaves out layers with attention or normalisation over channels before
            them, whether batch norms are folded into the kernels; see
            :class:`attackroute.penalties.WeightPenalty`.
        settings: See :class:`attackroute.train_settings.TrainSettings`.
        folder: Where checkpoints, log and the route are kept; None keeps nothing.
        resume: Go on with the run in the folder; an empty folder starts one.
        on_epoch: Called after every epoch, when its checkpoint is on disk.
        progress: Called after every step with the steps done, the steps in all and a message.

    Returns:
        The history, the route and how it changed.

    Raises:
        UserError: As for training and tracing, or a setting is unknown or out of range.
    """
    names = (penalty,) if isinstance(penalty, str) else tuple(penalty or ())
    if route is not None and (linear or sketches is not None or carrier != UNIT):
        raise UserError(
            "a route is given, so none is traced; leave out linear, sketches and carrier, or trace it with them"
        )
    if not names and route is not None:
        raise UserError("a route is given but no penalty, so nothing would be done with it; leave out one")
    if carrier == NOISE and names and attack is None:
        raise UserError(
            "carrier 'noise' follows what an attack changes: train against one (attack=..., --attack), or give a route "
            "that was traced so (route=..., --route)"
        )
    against = parse_attack(attack) if isinstance(attack, str) else attack
    tracing = RouteTracing(
        route_samples, refresh, compare_full, linear, sketches, carrier, str(against) if carrier == NOISE else None
    )
    factors = {name: factor_of(name, lam) for name in names}
    chosen = PenaltySettings(factors, target, method, folded)
    if isinstance(route, (str, os.PathLike)):
        route = Route.load(route, model)
    data, tests = as_dataset(train_data), None if test_data is None else as_dataset(test_data)
    objective = Penalised(chosen, against, route, tracing) if names else Objective(against)

    def save_route(record: EpochRecord) -> None:
        if folder is not None and leading() and isinstance(objective, Penalised) and objective.route is not None:
            objective.route.save(Path(folder) / ROUTE_FILE)
        if on_epoch is not None:
            on_epoch(record)

    result = fit(
        model, data, tests, settings, objective,
        folder=folder, resume=resume, on_epoch=save_route, progress=progress,
    )  # fmt: skip
    if not isinstance(objective, Penalised):
        return HardenResult(result, None, (), {}, None)
    return HardenResult(result, objective.route, tuple(objective.changes), objective.strengths, objective.overlap)


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
