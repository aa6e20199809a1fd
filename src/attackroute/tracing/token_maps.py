"""Maps of each token by itself between a route layer and attention: rotations, normalised queries and keys, copies.

Where queries, keys or values are no elements of route layers but functions of them, it is enough that each element of a
layer reaches one token, in one head or in the copies of one head: with the Jacobian of that piece, token by token, the
closed form of attention goes on to the layer's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from attackroute.tracing.factors import Factor
from attackroute.tracing.reach import Reach
from attackroute.tracing.trails import Trail, mixed


class TokenMap(NamedTuple):
    """How a route layer's elements reach queries, keys or values: each reaches one token, in one row of heads.

    Attributes:
        reach: Which elements reach which.
        heads: Digits of the head's number; those of dimension -1 count the heads of a row.
        tokens: Digits of the token's number.
    """

    reach: Reach
    heads: tuple[Factor, ...]
    tokens: tuple[Factor, ...]

    def arranged(self, values: Tensor) -> Tensor:
        """A tensor of the base's shape as (rows of heads, tokens, elements)."""
        arranged = self.reach.arranged(values, [factor for factor in self.heads if factor.dim >= 0], self.tokens)
        assert arranged is not None  # which was seen when the map was found
        return arranged

    @property
    def copies(self) -> Tensor:
        """The numbers of the heads in each row, (rows, copies)."""
        sizes = [factor.size for factor in self.heads]
        order = sorted(range(len(sizes)), key=lambda place: self.heads[place].dim < 0)
        numbers = torch.arange(torch.Size(sizes).numel()).view(sizes).permute(order)
        return numbers.reshape(-1, torch.Size(factor.size for factor in self.heads if factor.dim < 0).numel())

    def put_back(self, sums: Tensor) -> Tensor:
        """Such a tensor in the base's shape."""
        total = sums.new_empty(self.reach.base.shape)
        places = self.arranged(torch.arange(total.numel(), device=sums.device).view(total.shape))
        total.view(-1)[places] = sums
        return total

    def jacobian(self, edge: GradientEdge, read: Tensor, dim: int) -> Tensor:
        """Derivatives of ``read``, (b, T, E) with tokens in dimension ``dim``: (rows, copies, T, E, elements)."""
        parts, base = list[Tensor](), self.reach.base.edge
        assert base is not None  # operations have read it
        for heads in self.copies.T:
            for feature in range(read.shape[3 - dim]):
                seed = torch.zeros_like(read, memory_format=torch.contiguous_format)
                seed.select(3 - dim, feature)[heads] = 1
                gradient = torch.autograd.grad([edge], [base], [seed], retain_graph=True, materialize_grads=True)[0]
                parts.append(self.arranged(gradient))
        stacked = torch.stack(parts, 2)
        return stacked.view(*stacked.shape[:2], -1, read.shape[3 - dim], stacked.shape[3]).transpose(1, 2)


def _token_map(reach: Reach, shape: Sequence[int], dim: int) -> TokenMap | None:
    """The map to a tensor of heads with tokens in dimension ``dim``; None where tokens do not stay apart."""
    heads, tokens = reach.digits(0, shape[0]), reach.digits(dim, shape[dim])
    followed, elements = [each for each in heads if each.dim >= 0], torch.empty(reach.base.shape, device="meta")
    if any(each.dim < 0 for each in tokens) or reach.arranged(elements, followed, tokens) is None:
        return None
    return TokenMap(reach, heads, tokens)


def apart(
    sides: Sequence[tuple[Trail, int]], tensors: Sequence[Tensor]
) -> tuple[Trail, tuple[Mapping[int, TokenMap], ...]]:
    """The trail of what attention reads, and the token maps of those of queries, keys and values that need them.

    Args:
        sides: The trails of queries, keys and values, and the dimension that their tokens are in.
        tensors: Queries, keys and values.
    """
    trails = [trail for trail, _ in sides]
    plain = mixed(trails)
    if not plain.lost:
        return plain, ({}, {}, {})
    maps = [
        {source: each for source, reach in trail.reach.items() if (each := _token_map(reach, tensor.shape, dim))}
        for (trail, dim), tensor in zip(sides, tensors, strict=False)
    ]
    mapped = {source for source in plain.lost if _separate(source, trails, maps)}
    needed = [bool(mapped & mixed([trail]).lost) for trail in trails]
    shut = {
        source
        for trail, of_side, by_token in zip(trails, maps, needed, strict=True)
        for source in trail.sources
        if by_token and source not in of_side
    }
    trail = plain.changed(strand if strand.origin not in shut else None for strand in plain.strands)
    closed = mapped.union(*(strand.sources for strand in trail.strands))
    return trail, tuple(
        {source: each for source, each in of_side.items() if by_token and source in closed}
        for of_side, by_token in zip(maps, needed, strict=True)
    )


def _separate(source: int, trails: Sequence[Trail], maps: Sequence[Mapping[int, TokenMap]]) -> bool:
    """Whether a source comes to queries, keys and values by token maps, and in each by other elements."""
    ways = [each.get(source) for trail, each in zip(trails, maps, strict=True) if source in trail.sources]
    reaches = [way.reach for way in ways if way is not None]
    pairs = ((one, two) for number, one in enumerate(reaches) for two in reaches[:number])
    return len(reaches) == len(ways) and all(one.apart(two) for one, two in pairs)
