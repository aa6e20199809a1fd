"""Random small transformers, drawn by Hypothesis from the parts that have a closed form, and some that have none."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from architectures import randomised
from random_networks import Operation

Draw = st.DrawFn


class Residual(nn.Module):
    """``x + scale * body(norm(x))``, the factor per channel; the sum in place where that is asked."""

    def __init__(self, norm: nn.Module, body: nn.Module, scale: Tensor | None, inplace: bool) -> None:
        super().__init__()
        self.norm, self.body, self.inplace = norm, body, inplace
        self.scale = None if scale is None else nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.norm(x))
        y = y if self.scale is None else y * self.scale
        if not self.inplace:
            return x + y
        y += x
        return y


def turned(x: Tensor, kind: str) -> Tensor:
    """Queries or keys ``(n, heads, T, E)``, normalised, or rotated but for the first token, or both."""
    for step in kind.split(" and "):
        if step == "normalised":
            x = F.normalize(x, dim=-1)
        elif step == "standardised":
            x = F.layer_norm(x, x.shape[-1:], eps=0.1)
        elif step == "rotated" and x.shape[-1] > 1:
            first, (left, right) = x[:, :, :1], x[:, :, 1:].chunk(2, -1)
            angles = torch.arange(left.shape[2] * left.shape[3]).view(left.shape[2:]).to(x)
            rotated = [left * angles.cos() - right * angles.sin(), left * angles.sin() + right * angles.cos()]
            x = torch.cat([first, torch.cat(rotated, -1)], 2)
    return x


class Attention(nn.Module):
    """Self-attention in one of several styles, on windows of a size that are shifted, or on all tokens.

    There may be biases, of the size ``bias``; queries and keys are ``turned``; keys and values may be one head's.
    """

    def __init__(
        self, channels: int, heads: int, style: str, window: tuple[int, int], bias: int, turn: str, shared: bool
    ) -> None:
        super().__init__()
        self.heads, self.style, (self.window, self.shift), self.turn = heads, style, window, turn
        if style == "module":
            self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)
            return
        self.sizes = [channels] + [channels // heads if shared else channels] * 2
        sizes = [sum(self.sizes)] if style == "fused" else self.sizes
        self.qkv = nn.ModuleList([nn.Linear(channels, size) for size in sizes])
        self.proj = nn.Linear(channels, channels)
        self.bias = nn.Parameter(torch.randn(heads, bias, bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "module":
            return self.attention(x, x, x, need_weights=bool(self.shift))[0]
        samples, tokens, channels = x.shape
        if self.window:
            x = x.roll(-self.shift, 1).reshape(-1, self.window, channels)
        split = self.qkv[0](x).split(self.sizes, -1) if self.style == "fused" else [each(x) for each in self.qkv]
        q, k, v = (each.unflatten(-1, (-1, channels // self.heads)).transpose(1, 2) for each in split)
        q, k = turned(q, self.turn), turned(k, self.turn)
        if k.shape[1] < self.heads:
            k, v = k.expand(-1, self.heads, -1, -1), v.repeat_interleave(self.heads, 1)
        if self.style == "written":
            logits = q @ k.transpose(-2, -1) / 1.3
            logits = logits if self.bias is None else logits + self.bias
            y = logits.masked_fill(torch.ones_like(logits[0, 0]).tril(-2).bool(), -100.0).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=0.6)
        y = self.proj(y.transpose(1, 2).flatten(2))
        return y.reshape(samples, tokens, channels).roll(self.shift, 1) if self.window else y


class OverMap(nn.Module):
    """A part that works on maps ``(n, C, H, W)``, for tokens that form one."""

    def __init__(self, body: nn.Module, height: int) -> None:
        super().__init__()
        self.body, self.height = body, height

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.transpose(1, 2).unflatten(2, (self.height, -1))).flatten(2).transpose(1, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm(draw: Draw, channels: int, kind: type[nn.LayerNorm] = nn.LayerNorm) -> nn.Module:
    eps, affine = draw(st.sampled_from([1e-6, 0.3])), draw(st.booleans())
    if kind is nn.LayerNorm and draw(st.integers(0, 3)) == 0:
        return nn.RMSNorm(channels, eps, affine)
    return kind(channels, eps, affine)


def mlp(draw: Draw, channels: int) -> nn.Module:
    activation = draw(st.sampled_from([nn.GELU(), nn.ReLU(), nn.SiLU(), nn.Hardswish()]))
    return nn.Sequential(nn.Linear(channels, 6), activation, nn.Linear(6, channels))


def attention(draw: Draw, channels: int, tokens: int) -> nn.Module:
    style = draw(st.sampled_from(["module", "fused", "separate", "written"]))
    window = draw(st.sampled_from([0, 2])) if style != "module" and tokens % 2 == 0 else 0
    heads, shift = draw(st.sampled_from([1, 2])), draw(st.integers(0, 1))
    turn = draw(st.sampled_from(["left", "left", "rotated", "normalised", "standardised and rotated"]))
    shared = draw(st.integers(0, 3)) == 0
    bias = (window or tokens) if draw(st.booleans()) else 0
    return Attention(channels, heads, style, (window, shift), bias, turn, shared)


def convolution(draw: Draw, channels: int, height: int) -> nn.Module:
    groups = draw(st.sampled_from([1, channels]))
    layer = nn.Conv2d(channels, channels, draw(st.sampled_from([1, 3])), padding="same", groups=groups)
    normed = nn.Sequential(norm(draw, channels, ChannelNorm), layer)
    return OverMap(draw(st.sampled_from([layer, normed, nn.Sequential(nn.ReLU(), layer, nn.GELU())])), height)


class PatchMerging(nn.Module):
    """Two neighbours side by side, normalised together, and a linear map of half their features."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(2 * channels), nn.Linear(2 * channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(torch.cat([x[:, 0::2], x[:, 1::2]], -1)))


