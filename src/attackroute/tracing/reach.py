"""Reach: which elements of a route layer's output the elements of a tensor can depend on, whatever the operations are.

Where a rotation or a normalisation mixes the features of each token, elements go to many places, but tokens and heads
stay apart. What is followed here is this much of the places, by the digits of indices.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from attackroute.tracing.factors import Factor, merged, regrouped, whole

Axis = tuple[tuple[Factor, ...], int]
"""Digits that the indices of a dimension spell, the outermost first, and the number that its first index stands for."""


class Base:
    """A tensor that holds elements of one route layer, each once, and by which alone they reach what follows.

    Attributes:
        shape, dtype: Of the tensor.
        way: How it comes from the base before; None for the layer's output itself.
        edge: Its place in the graph, once an operation has read it.
    """

    def __init__(self, tensor: Tensor, way: Reach | None = None) -> None:
        self._tensor = weakref.ref(tensor)
        self.shape, self.dtype, self.way = tuple(tensor.shape), tensor.dtype, way
        self.edge: GradientEdge | None = None

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is this tensor, never written to; if so, its place is noted."""
        same = self._tensor() is tensor and tensor._version == 0
        if same and self.edge is None and tensor.grad_fn is not None:
            self.edge = get_gradient_edge(tensor)
        return same

    @property
    def line(self) -> list[Base]:
        """It and all bases before it."""
        return [self] if self.way is None else [self, *self.way.base.line]


