"""Trails: which elements of a tensor the elements of each route layer reach, whatever the derivatives are.

Where each element of a source reaches at most one element of a tensor, the absolute influence of that tensor's elements
is taken back to the source's by one vector-Jacobian product, which autograd knows how to take. A :class:`Strand` says
that this holds for one origin: a route layer, or a :class:`~attackroute.tracing.crossings.Crossing`, behind which
elements are mixed in a way that has a closed form of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from attackroute.tracing.factors import Axes
from attackroute.tracing.reach import Reach


class Origin(Protocol):
    """An operation that mixes the elements of route layers in a known way."""

    @property
    def sources(self) -> frozenset[int]:
        """The route layers that have a closed form through it."""


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
    def of_layer(cls, index: int, output: Tensor) -> Trail:
        """The trail of a route layer's output."""
        return cls((Strand(index),), reach={index: Reach.whole(output)})

    @property
    def followed(self) -> bool:
        """Whether more is known than the sources."""
        return bool(self.strands or self.reach) or self.form is not None

    @property
    def sources(self) -> frozenset[int]:
        """Every route layer that reaches the tensor."""
        return self.lost.union(*(strand.sources for strand in self.strands))

    def reaching(self, change: Callable[..., Reach], *args: Any) -> dict[int, Reach]:
        """What a change, such as ``Reach.mixed`` with these arguments, makes of its reach."""
        return {source: change(reach, *args) for source, reach in self.reach.items()}

    def changed(self, strands: Iterable[Strand | None]) -> Trail:
        """The trail with its strands replaced, in order, and no reach; where one becomes None, its sources are lost."""
        new = tuple(strands)
        gone = (old.sources for old, strand in zip(self.strands, new, strict=True) if strand is None)
        return Trail(tuple(strand for strand in new if strand is not None), self.lost.union(*gone))


UNTOUCHED = Trail()


def lost(trails: Iterable[Trail], form: object = None, reach: Mapping[int, Reach] | None = None) -> Trail:
    """The trail of which no element is followed; its form and reach may be known."""
    return Trail(lost=frozenset[int]().union(*(trail.sources for trail in trails)), form=form, reach=reach or {})


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


def reach_by(trails: Sequence[Trail]) -> dict[int, Reach]:
    """What is known of layers that reach a tensor by several trails, each of which brings elements to its places."""
    together: dict[int, Reach] = {}
    ways = [(trail.reach, trail.sources) for trail in trails]
    for source in frozenset[int]().union(*(reach for reach, _ in ways)):
        known = [reach.get(source) for reach, sources in ways if source in sources]
        first = known[0]
        for other in known[1:]:
            first = None if first is None or other is None else first.common(other)
        if first is not None:
            together[source] = first
    return together
