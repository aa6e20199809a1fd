"""VGG-16 with batch normalisation (Simonyan and Zisserman, 2015), and a small network of its kind.

The 16 layers are torchvision's ``vgg16_bn``, number by number. Up to 64 pixels, the form used with CIFAR replaces the
head by a global average (of a single position at 32 pixels) and one linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from attackroute.zoo.chain import ChainNet
from attackroute.zoo.initialisation import initialise_convolutions
from attackroute.zoo.spec import ModelSpec

Plan = Sequence[int | Literal["M"]]


_VGG16: Plan = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


_SMALL: Plan = (16, 16, "M", 32, 32, "M", 64, 64, "M")


_HIDDEN = 4096


_HEAD_SIZE = 7


def vgg16(spec: ModelSpec) -> nn.Module:
    """VGG-16 with batch normalisation."""
    features, channels = _features(spec, _VGG16)
    if spec.is_small:
        return _with_linear_head(spec, features, channels)
    hidden = spec.channels(_HIDDEN)
    classifier = nn.Sequential(
        nn.Linear(channels * _HEAD_SIZE**2, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, spec.num_classes),
    )
    return ChainNet(spec.statistics(), features, nn.AdaptiveAvgPool2d(_HEAD_SIZE), classifier)


def vgg_small(spec: ModelSpec) -> nn.Module:
    """Six convolutional layers and a linear one: trained on a few thousand small images within a minute on a CPU."""
    return _with_linear_head(spec, *_features(spec, _SMALL))


def _with_linear_head(spec: ModelSpec, features: nn.Module, channels: int) -> nn.Module:
    return ChainNet(spec.statistics(), features, nn.AdaptiveAvgPool2d(1), nn.Linear(channels, spec.num_classes))


def _features(spec: ModelSpec, plan: Plan) -> tuple[nn.Sequential, int]:
    """The convolutional part, initialised, and the channels that leave it."""
    layers: list[nn.Module] = []
    channels = spec.in_channels
    for step in plan:
        if step == "M":
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        source, channels = channels, spec.channels(step)
        layers += [
            nn.Conv2d(source, channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
    features = nn.Sequential(*layers)
    initialise_convolutions(features)
    return features, channels
