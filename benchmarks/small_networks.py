"""Networks of the blocks of well-known architectures, small enough for the oracle; 5 logits each."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import convnext as convnexts
from torchvision.models import efficientnet as efficientnets
from torchvision.models import mobilenetv3 as mobilenets
from torchvision.models import regnet as regnets
from torchvision.models.googlenet import BasicConv2d, Inception
from torchvision.models.inception import InceptionA

_CLASSES = 5


def efficientnet() -> nn.Module:
    """Inverted bottlenecks with squeeze-excite and SiLU."""
    blocks = [efficientnets.MBConvConfig(4, 3, 1, 8, 8, 1), efficientnets.MBConvConfig(4, 5, 2, 8, 12, 2)]
    network: nn.Module = models.EfficientNet(blocks, dropout=0.0, num_classes=_CLASSES, last_channel=16)
    return network


def mobilenet_v3() -> nn.Module:
    """Inverted bottlenecks with squeeze-excite, ReLU and hard swish."""
    blocks = [
        mobilenets.InvertedResidualConfig(8, 3, 16, 8, True, "RE", 1, 1, 1.0),
        mobilenets.InvertedResidualConfig(8, 5, 24, 12, True, "HS", 2, 1, 1.0),
    ]
    network: nn.Module = models.MobileNetV3(blocks, last_channel=16, num_classes=_CLASSES)
    return network


def regnet() -> nn.Module:
    """Grouped bottlenecks with squeeze-excite."""
    blocks = regnets.BlockParams([1, 2], [8, 16], [4, 4], [1.0, 1.0], [2, 2], 0.25)
    network: nn.Module = models.RegNet(blocks, num_classes=_CLASSES, stem_width=8)
    return network


def densenet() -> nn.Module:
    """Dense blocks and a transition."""
    network: nn.Module = models.DenseNet(4, (2, 2), 8, bn_size=2, num_classes=_CLASSES)
    return network


def googlenet() -> nn.Module:
    """A stem and two Inception blocks with pooling between them."""
    return nn.Sequential(
        BasicConv2d(3, 8, kernel_size=3),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Inception(8, 4, 4, 6, 2, 4, 4),
        nn.MaxPool2d(3, stride=2, ceil_mode=True),
        Inception(18, 4, 4, 6, 2, 4, 4),
        *_head(18),
    )


def inception() -> nn.Module:
    """A stem and Inception-v3's block of 5x5 and double 3x3 convolutions, at its full width."""
    return nn.Sequential(BasicConv2d(3, 8, kernel_size=3, stride=2), InceptionA(8, pool_features=4), *_head(228))


def resnet_group_norm() -> nn.Module:
    """Bottlenecks with group norm, narrow inside and otherwise at full width."""
    norm = partial(nn.GroupNorm, 4)
    network: nn.Module = models.ResNet(
        models.resnet.Bottleneck, [1, 1, 1, 1], _CLASSES, width_per_group=4, norm_layer=norm
    )
    return network


def convnext() -> nn.Module:
    """Blocks with layer norm over channels, and the downsampling between stages."""
    blocks = [convnexts.CNBlockConfig(8, 12, 2), convnexts.CNBlockConfig(12, None, 2)]
    network: nn.Module = models.ConvNeXt(blocks, layer_scale=0.5, num_classes=_CLASSES)
    return network


def swin() -> nn.Module:
    """Attention in shifted windows, and the merging of patches."""
    return _livened(models.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [2, 2], num_classes=_CLASSES))


def vit() -> nn.Module:
    """Two encoder blocks with a class token."""
    return _livened(models.VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=_CLASSES))


def deit() -> nn.Module:
    """The same in timm's form."""
    from timm.models.vision_transformer import VisionTransformer

    return _livened(
        VisionTransformer(img_size=16, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=_CLASSES)
    )


def _livened(network: nn.Module) -> nn.Module:
    """Weights at random throughout: new transformers have heads of zeros."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.3)
    return network


class _Pooled(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


def _head(channels: int) -> tuple[nn.Module, nn.Module]:
    return _Pooled(), nn.Linear(channels, _CLASSES)
