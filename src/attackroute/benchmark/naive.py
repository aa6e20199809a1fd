"""Eqs. (1)-(5) the naive way, one sample at a time, for chains: what the closed form is measured against.

The score of Eq. (5) is a sum over the critical neurons of the next layer, their positions z included, of
``sum_s |dZ'[z] / dZ[s]|``. Both ways here take such a derivative for each z, one by one or a batch at a time; given
some of the elements z they give that part of the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from attackroute.zoo.chain import ChainNet

_ROWS = 256  # most rows of a Jacobian at a time
_ELEMENTS = 1 << 22  # and most elements


@dataclass(frozen=True, eq=False)
class Segment:
    """Two adjacent layers of a chain at one sample, and what lies between them.

    Attributes:
        source: Name of the earlier layer.
        target: Name of the later layer.
        run: From ``Z`` of the source to ``Z'`` of the target.
        start: ``Z``, (1, C, H, W), a leaf of the graph.
        end: ``Z'``, (1, C', H', W'), with the graph to ``start``.
    """

    source: str
    target: str
    run: nn.Module
    start: Tensor
    end: Tensor

    def elements(self, critical: Tensor) -> Tensor:
        """Flat indices in ``end`` of all positions of critical neurons, bool (C',)."""
        return critical.view(-1, 1).expand(-1, self.end[0, 0].numel()).flatten().nonzero().flatten()


def chain_segments(model: ChainNet, image: Tensor) -> list[Segment]:
    """Cut a chain at its convolutions.

    Args:
        model: In eval mode; its ``features`` are a sequence of modules, no two convolutions without an operation that
            is out of place between them.
        image: (1, C, H, W).
    """
    features = model.features
    assert isinstance(features, nn.Sequential)
    cuts = [index for index, module in enumerate(features) if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        value = features[: cuts[0] + 1](model.normalise(image))
    segments = []
    for before, after in pairwise(cuts):
        run = features[before + 1 : after + 1]
        start = value.detach().requires_grad_()
        end = run(start)
        segments.append(Segment(f"features.{before}", f"features.{after}", run, start, end))
        value = end
    return segments


def by_autograd(segment: Segment, elements: Tensor) -> Tensor:
    """Part of Eq. (5) from these elements, by one call of ``torch.autograd.grad`` each: (C,)."""
    total = segment.start.new_zeros(segment.start.shape[1])
    flat = segment.end.flatten()
    for element in elements.tolist():
        (gradient,) = torch.autograd.grad(flat[element], segment.start, retain_graph=True)
        total += gradient.abs().sum((0, 2, 3))
    return total


def by_jacrev(segment: Segment, elements: Tensor) -> Tensor:
    """Part of Eq. (5) from these elements, by ``torch.func.jacrev``, which batches them with ``vmap``: (C,)."""
    total = segment.start.new_zeros(segment.start.shape[1])
    for rows in elements.split(chunk_rows(segment)):
        jacobian = torch.func.jacrev(_rows_of(segment.run, rows))(segment.start.detach())
        total += jacobian.abs().sum((0, 1, 3, 4))
    return total


def chunk_rows(segment: Segment) -> int:
    """Rows of the Jacobian that :func:`by_jacrev` computes at a time."""
    return max(1, min(_ROWS, _ELEMENTS // segment.start.numel()))


def _rows_of(run: nn.Module, rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda start: run(start).flatten()[rows]
