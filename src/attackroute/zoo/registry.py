"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from attackroute.core.errors import UserError, did_you_mean
from attackroute.zoo.alexnet import alexnet
from attackroute.zoo.external import from_factory, from_timm, from_torchvision, torchvision_names
from attackroute.zoo.resnet import resnet18
from attackroute.zoo.spec import ModelSpec
from attackroute.zoo.vgg import vgg16, vgg_small

BUILT_IN: Mapping[str, Callable[[ModelSpec], nn.Module]] = {
    "alexnet": alexnet,
    "resnet18": resnet18,
    "vgg16": vgg16,
    "vgg_small": vgg_small,
}


_MIN_IMAGE_SIZE = 32  # five poolings by 2 leave one position


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

            - ``vgg16`` (with batch normalisation), ``alexnet``, ``resnet18``: up to 64 pixels in the form used with
              CIFAR; above, torchvision's, so that its weights for ``vgg16_bn``, ``alexnet`` and ``resnet18`` load;
            - ``vgg_small``: six convolutional layers, quick to train on small images;
            - ``torchvision:NAME``: a classification network of torchvision, its modules' names unchanged, with the
              normalisation that its weights expect in front;
            - ``timm:NAME``: the same for timm (``pip install "attackroute[timm]"``);
            - ``package.module:factory``: what this function returns when it is called without arguments, as it is: it
              decides on all that follows, and normalises its input itself. The current directory can be imported from.
        num_classes: Number of logits.
        width: Factor on the channels of a built-in network: ``max(1, round(base * width))`` in every layer.
        image_size: Height and width of the images; at least 32 for a built-in network. The others take it as it comes.
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
            num_classes,
            width,
            image_size,
            in_channels,
            None if mean is None else tuple(mean),
            None if std is None else tuple(std),
        )
    )


def build(spec: ModelSpec) -> nn.Module:
    """:func:`build_model` with its arguments in one object.

    Raises:
        UserError: See :func:`build_model`.
    """
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


def _built_in(spec: ModelSpec) -> nn.Module:
    factory = BUILT_IN.get(spec.name)
    if factory is None:
        names = ", ".join(BUILT_IN)
        close = did_you_mean(spec.name, BUILT_IN) or did_you_mean(spec.name, torchvision_names(), "torchvision:")
        raise UserError(
            f"no model {spec.name!r}{close} "
            f"(built in: {names}; also torchvision:NAME, timm:NAME and package.module:factory)"
        )
    if spec.image_size < _MIN_IMAGE_SIZE:
        raise UserError(
            f"{spec.name} needs images of at least {_MIN_IMAGE_SIZE} pixels, not {spec.image_size}; resize or pad them"
        )
    return factory(spec)
