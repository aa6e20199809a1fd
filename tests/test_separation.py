"""What is called separate is separate: against gradients between samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attackroute.tracing.pass_checks import Separation

Function = Callable[[Tensor], Tensor]
SIZE = (2, 2, 6, 6)  # as many channels as samples, so that one can be taken for the other


class Watching(TorchDispatchMode):
    def __init__(self, separation: Separation) -> None:
        super().__init__()
        self.separation = separation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.separation.watch(func, args, kwargs or {}, output)
        return output


def proven(function: Function) -> bool:
    images = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    separation = Separation(SIZE[0])
    with Watching(separation):
        function(images)
    return separation.proven


def mixes(function: Function) -> bool:
    """Whether a gradient joins two samples."""
    images = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    output = function(images)
    weights = torch.rand(output[0].shape, generator=torch.Generator().manual_seed(1)).double()
    gradients = [torch.autograd.grad((row * weights).sum(), images, retain_graph=True)[0] for row in output]
    return bool(gradients[0][1].count_nonzero() or gradients[1][0].count_nonzero())


def ones(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.ones(shape, dtype=x.dtype)


def normalised(x: Tensor) -> Tensor:
    return F.batch_norm(x, ones(2)(x), ones(2)(x), ones(2)(x), ones(2)(x))


def written(x: Tensor) -> Tensor:
    target = torch.zeros_like(x)
    target.copy_(x)
    return target.relu_()


def behind_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        mean = x.mean(0, keepdim=True)
    return x - mean


SEPARATE: dict[str, Function] = {
    "convolution": lambda x: F.conv2d(x, ones(2, 2, 3, 3)(x), padding=1),
    "batch norm, in-place activation": lambda x: F.relu_(normalised(x)),
    "activations": lambda x: F.hardswish(F.silu(F.leaky_relu(x)).clamp(-1, 1)),
    "residual sum": lambda x: x + F.relu(x),
    "constants": lambda x: (x - ones(2, 1, 1)(x)) / 3 * ones(1, 2, 1, 1)(x),
    "pooling": lambda x: F.avg_pool2d(F.max_pool2d(x, 3, 2, 1), 2),
    "gate per sample": lambda x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)),
    "channels joined and cut": lambda x: torch.cat([x, x], 1)[:, 1:3],
    "padding": lambda x: F.pad(x, (1, 1, 0, 2, 0, 1)),
    "head": lambda x: F.linear(F.relu(x).mean((2, 3)).flatten(1), ones(5, 2)(x), ones(5)(x)),
    "written into a buffer": written,
}
MIXING: dict[str, Function] = {
    "mean over samples": lambda x: x - x.mean(0),
    "mean over samples, kept": lambda x: x - x.mean(0, keepdim=True),
    "mean that leaves channels in place of samples": lambda x: x.mean((0, 2)),
    "sum of everything": lambda x: x - x.sum(),
    "batch norm of the batch": lambda x: F.batch_norm(x, None, None, training=True),
    "roll": lambda x: x.roll(1, 0),
    "roll before a ReLU": lambda x: x.roll(1, 0).relu(),
    "flip": lambda x: x + x.flip(0),
    "transposition": lambda x: x.transpose(0, 1).relu(),
    "one sample for all": lambda x: x * x[:1],
    "samples joined": lambda x: torch.cat([x[1:], x[:1]]),
    "samples padded": lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, -1)),
    "kernel from the images": lambda x: F.conv2d(x, x.mean((2, 3), keepdim=True)),
    "norm from the images": lambda x: F.batch_norm(x, ones(2)(x), ones(2)(x), x.mean((2, 3)).mean(1)),
    "product with itself": lambda x: x.flatten(1) @ x.flatten(1).T,
    "matrix from the images": lambda x: F.linear(x.mean((2, 3)), x.mean((2, 3))),
    "bias from the images": lambda x: F.linear(x.mean((2, 3)), ones(2, 2)(x), x.mean((1, 2, 3))),
    "reshaped over samples": lambda x: x.view(4, 1, 6, 6).relu().view(2, 2, 6, 6).permute(1, 0, 2, 3),
    "softmax over samples": lambda x: x.softmax(0),
    "aligned with other dimensions": lambda x: x.mean((2, 3)) + x.mean((2, 3))[:, :, None],
}


@pytest.mark.parametrize("name", SEPARATE)
def test_ordinary_networks_are_proven_separate(name: str) -> None:
    assert not mixes(SEPARATE[name])
    assert proven(SEPARATE[name])


@pytest.mark.parametrize("name", MIXING)
def test_nothing_that_mixes_is_called_separate(name: str) -> None:
    assert mixes(MIXING[name])
    assert not proven(MIXING[name])


@pytest.mark.parametrize(
    "function",
    [behind_no_grad, lambda x: x / x.detach().amax(0), lambda x: x * x.mean(0).detach()],
    ids=["no_grad", "detached", "detached later"],
)
def test_what_autograd_does_not_see_is_not_called_separate(function: Function) -> None:
    assert not proven(function)