class Network(nn.Module):
    """A patch embedding, tokens beside its own, blocks, and a head that reads a token or the mean of all."""

    def __init__(self, stem: nn.Module, extra: int, blocks: list[nn.Module], norm: nn.Module, read: str) -> None:
        super().__init__()
        self.stem, self.blocks, self.norm, self.read = stem, nn.Sequential(*blocks), norm, read
        self.extra = nn.Parameter(torch.randn(1, extra, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.extra.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0] if self.read == "token" else x.mean(1))


OTHERS: list[Callable[[], nn.Module]] = [
    lambda: Operation("softmax over features", lambda x: x.softmax(-1)),
    lambda: nn.LayerNorm(4),
    lambda: Operation("a token of its own mean", lambda x: torch.cat([x.mean(1, keepdim=True), x[:, 1:]], 1)),
    lambda: Operation("gate of the first token", lambda x: x * x[:, :1].sigmoid()),
    lambda: nn.MultiheadAttention(4, 1, batch_first=True),
]
"""Parts without a closed form, or with one where they stand alone."""


class Plain(nn.Module):
    """The first result of attention that reads its input directly, or whatever else a module returns."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, x, x)[0] if isinstance(self.body, nn.MultiheadAttention) else self.body(x)


@st.composite
def transformers(draw: Draw, supported: bool = True) -> tuple[nn.Module, Tensor]:
    """A network of one to three blocks, and two images; unless all is ``supported``, one part has no closed form."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    height = 2
    stem, extra = nn.Conv2d(2, 4, 2, 2), draw(st.integers(0, 2))
    tokens, blocks = 2 * height + extra, list[nn.Module]()
    count = draw(st.integers(1, 3))
    strange = -1 if supported else draw(st.integers(0, count - 1))
    for number in range(count):
        if number == strange:
            blocks.append(Plain(draw(st.sampled_from(OTHERS))()))
        kind = draw(st.sampled_from(["attention", "attention", "mlp", "convolution", "merging"]))
        if kind == "merging" and tokens % 2 == 0 and tokens > 2:
            blocks.append(PatchMerging(4))
            tokens //= 2
            continue
        first: nn.Module = norm(draw, 4)
        if kind == "convolution" and not extra and tokens % height == 0:
            first, body = nn.Identity(), convolution(draw, 4, height)
        else:
            body = mlp(draw, 4) if kind == "mlp" else attention(draw, 4, tokens)
        scale = torch.randn(4) if draw(st.booleans()) else None
        blocks.append(Residual(first, body, scale, draw(st.booleans())))
    last = draw(st.sampled_from([nn.Identity(), norm(draw, 4)]))
    model = Network(stem, extra, blocks, last, draw(st.sampled_from(["token", "mean"])))
    model = randomised(model).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return model, torch.rand(2, 2, 2 * height, 4).double()
