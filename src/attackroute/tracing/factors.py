"""Factors: what the dimensions of a tensor are made of, in terms of those of another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Factor(NamedTuple):
    """Part of a dimension: ``size`` indices of the origin's dimension ``dim``, which are ``stride`` apart there.

    Dimension -1 stands for indices that are not followed any more.
    """

    dim: int
    stride: int
    size: int


Axes = tuple[tuple[Factor, ...], ...]
"""For each dimension of a tensor, what it is made of, the outermost first."""


def whole(shape: Sequence[int]) -> Axes:
    """The axes of an origin's own output."""
    return tuple(merged([Factor(dim, 1, size)]) for dim, size in enumerate(shape))


def unfollowed(axes: Axes, dims: Iterable[int], shape: Sequence[int]) -> Axes:
    """Axes with some dimensions, now of other sizes, no longer followed."""
    changed = set(dims)
    return tuple(merged([Factor(-1, 1, shape[dim])]) if dim in changed else factors for dim, factors in enumerate(axes))


def regrouped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """Axes after a reshape; None where a dimension is cut at a place that is not a multiple."""
    factors = [factor for group in axes for factor in group][::-1]
    groups = []
    for size in shape:
        group: list[Factor] = []
        missing = size
        while missing > 1:
            dim, stride, count = factors.pop() if factors else Factor(-1, 1, 0)
            if count == 0 or (count % missing and missing % count):
                return None
            if count > missing:  # the outer part belongs here, the inner one to the next dimension
                factors.append(Factor(dim, stride, count // missing))
                stride, count = stride * (count // missing), missing
            group.append(Factor(dim, stride, count))
            missing //= count
        groups.append(merged(group))
    return tuple(groups)


def merged(factors: Iterable[Factor]) -> tuple[Factor, ...]:
    """Factors without those of size one, neighbours that belong together as one."""
    merged: list[Factor] = []
    for factor in factors:
        if factor.size == 1:
            continue
        last = merged[-1] if merged else None
        if last is not None and last.dim == factor.dim >= 0 and last.stride == factor.stride * factor.size:
            merged[-1] = Factor(factor.dim, factor.stride, last.size * factor.size)
        else:
            merged.append(factor)
    return tuple(merged)


def holds(axes: Axes | None, dim: int, factors: Iterable[Factor]) -> bool:
    """Whether a dimension is made of just these factors."""
    return axes is not None and axes[dim] == merged(factors)


def samples_first(axes: Axes | None, shape: Sequence[int], samples: int) -> bool:
    """Whether the first dimension counts samples, which come first in the origin's ``shape`` too."""
    return shape[0] % samples == 0 and holds(axes, 0, [Factor(0, shape[0] // samples, samples)])
