"""Trails: which elements of a tensor the elements of each route layer reach, whatever the derivatives are.

Where each element of a source reaches at most one element of a tensor, the absolute influence of that tensor's elements
is taken back to the source's by one vector-Jacobian product, which autograd knows how to take. A :class:`Strand` says
that this holds for one origin: a route layer, or a :class:`~attackroute.tracing.crossings.Crossing`, behind which
elements are mixed in a way that has a closed form of its own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from torch import Tensor


class Origin(Protocol):
    """An operation that mixes the elements of route layers in a known way."""

    @property
    def sources(self) -> frozenset[int]:
        """The route layers that have a closed form through it."""


class Factor(NamedTuple):
    """Part of a dimension: ``size`` indices of the origin's dimension ``dim``, which are ``stride`` apart there.

    Dimension -1 stands for indices that are not followed any more.
    """

    dim: int
    stride: int
    size: int


Axes = tuple[tuple[Factor, ...], ...]
"""For each dimension of a tensor, what it is made of, the outermost first."""


@dataclass(frozen=True)
class Strand:
    """Elements of one origin as a tensor carries them: each reaches one element of the tensor at most.

    Attributes:
        origin: Index of a route layer, or a crossing.
        moves: What became of their places; equal moves from one shape lead to equal places.
        axes: What the tensor's dimensions are made of, for a crossing.
        partial: Whether some elements may be missing, or are multiplied by numbers that depend on their token alone.
        gained: Whether channels are multiplied by constants, for a crossing, whose other derivatives are ones.
        merged: Whether one element of the tensor may hold several.
        block: Where a crossing's channels begin, whole and in order, in a tensor that has them beside others.
    """

    origin: int | Origin
    moves: tuple[Hashable, ...] = ()
    axes: Axes | None = None
    partial: bool = False
    gained: bool = False
    merged: bool = False
    block: int = 0

    @property
    def sources(self) -> frozenset[int]:
        """The route layers behind it."""
        return frozenset((self.origin,)) if isinstance(self.origin, int) else self.origin.sources

    def moved(self, move: tuple[Hashable, ...], axes: Axes | None = None, *, partial: bool = False) -> Strand:
        """This strand after one more move."""
        return replace(self, moves=_appended(self.moves, move), axes=axes, partial=self.partial or partial)


def _appended(moves: tuple[Hashable, ...], move: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    """Moves with one more; reshapes and permutations that follow one another are one, or none."""
    last = moves[-1] if moves else None
    if isinstance(last, tuple) and last[0] == move[0] == "view":
        moves, move = moves[:-1], ("view", last[1], move[2])
    elif isinstance(last, tuple) and last[0] == move[0] == "permute":
        moves, move = moves[:-1], ("permute", tuple(last[1][dim] for dim in move[1]))  # type: ignore[index, attr-defined]
    idle = move[1] == move[2] if move[0] == "view" else move[0] == "permute" and move[1] == tuple(range(len(move[1])))  # type: ignore[arg-type]
    return moves if idle else (*moves, move)


def disjoint(first: Strand, second: Strand) -> bool:
    """Whether two strands of one origin carry different elements of it: cuts of one tensor that do not overlap."""
    for left, right in zip(first.moves, second.moves, strict=False):
        if left == right:
            continue
        if not (isinstance(left, tuple) and isinstance(right, tuple) and left[:2] == right[:2] and left[0] == "cut"):
            return False
        return not set(range(*left[2:])) & set(range(*right[2:]))
    return False


@dataclass(frozen=True)
class Trail:
    """All that is known of how route layers reach one tensor.

    Attributes:
        strands: Element by element.
        lost: Route layers that reach it in other ways too.
        form: What the tensor is on the way to a crossing, such as the logits of attention.
        reach: Of some layers, lost or not, which of their elements those of the tensor can depend on, in whatever way.
    """

    strands: tuple[Strand, ...] = ()
    lost: frozenset[int] = frozenset()
    form: object = None
    reach: Mapping[int, Reach] = field(default_factory=dict)

    @classmethod
    def of_layer(cls, index: int, shape: Sequence[int]) -> Trail:
        """The trail of a route layer's output."""
        return cls((Strand(index),), reach={index: Reach.whole(shape)})

    @property
    def followed(self) -> bool:
        """Whether more is known than the sources."""
        return bool(self.strands or self.reach) or self.form is not None

    @property
    def sources(self) -> frozenset[int]:
        """Every route layer that reaches the tensor."""
        return self.lost.union(*(strand.sources for strand in self.strands))

    @property
    def of_layers(self) -> Trail:
        """The trail with the strands of route layers alone; what comes through crossings is lost."""
        return self.changed(strand if isinstance(strand.origin, int) else None for strand in self.strands)

    def changed(self, strands: Iterable[Strand | None]) -> Trail:
        """The trail with its strands replaced, in order, and no reach; where one becomes None, its sources are lost."""
        new = tuple(strands)
        gone = (old.sources for old, strand in zip(self.strands, new, strict=True) if strand is None)
        return Trail(tuple(strand for strand in new if strand is not None), self.lost.union(*gone))


