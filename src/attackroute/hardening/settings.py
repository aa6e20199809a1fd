"""The settings of a training run, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch

from attackroute.core.errors import UserError
from attackroute.hardening.augmentation import Augment
from attackroute.hardening.schedules import Schedule

_LARGEST_SEED = 2**63 - 1


_LARGEST_NUMBER = torch.finfo(torch.float32).max  # tensors take no larger factor


@dataclass(frozen=True)
class TrainSettings:
    """How to train with stochastic gradient descent.

    Attributes:
        epochs: Passes over the training data.
        batch_size: Most images in one step; an epoch is split into batches of nearly equal size.
        lr: The schedule's largest learning rate.
        momentum: In [0, 1), in Nesterov's form.
        weight_decay: L2 penalty on all parameters.
        schedule: ``"one-cycle"`` or ``"cosine"``, see :func:`attackroute.schedules.learning_rate`.
        augment: ``"none"``, ``"crop"`` or ``"crop-flip"``, see :func:`attackroute.augmentation.augment`.
        accumulate: Take each batch in so many parts, one after the other, and step once: memory is that of a part.
            Batch norms and the gradient penalty's approximation then see a part at a time.
        clip_norm: Largest norm of the whole gradient; None leaves it as it is.
        amp: Mixed precision where the device has autocast: bfloat16, or float16 with a scaled loss on GPUs without
            it.
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
    schedule: Schedule = "one-cycle"
    augment: Augment = "none"
    accumulate: int = 1
    clip_norm: float | None = None
    amp: bool = False
    channels_last: bool = False
    seed: int = 0
    workers: int = 0
    robust_samples: int = 500

    def __post_init__(self) -> None:
        _check(_is_integer(self.epochs, 1), "epochs", self.epochs, "an integer of at least 1")
        _check(_is_integer(self.batch_size, 1), "batch_size", self.batch_size, "an integer of at least 1")
        _check(_is_number(self.lr) and self.lr > 0, "lr", self.lr, "a number above 0")
        _check(_is_number(self.momentum) and 0 <= self.momentum < 1, "momentum", self.momentum, "a number in [0, 1)")
        _check(
            _is_number(self.weight_decay) and self.weight_decay >= 0,
            "weight_decay", self.weight_decay, "a number of at least 0",
        )  # fmt: skip
        _check(self.schedule in get_args(Schedule), "schedule", self.schedule, _one_of(Schedule))
        _check(self.augment in get_args(Augment), "augment", self.augment, _one_of(Augment))
        _check(_is_integer(self.accumulate, 1), "accumulate", self.accumulate, "an integer of at least 1")
        _check(
            self.clip_norm is None or (_is_number(self.clip_norm) and self.clip_norm > 0),
            "clip_norm", self.clip_norm, "a number above 0, or None",
        )  # fmt: skip
        _check(isinstance(self.amp, bool), "amp", self.amp, "True or False")
        _check(isinstance(self.channels_last, bool), "channels_last", self.channels_last, "True or False")
        _check(
            _is_integer(self.seed, 0) and self.seed <= _LARGEST_SEED,
            "seed", self.seed, "an integer from 0 to 2**63 - 1",
        )  # fmt: skip
        _check(_is_integer(self.workers, 0), "workers", self.workers, "an integer of at least 0")
        _check(_is_integer(self.robust_samples, 1), "robust_samples", self.robust_samples, "an integer of at least 1")


def _check(valid: bool, name: str, value: object, wanted: str) -> None:
    if not valid:
        raise UserError(f"training setting {name} is {value!r}; give {wanted}")


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER


def _one_of(choices: Any) -> str:
    return "one of " + ", ".join(repr(choice) for choice in get_args(choices))
