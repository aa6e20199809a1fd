"""Crossings: normalisation and attention, which mix elements of earlier layers in a way that has a closed form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from attackroute.tracing.attention import Heads, attention_sums, pulled_sums
from attackroute.tracing.factors import Factor, holds, samples_first, whole
from attackroute.tracing.normalisation import Slopes, Stage
from attackroute.tracing.reach import Base
from attackroute.tracing.token_maps import TokenMap
from attackroute.tracing.trails import Strand, Trail


class Held:
    """A tensor of the pass as it was at some moment, and its place in the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.edge: GradientEdge | None = get_gradient_edge(tensor) if tensor.grad_fn is not None else None
        self.dtype, self._version = tensor.dtype, tensor._version

    @property
    def values(self) -> Tensor:
        """The tensor, without its graph."""
        return self.tensor.detach()

    @property
    def kept(self) -> bool:
        """Whether nothing was written to it."""
        return self.tensor._version == self._version


class Rows(NamedTuple):
    """A layer's critical rows, for each sample."""

    weight: Tensor  # (n, k, C_in, kernel offsets)
    own: Tensor | None = None  # (n, k), the only channel that each reads, where offsets are counted in what is read


Share = tuple[Held | Base, Tensor]
"""A tensor on the way to a layer, and the absolute influence of each of its elements."""


@dataclass(frozen=True, eq=False)
class Crossing:
    """An operation that mixes elements of route layers, and what of its pass a closed form needs.

    Attributes:
        trail: How route layers reach what it reads, one element for each of theirs.
        output: What it gave.
        held: All that must not change after it.
    """

    trail: Trail
    output: Tensor
    held: tuple[Held, ...]
    version: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "version", self.output._version)

    @property
    def sources(self) -> frozenset[int]:
        """The route layers that have a closed form through it."""
        return frozenset(strand.origin for strand in self.trail.strands if isinstance(strand.origin, int))

    @property
    def kept(self) -> bool:
        """Whether what it read and gave is unchanged."""
        return self.output._version == self.version and all(held.kept for held in self.held)

    @staticmethod
    def behind(*crossings: Crossing, lost: frozenset[int]) -> Trail:
        """The trail of crossings' common output."""
        of_sources = [crossing for crossing in crossings if crossing.sources]
        return Trail(tuple(Strand(each, (), whole(each.output.shape)) for each in of_sources), lost)

    def carries(self, strand: Strand, kind: str, samples: int, channels: int) -> bool:
        """Whether a layer that reads ``strand`` has a closed form through it."""
        raise NotImplementedError

    def shares(self, strands: Sequence[Strand], rows: Rows, reads: Iterator[Tensor]) -> list[Share]:
        """Absolute influence of what it reads on a layer's critical neurons.

        Args:
            strands: What the layer reads of its output.
            rows: The layer's critical rows.
            reads: For each kernel offset, how often each element of the output is read, if that differs.
        """
        raise NotImplementedError


class Deviation(NamedTuple):
    """What one normalisation over the last dimension of a tensor, ``(n, ..., C)``, did to it.

    Attributes:
        reciprocal: Of the deviation, ``(n, ..., 1)``; ``mean`` likewise, for layer norm.
        scale: The affine factor, ``(C,)``.
    """

    stream: Held
    reciprocal: Tensor
    mean: Tensor | None
    scale: Tensor | None

    def stage(self, samples: int, dtype: torch.dtype) -> Stage:
        """It with tokens in one dimension."""
        values, reciprocal = self.stream.values.to(dtype), self.reciprocal.to(dtype)
        normalised = (values if self.mean is None else values - self.mean) * reciprocal
        tokens = normalised.reshape(samples, -1, normalised.shape[-1])
        return Stage(tokens, reciprocal.reshape(samples, -1), self.scale, self.mean is not None)


