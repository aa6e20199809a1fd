"""Networks by name: VGG, AlexNet and ResNet-18 for small images, with torchvision's names, and others' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError, did_you_mean
from attackroute.zoo.external import from_factory, from_timm, from_torchvision, torchvision_names
from attackroute.zoo.spec import MOST_PIXELS, ModelSpec, Normalise, Statistics

Plan = Sequence[int | Literal["M"]]
"""Channels of convolutional layers, and ``"M"`` for a pooling."""

_MIN_IMAGE_SIZE = 32  # five poolings by 2 leave one position
_VGG16: Plan = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
_VGG_SMALL: Plan = (16, 16, "M", 32, 32, "M", 64, 64, "M")
_ALEXNET = (64, 192, 384, 256, 256)
_RESNET_STAGES = (64, 128, 256, 512)
_LARGE = {"alexnet": "alexnet", "resnet18": "resnet18", "vgg16": "vgg16_bn"}  # torchvision's, for larger images


def build_model(
    spec: str,
    *,
    num_classes: int = 10,
    width: float = 1.0,
    image_size: int = 32,
    in_channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Build a network with random weights that takes images in [0, 1]. Nothing is downloaded.

    Args:
        spec: One of

            - ``vgg16`` (with batch normalisation), ``alexnet``, ``resnet18``: in the form used with CIFAR, for images
              of 32 to 64 pixels; for larger ones take torchvision's;
            - ``vgg_small``: six convolutional layers, quick to train on small images;
            - ``torchvision:NAME``: a classification network of torchvision, its modules' names unchanged, with the
              normalisation that its weights expect in front;
            - ``timm:NAME``: the same for timm (``pip install "attackroute[timm]"``);
            - ``package.module:factory``: what this function returns when it is called without arguments, as it is: it
              decides on all that follows, and normalises its input itself. The current directory can be imported from.
        num_classes: Number of logits.
        width: Factor on the channels of a built-in network: ``max(1, round(base * width))`` in every layer.
        image_size: Height and width of the images, for a built-in network. The others take it as it comes.
        in_channels: Channels of the images: 3, or 1 where the network allows it.
        mean: Of each input channel, for images in [0, 1]; by default CIFAR's, ImageNet's above 64 pixels, MNIST's for
            one channel.
        std: The same for the standard deviation.

    Returns:
        The network, in training mode.

    Raises:
        UserError: Unknown name, a missing extra, or an argument out of range.

    Example:
        >>> model = build_model("vgg16", width=0.25)
        >>> model.features[0].out_channels
        16
    """
    return build(
        ModelSpec(
            spec,
            num_classes=num_classes,
            width=width,
            image_size=image_size,
            in_channels=in_channels,
            mean=None if mean is None else tuple(map(float, mean)),
            std=None if std is None else tuple(map(float, std)),
        )
    )


def build(spec: ModelSpec) -> nn.Module:
    """:func:`build_model` with its arguments in one object."""
    source, colon, name = spec.name.partition(":")
    if not colon:
        return _built_in(spec)
    if not (source and name):
        raise UserError(f"model {spec.name!r} must be a name, torchvision:NAME, timm:NAME or package.module:factory")
    if source == "torchvision":
        return from_torchvision(name, spec)
    if source == "timm":
        return from_timm(name, spec)
    return from_factory(source, name, spec)


