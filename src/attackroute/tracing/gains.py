"""Gains of a layer's input, summed over the positions that each offset of its kernel meets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attackroute.tracing.flow import Alive, Flow, Term, disentangled
from attackroute.tracing.windows import Axes, PatternSums, alive_sums, mask_sums, pattern_sums


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
        if self.axes is None:
            return self._positions(term)
        if term.path.many and term.path.windows is not None and not self.pointwise:
            return pattern_sums(term.path.windows, self._alive(term), *self.axes)
        if isinstance(term.mask, Alive):
            if term.mask not in self.counted:
                self.counted[term.mask] = alive_sums(self.values, term.mask, *self.axes)
            return self.counted[term.mask][:, term.span]
        if term.mask is None:
            return mask_sums(self.values.new_ones((1, 1, *self.flow.spatial)), *self.axes)
        key = id(term.mask)
        if key not in self.counted:
            self.counted[key] = mask_sums(term.mask.expand(-1, -1, *self.flow.spatial), *self.axes)
        return self.counted[key]

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
        if isinstance(term.mask, Alive):
            gains = term.mask.of(values)
        elif term.mask is None:
            gains = torch.ones_like(values[:1, :1])
        else:
            gains = term.mask.abs() if term.mask.dtype != torch.bool else term.mask
            gains = gains.expand(-1, -1, *self.flow.spatial)
        return gains.to(dtype).flatten(2).unsqueeze(-1) if gains.ndim > 2 else gains.to(dtype)[..., None, None]
