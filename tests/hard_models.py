"""Networks that users do write and that could mislead the tracer: aliasing, gradient barriers, odd layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import Function, Head

Between = Callable[[Tensor], Tensor]


def two(between: Between, *, inputs: int = 6, kernel: int = 3) -> Callable[[], nn.Module]:
    """Two convolutions with something between them."""

    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        return parts["head"](F.relu(parts["b"](between(parts["a"](x)))))

    return lambda: Function(forward, a=nn.Conv2d(3, 6, 3), b=nn.Conv2d(inputs, 5, kernel), head=Head(5))


def using(
    forward: Callable[[nn.ModuleDict, Tensor], Tensor], **parts: Callable[[], nn.Module]
) -> Callable[[], nn.Module]:
    """A network from a forward function and factories of its parts."""
    return lambda: Function(forward, **{name: part() for name, part in parts.items()})


A, B, END = (lambda: nn.Conv2d(3, 6, 3)), (lambda: nn.Conv2d(6, 5, 3)), (lambda: Head(5))


# Custom autograd functions


def custom(forward: Callable[[Any, Tensor], Tensor], backward: Between) -> Between:
    """A function whose gradient is what ``backward`` makes of it."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return forward(ctx, x)

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return backward(gradient)

    return Custom.apply


reversal = custom(lambda _, x: x.view_as(x), lambda gradient: -0.1 * gradient)


class Rectifier(torch.autograd.Function):
    """ReLU as tutorials write it: a backward that works in place."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient = gradient.clone()
        gradient[x < 0] = 0
        return gradient


# Aliasing


def relu_on_a_view(x: Tensor) -> Tensor:
    x.view(x.shape[0], -1).relu_()
    return x


def view_before_a_write(x: Tensor) -> Tensor:
    left, right = x[:, :3], x[:, 3:]
    x.relu_()
    return torch.cat([right, left], 1)


def write_into_a_buffer(x: Tensor) -> Tensor:
    buffer = x.new_zeros(x.shape[0], 8, *x.shape[2:])
    buffer[:, 1:7].copy_(F.relu(x))
    return buffer[:, :6]


def overwrite_a_copy(x: Tensor) -> Tensor:
    buffer = torch.empty_like(x)
    buffer.copy_(F.relu(x))
    buffer[:, 0] = 5
    return buffer


def old_view_of_a_buffer(x: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    view = buffer[:]
    buffer.copy_(x)
    return view


def shifted_behind_the_back(x: Tensor) -> Tensor:
    x = F.relu(x)
    x.data.sub_(0.05)
    return x


def exchanged_memory(x: Tensor) -> Tensor:
    x = F.relu(x)
    x.data = x.data * 0.5 - 0.01
    return x


def doubled_in_a_list(x: Tensor) -> Tensor:
    torch._foreach_mul_([x], [2.0])
    return F.relu(x)


def halved_behind_the_back(x: Tensor) -> Tensor:
    x = F.relu(x)
    x.data.mul_(0.5)
    return F.hardtanh(x, 0, 0.3)


def foreach(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    first, second = parts["a"](x), parts["c"](x)
    torch._foreach_add_([first], [second])
    return parts["head"](F.relu(parts["b"](first)))


# Gradient barriers


def detached_branch(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    x = F.relu_(parts["a"](x))
    return parts["head"](F.relu(parts["b"](x.detach()))) + parts["end"](x)


def only_its_shape(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    """The second convolution reads a map made ``like`` the first one's."""
    z = parts["a"](x)
    return parts["head"](F.relu(parts["b"](torch.zeros_like(z) + x.mean((1, 2, 3), keepdim=True)))) + parts["end"](z)


free = torch.full((1,), 1.5, dtype=torch.float64, requires_grad=True)
hidden = [nn.Conv2d(6, 6, 3).double()]