UNTOUCHED = Trail()


def lost(trails: Iterable[Trail], form: object = None) -> Trail:
    """The trail of which only the sources are known."""
    return Trail(lost=frozenset[int]().union(*(trail.sources for trail in trails)), form=form)


def joined(trails: Sequence[Trail]) -> Trail:
    """The trail of a tensor that brings the elements of several together.

    Two strands of one origin that may carry the same elements to different places make the origin lost.
    """
    if len(trails) == 1:
        return trails[0]
    kept: dict[object, list[Strand]] = {}
    gone = set[int]().union(*(trail.lost for trail in trails))
    for strand in (strand for trail in trails for strand in trail.strands):
        others = kept.setdefault(strand.origin, [])
        met = any(other.moves == strand.moves for other in others)
        if met and isinstance(strand.origin, int):
            continue  # at the same places, so that derivatives add up, which is autograd's business
        if met or not all(disjoint(other, strand) for other in others):
            gone |= strand.sources
        else:
            others.append(strand)
    left = tuple(strand for strands in kept.values() for strand in strands if not strand.sources <= gone)
    return Trail(left, frozenset(gone), reach=reach_by(trails))


def mixed(trails: Sequence[Trail]) -> Trail:
    """The trail of all that an operation reads, less other crossings."""
    together = joined(trails)
    nested = frozenset[int]().union(*(each.sources for each in together.strands if not isinstance(each.origin, int)))
    strands = (each for each in together.strands if isinstance(each.origin, int) and each.origin not in nested)
    return Trail(tuple(strands), together.lost | nested)


# --- what dimensions are made of


def whole(shape: Sequence[int]) -> Axes:
    """The axes of an origin's own output."""
    return tuple(_merged([Factor(dim, 1, size)]) for dim, size in enumerate(shape))


def unfollowed(axes: Axes, dims: Iterable[int], shape: Sequence[int]) -> Axes:
    """Axes with some dimensions, now of other sizes, no longer followed."""
    changed = set(dims)
    return tuple(
        _merged([Factor(-1, 1, shape[dim])]) if dim in changed else factors for dim, factors in enumerate(axes)
    )


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
        groups.append(_merged(group))
    return tuple(groups)


def _merged(factors: Iterable[Factor]) -> tuple[Factor, ...]:
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
    return axes is not None and axes[dim] == _merged(factors)


