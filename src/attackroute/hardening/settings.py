"""The settings of a training run, checked when they are made, and the learning rates that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import get_args

import torch

from attackroute.core.errors import UserError, require_known
from attackroute.hardening.augmentation import Augment
from attackroute.tracing.config import TraceConfig

GRADIENT, WEIGHT, STABILISATION = "gradient", "weight", "stabilisation"
PENALTIES = (GRADIENT, WEIGHT)
"""The paper's."""

ON_ROUTE, RANDOM, ALL = "route", "random", "all"
TARGETS = (ON_ROUTE, RANDOM, ALL)
"""Whose neurons are punished."""

_LARGEST_NUMBER = torch.finfo(torch.float32).max  # tensors take no larger factor


@dataclass(frozen=True)
class TrainSettings:
    """How to train with stochastic gradient descent.

    Attributes:
        epochs: Passes over the training data.
        batch_size: Most images in one step; an epoch is split into batches of nearly equal size.
        lr: The largest learning rate, see :func:`learning_rate`.
        momentum: In [0, 1), in Nesterov's form.
        weight_decay: L2 penalty on all parameters.
        augment: ``"none"``, ``"crop"`` or ``"crop-flip"``, see :func:`attackroute.hardening.augmentation.augment`.
        amp: Mixed precision in bfloat16 where the device has it; elsewhere nothing changes.
        channels_last: Hold images and weights in PyTorch's channels_last format during training.
        seed: Decides data order, augmentation and dropout. The initial weights are the caller's.
        workers: Processes that read the data; 0 reads in this one.
        robust_samples: Test images, drawn with the seed, that are attacked after every epoch where the training is
            against an attack; the epoch that does best on them is the best one.

    Raises:
        UserError: A value is of the wrong kind or out of range.
    """

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    augment: Augment = "none"
    amp: bool = False
    channels_last: bool = False
    seed: int = 0
    workers: int = 0
    robust_samples: int = 500

    def __post_init__(self) -> None:
        counts, flags = ("epochs", "batch_size", "robust_samples"), ("amp", "channels_last")
        rules = {
            **{name: (_is_integer(getattr(self, name), 1), "an integer of at least 1") for name in counts},
            **{name: (isinstance(getattr(self, name), bool), "True or False") for name in flags},
            "lr": (_is_number(self.lr) and self.lr > 0, "a number above 0"),
            "momentum": (_is_number(self.momentum) and 0 <= self.momentum < 1, "a number in [0, 1)"),
            "weight_decay": (_is_number(self.weight_decay) and self.weight_decay >= 0, "a number of at least 0"),
            "augment": (self.augment in get_args(Augment), "one of " + ", ".join(map(repr, get_args(Augment)))),
            "seed": (_is_integer(self.seed, 0) and self.seed < 2**63, "an integer from 0 to 2**63 - 1"),
            "workers": (_is_integer(self.workers, 0), "an integer of at least 0"),
        }
        for name, (valid, expected) in rules.items():
            if not valid:
                raise UserError(f"training setting {name} is {getattr(self, name)!r}; give {expected}")


@dataclass(frozen=True)
class HardenSettings:
    """Which neurons are punished, and how; the defaults are the paper's.

    Attributes:
        target: Whose neurons: those of the ``"route"``, or for controls as many ``"random"`` ones off it in each layer,
            or ``"all"`` of its layers.
        route_samples: Share of the training samples, drawn with the seed, to trace the route from, in (0, 1].
        compare_full: Trace all training samples too, and compare; False saves that trace.
        trace: How the route is traced; the seed of sketches is the training's. With the carrier ``"noise"`` it follows
            what the attack that is trained against changes in the network as it is when the route is traced.
        folded: For the weight penalty, which leaves out layers with attention or normalisation over channels before
            them, whether batch norms are folded into the kernels; see :class:`WeightPenalty`.

    Raises:
        UserError: A name is unknown, or a value is out of range.
    """

    target: str = ON_ROUTE
    route_samples: float = 0.1
    compare_full: bool = True
    trace: TraceConfig = field(default_factory=TraceConfig)
    folded: bool = True

    def __post_init__(self) -> None:
        share = self.route_samples
        if not (isinstance(share, (int, float)) and 0 < share <= 1):
            raise UserError(f"a share of {share} of the samples is outside (0, 1]; the paper takes 0.1")
        require_known("target", self.target, TARGETS)


def learning_rate(peak: float, step: int, total: int) -> float:
    """The learning rate of optimiser step ``step``, counted from 0, of ``total``: PyTorch's ``OneCycleLR``.

    It climbs from peak / 25 to the peak within the first 30 % of the steps and falls to peak / 250,000, each along half
    a cosine; runs of one to three steps, which have no room to climb, start at the peak.
    """
    if total == 1:
        return peak
    start, top = 1 / 25, max(0.3 * total - 1, 0.0)
    if step < top:
        first, last, share = peak * start, peak, step / top
    else:
        first, last, share = peak, peak * (start / 1e4), (step - top) / (total - 1 - top)
    return last + (first - last) / 2 * (1 + math.cos(math.pi * share))


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER


FINE_TUNING = TrainSettings(epochs=10, lr=0.01)
"""What hardening takes by default."""
