"""AlexNet (Krizhevsky et al., 2012; in one column, 2014), with the layer numbers of torchvision's ``alexnet``.

Above 64 pixels, it is torchvision's. Up to 64 pixels, the first layer is 5x5 with stride 1, as in the authors' networks
for CIFAR, so that all three overlapping poolings (3x3, stride 2) still have room: 32 -> 15 -> 7 -> 3 pixels; the head
is one linear layer.
"""

from __future__ import annotations

from torch import nn

from attackroute.zoo.chain import ChainNet
from attackroute.zoo.initialisation import initialise_convolutions
from attackroute.zoo.spec import ModelSpec

_HIDDEN = 4096


_HEAD_SIZE = 6


_SMALL_HEAD_SIZE = 3


def alexnet(spec: ModelSpec) -> nn.Module:
    """AlexNet: five convolutional layers, no batch normalisation."""
    features = _features(spec)
    initialise_convolutions(features)
    last = spec.channels(256)
    if spec.is_small:
        pool = nn.AdaptiveAvgPool2d(_SMALL_HEAD_SIZE)
        head = nn.Linear(last * _SMALL_HEAD_SIZE**2, spec.num_classes)
        return ChainNet(spec.statistics(), features, pool, head)
    hidden = spec.channels(_HIDDEN)
    classifier = nn.Sequential(
        nn.Dropout(),
        nn.Linear(last * _HEAD_SIZE**2, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, spec.num_classes),
    )
    return ChainNet(spec.statistics(), features, nn.AdaptiveAvgPool2d(_HEAD_SIZE), classifier)


def _features(spec: ModelSpec) -> nn.Sequential:
    widths = [spec.channels(base) for base in (64, 192, 384, 256, 256)]
    if spec.is_small:
        first = nn.Conv2d(spec.in_channels, widths[0], kernel_size=5, padding=2)
    else:
        first = nn.Conv2d(spec.in_channels, widths[0], kernel_size=11, stride=4, padding=2)
    return nn.Sequential(
        first,
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(widths[0], widths[1], kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(widths[1], widths[2], kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(widths[2], widths[3], kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(widths[3], widths[4], kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )
