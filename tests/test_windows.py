"""Window sums against loops over positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attackroute.tracing import windows
from attackroute.tracing.flow import Alive, Windows
from attackroute.tracing.windows import Axis, alive_sums, mask_sums, pattern_kernel, pattern_sums

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


class Line(NamedTuple):
    """One axis of a convolution."""

    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def axis(self) -> Axis:
        return Axis.of(*self)

    def met(self, offset: int) -> list[int]:
        """Positions that a kernel offset joins to an output, by trying every output."""
        last = self.size + 2 * self.padding - self.dilation * (self.kernel - 1)
        starts = range(0, last, self.stride)
        positions = [start + self.dilation * offset - self.padding for start in starts]
        return [position for position in positions if 0 <= position < self.size]


@st.composite
def lines(draw: st.DrawFn, *, size: int | None = None, largest: int = 12) -> Line:
    """An axis that has at least one output."""
    size = draw(st.integers(1, largest)) if size is None else size
    padding, dilation, stride = draw(st.integers(0, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kernel = draw(st.integers(1, min(6, (size + 2 * padding - 1) // dilation + 1)))
    return Line(size, kernel, stride, padding, dilation)


def naive_sums(values: Tensor, rows: Line, columns: Line) -> Tensor:
    """Sums over the positions of each pair of offsets, pair by pair."""
    sums = [
        values[:, :, rows.met(u)][..., columns.met(v)].sum((2, 3))
        for u, v in product(range(rows.kernel), range(columns.kernel))
    ]
    return torch.stack(sums, dim=-1).unflatten(-1, (rows.kernel, columns.kernel))


@given(lines(largest=40))
@settings(quick, max_examples=200)
def test_positions_are_those_of_the_convolution(line: Line) -> None:
    for offset in range(line.kernel):
        assert list(line.axis.positions(offset)) == line.met(offset)
    image, kernel = torch.zeros(1, 1, line.size), torch.zeros(1, 1, line.kernel)
    assert line.axis.out == F.conv1d(image, kernel, None, line.stride, line.padding, line.dilation).shape[-1]


WAYS = {"positions": (1 << 30, 0), "segments": (0, 1 << 30), "products": (0, 0)}
"""The three ways to sum, by the sizes of maps (``_SMALL``) and counts of segments (``_SEGMENTS``) that choose them."""


@contextmanager
def summed_by(way: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_SMALL", WAYS[way][0])
        patch.setattr(windows, "_SEGMENTS", WAYS[way][1])
        yield


@pytest.mark.parametrize("way", WAYS)
@given(lines(), lines(), st.integers(0, 2**31), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@quick
def test_float_masks(way: str, rows: Line, columns: Line, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(-8, 9, (2, 3, rows.size, columns.size), generator=generator).to(dtype)
    with summed_by(way):
        found = mask_sums(mask, rows.axis, columns.axis)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(found.double(), naive_sums(mask.double().abs(), rows, columns))


@pytest.mark.parametrize("way", WAYS)
@given(lines(), lines(), st.integers(0, 2**31))
@quick
def test_bool_masks_and_lazy_ones(way: str, rows: Line, columns: Line, seed: int) -> None:
    values = torch.randn(3, 2, rows.size, columns.size, generator=torch.Generator().manual_seed(seed)).relu()
    for alive in (Alive(), Alive(0.5)):
        values = values.clamp(max=alive.below)
        mask = alive.of(values)
        expected = naive_sums(mask.float(), rows, columns)
        with summed_by(way):
            assert torch.equal(mask_sums(mask, rows.axis, columns.axis), expected)
            assert torch.equal(alive_sums(values, alive, rows.axis, columns.axis), expected)


@given(lines(largest=60), lines(largest=60), st.integers(0, 2**31))
@quick
def test_any_size_on_the_way_that_is_chosen_for_it(rows: Line, columns: Line, seed: int) -> None:
    mask = torch.randn(2, 2, rows.size, columns.size, generator=torch.Generator().manual_seed(seed)).double()
    found = mask_sums(mask, rows.axis, columns.axis)
    torch.testing.assert_close(found, naive_sums(mask.abs(), rows, columns), rtol=1e-12, atol=1e-12)


def test_a_kernel_of_31_on_a_wide_map() -> None:
    line = Line(40, 31, 1, 15, 1)
    mask = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0)) > 0.4
    assert torch.equal(mask_sums(mask, line.axis, line.axis), naive_sums(mask.float(), line, line))


def test_large_counts_are_exact() -> None:
    axis = Axis.of(2100, 3, 1, 1, 1)  # more than 2^22 positions
    counts = mask_sums(torch.ones(1, 1, 2100, 2100, dtype=torch.bool), axis, axis)
    assert counts[0, 0].tolist() == [[a * b for b in (2099, 2100, 2099)] for a in (2099, 2100, 2099)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(300, 8), (600, 3), (7, 21), (256, 256)])
def test_bytes_that_are_added_in_one_word_do_not_run_over(size: tuple[int, int], channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(2, 8, *size, generator=generator) > 0.1).contiguous(memory_format=layout)
    mask[0] = True  # the most that a column can hold
    rows, columns = (Line(side, 3, stride, 1, 1) for side, stride in zip(size, (1, 2), strict=True))
    assert torch.equal(mask_sums(mask, rows.axis, columns.axis), naive_sums(mask.float(), rows, columns))


@pytest.mark.parametrize("way", WAYS)
def test_blocks_do_not_change_the_sums(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, axis = torch.randn(7, 2, 5, 5).relu(), Axis.of(5, 3, 2, 1, 1)
    whole = alive_sums(values, Alive(), axis, axis)
    monkeypatch.setattr(windows, "_BLOCK", 100)  # two samples a block, and one in the last
    with summed_by(way):
        assert torch.equal(alive_sums(values, Alive(), axis, axis), whole)


@pytest.mark.parametrize("way", WAYS)
def test_a_strided_map_is_summed_as_its_copy(way: str) -> None:
    axis = Axis.of(5, 3, 1, 1, 1)
    values = torch.randint(-4, 5, (2, 5, 5, 4)).float().permute(0, 3, 1, 2)  # channels last
    assert not values.is_contiguous()
    with summed_by(way):
        for mask in (values, values > 0, (values > 0)[:1, :1].expand(2, 4, 5, 5)):
            assert torch.equal(mask_sums(mask, axis, axis), mask_sums(mask.contiguous(), axis, axis))
        ramp = values.relu()
        assert torch.equal(alive_sums(ramp, Alive(), axis, axis), mask_sums(ramp > 0, axis, axis))


# Patterns of overlapping pooling


def pooling(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Kernel, stride, padding and dilation of a pooling of which at most two windows share an input."""
    stride = draw(st.integers(1, 3))
    kernel = draw(st.integers(1, 2 * stride))
    dilation = draw(st.integers(1, max(1, (2 * stride - 1) // max(1, kernel - 1)))) if kernel > 1 else 1
    return kernel, stride, draw(st.integers(0, kernel // 2)), dilation


class Pooled(NamedTuple):
    """A map behind an overlapping max pooling, and the convolution that follows."""

    winners: Tensor
    reach: tuple[int, int]
    alive: Tensor
    weight: Tensor
    rows: Line
    columns: Line


@st.composite
def pooled(draw: st.DrawFn) -> Pooled:
    kernel, stride, padding, dilation = zip(pooling(draw), pooling(draw), strict=True)
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    reach = [-(-size // step) for size, step in zip(extent, stride, strict=True)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.sampled_from([2, 4, 1000]))  # few levels: many ties
    size = [draw(st.integers(least, 9)) for least in extent]
    values = torch.randint(0, levels, (2, 2, *size), generator=generator).double()
    ceil = draw(st.booleans())
    _, winners = F.max_pool2d(values, kernel, stride, padding, dilation, ceil_mode=ceil, return_indices=True)
    alive = torch.rand(winners.shape, generator=generator) < draw(st.sampled_from([0.3, 0.8, 1.0]))
    rows, columns = (draw(lines(size=side)) for side in winners.shape[-2:])
    weight = torch.randn(3, 2, rows.kernel, columns.kernel, generator=generator).double()
    return Pooled(winners, (reach[0], reach[1]), alive, weight, rows, columns)


@given(pooled())
@settings(quick, max_examples=200)
def test_patterns_add_weights_before_they_take_absolute_values(case: Pooled) -> None:
    found = torch.zeros(2, 3, 2, dtype=torch.float64)
    rows, columns = case.rows.axis, case.columns.axis
    for pattern in pattern_sums(Windows.of(case.winners, case.reach), case.alive, rows, columns):
        kernel = pattern_kernel(case.weight, pattern, rows, columns)
        found += torch.einsum("oiuv,niuv->noi", kernel, pattern.sums.double())
    torch.testing.assert_close(found, naive_influence(case), rtol=1e-12, atol=1e-12)


@given(pooled())
@quick
def test_patterns_do_not_depend_on_the_memory_format(case: Pooled) -> None:
    rows, columns = case.rows.axis, case.columns.axis
    expected = pattern_sums(Windows.of(case.winners, case.reach), case.alive, rows, columns)
    winners, alive = (x.contiguous(memory_format=torch.channels_last) for x in (case.winners, case.alive))
    for mask in (alive, case.alive):
        found = pattern_sums(Windows.of(winners, case.reach), mask, rows, columns)
        assert [pattern.members for pattern in found] == [pattern.members for pattern in expected]
        assert all(torch.equal(one.sums, other.sums) for one, other in zip(found, expected, strict=True))


def naive_influence(case: Pooled) -> Tensor:
    """Sum over z and s of |sum over the pooled positions p that s won of W[j, i] at z - p|, (N, C_target, C_source)."""
    winners, weight = case.winners, case.weight
    samples, channels = winners.shape[:2]
    options = {
        name: (getattr(case.rows, name), getattr(case.columns, name)) for name in ("stride", "padding", "dilation")
    }
    influence = torch.zeros(samples, len(weight), channels, dtype=torch.float64)
    for n, i in product(range(samples), range(channels)):
        for s in winners[n, i].unique():
            won = ((winners[n, i] == s) & case.alive[n, i]).double()[None, None]
            influence[n, :, i] += F.conv2d(won, weight[:, i : i + 1], **options).abs().sum((0, 2, 3))
    return influence


def test_patterns_are_at_most_fifteen_and_share_no_position() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 3, 41, 41, generator=generator)
    pooled_map, winners = F.max_pool2d(values, 3, 2, 1, return_indices=True)
    axis = Axis.of(pooled_map.shape[-1], 1, 1, 0, 1)
    patterns = pattern_sums(Windows.of(winners, (2, 2)), torch.ones_like(winners, dtype=torch.bool), axis, axis)
    assert len(patterns) <= 15
    assert len({pattern.members for pattern in patterns}) == len(patterns)
    groups = sum(pattern.sums.flatten(2).amax(2).sum() for pattern in patterns)
    distinct = sum(len(winners[n, c].unique()) for n in range(4) for c in range(3))
    assert groups == distinct  # every winner is counted once, at its first window
    assert max(len(pattern.members) for pattern in patterns) == 4


def test_channels_of_windows() -> None:
    winners = F.max_pool2d(torch.randn(2, 5, 9, 9), 3, 2, return_indices=True)[1]
    part = Windows.of(winners, (2, 2)).channels(slice(1, 4))
    alone = Windows.of(winners[:, 1:4], (2, 2))
    assert part.reach == alone.reach
    assert all(torch.equal(part.shared[offset], alone.shared[offset]) for offset in alone.shared)
