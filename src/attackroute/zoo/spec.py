"""What a network is to look like apart from its weights, and the normalisation of its input.

Networks normalise inside, so that images stay in [0, 1] everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError

MOST_PIXELS = 64
"""Height and width of the largest images that are like CIFAR's."""
_MAX_WIDTH = 64
_MOST = {"num_classes": 1_000_000, "image_size": 16_384, "in_channels": 4096}
"""The largest values that make sense, so that a slip does not end in a want of memory."""


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each input channel, in units of images in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.std:
            raise UserError(f"mean {self.mean} and std {self.std} need one number for each channel")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise UserError(f"mean {self.mean} and std {self.std} must be finite numbers, and std positive")


CIFAR = Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MNIST = Statistics((0.1307,), (0.3081,))


@dataclass(frozen=True)
class ModelSpec:
    """The arguments of :func:`attackroute.build_model`, checked; plain values that JSON can hold."""

    name: str
    num_classes: int = 10
    width: float = 1.0
    image_size: int = 32
    in_channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:  # the values may come from a file
        if not isinstance(self.name, str):
            raise UserError(f"the model's name must be a string, not {self.name!r}")
        for field, most in _MOST.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not hasattr(value, "__index__") or not 1 <= value <= most:
                raise UserError(f"{field} must be a whole number from 1 to {most}, not {value!r}")
        if isinstance(self.width, bool) or not hasattr(self.width, "__float__") or not 0 < self.width <= _MAX_WIDTH:
            raise UserError(
                f"width must be a number above 0, at most {_MAX_WIDTH}, not {self.width!r}; 0.25 makes every layer a "
                "quarter as wide"
            )
        for field in ("mean", "std"):
            values = getattr(self, field)
            if values is not None and not (
                isinstance(values, tuple) and all(type(each) in (int, float) for each in values)
            ):
                raise UserError(f"{field} must be numbers, not {values!r}")

    def channels(self, base: int) -> int:
        """Channels of a layer that has ``base`` of them at width 1: ``max(1, round(base * width))``."""
        return max(1, round(base * self.width))

    def statistics(self, trained_with: Statistics | None = None) -> Statistics:
        """What to normalise the input with: ``mean`` and ``std`` where they are given, else the network's own.

        Where nothing is known of the network's own, or that has another number of channels, they are MNIST's for one
        channel; for three, CIFAR's where images are small and ImageNet's elsewhere.
        """
        defaults = (trained_with, MNIST, CIFAR if self.image_size <= MOST_PIXELS else IMAGENET)
        own = next((each for each in defaults if each is not None and len(each.mean) == self.in_channels), None)
        mean = self.mean if self.mean is not None or own is None else own.mean
        std = self.std if self.std is not None or own is None else own.std
        if mean is None or std is None:
            raise UserError(f"no default normalisation for {self.in_channels} input channels; give mean and std")
        if not len(mean) == len(std) == self.in_channels:
            raise UserError(f"mean {mean} and std {std} need one value for each of {self.in_channels} input channels")
        return Statistics(mean, std)


class Normalise(nn.Module):
    """``(x - mean) / std`` for each channel.

    The buffers are not persistent: state dicts keep the names that other libraries give them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self.statistics = statistics
        self.register_buffer("mean", torch.tensor(statistics.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(statistics.std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise float images (N, C, H, W) in [0, 1]; others are refused.

        Broadcasting would let one grey channel pass for three, and integers in [0, 255] for images far too bright.
        """
        if images.ndim != 4 or not images.is_floating_point():
            what = f"{images.dtype} of shape {tuple(images.shape)}"
            raise UserError(f"the model takes float images (N, C, H, W) in [0, 1], not {what}")
        if images.shape[1] != len(self.mean):
            raise UserError(
                f"the model takes images with {len(self.mean)} channels, not {images.shape[1]}; "
                "give other images, or build the model with that many input channels"
            )
        return (images - self.mean) / self.std


def normalised(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """Let a network that expects normalised images take images in [0, 1], by ``(x - mean) / std`` in each channel.

    It is changed in place: it gains a submodule ``normalise`` that its forward pass runs first. It stays an instance of
    its class, and its weights load and its routes are named as before. (A module around it would prefix every name.)

    Args:
        model: A network whose forward pass begins with the images.
        mean: Of each channel, in units of images in [0, 1], such as ``(0.485, 0.456, 0.406)``.
        std: The standard deviations, likewise.

    Returns:
        The model itself.

    Raises:
        UserError: Mean or std are no finite numbers, one for each channel, or the model has a part of that name.
    """
    if hasattr(model, "normalise"):
        raise UserError(f"{type(model).__name__} has a part called 'normalise' already; wrap it in a factory instead")
    first = next(model.parameters(), None)
    normalise = Normalise(Statistics(tuple(map(float, mean)), tuple(map(float, std))))
    model.__class__ = _normalised_class(type(model))
    model.add_module("normalise", normalise.train(model.training).to(None if first is None else first.device))
    return model


class _NormalisesFirst:
    """Placed before a module's class, runs ``self.normalise`` ahead of that class's forward pass."""

    normalise: Normalise

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(self.normalise(images), *args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        # The class exists only at run time, so copies and pickles name the one that it stands for.
        return _blank, (type(self).__mro__[2],), self.__dict__


def _normalised_class(base: type[nn.Module]) -> type[nn.Module]:
    return cast("type[nn.Module]", type(base.__name__, (_NormalisesFirst, base), {"__module__": base.__module__}))


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = _normalised_class(base)
    return cls.__new__(cls)
