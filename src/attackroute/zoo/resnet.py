"""ResNet-18 (He et al., 2016), with the names of torchvision's ``resnet18``.

Above 64 pixels, it is torchvision's. Up to 64 pixels, the first layer is 3x3 with stride 1 and no pooling follows it,
as is usual with CIFAR.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attackroute.zoo.initialisation import initialise_convolutions
from attackroute.zoo.normalisation import Normalise
from attackroute.zoo.spec import ModelSpec

_STAGES = (64, 128, 256, 512)


def resnet18(spec: ModelSpec) -> nn.Module:
    """ResNet-18: four stages of two basic blocks."""
    network = ResNet18(spec)
    initialise_convolutions(network)
    return network


class ResNet18(nn.Module):
    """See :func:`resnet18`, which also initialises it."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        stem, *_, last = widths = [spec.channels(base) for base in _STAGES]
        self.normalise = Normalise(spec.statistics())
        if spec.is_small:
            self.conv1 = nn.Conv2d(spec.in_channels, stem, kernel_size=3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(spec.in_channels, stem, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if spec.is_small else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(stem, widths[0], stride=1)
        self.layer2 = _stage(widths[0], widths[1], stride=2)
        self.layer3 = _stage(widths[1], widths[2], stride=2)
        self.layer4 = _stage(widths[2], widths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, spec.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.normalise(images)))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


class BasicBlock(nn.Module):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``.

    The shortcut is the identity, or a strided 1x1 convolution with batch normalisation (``downsample``) at the start of
    a stage that halves the size.
    """

    def __init__(self, source: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(source, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(source, channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps of (N, channels, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += shortcut
        activated: Tensor = self.relu(out)
        return activated


def _stage(source: int, channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(source, channels, stride), BasicBlock(channels, channels, stride=1))
