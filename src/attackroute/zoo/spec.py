"""What a network is to look like, apart from its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attackroute.core.errors import UserError
from attackroute.zoo.normalisation import Statistics, default_statistics

_MAX_SMALL_IMAGE_SIZE = 64


@dataclass(frozen=True)
class ModelSpec:
    """The arguments of :func:`attackroute.models.build_model`, checked; plain values that JSON can hold.

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

    def statistics(self, own: Statistics | None = None) -> Statistics:
        """What to normalise the input with: ``mean`` and ``std`` where they are given, else the network's own.

        Args:
            own: What the network was trained with. None, or statistics of another number of channels, gives way to
                :func:`default_statistics`.

        Raises:
            UserError: They do not fit the number of input channels, or there is no default for it.
        """
        mean, std = self.mean, self.std
        if mean is None or std is None:
            if own is None or len(own.mean) != self.in_channels:
                own = default_statistics(self.in_channels, small=self.is_small)
            mean = own.mean if mean is None else mean
            std = own.std if std is None else std
        for what, values in (("mean", mean), ("std", std)):
            if len(values) != self.in_channels:
                raise UserError(
                    f"{what} has {len(values)} values for {self.in_channels} input channels; give one a channel"
                )
        return Statistics(tuple(mean), tuple(std))
