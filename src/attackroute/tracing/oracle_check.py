"""A trace beside the oracle, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attackroute.robustness.attack import Attack, attacked
from attackroute.robustness.registry import as_attack
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.tracing import oracle
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.structure import SKETCH
from attackroute.tracing.trace import trace_routes

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest relative deviation of scores that rounding explains."""


@dataclass(frozen=True)
class OracleCheck:
    """How far a trace is from the oracle.

    Attributes:
        agreeing: How many of the samples have the same routes in every layer.
        faults: How many have other neurons in some layer where no tie within rounding explains that.
        deviation: Largest ``|score - oracle's score|``, relative to the largest score of the sample in that ``layer``.
        tolerance: What rounding explains; None at reduced precision, and for approximate routes.
    """

    samples: int
    agreeing: int
    faults: int
    deviation: float
    layer: str
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Whether scores and routes differ by no more than rounding explains."""
        return self.tolerance is None or (self.deviation <= self.tolerance and not self.faults)


def verify(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    width: float = 0.2,
    *,
    attack: Attack | str | None = None,
    config: TraceConfig = TraceConfig(),
    autocast: torch.dtype | None = None,
    written: InstanceRoutes | None = None,
) -> OracleCheck:
    """Trace samples twice, by the engine and by the oracle; ``written`` are earlier routes of theirs, to be checked.

    A neuron whose score ties with another's within rounding may be on one route and not on the other. From there on
    towards the input both sum over different neurons, so those scores are left out of the deviation.

    ``images`` and ``labels`` are on the model's device, in its dtype, in which the oracle runs also where the engine
    does not (``autocast``). The oracle sketches nothing. Other arguments as of ``ar.trace_routes``.
    """
    config = config.measured(model, images)
    traced = images if attack is None else attacked(model, as_attack(attack), images, labels)[0]
    noise = config.follows_noise
    routes = trace_routes(
        model, (images if noise else traced, labels), width, batch_size=len(images),
        attack=(lambda *_: traced) if noise else None, config=config, keep_scores=True, autocast=autocast
    )  # fmt: skip
    rows = list(range(len(images))) * (2 if len(images) == 1 else 1)  # two show which rows are images
    clean = images[rows] if noise else None
    expected = oracle.trace(
        model, traced[rows], labels[rows], clean=clean, width=width, linear=config.linear,
        deviations=None if config.deviations is None else config.deviations.values,
    )  # fmt: skip
    comparable = torch.ones(len(images), dtype=torch.bool)
    exact = autocast is None and SKETCH not in routes.methods.values()
    tolerance = TOLERANCES.get(images.dtype) if exact else None
    faulty, deviation, layer_of_it = torch.zeros(len(images), dtype=torch.bool), 0.0, expected.layers[-1]
    for layer in reversed(expected.layers):
        scores = expected.scores[layer][: len(images)].detach().cpu().double()
        difference = (routes.scores[layer].double() - scores).abs().amax(1)
        relative = torch.where(difference == 0, 0.0, difference / scores.abs().amax(1))[comparable]
        if relative.numel() and (largest := relative.max().item()) > deviation:
            deviation, layer_of_it = largest, layer
        mask, right = (written or routes).masks[layer], expected.masks[layer][: len(images)].cpu()
        missing, wrong = scores.masked_fill(~right | mask, -torch.inf), scores.masked_fill(right | ~mask, torch.inf)
        gap = (missing.amax(1) - wrong.amin(1)) / scores.abs().amax(1)  # what was left out, above what is there instead
        faulty |= comparable & (gap > (tolerance or torch.inf))
        comparable &= (mask == right).all(1)
    return OracleCheck(
        len(images), int(comparable.sum()), faults=int(faulty.sum()), deviation=deviation, layer=layer_of_it,
        tolerance=tolerance
    )  # fmt: skip
