"""``trace --check``: the fast trace against the oracle, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attackroute.tracing import noise_oracle, oracle
from attackroute.tracing.noise import NOISE, UNIT
from attackroute.tracing.sketches import Sketches
from attackroute.tracing.trace import trace_routes

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest relative deviation of scores that rounding explains."""


@dataclass(frozen=True)
class Comparison:
    """How far the trace is from the oracle.

    Attributes:
        samples: Samples compared.
        agreeing: Samples whose routes are the same in every layer.
        deviation: Largest ``|score - oracle's score|``, relative to the largest score of the sample in that layer.
        layer: Where it is.
        tolerance: What rounding explains; None at reduced precision, and for approximate routes.
    """

    samples: int
    agreeing: int
    deviation: float
    layer: str
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Whether the scores deviate by no more than rounding explains."""
        return self.tolerance is None or self.deviation <= self.tolerance


def compare(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    width: float,
    *,
    clean: Tensor | None = None,
    linear: bool,
    autocast: torch.dtype | None,
    sketches: Sketches = None,
    seed: int = 0,
    freeze_gates: bool = False,
) -> Comparison:
    """Trace samples twice, by the engine and by the oracle.

    A neuron whose score ties with another's within rounding may be on one route and not on the other. From there on
    towards the input both sum over different neurons, so those scores are left out of the deviation.

    Args:
        model: The network; its dtype is that of the comparison, on the oracle's side also under autocast.
        images: (N, C, H, W), on the model's device and in its dtype.
        labels: (N,).
        width: Share of each layer's channels that a route keeps.
        clean: The images before the attack, where the noise between the two is what is followed.
        linear: Whether linear layers are route layers.
        autocast: Reduced precision for the engine.
        sketches: For the engine, with ``seed``; the oracle is exact.
        freeze_gates: For the engine; the oracle freezes nothing.
    """
    ours = trace_routes(
        model,
        (images if clean is None else clean, labels),
        width,
        batch_size=len(images),
        attack=None if clean is None else lambda *_: images,
        carrier=UNIT if clean is None else NOISE,
        linear=linear,
        keep_scores=True,
        autocast=autocast,
        sketches=sketches,
        seed=seed,
        freeze_gates=freeze_gates,
    )
    if clean is None:
        theirs = oracle.trace(model, images, labels, width=width, linear=linear)
    else:
        theirs = noise_oracle.trace(model, clean, images, labels, width=width, linear=linear)
    comparable = torch.ones(len(images), dtype=torch.bool)
    deviation, where = 0.0, theirs.layers[-1]
    for layer in reversed(theirs.layers):
        expected = theirs.scores[layer].detach().cpu().double()
        apart = (ours.scores[layer].double() - expected).abs().amax(1)
        scale = expected.abs().amax(1)
        relative = torch.where(apart == 0, 0.0, apart / scale)[comparable]
        if relative.numel() and (largest := relative.max().item()) > deviation:
            deviation, where = largest, layer
        comparable &= (ours.masks[layer] == theirs.masks[layer].cpu()).all(1)
    tolerance = (
        TOLERANCES.get(images.dtype) if autocast is None and ours.sketched is None and not freeze_gates else None
    )
    return Comparison(len(images), int(comparable.sum()), deviation, where, tolerance)