@dataclass(frozen=True, eq=False)
class Normalisation(Crossing):
    """Layer norm, or RMS norm, over the last dimension; or several in a row.

    Attributes:
        deviations: What each did, the last one first.
        inner: The one before, where its tokens stand side by side in what the last one read.
        starts: The channels at which they begin there.
    """

    deviations: tuple[Deviation, ...]
    inner: Normalisation | None = None
    starts: tuple[int, ...] = ()

    def carries(self, strand: Strand, kind: str, samples: int, channels: int) -> bool:
        """Tokens may be picked, moved and averaged; channels must be the layer's input channels, in order."""
        shape, dim = self.output.shape, 1 if kind == "conv2d" else -1
        last = Factor(len(shape) - 1, 1, shape[-1])
        return samples_first(strand.axes, shape, samples) and channels == shape[-1] and holds(strand.axes, dim, [last])

    def aligned(self, strand: Strand, shape: Sequence[int]) -> bool:
        """Whether a tensor of a shape holds its output as it is, summed with other elements or not."""
        plain = not (strand.partial or strand.gained or strand.merged)
        return plain and self.output.shape == shape and strand.axes == whole(shape)

    def side_by_side(self, strand: Strand, shape: Sequence[int]) -> bool:
        """Whether a tensor of a shape holds some of its tokens as one block of the channels, as patch merging does."""
        last = strand.moves[-1] if strand.moves else None
        counts = self.output.dtype in (torch.float32, torch.float64)  # numbers of tokens, without rounding
        plain = counts and not (strand.gained or strand.merged) and len(self.deviations) == 1
        rows_apart = strand.axes is not None and strand.axes[0] == whole(self.output.shape)[0]
        return plain and rows_apart and last == ("cat", len(shape) - 1, strand.block, tuple(shape))

    def shares(self, strands: Sequence[Strand], rows: Rows, reads: Iterator[Tensor]) -> list[Share]:
        stream = self.deviations[-1].stream
        if stream.edge is None:
            return []
        samples, _, channels, offsets = rows.weight.shape
        first, *others = (deviation.stage(samples, rows.weight.dtype) for deviation in self.deviations)
        blocks = self._blocks(samples)
        total = torch.zeros_like((others[-1] if others else first).normalised)
        for offset in range(offsets):
            slopes, counted, read = Slopes(rows.weight[..., offset]), None, next(reads, None)
            if read is not None:
                read = read.to(total.dtype).reshape(samples, -1, channels)
            if read is not None and rows.own is not None:
                counted = read.abs().transpose(1, 2).gather(1, rows.own.unsqueeze(2).expand(-1, -1, read.shape[1]))
            elif read is not None:
                slopes = _weighed(slopes, read, any(strand.gained for strand in strands))
            slopes = slopes.through(first)
            if not blocks:
                for stage in others:
                    slopes = slopes.through(stage)
                total += slopes.sums(counted)
            for block, inner, outer in blocks:
                part = slopes.part(outer, slice(block, block + total.shape[2])).through(others[0].part(inner))
                total[:, inner] += part.sums(None if counted is None else counted[:, :, outer])
        return [(stream, total.view(stream.values.shape))]

    def _blocks(self, samples: int) -> list[tuple[int, Tensor, Tensor]]:
        """Where tokens of an earlier normalisation stand side by side in what this one reads.

        For each block its first channel, the earlier one's tokens, and those of this one that hold them.
        """
        stream, blocks = self.deviations[0].stream, list[tuple[int, Tensor, Tensor]]()
        if self.inner is None or stream.edge is None:
            return []
        values = stream.values
        numbers = torch.arange(1, values[0, ..., 0].numel() + 1, device=values.device, dtype=values.dtype)
        for block in self.starts:
            seed = torch.zeros_like(values, memory_format=torch.contiguous_format)
            seed[..., block] = numbers.view(1, *values.shape[1:-1])
            (places,) = torch.autograd.grad([stream.edge], [self.inner.output], [seed], retain_graph=True)
            held = places[..., 0].reshape(samples, -1)[0].long()
            inner = held.nonzero()[:, 0]
            blocks.append((block, inner, held[inner] - 1))
        return blocks


def _weighed(slopes: Slopes, read: Tensor, gained: bool) -> Slopes:
    """Rows that read each element of n samples' tokens as often as ``read``, ``(n, T, C)``, says.

    That is a number for each token, times one for each channel where the channels have ``gained`` factors.
    """
    counted = read.abs().amax(2)
    if not gained:
        return slopes._replace(reciprocal=counted)
    token = counted.argmax(1).view(-1, 1, 1).expand(-1, 1, read.shape[2])  # at which the factors show
    most = counted.amax(1).clamp(min=torch.finfo(read.dtype).tiny)
    return Slopes(slopes.rows * (read.gather(1, token) / most[:, None, None]), reciprocal=counted)