class ChainNet(nn.Module):
    """``classifier(flatten(avgpool(features(normalise(x)))))``, with the parts' names as torchvision has them."""

    def __init__(self, statistics: Statistics, features: nn.Module, avgpool: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.normalise = Normalise(statistics)
        self.features = features
        self.avgpool = avgpool
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        maps = self.avgpool(self.features(self.normalise(images)))
        logits: Tensor = self.classifier(torch.flatten(maps, 1))
        return logits


def vgg16(spec: ModelSpec) -> nn.Module:
    """VGG-16 with batch normalisation (Simonyan and Zisserman, 2015), its features those of torchvision's ``vgg16_bn``.

    The head is a global average (of a single position at 32 pixels) and one linear layer, as is usual with CIFAR.
    """
    return _with_linear_head(spec, *_vgg_features(spec, _VGG16))


def vgg_small(spec: ModelSpec) -> nn.Module:
    """Six convolutional layers and a linear one: trained on a few thousand small images within a minute on a CPU."""
    return _with_linear_head(spec, *_vgg_features(spec, _VGG_SMALL))


def _with_linear_head(spec: ModelSpec, features: nn.Module, channels: int, size: int = 1) -> nn.Module:
    """A network that pools the features to some pixels a side, of which one linear layer makes logits."""
    classifier = nn.Linear(channels * size**2, spec.num_classes)
    return ChainNet(spec.statistics(), features, nn.AdaptiveAvgPool2d(size), classifier)


def _vgg_features(spec: ModelSpec, plan: Plan) -> tuple[nn.Sequential, int]:
    """The convolutional part, initialised, and the channels that leave it."""
    layers: list[nn.Module] = []
    channels = spec.in_channels
    for step in plan:
        if step == "M":
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        source, channels = channels, spec.channels(step)
        layers += [nn.Conv2d(source, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    features = nn.Sequential(*layers)
    _initialise_convolutions(features)
    return features, channels


def alexnet(spec: ModelSpec) -> nn.Module:
    """AlexNet (Krizhevsky et al., 2012; in one column, 2014): five convolutional layers, no batch normalisation.

    The first layer is 5x5 with stride 1, as in the authors' networks for CIFAR, so that all three overlapping poolings
    (3x3, stride 2) still have room: 32 -> 15 -> 7 -> 3 pixels; the head is one linear layer.
    """
    widths = [spec.channels(base) for base in _ALEXNET]
    features = nn.Sequential(
        *(nn.Conv2d(spec.in_channels, widths[0], 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(widths[0], widths[1], 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)),
        *(nn.Conv2d(widths[1], widths[2], 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(widths[2], widths[3], 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(widths[3], widths[4], 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)),
    )
    _initialise_convolutions(features)
    return _with_linear_head(spec, features, widths[4], size=3)


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2016): four stages of two basic blocks.

    The first layer is 3x3 with stride 1 and no pooling follows it, as is usual with CIFAR.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        stem, *_, last = widths = [spec.channels(base) for base in _RESNET_STAGES]
        self.normalise = Normalise(spec.statistics())
        self.conv1 = nn.Conv2d(spec.in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(stem, widths[0], stride=1)
        self.layer2 = _stage(widths[0], widths[1], stride=2)
        self.layer3 = _stage(widths[1], widths[2], stride=2)
        self.layer4 = _stage(widths[2], widths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, spec.num_classes)
        _initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        x = self.relu(self.bn1(self.conv1(self.normalise(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _stage(source: int, channels: int, stride: int) -> nn.Sequential:
    """Two basic blocks; the shortcut of one that halves the size is a 1x1 convolution with batch normalisation."""
    from torchvision.models.resnet import BasicBlock

    shortcut: nn.Module | None = None
    if stride != 1:
        shortcut = nn.Sequential(nn.Conv2d(source, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
    return nn.Sequential(BasicBlock(source, channels, stride, shortcut), BasicBlock(channels, channels))


def _initialise_convolutions(network: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / fan-in) (He et al., 2015) and set its bias to 0.

    Activations keep their size from layer to layer, which AlexNet needs, having no batch normalisation.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


BUILT_IN = {"alexnet": alexnet, "resnet18": ResNet18, "vgg16": vgg16, "vgg_small": vgg_small}


def _built_in(spec: ModelSpec) -> nn.Module:
    factory = BUILT_IN.get(spec.name)
    if factory is None:
        close = did_you_mean(spec.name, BUILT_IN) or did_you_mean(spec.name, torchvision_names(), "torchvision:")
        raise UserError(
            f"no model {spec.name!r}{close} "
            f"(built in: {', '.join(BUILT_IN)}; also preset:NAME, torchvision:NAME, timm:NAME, package.module:factory)"
        )
    if spec.image_size < _MIN_IMAGE_SIZE:
        raise UserError(
            f"{spec.name} needs images of at least {_MIN_IMAGE_SIZE} pixels, not {spec.image_size}; resize or pad them"
        )
    if spec.image_size > MOST_PIXELS and spec.name in _LARGE:
        raise UserError(
            f"{spec.name} is for images of at most {MOST_PIXELS} pixels, not {spec.image_size}; resize them, or take "
            f"torchvision:{_LARGE[spec.name]}"
        )
    try:
        return factory(spec)
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"{spec.name} cannot be built ({str(error).splitlines()[0]}); make it smaller") from error
