"""Random networks, drawn by Hypothesis from every operation that the closed form knows.

A network is built while it is drawn, on a map that tells each block the shape to fit; a failing example prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from architectures import randomised

Draw = st.DrawFn
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
steady = settings(deadline=None, derandomize=True, database=None, suppress_health_check=CHECKS)
thorough = settings(deadline=None, max_examples=1000, database=None, suppress_health_check=CHECKS)


class Residual(nn.Module):
    """``body(x) + shortcut(x)``, the sum in place where that is asked."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, inplace: bool) -> None:
        super().__init__()
        self.body, self.shortcut, self.inplace = body, shortcut, inplace

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if not self.inplace:
            return out + self.shortcut(x)
        out += self.shortcut(x)
        return out


class OptionA(nn.Module):
    """The shortcut without weights: every other position, and channels of zeros around."""

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.before, self.after = stride, before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class Concatenated(nn.Module):
    """Branches side by side."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Operation(nn.Module):
    """A function with a name to print."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


def integer(draw: Draw, low: int, high: int) -> int:
    return draw(st.integers(low, high))


def convolution(
    draw: Draw, x: Tensor, *, channels: int | None = None, keeps: bool = False, stride: int = 1
) -> nn.Conv2d:
    """Any convolution that fits; one that ``keeps`` has the output size of its stride alone."""
    inputs = x.shape[1]
    groups = draw(st.sampled_from([g for g in range(1, inputs + 1) if inputs % g == 0]))
    if channels is None:
        channels = groups * integer(draw, 1, max(1, 4 // groups))
    elif channels % groups:
        groups = 1
    options = {"bias": draw(st.booleans()), "groups": groups}
    if keeps:
        kernel = (draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 3])))
        padding = (kernel[0] // 2, kernel[1] // 2)
        return nn.Conv2d(inputs, channels, kernel, stride=stride, padding=padding, **options)
    if draw(st.integers(0, 5)) == 0:
        kernel = (integer(draw, 1, 4), integer(draw, 1, 3))
        return nn.Conv2d(inputs, channels, kernel, padding="same", dilation=integer(draw, 1, 2), **options)
    kernel, padding, dilation, steps = [], [], [], []
    for size in x.shape[2:]:
        padding.append(integer(draw, 0, 2))
        kernel.append(integer(draw, 1, min(4, size + 2 * padding[-1])))
        most = (size + 2 * padding[-1] - 1) // max(1, kernel[-1] - 1)
        dilation.append(integer(draw, 1, min(2, most) if kernel[-1] > 1 else 2))
        steps.append(integer(draw, 1, 2))
    sizes = {"stride": tuple(steps), "padding": tuple(padding), "dilation": tuple(dilation)}
    return nn.Conv2d(inputs, channels, tuple(kernel), **sizes, **options)


def activation(draw: Draw, *, inplace: bool = True) -> nn.Module:
    inplace = inplace and draw(st.booleans())
    choices: list[nn.Module] = [
        nn.ReLU(inplace), nn.ReLU(inplace), nn.ReLU6(inplace), nn.LeakyReLU(0.2, inplace), nn.SiLU(inplace),
        nn.GELU(), nn.GELU("tanh"), nn.Hardswish(inplace), nn.Identity(),
    ]  # fmt: skip
    return draw(st.sampled_from(choices))


def pooling(draw: Draw, x: Tensor) -> nn.Module:
    """Max, average or adaptive pooling of any geometry that fits."""
    height, width = x.shape[2:]
    kind = draw(st.sampled_from(["max", "max", "average", "adaptive max", "adaptive average"]))
    if kind.startswith("adaptive"):
        size = (integer(draw, 1, min(3, height)), integer(draw, 1, min(3, width)))
        return nn.AdaptiveMaxPool2d(size) if kind == "adaptive max" else nn.AdaptiveAvgPool2d(size)
    kernel = (integer(draw, 1, min(3, height)), integer(draw, 1, min(3, width)))
    stride = (integer(draw, 1, 3), integer(draw, 1, 3))
    padding = (integer(draw, 0, kernel[0] // 2), integer(draw, 0, kernel[1] // 2))
    ceil = draw(st.booleans())
    if kind == "average":
        return nn.AvgPool2d(kernel, stride, padding, ceil, draw(st.booleans()))
    dilation = 2 if kernel == (2, 2) and min(height, width) > 3 and draw(st.booleans()) else 1
    return nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil)


def unit(draw: Draw, x: Tensor) -> nn.Module:
    """Convolution, batch norm, activation and pooling, each of the last three or not."""
    parts: list[nn.Module] = [convolution(draw, x)]
    if draw(st.booleans()):
        parts.append(nn.BatchNorm2d(parts[0].out_channels))
    parts.append(activation(draw))
    if draw(st.integers(0, 3)) == 0:
        parts.append(nn.Dropout(0.5))
    if draw(st.booleans()):
        parts.append(pooling(draw, nn.Sequential(*parts).eval()(x.clone())))
    return nn.Sequential(*parts)


def residual(draw: Draw, x: Tensor) -> nn.Module:
    """A block with a shortcut: the identity, a projection, or option A; an activation after it or not."""
    inputs, stride = x.shape[1], integer(draw, 1, 2)
    extra = integer(draw, 0, 2) if stride == 2 else 0
    body: list[nn.Module] = [convolution(draw, x, channels=inputs + extra, keeps=True, stride=stride)]
    for _ in range(integer(draw, 0, 1)):
        body += [nn.BatchNorm2d(inputs + extra), activation(draw)]
        body.append(convolution(draw, x.new_zeros(1, inputs + extra, 4, 4), channels=inputs + extra, keeps=True))
    body.append(nn.BatchNorm2d(inputs + extra) if draw(st.booleans()) else nn.Identity())
    shortcut: nn.Module = nn.Identity()
    if extra or stride > 1:
        outputs = inputs + extra
        project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        shortcut = project if draw(st.booleans()) else OptionA(stride, extra // 2, extra - extra // 2)
    return nn.Sequential(Residual(nn.Sequential(*body), shortcut, draw(st.booleans())), activation(draw))


def concatenation(draw: Draw, x: Tensor) -> nn.Module:
    """Two or three branches of one size: convolutions, pooling of stride 1 before one, or the map itself."""
    branches: list[nn.Module] = []
    for _ in range(integer(draw, 2, 3)):
        narrow = convolution(draw, x, channels=integer(draw, 1, 2), keeps=True)
        pool = draw(st.sampled_from([nn.Identity(), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)]))
        branches.append(
            draw(st.sampled_from([nn.Identity(), narrow, nn.Sequential(pool, nn.Conv2d(x.shape[1], 2, 1))]))
        )
    return nn.Sequential(Concatenated(branches), activation(draw))


def reused(draw: Draw, x: Tensor) -> nn.Module:
    """One convolution called two or three times."""
    layer = convolution(draw, x, channels=x.shape[1], keeps=True)
    calls = [module for _ in range(integer(draw, 2, 3)) for module in (layer, activation(draw))]
    return nn.Sequential(*calls)


@st.composite
def networks(draw: Draw) -> tuple[nn.Module, Tensor]:
    """A network of two to four blocks with a head, and two images."""
    torch.manual_seed(integer(draw, 0, 2**31))
    images = torch.rand(2, integer(draw, 1, 3), integer(draw, 4, 8), integer(draw, 4, 8))
    blocks: list[nn.Module] = []
    x = images
    for _ in range(integer(draw, 2, 4)):
        block = draw(st.sampled_from([unit, unit, residual, concatenation, reused]))(draw, x)
        blocks.append(block.eval())
        with torch.no_grad():
            x = block(x.clone())
    assume(any(isinstance(module, nn.Conv2d) for block in blocks for module in block.modules()))
    head = [nn.AdaptiveAvgPool2d(1)] if draw(st.booleans()) else []
    features = x.shape[1] if head else x[0].numel()
    model = randomised(nn.Sequential(*blocks, *head, nn.Flatten(), nn.Linear(features, 4)))
    gain = draw(st.sampled_from([1.0, 4.0]))  # large enough for ReLU6 and Hardswish to saturate
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight *= gain
    return model.double().eval(), images.double()


def _elementwise(draw: Draw, x: Tensor) -> nn.Module:
    """One operation that acts per channel, those whose derivatives are 0 and 1 more often than others."""
    channels, height = x.shape[1:3]
    number = draw(st.sampled_from([-2.0, -0.5, 0.5, 3.0]))
    kind = draw(st.sampled_from(["ramp", "ramp", "ramp", "pool", "pool", "pad", "pad", "smooth", "other", "other"]))
    if kind == "ramp":
        ramps = [nn.ReLU(), nn.ReLU(), nn.ReLU6(), nn.Hardtanh(0, 0.5), nn.Hardtanh(-0.5, 0.5), nn.LeakyReLU(0.5)]
        ramps += [Operation("clamp(0, .5)", lambda x: x.clamp(0, 0.5)), Operation("clamp(0)", lambda x: x.clamp(min=0))]
        return draw(st.sampled_from(ramps))
    if kind == "pool":
        return pooling(draw, x)
    if kind == "pad":
        padding = (1, 0, integer(draw, -1, 1) if height > 1 else 1, 1)
        return nn.ConstantPad2d(padding, number)
    if kind == "smooth":
        smooth = [nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Tanh(), nn.Softplus(), nn.ELU(), nn.Hardsigmoid()]
        return draw(st.sampled_from([*smooth, nn.PReLU(), nn.BatchNorm2d(channels)]))
    half, side = max(1, channels // 2), integer(draw, 0, height - 1)
    rows = torch.linspace(-1, 1, height).view(-1, 1)
    others = [
        Operation(f"* {number}", lambda x: x * number),
        Operation(f"+ {number}", lambda x: x + number),
        Operation("* rows", lambda x: x * rows.to(x)),
        Operation("abs", torch.abs),
        Operation("-", torch.neg),
        Operation("+ relu", lambda x: x + F.relu(x)),
        Operation("* relu6", lambda x: x * F.relu6(x)),
        Operation(f"[:, {channels // 2}:, {side}:]", lambda x: x[:, channels // 2 :, side:]),
        Operation("halves in turn", lambda x: torch.cat([*reversed(x.split(half, 1))], 1)),
        Operation("there and back", lambda x: x.flatten(2).view(x.shape)),
        Operation("relu and ones", lambda x: torch.cat([F.relu(x), x.new_ones(x[:, :1].shape)], 1)),
    ]
    return draw(st.sampled_from(others))


@st.composite
def segments(draw: Draw) -> tuple[nn.Module, Tensor]:
    """Two convolutions with one to five operations between them, on values that tie often or never."""
    torch.manual_seed(integer(draw, 0, 2**31))
    images = torch.rand(2, 2, integer(draw, 3, 7), integer(draw, 3, 7))
    coarse = draw(st.booleans())
    if coarse:
        images = images.mul(4).round().div(4)
    first = nn.Conv2d(2, 4, 1, bias=False) if coarse else nn.Conv2d(2, 4, (1, 2), padding=1)
    with torch.no_grad():
        first.weight.mul_(4)
        if coarse:
            first.weight.mul_(2).round_().div_(2)
        x = first(images)
        parts: list[nn.Module] = []
        for _ in range(integer(draw, 1, 5)):
            parts.append(_elementwise(draw, x).eval())
            x = parts[-1](x.clone())
    last = convolution(draw, x)
    model = nn.Sequential(first, *parts, last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last.out_channels, 3))
    return randomised(model).double().eval(), images.double()