@dataclass(frozen=True, eq=False)
class Attended(Crossing):
    """Softmax attention: what it held are queries (b, T, E), keys as (b, E, T'), values (b, T', D), weights (b, T, T').

    Attributes:
        scale: What the logits were multiplied by: a number, or one for each head, (b,).
        maps: For queries, keys and values the maps, by layer, through which they go back to layers' outputs token by
            token; empty where their elements are those of layers.
    """

    scale: Tensor | float
    maps: tuple[Mapping[int, TokenMap], ...] = ({}, {}, {})

    @property
    def sources(self) -> frozenset[int]:
        return super().sources.union(*self.maps)

    def carries(self, strand: Strand, kind: str, samples: int, channels: int) -> bool:
        """A linear map over tokens, which reads whole heads side by side."""
        heads, features = self.output.shape[0], self.output.shape[2]
        count = channels // features
        if kind != "linear" or strand.gained or strand.merged or channels % features or heads % (samples * count):
            return False
        side_by_side = holds(strand.axes, -1, [Factor(0, 1, count), Factor(2, 1, features)])
        copies = [each.copies // count for maps in self.maps for each in maps.values()]
        together = all(bool((windows == windows[:, :1]).all()) for windows in copies)
        return side_by_side and together and samples_first(strand.axes, self.output.shape, samples)

    def shares(self, strands: Sequence[Strand], rows: Rows, reads: Iterator[Tensor]) -> list[Share]:
        dtype, read = rows.weight.dtype, next(reads, None)
        keys, features = self.held[1].values.to(dtype).transpose(1, 2), self.held[2].values.shape[2]
        queries, values, weights = (self.held[place].values.to(dtype) for place in (0, 2, 3))
        heads = Heads(queries, keys, values, weights, self.scale)
        by_head = rows.weight[..., 0].unflatten(2, (-1, features))
        read = None if read is None else read[..., 0].to(dtype)
        direct = [not maps and held.edge is not None for maps, held in zip(self.maps, self.held, strict=False)]
        sums = attention_sums(heads, by_head, read, direct)
        shares: list[Share] = [
            (held, each.transpose(1, 2) if held is self.held[1] else each)
            for held, each in zip(self.held, sums, strict=False)
            if each is not None
        ]
        for side, (held, maps) in enumerate(zip(self.held, self.maps, strict=False)):
            if held.edge is None:
                continue
            for token_map in maps.values():
                jacobian = token_map.jacobian(held.edge, held.values, 1 + (side == 1)).to(dtype)
                of_base = pulled_sums(side, heads, by_head, read, token_map.copies, jacobian)
                shares.append((token_map.reach.base, token_map.put_back(of_base)))
        return shares


@dataclass(frozen=True, eq=False)
class Passage:
    """Closed-form part of the edges into a layer: from sources whose elements each reach one element on the way.

    Attributes:
        crossing: What mixes them before the layer reads them; None where nothing does.
        strands: What the layer reads of the crossing's output, or of the sources themselves.
        sources: Indices of the source layers.
    """

    crossing: Crossing | None
    strands: tuple[Strand, ...]
    sources: frozenset[int]


def passages(trail: Trail, kind: str, samples: int, channels: int) -> tuple[Passage, ...]:
    """The closed-form parts of the edges into a layer, of a number of input channels, from what it reads.

    A source that comes in two ways, by itself and through a crossing or through two crossings, has no closed form.
    """
    by_crossing: dict[Crossing | None, list[Strand]] = {}
    for strand in trail.strands:
        by_crossing.setdefault(strand.origin if isinstance(strand.origin, Crossing) else None, []).append(strand)
    ways: dict[Crossing | None, frozenset[int]] = {}
    shut = set(trail.lost)
    for crossing, strands in by_crossing.items():
        sources = frozenset[int]().union(*(strand.sources for strand in strands))
        if crossing is not None and not all(crossing.carries(each, kind, samples, channels) for each in strands):
            shut |= sources
        for other in ways.values():
            shut |= sources & other
        ways[crossing] = sources
    return tuple(
        Passage(crossing, tuple(by_crossing[crossing]), sources - shut)
        for crossing, sources in ways.items()
        if sources - shut
    )
