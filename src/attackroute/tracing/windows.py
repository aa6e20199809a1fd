"""Window sums: how much of a gain map each kernel offset of a convolution pairs with a valid output.

``N[u] = sum of G[p] over the positions p that kernel offset u joins to some output position z`` (p = stride * z +
dilation * u - padding). Every row range that occurs is a union of a few segments, so one pass over the map and a few
border rows and columns give all offsets at once, without a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from attackroute.tracing.flow import Alive, Flow, Term, Windows, disentangled, in_memory_order, shifted

_BLOCK = 1 << 20  # elements per block: temporaries that stay in the processor's cache
_SEGMENTS = 64  # beyond this many pieces a matrix product is quicker than slicing
_SMALL = 400  # so it is for maps of at most this many positions
_EXACT = 1 << 24  # float32 counts exactly up to here
_WORD = 8  # bytes of an int64
_BYTE = 255  # the largest count in one of them


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution.

    Attributes:
        size: Input size; ``out`` is the output's.
        stride: Step of the output position in the input.
        starts: For each kernel offset, the input position that output 0 pairs with (may be negative).
    """

    size: int
    out: int
    stride: int
    starts: tuple[int, ...]

    @classmethod
    def of(cls, size: int, kernel: int, stride: int, padding: int, dilation: int) -> Axis:
        """The axis of an ordinary convolution."""
        out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        return cls(size, out, stride, tuple(dilation * offset - padding for offset in range(kernel)))

    @property
    def takes_all(self) -> bool:
        """Whether there is one kernel offset, and it pairs every input position with an output."""
        return len(self.starts) == 1 and self.positions(0) == range(self.size)

    def positions(self, offset: int) -> range:
        """Input positions inside the map that kernel offset number ``offset`` pairs with an output."""
        start = self.starts[offset]
        first = max(0, -(start // self.stride)) if start < 0 else 0
        last = min(self.out - 1, (self.size - 1 - start) // self.stride)
        return range(start + first * self.stride, start + last * self.stride + 1, self.stride)

    def widened(self, places: Sequence[int]) -> Axis:
        """The axis as seen by a group of inputs, at ``places`` from its anchor p0, that stands there.

        A member at p0 + shift meets the kernel offset that starts at ``start`` where p0 meets ``start - shift``.
        """
        shifts = range(min(places), max(places) + 1)
        starts = sorted({start - shift for start in self.starts for shift in shifts})
        return Axis(self.size, self.out, self.stride, tuple(starts))


Axes = tuple[Axis, Axis]
"""Vertical and horizontal axis of a convolution."""


@lru_cache(maxsize=256)
def _members(rows: Axis, columns: Axis, *, by_segment: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0/1 matrix of which pieces of a map each pair of kernel offsets takes, ``(kh * kw, h * w)``.

    The pieces are the map's segments, or its single positions.
    """
    left, right = (
        torch.tensor(_segments(axis)[1], dtype=dtype, device=device) if by_segment else indicator(axis, dtype, device)
        for axis in (rows, columns)
    )
    return torch.kron(left, right)


@lru_cache(maxsize=512)
def _segments(axis: Axis) -> tuple[list[slice], list[list[float]]]:
    """Slices that partition the positions an axis visits, and for each kernel offset which of them it takes (0/1)."""
    taken = [axis.positions(offset) for offset in range(len(axis.starts))]
    pieces: list[slice] = []
    for residue in sorted({span.start % axis.stride for span in taken if span}):
        spans = [span for span in taken if span and span.start % axis.stride == residue]
        cuts = sorted({edge for span in spans for edge in (span.start, span[-1] + axis.stride)})
        pieces += [slice(low, high, axis.stride) for low, high in pairwise(cuts)]
    pieces = [piece for piece in pieces if any(piece.start in span for span in taken)]
    return pieces, [[float(piece.start in span) for piece in pieces] for span in taken]


def mask_sums(mask: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Window sums of ``|mask|``, a bool or float map ``(n, C, H, W)``; returns ``(n, C, kh, kw)`` in float."""
    if mask.dtype == torch.bool:
        sums = _count_sums if mask.device.type == "cpu" else _product_sums
        return sums(mask, rows, columns)
    return _sums(mask.abs(), rows, columns)


def alive_sums(values: Tensor, alive: Alive, rows: Axis, columns: Axis) -> Tensor:
    """Window sums of the mask ``alive`` of ``values`` ``(n, C, H, W)``, in blocks that stay in cache."""
    if values.device.type != "cpu":
        return _product_sums(alive.of(values), rows, columns)
    blocks = values.split(max(1, _BLOCK // max(1, values[0].numel())))
    pointwise = len(rows.starts) == len(columns.starts) == 1
    by_column = values.is_contiguous() and not pointwise and rows.size * columns.size > _SMALL
    sums = _count_sums if by_column else _sums
    buffer = torch.empty_like(blocks[0])  # one for all blocks: fresh memory would cost more than the counting
    return torch.cat([sums(alive.counted(block, buffer[: len(block)]), rows, columns) for block in blocks])


def _product_sums(values: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Window sums as one matrix product: quickest in channels_last, and on accelerators, where each operation costs."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    if rows.takes_all and columns.takes_all:
        return values.sum((2, 3), dtype=dtype, keepdim=True)
    if len(rows.starts) * len(columns.starts) > _SEGMENTS:  # the matrix of both axes at once would be large
        left, right = (indicator(axis, dtype, values.device) for axis in (rows, columns))
        return (left @ values.to(dtype)).matmul(right.T)
    members = _members(rows, columns, by_segment=False, dtype=dtype, device=values.device)
    if values.is_contiguous(memory_format=torch.channels_last):
        sums = (members @ values.permute(0, 2, 3, 1).flatten(1, 2).to(dtype)).transpose(1, 2)
    else:
        sums = values.flatten(2).to(dtype) @ members.T  # (n, C, kh * kw)
    return sums.reshape(*values.shape[:2], len(rows.starts), len(columns.starts))


def _count_sums(counted: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Window sums of a bool map, or of zeros and ones: column by column, from totals less the border rows.

    That is exact for counts.
    """
    dtype = torch.float64 if counted.dtype == torch.float64 or rows.size * columns.size > _EXACT else torch.float32
    total = _column_totals(counted, dtype)
    totals: dict[int, Tensor] = {}

    def taken(offset: int) -> Tensor:
        span = rows.positions(offset)
        residue = span.start % rows.stride
        whole = range(residue, rows.size, rows.stride)
        if 2 * len(span) <= len(whole):  # else it is cheaper to take the border rows from the total, which others share
            return total(slice(span.start, max(span.start, span.stop), rows.stride))
        if residue not in totals:
            totals[residue] = total(slice(residue, None, rows.stride))
        result = totals[residue]
        for border in (slice(residue, span.start, rows.stride), slice(span[-1] + rows.stride, None, rows.stride)):
            if border.start < (border.stop or rows.size):
                result = result - total(border)
        return result

    by_row = torch.stack([taken(offset) for offset in range(len(rows.starts))])  # (kh, n, C, W)
    # rows last: a product with few columns is several times slower in BLAS than one with few rows
    sums = indicator(columns, dtype, counted.device) @ by_row.flatten(0, -2).T
    return sums.view(len(columns.starts), *by_row.shape[:-1]).permute(2, 3, 1, 0)


def _column_totals(mask: Tensor, dtype: torch.dtype) -> Callable[[slice], Tensor]:
    """Column totals ``(n, C, W)`` of a map of zeros and ones over a slice of its rows.

    Of a bool map, eight neighbours in memory are added at once, as the bytes of one word; a byte holds a count of up to
    255 rows.
    """
    if mask.dtype != torch.bool:
        return lambda rows: mask[:, :, rows].sum(2, dtype=dtype)
    width = mask.shape[3]
    by_channel = not mask.is_contiguous() and mask.is_contiguous(memory_format=torch.channels_last)
    if by_channel and mask.shape[1] % _WORD == 0:
        words, dim = mask.permute(0, 2, 3, 1).view(torch.int64), 1
    else:
        whole = functional.pad(mask, (0, -width % _WORD)) if width % _WORD else mask  # to pad by nothing is to copy
        words, dim = whole.reshape(-1).view(torch.int64).view(*whole.shape[:-1], -1), 2

    def total(rows: slice) -> Tensor:
        taken = words[(slice(None),) * dim + (rows,)]
        counts = [chunk.sum(dim).view(torch.uint8).to(dtype) for chunk in taken.split(_BYTE, dim)]
        columns: Tensor = reduce(torch.add, counts)
        return columns.transpose(1, 2) if dim == 1 else columns[..., :width]

    return total


def _sums(values: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Window sums of a map of floats that are not negative."""
    if values.device.type != "cpu" or not values.is_contiguous():
        return _product_sums(values, rows, columns)
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    device = values.device
    if rows.size * columns.size <= _SMALL:
        members = _members(rows, columns, by_segment=False, dtype=dtype, device=device)
        sums = members @ values.to(dtype).flatten(2).flatten(0, 1).T  # in this order as in `_count_sums`
        return sums.view(len(rows.starts), len(columns.starts), *values.shape[:2]).permute(2, 3, 0, 1)
    if len(_segments(rows)[0]) * len(_segments(columns)[0]) > _SEGMENTS:
        return indicator(rows, dtype, device) @ values.to(dtype) @ indicator(columns, dtype, device).T
    pieces = [
        values[:, :, row, column].sum((2, 3), dtype=dtype)
        for row in _segments(rows)[0]
        for column in _segments(columns)[0]
    ]
    shape = (*values.shape[:2], len(rows.starts), len(columns.starts))
    if not pieces:  # a kernel that never meets the map
        return values.new_zeros(shape, dtype=dtype)
    members = _members(rows, columns, by_segment=True, dtype=dtype, device=device)
    return (torch.stack(pieces, dim=-1) @ members.T).view(shape)


@lru_cache(maxsize=512)
def indicator(axis: Axis, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(kernel, size)`` 0/1 matrix of the positions that each kernel offset takes."""
    matrix = torch.zeros(len(axis.starts), axis.size, dtype=dtype, device=device)
    for offset in range(len(axis.starts)):
        span = axis.positions(offset)
        if span:
            matrix[offset, slice(span.start, span.stop, span.step)] = 1
    return matrix


@dataclass(frozen=True, eq=False)
class PatternSums:
    """Window sums of the positions whose pooling winners share one pattern of windows."""

    members: tuple[tuple[int, int], ...]  # offsets of the windows won, relative to the first one, which is (0, 0)
    sums: Tensor  # (n, C, kh', kw') over the offsets of the widened kernel, whose axes follow
    rows: Axis
    columns: Axis


def pattern_sums(windows: Windows, alive: Tensor, rows: Axis, columns: Axis) -> list[PatternSums]:
    """Window sums by pattern, for a map behind an overlapping max pooling.

    Several outputs p of the pooling can share one input s, and ``|sum of weights|`` is not the sum of ``|weights|``.
    So positions are grouped by which windows their winner won (and that are still ``alive``: the 0/1 derivative at each
    pooled position, bool ``(n, C, H', W')``), each group standing at its first window. At most two windows per axis may
    share an input. The axes are those of the convolution that follows.
    """
    layout = torch.contiguous_format if alive.is_contiguous() else torch.channels_last
    alive = alive.contiguous(memory_format=layout)
    first = alive.clone(memory_format=layout)
    shared = []
    for (dy, dx), same_winner in windows.shared.items():
        if alive.shape[-2] <= dy or alive.shape[-1] <= abs(dx):
            continue  # no position has such a neighbour
        alive_pair = same_winner.contiguous(memory_format=layout) & alive
        shared.append(((dy, dx), _words(alive_pair)))
        shifted(alive_pair, dy, dx)[0].logical_and_(shifted(alive, dy, dx)[1])
        shifted(first, dy, dx)[1].logical_and_(~shifted(alive_pair, dy, dx)[0])
    sums = []
    for members, group in _patterns(_words(first), ((0, 0),), shared):
        wide_rows, wide_columns = rows.widened([dy for dy, _ in members]), columns.widened([dx for _, dx in members])
        mask = group.view(torch.bool).as_strided(alive.shape, alive.stride())
        sums.append(PatternSums(members, mask_sums(mask, wide_rows, wide_columns), wide_rows, wide_columns))
    return sums


def _words(mask: Tensor) -> Tensor:
    """A dense bool map as a flat view of whole words, on which logic is quicker."""
    return in_memory_order(mask).view(torch.int64 if mask.numel() % _WORD == 0 else torch.uint8)


def _patterns(
    group: Tensor, members: tuple[tuple[int, int], ...], shared: list[tuple[tuple[int, int], Tensor]]
) -> Iterator[tuple[tuple[tuple[int, int], ...], Tensor]]:
    """Split the positions of ``group``, given as words and used up, by which further windows their winner won."""
    if not shared:
        yield members, group
        return
    (offset, shared_winner), *further = shared
    if any(abs(offset[0] - y) > 1 or abs(offset[1] - x) > 1 for y, x in members):
        yield from _patterns(group, members, further)  # too far from a window already won to share its winner
        return
    won = group & shared_winner
    group ^= won
    yield from _patterns(won, (*members, offset), further)
    yield from _patterns(group, members, further)


def pattern_kernel(weight: Tensor, pattern: PatternSums, rows: Axis, columns: Axis) -> Tensor:
    """``|sum over the pattern's windows of the shifted kernel|``, ``(C_out, C_in, kh', kw')``, for ``weight`` of
    shape ``(C_out, C_in, kh, kw)``.
    """
    wide = weight.new_zeros(*weight.shape[:2], len(pattern.rows.starts), len(pattern.columns.starts))
    for dy, dx in pattern.members:
        wide[:, :, _places(rows, pattern.rows, dy), _places(columns, pattern.columns, dx)] += weight
    return wide.abs_()


def _places(axis: Axis, wide: Axis, shift: int) -> slice:
    """Where the kernel's offsets stand in the widened kernel for a member at ``shift``: evenly spaced."""
    index = [wide.starts.index(start - shift) for start in axis.starts]
    return slice(index[0], index[-1] + 1, index[1] - index[0] if len(index) > 1 else 1)


@dataclass
class GainSums:
    """Window sums of the terms that meet one layer; terms that share a mask share the work."""

    flow: Flow
    values: Tensor
    axes: Axes | None
    counted: dict[object, Tensor] = field(default_factory=dict)

    @property
    def pointwise(self) -> bool:
        """Whether each output position meets one input position only."""
        if self.axes is None:
            return math.prod(self.flow.spatial) == 1
        return all(len(axis.starts) == 1 for axis in self.axes)

    def closed(self, terms: Sequence[Term]) -> bool:
        """Whether the terms of one source, all that the layer reads of it, have a closed form."""
        # two paths from one channel add with their signs before the absolute value, which window sums cannot tell
        return disentangled((term.src, term.length) for term in terms) and all(map(self._closed, terms))

    def _closed(self, term: Term) -> bool:
        """Whether every pair of a source and a target position is joined by one path, or by known patterns."""
        windows = term.path.windows
        if not term.path.many or self.pointwise:
            return True
        binary = not isinstance(term.mask, Tensor) or term.mask.dtype == torch.bool
        return self.axes is not None and windows is not None and max(windows.reach) <= 2 and binary

    def sums(self, term: Term) -> Tensor | list[PatternSums]:
        """``N``, ``(n or 1, length, kh, kw)``: a term's gains, summed over what each kernel offset meets."""
        if self.axes is not None and term.path.many and term.path.windows is not None and not self.pointwise:
            return pattern_sums(term.path.windows, self._alive(term), *self.axes)
        key = (term.mask if isinstance(term.mask, Alive) else id(term.mask), term.dst, term.length)
        if key not in self.counted:
            self.counted[key] = self._positions(term) if self.axes is None else self._windows(term, self.axes)
        return self.counted[key]

    def _windows(self, term: Term, axes: Axes) -> Tensor:
        if isinstance(term.mask, Alive):
            if term.mask not in self.counted:
                self.counted[term.mask] = alive_sums(self.values, term.mask, *axes)
            return self.counted[term.mask][:, term.span]
        return mask_sums(self._mask(term.mask), *axes)

    def _alive(self, term: Term) -> Tensor:
        values = self.values[:, term.span]
        if isinstance(term.mask, Alive):
            return term.mask.of(values)
        if term.mask is None:
            return torch.ones_like(values, dtype=torch.bool)
        return term.mask.expand(values.shape)

    def _positions(self, term: Term) -> Tensor:
        """Gains of a linear map's input: every position is a kernel offset of its own."""
        values = self.flow.view(self.values)[:, term.span]
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        gains = term.mask.of(values) if isinstance(term.mask, Alive) else self._mask(term.mask)
        gains = (gains if gains.dtype == torch.bool else gains.abs()).to(dtype)
        return gains.flatten(2).unsqueeze(-1) if gains.ndim > 2 else gains[..., None, None]

    def _mask(self, mask: Tensor | None) -> Tensor:
        """A mask at every position, ``(n or 1, length or 1, *spatial)``."""
        gains = self.values.new_ones((1,) * (1 + len(self.flow.shape))) if mask is None else mask
        return gains.expand(-1, -1, *self.flow.spatial)