def samples_first(axes: Axes | None, shape: Sequence[int], samples: int) -> bool:
    """Whether the first dimension counts samples, which come first in the origin's ``shape`` too."""
    return shape[0] % samples == 0 and holds(axes, 0, [Factor(0, shape[0] // samples, samples)])


# --- which elements a tensor can depend on


@dataclass(frozen=True)
class Reach:
    """Which elements of a route layer's output the elements of a tensor can depend on, however they do.

    A factor is a digit of the layer's indices of one dimension, ``index // stride % size``. An element of the tensor
    depends on no other elements than those whose digits are the ones that its own indices spell.

    Attributes:
        shape: Of the layer's output.
        axes: For each dimension of the tensor the digits that its indices spell, the outermost first, and the number
            that its first index stands for; None where the indices say nothing.
        within: Digits that are in a range, from a start to a stop, in all elements that the tensor depends on.
    """

    shape: tuple[int, ...]
    axes: tuple[tuple[tuple[Factor, ...], int] | None, ...]
    within: frozenset[tuple[Factor, int, int]] = frozenset()

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Reach:
        """That of the layer's own output."""
        return cls(tuple(shape), tuple((group, 0) for group in whole(shape)))

    def mixed(self, dims: Iterable[int]) -> Reach:
        """Where each index of some dimensions may depend on all."""
        changed = set(dims)
        return replace(self, axes=tuple(None if dim in changed else axis for dim, axis in enumerate(self.axes)))

    def permuted(self, dims: Sequence[int]) -> Reach:
        """With dimensions in another order."""
        return replace(self, axes=tuple(self.axes[dim] for dim in dims))

    def cut(self, dim: int, taken: range) -> Reach:
        """Within a range of one dimension."""
        axis = self.axes[dim]
        if axis is None or taken.step != 1:
            return self.mixed([dim])
        within, (group, start) = self.within, axis
        if len(group) == 1 and group[0].dim >= 0:
            within |= {(group[0], start + taken.start, start + taken.stop)}
        return replace(self.shifted(dim, -taken.start), within=within)

    def shifted(self, dim: int, places: int) -> Reach:
        """With the indices of a dimension moved up."""
        axis = self.axes[dim]
        moved = None if axis is None else (axis[0], axis[1] - places)
        return replace(self, axes=(*self.axes[:dim], moved, *self.axes[dim + 1 :]))

    def viewed(self, old: Sequence[int], new: Sequence[int]) -> Reach:
        """After a reshape, which dimensions at either end may not take part in."""
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
            return _merged([group[0]._replace(size=size)])
        return _merged([Factor(-1, 1, size)])

    def apart(self, other: Reach) -> bool:
        """Whether no element of the layer is in both."""
        pairs = ((one[1:], two[1:]) for one in self.within for two in other.within if one[0] == two[0])
        return any(one[1] <= two[0] or two[1] <= one[0] for one, two in pairs)

    def arranged(self, values: Tensor, *groups: Sequence[Factor]) -> Tensor | None:
        """A tensor of the layer's shape, with a dimension for the digits of each group and one for all others.

        Elements on which nothing depends may be left out. None where one digit tells of another.
        """
        used = [factor for group in groups for factor in group]
        for (dim, stride, size), *ends in sorted(self.within):
            bounds = [max(0, ends[0] * stride), min(ends[1] * stride, self.shape[dim])]
            steps = [factor.stride * factor.size for factor in used if factor.dim == dim]
            untouched = stride * size == self.shape[dim] == values.shape[dim]
            if untouched and not any(bound % step for bound in bounds for step in steps):
                values = values.narrow(dim, bounds[0], bounds[1] - bounds[0])
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


def reach_by(trails: Sequence[Trail]) -> dict[int, Reach]:
    """What is known of layers that reach a tensor by several trails, each of which brings elements to its places."""
    together: dict[int, Reach] = {}
    ways = [(trail.reach, trail.sources) for trail in trails]
    for source in frozenset[int]().union(*(reach for reach, _ in ways)):
        known = [reach.get(source) for reach, sources in ways if source in sources]
        first = known[0]
        for other in known[1:]:
            first = None if first is None or other is None else _common(first, other)
        if first is not None:
            together[source] = first
    return together


def _common(first: Reach, second: Reach) -> Reach:
    """What holds of an element whichever of two it depends by."""
    if first is second or first == second:
        return first
    axes = (one if one == two else None for one, two in zip(first.axes, second.axes, strict=True))
    return Reach(first.shape, tuple(axes), first.within & second.within)
