"""Standard deviations of neurons over data: the unit in which influence belongs to the function, not its parameters.

A factor on a layer's kernel that what follows takes back, as batch norm does, changes ``Z`` and no prediction, and no
influence in units of these deviations; see docs/definitions.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.core.batches import BatchStream, Data
from attackroute.core.errors import UserError
from attackroute.core.layers import CHANNEL_DIM, LayerCall, LayerCalls
from attackroute.core.model_state import explained, frozen, placement

_ROUNDING = 16  # units of rounding of a neuron's mean, below which its deviation is taken for zero

Progress = Callable[[int, "int | None"], None]
"""Called after every batch with the number of samples done and, where known, in all."""

_Moments = tuple[int, Tensor, Tensor]  # number of values; mean and variance of each neuron, float64 (C,) on the CPU


@dataclass(frozen=True, eq=False)
class Deviations:
    """Standard deviation of each neuron over samples and positions, of ``Z``, the layer's own output.

    Attributes:
        values: For each layer, in forward order, float64 ``(C,)`` on the CPU; zero for a neuron that never varies.
    """

    values: Mapping[str, Tensor]
    _placed: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module, data: Data, *, batch_size: int = 128, progress: Progress | None = None) -> Deviations:
        """Measure them, in eval mode, in one pass over the data and constant memory.

        Linear maps count as layers too. Arguments as of ``ar.trace_routes``; labels are not looked at.

        Raises:
            UserError: The data can be read once only, hold no sample, or do not fit the model.
        """
        if isinstance(data, Iterator):
            raise UserError(
                "units='std' read the data once more than the routes do, and these can be read once only: give a "
                "DataLoader, a data set or tensors"
            )
        total: dict[str, _Moments] = {}
        done = 0
        with frozen(model), torch.inference_mode(False), torch.no_grad():
            stream = BatchStream(model, data, batch_size)
            for samples, moments in stream.map(lambda images, _: (len(images), _moments(model, images))):
                total = {name: _together(total[name], each) if total else each for name, each in moments.items()}
                done += samples
                if progress is not None:
                    progress(done, stream.total)
        rounding = _ROUNDING * torch.finfo(torch.promote_types(placement(model)[1], torch.float32)).eps
        deviations = {name: (variance.sqrt(), rounding * mean.abs()) for name, (_, mean, variance) in total.items()}
        return cls({name: sigma.masked_fill(sigma <= least, 0.0) for name, (sigma, least) in deviations.items()})

    def power(self, exponent: int, layer: str, like: Tensor) -> Tensor:
        """A power of a layer's deviations, zero for zero, ``(C,)`` on the device and in the dtype of a tensor.

        It is placed there once, since every batch asks for it again.

        Raises:
            UserError: The layer did not run when they were measured.
        """
        key = exponent, layer, like.device, like.dtype
        if key not in self._placed:
            values = self.values.get(layer)
            if values is None:
                raise UserError(f"the deviations of units='std' are not of this model: they lack layer {layer!r}")
            with torch.inference_mode(False):  # what is made in inference mode could not serve a backward pass
                powers = torch.where(values > 0, values**exponent, 0.0)
                self._placed[key] = powers.to(like.device, like.dtype)
        return self._placed[key]

    @property
    def digest(self) -> str:
        """What tells these from others, in a few letters."""
        numbers = b"".join(values.numpy().tobytes() for values in self.values.values())
        return hashlib.sha256(numbers).hexdigest()[:16]


def _moments(model: nn.Module, images: Tensor) -> dict[str, _Moments]:
    """Number of values, mean and variance of each neuron in one batch, by layer."""
    moments: dict[str, _Moments] = {}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        values = output.detach().movedim(CHANNEL_DIM[call.kind], 0).flatten(1)
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=1, correction=0)
        moments[call.name] = values.shape[1], mean.cpu().double(), variance.cpu().double()
        return output

    with explained(images), LayerCalls(model, visit, linear=True):
        model(images.clone())
    return moments


def _together(one: _Moments, other: _Moments) -> _Moments:
    """The moments of two sets of values together (Chan, Golub and LeVeque, 1983)."""
    count = one[0] + other[0]
    share, gap = other[0] / count, other[1] - one[1]
    variance = one[2] + (other[2] - one[2]) * share + gap.square() * (share * (1 - share))
    return count, one[1] + gap * share, variance
