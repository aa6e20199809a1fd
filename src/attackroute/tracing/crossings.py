"""Crossings: normalisation and attention, which mix elements of earlier layers in a way that has a closed form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from attackroute.tracing.attention import Heads, attention_sums
from attackroute.tracing.normalisation import normalised_sums
from attackroute.tracing.trails import Factor, Strand, Trail, holds, joined, samples_first


class Held:
    """A tensor of the pass as it was at some moment: its values, its place in the graph, whether it has changed since."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.edge: GradientEdge | None = get_gradient_edge(tensor) if tensor.grad_fn is not None else None
        self._version = tensor._version

    @property
    def values(self) -> Tensor:
        """The tensor, without its graph."""
        return self._tensor.detach()

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is this tensor."""
        return self._tensor is tensor

    @property
    def kept(self) -> bool:
        """Whether nothing was written to it."""
        return self._tensor._version == self._version


Share = tuple[GradientEdge, Tensor]
"""A tensor's place in the graph, and the absolute influence of each of its elements."""


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

    def carries(self, strand: Strand, kind: str, samples: int, channels: int) -> bool:
        """Whether a layer that reads ``strand`` has a closed form through it."""
        raise NotImplementedError

    def shares(self, strands: Sequence[Strand], rows: Tensor, reads: Iterator[Tensor]) -> list[Share]:
        """Absolute influence of what it reads on a layer's critical neurons.

        Args:
            strands: What the layer reads of its output.
            rows: The layer's critical rows, ``(n, k, C_in, offsets)``.
            reads: For each kernel offset, how often each element of the output is read, if that differs.
        """
        raise NotImplementedError


def mixed(trails: Sequence[Trail]) -> Trail:
    """The trail of all that an operation reads, without other crossings, whose forms do not chain."""
    together = joined(trails)
    nested = frozenset[int]().union(*(each.sources for each in together.strands if not isinstance(each.origin, int)))
    strands = (each for each in together.strands if isinstance(each.origin, int) and each.origin not in nested)
    return Trail(tuple(strands), together.lost | nested)


@dataclass(frozen=True, eq=False)
class Normalisation(Crossing):
    """Layer norm, or RMS norm, over the last dimension of a tensor, ``(n, ..., C)``.

    Attributes:
        reciprocal: Of the deviation, ``(..., 1)``; ``mean`` likewise, for layer norm.
        scale: The affine factor, ``(C,)``.
    """

    reciprocal: Tensor
    mean: Tensor | None
    scale: Tensor | None

    def carries(self, strand: Strand, kind: str, samples: int, channels: int) -> bool:
        """Tokens may be picked, moved and averaged; channels must be the layer's input channels, in order."""
        shape, dim = self.output.shape, 1 if kind == "conv2d" else -1
        last = Factor(len(shape) - 1, 1, shape[-1])
        return samples_first(strand.axes, shape, samples) and channels == shape[-1] and holds(strand.axes, dim, [last])

    def shares(self, strands: Sequence[Strand], rows: Tensor, reads: Iterator[Tensor]) -> list[Share]:
        stream = self.held[0]
        if stream.edge is None:
            return []
        samples, channels, dtype = rows.shape[0], rows.shape[2], rows.dtype
        centred = stream.values.to(dtype) if self.mean is None else stream.values.to(dtype) - self.mean
        normalised = (centred * self.reciprocal).view(samples, -1, channels)
        reciprocal = self.reciprocal.to(dtype).view(samples, -1)
        gained = any(strand.gained for strand in strands)
        total: Tensor | None = None
        for offset in range(rows.shape[3]):
            kernel = rows[..., offset] if self.scale is None else rows[..., offset] * self.scale
            read = next(reads, None)
            if read is None:
                part = normalised_sums(kernel, normalised, reciprocal, centred=self.mean is not None)
            else:
                read = read.to(dtype).view(samples, -1, channels)
                weights, first = read.abs().amax(2), read[..., 0]
                if gained:  # what each channel is multiplied by shows at a token that is read
                    token = weights.argmax(1).view(-1, 1, 1).expand(-1, 1, channels)
                    factors = read.gather(1, token) / weights.amax(1).clamp(min=torch.finfo(dtype).tiny)[:, None, None]
                    kernel = kernel * factors
                else:
                    weights = first.abs()
                part = normalised_sums(kernel, normalised, reciprocal * weights, centred=self.mean is not None)
            total = part if total is None else total + part
        assert total is not None
        return [(stream.edge, total.view(self.output.shape).to(stream.values.dtype))]


@dataclass(frozen=True, eq=False)
class Attended(Crossing):
    """Softmax attention: what it held are queries (b, T, E), keys as (b, E, T'), values (b, T', D), weights (b, T, T').

    Attributes:
        scale: What the logits were multiplied by: a number, or one for each head, (b,).
    """

    scale: Tensor | float

    def carries(self, strand: Strand, kind: str, samples: int, channels: int) -> bool:
        """A linear map over tokens, which reads whole heads side by side."""
        heads, features = self.output.shape[0], self.output.shape[2]
        count = channels // features
        if kind != "linear" or strand.gained or strand.merged or channels % features or heads % (samples * count):
            return False
        side_by_side = holds(strand.axes, -1, [Factor(0, 1, count), Factor(2, 1, features)])
        return side_by_side and samples_first(strand.axes, self.output.shape, samples)

    def shares(self, strands: Sequence[Strand], rows: Tensor, reads: Iterator[Tensor]) -> list[Share]:
        queries, keys, values, weights = self.held
        dtype, read = rows.dtype, next(reads, None)
        features = values.values.shape[2]
        heads = Heads(
            queries.values.to(dtype), keys.values.to(dtype).transpose(1, 2), values.values.to(dtype),
            weights.values.to(dtype), self.scale
        )  # fmt: skip
        by_head = rows[..., 0].unflatten(2, (-1, features))
        read = None if read is None else read[..., 0].to(dtype)
        of_queries, of_keys, of_values = attention_sums(heads, by_head, read)
        parts = ((queries, of_queries), (keys, of_keys.transpose(1, 2)), (values, of_values))
        return [(held.edge, sums.to(held.values.dtype)) for held, sums in parts if held.edge is not None]


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


def passages(trail: Trail, kind: str, samples: int, channels: int) -> list[Passage]:
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
    return [
        Passage(crossing, tuple(by_crossing[crossing]), sources - shut)
        for crossing, sources in ways.items()
        if sources - shut
    ]
