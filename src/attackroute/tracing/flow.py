"""Gains: what a tensor inside the network owes to the outputs of the route layers before it.

Between two route layers the derivative is followed per channel. A :class:`Term` says that channels
``dst .. dst + length`` of a tensor carry channels ``src .. src + length`` of route layer ``source``, each position of
the tensor multiplied by ``scale * mask``. A :class:`Flow` is all that is known of one tensor: its terms, and the
sources whose influence has left the closed form (``opaque``), whose edges the Jacobian path computes instead.

Masks are lazy. ``None`` stands for ones, :class:`Alive` for "where the tensor's own value is alive", which after a
ReLU is its derivative and costs nothing until it is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alive:
    """The 0/1 mask ``0 < value < below`` of the tensor that carries the term (ReLU; ReLU6 with ``below=6``)."""

    below: float = math.inf

    def of(self, values: Tensor) -> Tensor:
        """The mask as a bool tensor of the shape of ``values``."""
        alive = values > 0
        return alive if math.isinf(self.below) else alive.logical_and_(values < self.below)

    def counted(self, values: Tensor, out: Tensor) -> Tensor:
        """The mask as 0.0 and 1.0, written to ``out``, for values that are the activation's own outputs."""
        if math.isinf(self.below):
            return torch.sign(values, out=out)  # 0 or 1, since a ReLU's outputs are not negative
        ones = values.new_ones(()).expand_as(values)
        counted: Tensor = torch.ops.aten.hardtanh_backward.grad_input(ones, values, 0.0, self.below, grad_input=out)
        return counted


@dataclass(frozen=True, eq=False)
class Windows:
    """The winners of an overlapping max pooling: where several outputs can share one input position.

    Attributes:
        reach: How many windows, per axis, can share one input position.
        shared: For each offset to a later neighbour, bool ``(n, length, H', W')``: whether an output and that
            neighbour have the same winner. Complete where at most two windows per axis can share an input.
    """

    reach: tuple[int, int]
    shared: dict[tuple[int, int], Tensor]

    @classmethod
    def of(cls, winners: Tensor, reach: tuple[int, int]) -> Windows:
        """From the flat index of each output's winner, ``(n, C, H', W')``."""
        offsets = [(0, 1)] * (reach[1] > 1) + [(1, 0)] * (reach[0] > 1) + [(1, -1), (1, 1)] * (min(reach) > 1)
        winners = winners.to(torch.int32)
        shared = {}
        for dy, dx in offsets:
            same_winner = torch.zeros_like(winners, dtype=torch.bool)
            if winners.shape[-2] > dy and winners.shape[-1] > abs(dx):
                earlier, later = shifted(winners, dy, dx)
                torch.eq(earlier, later, out=shifted(same_winner, dy, dx)[0])
                if dy:
                    same_winner[..., -1, :] = False
                if dx:
                    same_winner[..., -1 if dx > 0 else 0] = False  # there, memory goes on to another row
            shared[dy, dx] = same_winner
        return cls(reach, shared)

    def channels(self, cut: slice) -> Windows:
        """The windows of some of the channels."""
        return Windows(self.reach, {offset: same[:, cut] for offset, same in self.shared.items()})


