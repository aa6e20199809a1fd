"""Closed forms through normalisation and attention, each alone, against Jacobians by autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.functional import jacobian

from attackroute.tracing import normalisation
from attackroute.tracing.attention import Heads, attention_sums
from attackroute.tracing.normalisation import Slopes, Stage

SAMPLES, TOKENS, CHANNELS, ROWS = 2, 5, 7, 4


def stage(x: Tensor, eps: float, scale: Tensor | None, centred: bool) -> Stage:
    deviation = x - x.mean(-1, keepdim=True) if centred else x
    reciprocal = (deviation.pow(2).mean(-1) + eps).rsqrt()
    return Stage(deviation * reciprocal.unsqueeze(-1), reciprocal, scale, centred)


def normalised(x: Tensor, eps: float, scale: Tensor | None, centred: bool) -> Tensor:
    shape = x.shape[-1:]
    return F.layer_norm(x, shape, scale, None, eps) if centred else F.rms_norm(x, shape, scale, eps)


def agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())


def sums_by_jacobian(function: Callable[[Tensor, int], Tensor], x: Tensor) -> Tensor:
    """For each sample, ``sum over what the function returns of |d / dx|``."""
    rows = [jacobian(lambda each, i=i: function(each, i), x[i]).flatten(0, -x.ndim) for i in range(len(x))]
    return torch.stack([row.abs().sum(0) for row in rows])


def constant(x: Tensor, rows: Tensor) -> None:
    x[:, 1] = 3.0


def equal_to_the_bound(x: Tensor, rows: Tensor) -> None:
    x[:] = x[:1, :1].sign()  # xh is +-1 in all tokens, and in one row |w| = |b| in all channels
    rows[:, 0] = x[:, 0]


CASES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "random": lambda x, rows: None,
    "zero weights": lambda x, rows: rows[:, 1:3].zero_(),
    "some zero weights": lambda x, rows: rows.mul_(rows > 0),
    "zero variance": constant,
    "all zero": lambda x, rows: x.zero_(),
    "weights at the bound": equal_to_the_bound,
    "alike rows": lambda x, rows: rows.copy_(rows[:, :1].expand_as(rows)),
}


@pytest.mark.parametrize("split", ["_by_signs", "_one_by_one"])
@pytest.mark.parametrize("centred", [True, False], ids=["layer norm", "RMS norm"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_normalisation(case: str, eps: float, centred: bool, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalisation, "_by_signs", getattr(normalisation, split))
    monkeypatch.setattr(normalisation, "_BLOCK", 20)
    monkeypatch.setattr(normalisation, "_FEW", 1.0)
    monkeypatch.setattr(normalisation, "_TOKENS", 3)
    torch.manual_seed(0)
    x, rows, scale = torch.randn(SAMPLES, TOKENS, CHANNELS), torch.randn(SAMPLES, ROWS, CHANNELS), torch.randn(CHANNELS)
    CASES[case](x, rows)
    x, rows, scale = x.double(), rows.double(), scale.double()
    expected = sums_by_jacobian(lambda each, i: normalised(each, eps, scale, centred) @ rows[i].T, x)
    agree(Slopes(rows).through(stage(x, eps, scale, centred)).sums(), expected)
    counts = torch.rand(SAMPLES, ROWS, TOKENS).double()
    weighed = sums_by_jacobian(lambda each, i: normalised(each, eps, scale, centred) @ rows[i].T * counts[i].T, x)
    agree(Slopes(rows).through(stage(x, eps, scale, centred)).sums(counts), weighed)


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True), (True, False, True)])
def test_normalisations_in_a_row(kinds: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    x, rows = torch.randn(SAMPLES, TOKENS, CHANNELS).double(), torch.randn(SAMPLES, ROWS, CHANNELS).double()
    scales = [None, *torch.randn(len(kinds) - 1, CHANNELS).double()]
    added = torch.randn(CHANNELS).double()

    def chain(each: Tensor, i: int) -> Tensor:
        for centred, scale in zip(kinds, scales, strict=True):
            each = normalised(each, 0.1, scale, centred) + added
        return each @ rows[i].T

    stages, reached = list[Stage](), x
    for centred, scale in zip(kinds, scales, strict=True):
        stages.insert(0, stage(reached, 0.1, scale, centred))
        reached = normalised(reached, 0.1, scale, centred) + added
    slopes = Slopes(rows)
    for each in stages:
        slopes = slopes.through(each)
    agree(slopes.sums(), sums_by_jacobian(chain, x))


@pytest.mark.parametrize("sizes", [(4, 5, 3, 2), (1, 1, 2, 2), (3, 1, 1, 1), (1, 4, 2, 3)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("case", ["random", "constant", "masked", "read in part"])
def test_attention(sizes: tuple[int, int, int, int], count: int, case: str) -> None:
    queries, keys, features, outputs = sizes
    torch.manual_seed(0)
    windows = 2
    heads = SAMPLES * windows * count
    q, k, v = (torch.randn(heads, *size) for size in ((queries, features), (keys, features), (keys, outputs)))
    q, k, v = q.double(), k.double(), v.double()
    bias = torch.randn(queries, keys).double()
    if case == "constant":
        q, bias = torch.zeros_like(q), torch.zeros_like(bias)
    if case == "masked":
        bias[:, 1:] = -torch.inf
    rows = torch.randn(SAMPLES, ROWS, count, outputs).double()
    read = (torch.rand(heads, queries) > 0.5).double() if case == "read in part" else None
    scale = torch.randn(heads).double()
    weights = (q @ k.transpose(1, 2) * scale.view(-1, 1, 1) + bias).softmax(-1)
    found = attention_sums(Heads(q, k, v, weights, scale), rows, read)
    for head in range(heads):
        sample = head // (windows * count)

        def attended(q: Tensor, k: Tensor, v: Tensor, sample: int = sample, head: int = head) -> Tensor:
            z = (q @ k.T * scale[head] + bias).softmax(-1) @ v @ rows[sample, :, head % count].T
            return z if read is None else z * read[head].unsqueeze(1)

        expected = jacobian(attended, (q[head], k[head], v[head]))
        for each, sums in zip(expected, found, strict=True):
            torch.testing.assert_close(sums[head], each.abs().sum((0, 1)), rtol=1e-10, atol=1e-12)
