"""Small networks of attention, gates and normalisation over channels, and their layers' outputs by a slow way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

from benchmarks.small_networks import efficientnet

CLASSES = 5


class Attentive(nn.Module):
    """A gate, three normalisations, attention by function and by module, and tokens with a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.group = nn.Conv2d(3, 8, 4, 4), nn.GroupNorm(2, 8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm1, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm2, self.attn = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm3, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.group(self.embed(x)))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm2(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        x = x + self.fc2(F.gelu(self.fc1(self.norm3(x))))
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """PyTorch's own encoder, which in eval mode without gradients runs as one fused operation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


class PositionsFirst(nn.Module):
    """Tokens as ``(positions, samples, features)``, where nothing but the values tells samples from positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.fc(self.embed(x).flatten(2).permute(2, 0, 1))).mean(0))


def vit() -> nn.Module:
    return VisionTransformer(16, 4, 2, 2, 8, 12, num_classes=CLASSES)


def swin() -> nn.Module:
    return SwinTransformer([2, 2], 8, [2], [2], [2, 2], stochastic_depth_prob=0.0, num_classes=CLASSES)


def convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(6, 8, 1), CNBlockConfig(8, None, 1)], layer_scale=0.7, num_classes=CLASSES)


def mobilenet() -> nn.Module:
    blocks = [
        InvertedResidualConfig(8, 3, 16, 8, True, "RE", 1, 1, 1.0),
        InvertedResidualConfig(8, 5, 16, 8, True, "HS", 2, 1, 1.0),
    ]
    return MobileNetV3(blocks, 16, num_classes=CLASSES)


TOKENS: dict[str, Callable[[], nn.Module]] = {"vit": vit, "swin": swin, "attentive": Attentive, "encoder": Encoder}
"""Networks with attention."""

GATED: dict[str, Callable[[], nn.Module]] = {"convnext": convnext, "efficientnet": efficientnet, "mobilenet": mobilenet}
"""Networks with gates, or normalisation over channels, and no attention."""


def made(build: Callable[[], nn.Module], samples: int = 3, size: int = 16) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in float64 with lively weights, in eval mode, with images and labels for it."""
    torch.manual_seed(0)
    model = build().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / max(1, parameter[0].numel()) ** 0.5)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model, torch.rand(samples, 3, size, size).double(), torch.arange(samples) % CLASSES


@contextmanager
def every_output(change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Show each convolution's and linear map's output, numbered in order, to ``change``, whose result flows on.

    Outputs are channels last. The way: other functions in the place of PyTorch's own, where its modules look for them.
    """
    linear, conv = F.linear, nn.Conv2d.forward
    count = 0

    def shown(output: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return change(count - 1, output)

    def patched(*args: Any, **kwargs: Any) -> Tensor:
        return shown(linear(*args, **kwargs))

    def patched_conv(self: nn.Conv2d, x: Tensor) -> Tensor:
        return shown(conv(self, x).movedim(1, -1)).movedim(-1, 1)

    try:
        F.linear, nn.Conv2d.forward = patched, patched_conv  # type: ignore[assignment, method-assign]
        yield
    finally:
        F.linear, nn.Conv2d.forward = linear, conv  # type: ignore[method-assign]


def readings(model: nn.Module, image: Tensor, label: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
    """For one image, every layer's output and the loss's gradient at it, in order, each ``(positions, C)``."""
    held: list[Tensor] = []

    def hold(_: int, output: Tensor) -> Tensor:
        output.retain_grad()
        held.append(output)
        return output.clone()

    with torch.enable_grad(), every_output(hold):
        logits = model(image[None].clone().requires_grad_())
        F.cross_entropy(logits, logits.argmax(1) if label is None else label[None]).backward()
    model.zero_grad()
    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in held]
    return [(z.detach().flatten(0, -2), g.flatten(0, -2)) for z, g in zip(held, grads, strict=True)]
