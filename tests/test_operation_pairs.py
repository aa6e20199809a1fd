"""Every operation that has a rule, followed by every other one, between two convolutions: the oracle's numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import Function
from attackroute.tracing import oracle
from attackroute.tracing.trace import trace_routes
from tracing import deviation

ROWS = torch.linspace(-1, 1, 3, dtype=torch.float64)
SCALE = torch.tensor([0.5, -2.0, 0.0, 1.5], dtype=torch.float64)


def batch_norm(x: Tensor) -> Tensor:
    repeats = -(-x.shape[1] // 4)
    weight = SCALE.repeat(repeats)[: x.shape[1]]
    return F.batch_norm(x, weight * 0, weight.square() + 1, weight, weight * 0 + 0.25)


def scaled(x: Tensor) -> Tensor:
    return x * SCALE.repeat(-(-x.shape[1] // 4))[: x.shape[1], None, None]


def position_gains(x: Tensor) -> Tensor:
    return x * ROWS.repeat(-(-x.shape[3] // 3))[: x.shape[3]]


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu_(x.clone()),
    "relu6": lambda x: F.relu6(8 * x),
    "hardtanh(0, .5)": lambda x: F.hardtanh(x, 0, 0.5),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.75),
    "clamp": lambda x: x.clamp(-0.25, 0.5),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max": lambda x: x.clamp(max=0.5),
    "leaky_relu": lambda x: F.leaky_relu(x, -0.5),
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": lambda x: F.hardswish(4 * x),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.25], dtype=x.dtype)),
    "abs": torch.abs,
    "neg": torch.neg,
    "sigmoid": torch.sigmoid,
    "batch norm": batch_norm,
    "scale": scaled,
    "gains": position_gains,
    "mask": lambda x: x * (x > 0.25),
    "+ constant": lambda x: x + 0.25,
    "- relu": lambda x: x - F.relu(x),
    "+ relu6": lambda x: x + F.relu6(8 * x),
    "* itself": lambda x: x * x,
    "slice": lambda x: x[:, 1:, :, : max(1, x.shape[3] - 1)],
    "every other": lambda x: x[:, :, ::2, ::2],
    "split": lambda x: torch.cat([*x.split(2, 1)][::-1], 1),
    "cat": lambda x: torch.cat([F.relu(x), x.new_ones(x[:, :1].shape)], 1),
    "index_fill": lambda x: x.index_fill(1, torch.tensor([0]), -0.5),
    "pad with zeros": lambda x: F.pad(x, (1, 0, 0, 2)),
    "pad above zero": lambda x: F.pad(x, (1, 1, 0, 0), value=0.5),
    "pad below zero": lambda x: F.pad(x, (0, 1, 1, 0), value=-0.5),
    "crop": lambda x: F.pad(x, (0, -1, 0, 0)) if x.shape[3] > 1 else x,
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 0), value=-0.5),
    "view": lambda x: x.flatten(2).view(x.shape),
    "max pool": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "overlapping max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "dense max pool": lambda x: F.max_pool2d(x, 2, 1, 1),
    "average pool": lambda x: F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False),
    "overlapping average pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive average pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "adaptive max pool": lambda x: F.adaptive_max_pool2d(x, (1, 2)),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
}


def network(first: str, second: str, kernel: int) -> nn.Module:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = OPERATIONS[second](OPERATIONS[first](parts["conv"](x)))
        weight = weights[:, : x.shape[1], :kernel, :kernel]
        return F.conv2d(x, weight, padding=kernel // 2).sum((2, 3))

    weights = torch.randn(3, 8, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    conv = nn.Conv2d(2, 4, 1, bias=False).double()
    with torch.no_grad():  # coarse numbers: values tie, and stand at the bounds of clamps
        conv.weight.copy_(torch.tensor([[1.0, 0], [0.5, -1], [-0.5, 1], [1, 1]]).view(4, 2, 1, 1))
    return Function(forward, conv=conv)


@pytest.mark.parametrize("kernel", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "first", [pytest.param(each, marks=[pytest.mark.slow] * (number % 2)) for number, each in enumerate(OPERATIONS)]
)
def test_pairs(first: str, kernel: int) -> None:
    images = torch.rand(2, 2, 5, 5, generator=torch.Generator().manual_seed(0)).mul(4).round().div(4).double()
    labels = torch.tensor([0, 2])
    wrong = []
    for second in OPERATIONS:
        model = network(first, second, kernel)
        expected = oracle.trace(model, images, labels, width=1)
        found = trace_routes(model, (images, labels), 1, keep_scores=True)
        assert set(found.methods) == set(expected.edges), second
        if deviation(found.scores["parts.conv"], expected.scores["parts.conv"]) > 1e-9:
            wrong.append(second)
    assert wrong == []