@dataclass(frozen=True)
class Reach:
    """Which elements of a base the elements of a tensor can depend on, however they do.

    A factor is a digit of the base's indices of one dimension, ``index // stride % size``. An element of the tensor
    depends on no other elements than those whose digits are the ones that its own indices spell.

    Attributes:
        base: What the digits are counted in.
        axes: What the indices of each dimension of the tensor spell; None where they say nothing.
        within: Digits that are in a range, from a start to a stop, in all elements that the tensor depends on.
    """

    base: Base
    axes: tuple[Axis | None, ...]
    within: frozenset[tuple[Factor, int, int]] = frozenset()

    @classmethod
    def whole(cls, tensor: Tensor, way: Reach | None = None) -> Reach:
        """That of a base itself."""
        return cls(Base(tensor, way), tuple((group, 0) for group in whole(tensor.shape)))

    def based(self, tensor: Tensor) -> Reach:
        """The same in digits of the tensor, unless that has a single index of what was a longer dimension."""
        single = any(axis and axis[0] for axis, size in zip(self.axes, tensor.shape, strict=True) if size == 1)
        return self if single else Reach.whole(tensor, self)

    def mixed(self, dims: Iterable[int]) -> Reach:
        """Where each index of some dimensions may depend on all."""
        changed = set(dims)
        return replace(self, axes=tuple(None if dim in changed else axis for dim, axis in enumerate(self.axes)))

    def moved(self, move: tuple[Any, ...]) -> Reach:
        """After one move of a strand."""
        name: str = move[0]
        if name == "view":
            return self.viewed(move[1], move[2])
        if name == "permute":
            return replace(self, axes=tuple(self.axes[dim] for dim in move[1]))
        if name == "cat":
            return self._shifted(move[1], -move[2])
        if name != "cut":
            return self.mixed(range(len(self.axes)))
        dim, (start, stop, step) = move[1][0], move[2:]
        axis = self.axes[dim]
        if axis is None or step != 1:
            return self.mixed([dim])
        within, (group, first) = self.within, axis
        if len(group) == 1 and group[0].dim >= 0:
            within |= {(group[0], first + start, first + stop)}
        return replace(self._shifted(dim, start), within=within)

    def _shifted(self, dim: int, places: int) -> Reach:
        """With the number of a dimension's first index moved up."""
        axis = self.axes[dim]
        moved = None if axis is None else (axis[0], axis[1] + places)
        return replace(self, axes=(*self.axes[:dim], moved, *self.axes[dim + 1 :]))

    def viewed(self, old: Sequence[int], new: Sequence[int]) -> Reach:
        """After a reshape, in which dimensions at either end may take no part."""
        first = last = 0
        while first < min(len(old), len(new)) and old[first] == new[first]:
            first += 1
        while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
            last += 1
        changed = range(first, len(old) - last)
        groups = regrouped(tuple(self.digits(dim, old[dim]) for dim in changed), new[first : len(new) - last])
        between = [None] * (len(new) - last - first) if groups is None else [(group, 0) for group in groups]
        return replace(self, axes=(*self.axes[:first], *between, *self.axes[len(old) - last :]))

    def spread(self, old: Sequence[int], new: Sequence[int]) -> Reach:
        """After an expansion."""
        if tuple(old) == tuple(new):
            return self
        missing = len(new) - len(old)
        padded = replace(self, axes=(None,) * missing + self.axes)
        return padded.mixed(dim for dim, size in enumerate(old, missing) if size != new[dim])

    def digits(self, dim: int, size: int) -> tuple[Factor, ...]:
        """What the indices of a dimension of this size spell; those of which nothing is known have dimension -1."""
        group, start = self.axes[dim] or ((), 0)
        if start == 0 and math.prod(factor.size for factor in group) == size:
            return group
        if len(group) == 1 and start % size == 0 and group[0].size % size == 0 and 0 <= start < group[0].size:
            return merged([group[0]._replace(size=size)])
        return merged([Factor(-1, 1, size)])

    # --- several bases

    def common(self, other: Reach) -> Reach | None:
        """What holds of an element whichever of two it depends by."""
        if self == other:
            return self
        line = self.base.line
        shared = next((base for base in other.base.line if base in line), None)
        if shared is None:
            return None
        one, two = self._since(shared), other._since(shared)
        axes = (left if left == right else None for left, right in zip(one.axes, two.axes, strict=True))
        return Reach(shared, tuple(axes), one.within & two.within)

    def apart(self, other: Reach) -> bool:
        """Whether no element of the layer is in both."""
        shared = next((base for base in other.base.line if base in self.base.line), None)
        if shared is None:
            return False
        ways = self._since(shared).within, other._since(shared).within
        pairs = [(one[1:], two[1:]) for one in ways[0] for two in ways[1] if one[0] == two[0]]
        return any(one[1] <= two[0] or two[1] <= one[0] for one, two in pairs)

    def _since(self, base: Base) -> Reach:
        """The same in digits of an earlier base."""
        reach = self
        while reach.base is not base:
            way = reach.base.way
            assert way is not None
            axes = map(reach._axis_of_way, reach.axes)
            bounds = ((reach._of_way(factor), start, stop) for factor, start, stop in reach.within)
            within = {(group[0], start, stop) for group, start, stop in bounds if len(group) == 1}
            reach = Reach(way.base, tuple(axes), way.within | within)
        return reach

    def _axis_of_way(self, axis: Axis | None) -> Axis | None:
        """A dimension in digits of the base before; one of the base may itself be a part of a dimension there."""
        way, shape = self.base.way, self.base.shape
        if way is None or axis is None:
            return None
        group, start = axis
        if len(group) == 1 and group[0] == Factor(group[0].dim, 1, shape[group[0].dim]):
            before = way.axes[group[0].dim]
            return None if before is None else (before[0], before[1] + start)
        return tuple(each for factor in group for each in self._of_way(factor)), start

    def _of_way(self, factor: Factor) -> tuple[Factor, ...]:
        """A factor of the base in digits of the one before."""
        dim, stride, size = factor
        way, groups = self.base.way, None
        if way is not None and dim >= 0:
            length = self.base.shape[dim]
            groups = regrouped((way.digits(dim, length),), (length // (stride * size), size, stride))
        return merged([Factor(-1, 1, size)]) if groups is None else groups[1]

    # --- the base's elements

    def arranged(self, values: Tensor, *groups: Sequence[Factor]) -> Tensor | None:
        """A tensor of the base's shape, with a dimension for the digits of each group and one for all others.

        None where one digit tells of another.
        """
        used = [factor for group in groups for factor in group]
        sizes, labels = list[int](), list[Factor | None]()
        for dim, length in enumerate(values.shape):
            rest = length
            for factor in sorted((each for each in used if each.dim == dim), key=lambda each: -each.stride):
                sizes += [rest // (factor.stride * factor.size), factor.size]
                labels += [None, factor]
                rest = factor.stride
            sizes.append(rest)
            labels.append(None)
        if math.prod(sizes) != values.numel():
            return None
        order = [labels.index(factor) for factor in used]
        order += [place for place, label in enumerate(labels) if label is None]
        counts = (math.prod(factor.size for factor in group) for group in groups)
        return values.reshape(sizes).permute(order).reshape(*counts, -1)