def shifted(values: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    """Two views of a dense map ``(n, C, H, W)``, as it lies in memory: every position, and its neighbour.

    The neighbour at ``(dy, dx)`` lies a constant step further on; at the end of a row it is another row's, which
    the caller leaves aside. The views are ``(size,)``, less the last positions, which have no neighbour.
    """
    step = dy * values.stride(2) + dx * values.stride(3)
    flat = in_memory_order(values)
    return flat[: len(flat) - step], flat[step:]


def in_memory_order(values: Tensor) -> Tensor:
    """A dense map ``(n, C, H, W)``, contiguous or channels_last, as a flat view."""
    return (values if values.is_contiguous() else values.permute(0, 2, 3, 1)).view(-1)


@dataclass(frozen=True)
class Path:
    """How positions of the source layer map to positions of the tensor.

    Attributes:
        moves: Identity of the map; two terms of one source can be added only where their moves agree.
        summed: The mask already sums absolute derivatives of several source positions (average pooling).
        many: One source position may reach several positions of the tensor.
        windows: Present as long as ``many`` is due to one overlapping max pooling alone.
    """

    moves: tuple[object, ...] = ()
    summed: bool = False
    many: bool = False
    windows: Windows | None = None

    def moved(self, move: object, *, summed: bool = False, many: bool = False) -> Path:
        """This path followed by a move after which the pooling windows can no longer be told apart."""
        return Path((*self.moves, move), self.summed or summed, self.many or many, None)


Mask = Alive | Tensor | None


@dataclass(frozen=True, eq=False)
class Term:
    """A range of channels that carries a range of a route layer's channels.

    Attributes:
        source: Index of the route layer, in forward order.
        src: First of ``length`` channels of the source.
        dst: First of ``length`` channels of the tensor.
        scale: ``(length,)``, the signed derivative per channel; None for ones.
        mask: Derivative per position, broadcastable to ``(n, length, *spatial)``: bool, or signed float.
        path: How positions map.
    """

    source: int
    src: int
    dst: int
    length: int
    scale: Tensor | None = None
    mask: Mask = None
    path: Path = field(default_factory=Path)

    @property
    def span(self) -> slice:
        """The channels of the tensor."""
        return slice(self.dst, self.dst + self.length)

    def channels(self, start: int, stop: int) -> Term | None:
        """What of the term lies inside channels ``start .. stop`` of the tensor, counted from ``start``."""
        first, last = max(self.dst, start), min(self.dst + self.length, stop)
        if first >= last:
            return None
        cut = slice(first - self.dst, last - self.dst)
        windows = self.path.windows
        if windows is not None:
            windows = windows.channels(cut)
        return replace(
            self,
            src=self.src + cut.start,
            dst=first - start,
            length=last - first,
            scale=None if self.scale is None else self.scale[cut],
            mask=_cut_channels(self.mask, cut) if isinstance(self.mask, Tensor) else self.mask,
            path=replace(self.path, windows=windows),
        )


@dataclass(frozen=True, eq=False)
class Flow:
    """All that one tensor owes to earlier route layers.

    Attributes:
        shape: ``(C, *spatial)``: the layout that terms refer to; the tensor is ``(n, C, *spatial)``, or, when
            ``flat``, its flattening ``(n, C * prod(spatial))``.
        terms: Closed-form contributions.
        opaque: Sources that reach the tensor through an operation without a closed form.
        flat: Whether the tensor is flattened.
    """

    shape: tuple[int, ...] = ()
    terms: tuple[Term, ...] = ()
    opaque: frozenset[int] = frozenset()
    flat: bool = False

    @property
    def sources(self) -> frozenset[int]:
        """Every route layer that reaches the tensor."""
        return self.opaque.union(term.source for term in self.terms)

    @property
    def spatial(self) -> tuple[int, ...]:
        """Sizes of the position dimensions."""
        return self.shape[1:]

    def view(self, values: Tensor) -> Tensor:
        """``values``, shaped like the tensor, in the layout ``(n, C, *spatial)``."""
        return values.reshape(values.shape[0], *self.shape) if self.flat else values


EMPTY = Flow()


def opaque(sources: Iterable[int]) -> Flow:
    """A flow of which only the sources are known."""
    return Flow(opaque=frozenset(sources))


def _cut_channels(mask: Tensor, cut: slice) -> Tensor:
    """``mask[:, cut]`` where the mask is not constant over channels."""
    return mask if mask.shape[1] == 1 else mask[:, cut]


def settled(flow: Flow, values: Tensor) -> Flow:
    """``flow`` with every lazy mask turned into a tensor: needed before the tensor's own values change."""
    if not any(isinstance(term.mask, Alive) for term in flow.terms):
        return flow
    masks: dict[Alive, Tensor] = {}
    terms = []
    for term in flow.terms:
        mask = term.mask
        if isinstance(mask, Alive):
            if mask not in masks:
                masks[mask] = mask.of(flow.view(values))
            mask = masks[mask] if term.length == flow.shape[0] else masks[mask][:, term.span]
        terms.append(replace(term, mask=mask))
    return replace(flow, terms=tuple(terms))


def scaled(flow: Flow, scale: Tensor) -> Flow:
    """``flow`` times a factor per channel, ``scale`` of shape ``(C,)``; masks must be settled."""
    terms = []
    for term in flow.terms:
        factor = scale if term.length == len(scale) else scale[term.span]
        terms.append(replace(term, scale=factor if term.scale is None else term.scale * factor))
    return replace(flow, terms=tuple(terms))


def times(flow: Flow, factor: Tensor) -> Flow:
    """``flow`` times a factor per position, broadcastable to ``(n, C, *spatial)``; masks must be settled."""
    products: dict[tuple[int, int, int], Tensor] = {}  # terms of a residual stream share their masks: multiply once
    terms = []
    for term in flow.terms:
        key = (id(term.mask), term.dst, term.length)
        if key not in products:
            channel_factor = _cut_channels(factor, term.span)
            products[key] = channel_factor if term.mask is None else term.mask * channel_factor  # type: ignore[operator]
        terms.append(replace(term, mask=products[key]))
    return replace(flow, terms=tuple(terms))


def mapped(flow: Flow, change: Callable[[Term], Term | None], shape: tuple[int, ...]) -> Flow:
    """``flow`` of another ``shape``, with ``change`` applied to each term; one that becomes None is opaque."""
    terms: list[Term] = []
    lost = set(flow.opaque)
    for term in flow.terms:
        new = change(term)
        if new is None:
            lost.add(term.source)
        else:
            terms.append(new)
    return Flow(shape, tuple(terms), frozenset(lost), flow.flat)


def added(first: Flow, second: Flow) -> Flow:
    """The flow of a sum of two tensors of one layout; masks must be settled.

    Terms of different sources stand side by side. Two terms of one source join the same positions by two paths, whose
    derivatives add with their signs before the absolute value is taken; where that is not known, the source becomes
    opaque.
    """
    terms = list(first.terms)
    lost = set(first.opaque | second.opaque)
    for new in second.terms:
        for index, old in enumerate(terms):  # a residual stream brings the same source by several paths
            if old.source != new.source or disentangled([(old.src, old.length), (new.src, new.length)]):
                continue
            if old.dst - old.src != new.dst - new.src:
                continue  # other channels of the tensor: two terms, which a convolution will find and refuse
            joined = _joined(old, new, len(first.shape) + 1)
            if joined is None:
                lost.add(new.source)
            else:
                terms[index] = joined
            break
        else:
            terms.append(new)
    return replace(first, terms=tuple(terms), opaque=frozenset(lost))


def _joined(old: Term, new: Term, dims: int) -> Term | None:
    """The sum of two terms of one source on the same channels of a tensor of ``dims`` dimensions, if it is known."""
    if (old.src, old.length, old.path) != (new.src, new.length, new.path) or old.path.summed:
        return None
    if old.mask is new.mask:
        given_scale = old.scale if old.scale is not None else new.scale
        if given_scale is None:
            return None
        return replace(old, scale=given_scale + (1.0 if old.scale is None or new.scale is None else new.scale))
    total = _coefficient(old, dims) + _coefficient(new, dims)
    return replace(old, scale=None, mask=total) if isinstance(total, Tensor) else None


def _coefficient(term: Term, dims: int) -> Tensor | float:
    """``scale * mask``, broadcastable to ``(n, length, *spatial)``; a number where both are ones."""
    scale = None if term.scale is None else term.scale.view(1, -1, *(1,) * (dims - 2))
    if not isinstance(term.mask, Tensor):
        return 1.0 if scale is None else scale
    mask = term.mask.float() if term.mask.dtype == torch.bool else term.mask
    return mask if scale is None else mask * scale


def disentangled(ranges: Iterable[tuple[int, int]]) -> bool:
    """Whether no channel is in two of the ranges, each a first channel and a number of channels."""
    return all(first + length <= following for (first, length), (following, _) in pairwise(sorted(ranges)))