class Standardised(nn.Conv2d):
    """Weight standardisation, and padding of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(F.pad(x, (1, 0, 1, 0)), weight / weight.std((1, 2, 3), keepdim=True), self.bias)


@torch.jit.script
def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def spatial_gate(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    x = F.relu(parts["a"](x))
    pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return parts["head"](F.relu(parts["b"](x * torch.sigmoid(parts["gate"](pooled)))))


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, Head(5))


def alternating(channels: int, *between: nn.Module) -> nn.Module:
    """Convolutions with these modules between them."""
    points = (nn.Conv2d(channels, channels, 1) for _ in between)
    layers = [layer for pair in zip(between, points, strict=True) for layer in pair]
    return nn.Sequential(nn.Conv2d(3, channels, 3), *layers, Head(channels))


HARD: dict[str, Callable[[], nn.Module]] = {
    # custom functions
    "straight-through clamp": two(custom(lambda _, x: x.clamp(-0.2, 0.2), lambda gradient: gradient)),
    "gradient reversal": two(lambda x: reversal(F.relu(x))),
    "function that returns its input": two(custom(lambda _, x: x, lambda gradient: gradient / 2)),
    "hand-written ReLU": two(Rectifier.apply),
    "function in place": two(custom(lambda ctx, x: ctx.mark_dirty(x) or x.mul_(2), lambda gradient: 2 * gradient)),
    # aliasing
    "ReLU on a view": two(relu_on_a_view),
    "view before a write": two(view_before_a_write),
    "write into a buffer": two(write_into_a_buffer),
    "overwrite a copy": two(overwrite_a_copy),
    "old view of a buffer": two(old_view_of_a_buffer),
    "changed through .data": two(halved_behind_the_back),
    "shifted through .data": two(shifted_behind_the_back),
    "other memory as .data": two(exchanged_memory),
    "foreach in place": two(doubled_in_a_list),
    "foreach": using(foreach, a=A, c=A, b=B, head=END),
    # gradient barriers
    "rounding with detach": two(lambda x: x + (x.mul(4).round().div(4) - x).detach()),
    "clamp under no_grad": two(lambda x: x + torch.no_grad()(lambda x: x.clamp(-0.2, 0.2) - x)(x)),
    "integers added": two(lambda x: x + x.mul(10).int().to(x.dtype) / 10),
    "integers as a gate": two(lambda x: x * (3 * x).to(torch.int32)),
    "gate under no_grad": two(lambda x: x * torch.no_grad()(torch.sigmoid)(x)),
    "integers only": two(lambda x: x.mul(100).int().to(x.dtype)),
    "half detached": two(lambda x: torch.cat([x[:, :3], F.relu(x[:, 3:]).detach()], 1)),
    "detached branch": using(detached_branch, a=A, b=B, head=END, end=lambda: Head(6)),
    "shape alone": using(only_its_shape, a=A, b=B, head=END, end=lambda: Head(6)),
    "one-hot": two(lambda x: torch.zeros_like(x).scatter(1, x.argmax(1, keepdim=True), 1.0) * x),
    # activations and padding
    "ReLU after saturated ReLU6": two(lambda x: F.relu(F.max_pool2d(F.relu6(30 * x), 2))),
    "padding with -inf before pooling": two(
        lambda x: F.max_pool2d(F.pad(F.relu(x), (0, 1, 0, 1), value=-torch.inf), 3, 2)
    ),
    "masked_fill and where": two(lambda x: torch.where(x > 0.1, x, x.masked_fill(x < -0.1, 0))),
    # paths of one source that meet
    "skip around a softmax": two(lambda x: x + F.softmax(x, 1)),
    "softmax around a skip": two(lambda x: F.softmax(x, 1) - x),
    "a channel twice": two(lambda x: torch.cat([x[:, :3], -2 * x[:, :3]], 1)),
    "a channel twice in groups": using(
        lambda p, x: p["head"](p["b"](torch.cat([x := p["a"](x), x.neg()], 1))),
        a=A,
        b=lambda: nn.Conv2d(12, 4, 3, groups=2),
        head=lambda: Head(4),
    ),
    "channels in another order added": two(lambda x: x + torch.cat([x[:, 3:], x[:, :3]], 1)),
    "some channels added": two(lambda x: x + F.pad(x[:, :4], (0, 0, 0, 0, 0, 2))),
    "neighbours added": two(lambda x: x[:, :, 1:] - x[:, :, :-1]),
    "two poolings added": two(lambda x: F.max_pool2d(x, 2) + F.max_pool2d(-x, 2)),
    "both signs averaged": two(
        lambda x: F.avg_pool2d(F.max_pool2d(x, 3, 1) * torch.linspace(-1, 1, 9).to(x), 2), kernel=1
    ),
    "gate of its own mean": two(lambda x: x * x.mean((2, 3), keepdim=True)),
    # calls and parameters
    "functional padding='valid'": using(
        lambda p, x: p["head"](F.conv2d(F.relu(p["a"](x)), p["b"].weight, padding="valid")), a=A, b=B, head=END
    ),
    "tensors that require grad": two(lambda x: (x * free)[:, 1:5].flatten(2).unflatten(2, (11, 11)), inputs=4),
    "input that requires grad": using(
        lambda p, x: p["head"](F.relu(p["b"](p["a"](x.requires_grad_())))), a=A, b=B, head=END
    ),
    "module outside the tree": two(lambda x: hidden[0](F.relu(x))),
    "weight standardisation": lambda: sequence(Standardised(3, 6, 3), nn.ReLU(), Standardised(6, 5, 3)),
    "parametrised weights": lambda: sequence(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3)),
        nn.ReLU(),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(6, 5, 3)),
        nn.ReLU(),
    ),
    "gated linear unit": two(lambda x: F.glu(x, 1), inputs=3),
    "scripted function": two(swish),
    "vmap": two(torch.vmap(lambda x: F.relu(x) * 2)),
    "unusual activations": lambda: alternating(
        6, nn.Softshrink(0.1), nn.Threshold(0.1, 0.2), nn.RReLU(), nn.Softsign()
    ),
    "normalisations": lambda: alternating(
        4,
        nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.ReLU()),
        *(nn.LayerNorm([4, 11, 11]), nn.InstanceNorm2d(4, track_running_stats=True), nn.LocalResponseNorm(3)),
    ),
    "spatial gate": using(spatial_gate, a=A, b=B, head=END, gate=lambda: nn.Conv2d(2, 1, 3, padding=1)),
    "Fourier transform": two(lambda x: torch.fft.irfft2(torch.fft.rfft2(x) / 2, s=(11, 11))),
    "interpolation": two(lambda x: F.interpolate(F.relu(x), scale_factor=1.5, mode="bilinear")),
    "unpooling": two(lambda x: F.max_unpool2d(*F.max_pool2d(x[..., 1:, 1:], 2, return_indices=True), 2)),
    "pooling of unusual kinds": two(lambda x: F.adaptive_max_pool2d(F.lp_pool2d(F.relu(x) + 0.1, 2, 2), 4)),
    "one position": lambda: sequence(nn.Conv2d(3, 4, 13), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=2), nn.Conv2d(4, 5, 1)),
    "a kernel beyond the map": lambda: sequence(
        nn.Conv2d(3, 4, 5, 4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 7, padding=3),
        nn.ReLU(),
        nn.Conv2d(4, 5, 5, 2, padding=6, dilation=3),
    ),
    "one channel": lambda: sequence(
        nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(1, 5, 2)
    ),
}
"""Networks that must be traced as the oracle does it."""


def mapped(
    before: Between, features: int, after: Between, end: Callable[[], nn.Module], outputs: int = 4, channels: int = 6
) -> Callable[[], nn.Module]:
    """A linear map of an arrangement of a convolution's output."""

    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        return parts["end"](after(F.relu(parts["fc"](before(parts["a"](x))))))

    return using(forward, a=lambda: nn.Conv2d(3, channels, 3), fc=lambda: nn.Linear(features, outputs), end=end)


HARD_LINEAR: dict[str, Callable[[], nn.Module]] = {
    "linear map of columns": mapped(F.relu, 11, lambda x: x, lambda: Head(6)),
    "linear map of positions": mapped(
        lambda x: F.relu(x).flatten(2), 121, lambda x: x.mean(2), lambda: nn.Linear(6, 5)
    ),
    "linear map of channels": mapped(
        lambda x: x.permute(0, 2, 3, 1), 6, lambda x: x.permute(0, 3, 1, 2), END, outputs=5
    ),
    "linear map of one channel's positions": mapped(
        lambda x: F.relu(x).flatten(2), 121, lambda x: x[:, 0], lambda: nn.Linear(4, 5), channels=1
    ),
    "linear map of a mean": mapped(lambda x: F.relu(x).mean((3, 2)), 6, lambda x: x, lambda: nn.Linear(4, 5)),
    "linear map of a flat map": using(
        lambda p, x: p["end"](F.relu_(p["norm"](p["fc"](F.relu_(p["a"](x)).flatten(1))))),
        a=A,
        fc=lambda: nn.Linear(726, 4),
        norm=lambda: nn.BatchNorm1d(4),
        end=lambda: nn.Linear(4, 5),
    ),
}
"""The same with linear maps as route layers."""
