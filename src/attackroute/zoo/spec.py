"""What a network is to look like apart from its weights, and the normalisation of its input.

Networks normalise inside, so that images stay in [0, 1] everywhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError

_IMAGE_DIMS = 4
_MAX_SMALL_IMAGE_SIZE = 64


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each input channel, in units of images in [0, 1].

    Raises:
        UserError: Numbers that are not finite, or a standard deviation that is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)):
            raise UserError(f"mean {self.mean} and std {self.std} must be finite numbers")
        if min(self.std) <= 0:
            raise UserError(f"std {self.std} must be positive")


CIFAR = Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MNIST = Statistics((0.1307,), (0.3081,))


def default_statistics(in_channels: int, *, small: bool) -> Statistics:
    """MNIST's statistics for one channel; for three, CIFAR's where images are small and ImageNet's elsewhere.

    Raises:
        UserError: Another number of channels, for which there is no default.
    """
    if in_channels == 1:
        return MNIST
    if in_channels == 3:
        return CIFAR if small else IMAGENET
    raise UserError(f"no default normalisation for {in_channels} input channels; give mean and std")


@dataclass(frozen=True)
class ModelSpec:
    """The arguments of :func:`attackroute.zoo.build_model`, checked; plain values that JSON can hold.

    Attributes:
        name: A built-in name, ``torchvision:NAME``, ``timm:NAME`` or ``package.module:factory``.
        num_classes: Number of logits.
        width: Factor on every layer's channels; built-in networks only.
        image_size: Height and width of the images in pixels; decides between the two forms of a built-in network.
        in_channels: Channels of the images.
        mean: Mean of each input channel; None takes the network's default.
        std: Standard deviation of each input channel; None takes the network's default.

    Raises:
        UserError: A value is out of range.
    """

    name: str
    num_classes: int = 10
    width: float = 1.0
    image_size: int = 32
    in_channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for field in ("num_classes", "image_size", "in_channels"):
            value = getattr(self, field)
            if value < 1:
                raise UserError(f"{field} must be at least 1, not {value}")
        if not (math.isfinite(self.width) and self.width > 0):
            raise UserError(f"width must be above 0, not {self.width}; 0.25 makes every layer a quarter as wide")

    @property
    def is_small(self) -> bool:
        """Whether the images, of at most 64 pixels, call for the form that is used with CIFAR."""
        return self.image_size <= _MAX_SMALL_IMAGE_SIZE

    def channels(self, base: int) -> int:
        """Channels of a layer that has ``base`` of them at width 1: ``max(1, round(base * width))``."""
        return max(1, round(base * self.width))

    def statistics(self, trained_with: Statistics | None = None) -> Statistics:
        """What to normalise the input with: ``mean`` and ``std`` where they are given, else the network's own.

        Args:
            trained_with: What the network was trained with. None, or statistics of another number of channels, gives
                way to :func:`default_statistics`.

        Raises:
            UserError: They do not fit the number of input channels, or there is no default for it.
        """
        mean, std = self.mean, self.std
        if mean is None or std is None:
            if trained_with is None or len(trained_with.mean) != self.in_channels:
                trained_with = default_statistics(self.in_channels, small=self.is_small)
            mean = trained_with.mean if mean is None else mean
            std = trained_with.std if std is None else std
        for what, values in (("mean", mean), ("std", std)):
            if len(values) != self.in_channels:
                raise UserError(
                    f"{what} has {len(values)} values for {self.in_channels} input channels; give one a channel"
                )
        return Statistics(tuple(mean), tuple(std))


class Normalise(nn.Module):
    """``(x - mean) / std`` for each channel.

    The buffers are not persistent: state dicts keep the names that other libraries give them.

    Args:
        statistics: One mean and one standard deviation a channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self.statistics = statistics
        self.register_buffer("mean", torch.tensor(statistics.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(statistics.std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images.

        Args:
            images: Float tensor (N, C, H, W) in [0, 1].

        Returns:
            Tensor of the same shape.

        Raises:
            UserError: Not such a tensor, or another number of channels. Broadcasting would let one grey channel pass
                for three, and integers in [0, 255] for images that are far too bright.
        """
        if images.ndim != _IMAGE_DIMS or not images.is_floating_point():
            what = f"{images.dtype} of shape {tuple(images.shape)}"
            raise UserError(f"the model takes float images (N, C, H, W) in [0, 1], not {what}")
        if images.shape[1] != len(self.mean):
            raise UserError(
                f"the model takes images with {len(self.mean)} channels, not {images.shape[1]}; "
                "give other images, or build the model with that many input channels"
            )
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        """The statistics, for ``print(model)``."""
        return f"mean={self.statistics.mean}, std={self.statistics.std}"


def normalised(network: nn.Module, statistics: Statistics) -> nn.Module:
    """Let a network of another library normalise its own input.

    The network is changed in place. It gains a submodule ``normalise`` that its forward pass runs first; it stays an
    instance of its class, and the names of its modules, parameters and buffers stay as they were, so that its weights
    load and its routes bear the names that its users know. (A module around it would prefix every name.)

    Args:
        network: Takes normalised images (N, C, H, W).
        statistics: What to normalise with.

    Returns:
        The same object, which now takes images in [0, 1].

    Raises:
        UserError: The network already has an attribute ``normalise``.
    """
    if hasattr(network, "normalise"):
        raise UserError(f"{type(network).__name__} has a part called 'normalise' already; wrap it in a factory instead")
    network.__class__ = _normalised_class(type(network))
    network.add_module("normalise", Normalise(statistics))
    return network


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
