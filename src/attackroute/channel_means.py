"""Means over samples of what a network's own run says of each channel: its activation, or the loss gradient at it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from attackroute.layers import LayerCall, LayerCalls
from attackroute.seeds import checked_labels, checked_logits, log_doubt, seed_gradients

_LOG_SMALLEST = -600.0  # exp(-600) and quotients of it are far above float64's smallest number


@dataclass(frozen=True, eq=False)
class Measured:
    """One number per sample and channel, times a factor per sample.

    Attributes:
        values: For each layer, in forward order, ``(n, C)``.
        log_factor: ``(n,)``, float64 on the CPU.
        logits: ``(n, K)``, detached, where a gradient was measured.
        at_images: The gradient at the images, in their shape and up to the factor, where one was measured.
    """

    values: dict[str, Tensor]
    log_factor: Tensor
    logits: Tensor | None = None
    at_images: Tensor | None = None


Measure = Callable[..., Measured]
"""``(model, images, labels or None, linear=...) -> Measured``, for a frozen model."""


def activations(model: nn.Module, images: Tensor, labels: Tensor | None, *, linear: bool = False) -> Measured:
    """Mean over positions of ``|Z^m|``, the layer's own output."""
    values: dict[str, Tensor] = {}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        totals = _position_sums(output, call.kind)
        values[call.name] = totals * (totals.numel() / output.numel())
        return output

    with torch.no_grad(), LayerCalls(model, visit, linear=linear):
        model(images)
    return Measured(values, torch.zeros(images.shape[0], dtype=torch.float64))


def gradients(model: nn.Module, images: Tensor, labels: Tensor | None, *, linear: bool = False) -> Measured:
    """Sum over positions of ``|dL/dZ^m|``, through all paths, L the cross entropy.

    The factor ``1 - p_y``, which a confident sample's logits cannot hold, is kept apart as a logarithm.

    Raises:
        UserError: The output is not logits, a label is outside them, or the logits do not depend on any layer.
    """
    values: dict[str, Tensor] = {}
    start = images.detach().requires_grad_()
    leaves = {"": start}  # where gradients end: all that lies between these and the logits is differentiated

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        if not output.requires_grad:  # the model cut the graph before this layer
            leaves[call.name] = output.detach().requires_grad_()
            output = leaves[call.name].clone()  # a copy, since what follows may work in place
        shape = (output.shape[0], output.shape[_channel_dim(output, call.kind)])
        values[call.name] = torch.zeros(shape, device=output.device)
        if output.requires_grad:
            output.register_hook(partial(keep, call))
        return output

    def keep(call: LayerCall, gradient: Tensor) -> None:
        values[call.name] = _position_sums(gradient, call.kind)

    with torch.enable_grad(), LayerCalls(model, visit, linear=linear):
        logits = checked_logits(model(start.clone()), images.shape[0])
    answers = logits.detach().argmax(1) if labels is None else checked_labels(labels, logits.shape[1], images.shape[0])
    ends = seed_gradients(logits, answers, leaves, None)
    logits = logits.detach()
    return Measured(values, log_doubt(logits.cpu().to(torch.float64), answers.cpu()), logits, ends[""])


@dataclass
class RunningMean:
    """Mean over samples, in float64, that no factor can push below what float64 holds.

    Attributes:
        samples: How many samples are in.
    """

    samples: int = 0
    _total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    _log_scale: float = -math.inf

    def add(self, measured: Measured) -> None:
        """Add one batch."""
        values = torch.cat(list(measured.values.values()), dim=1).cpu().to(torch.float64)
        scale = max(self._log_scale, float(measured.log_factor.max()))
        factors = (measured.log_factor - scale).exp()
        self._total = self._total * math.exp(self._log_scale - scale) + factors @ values
        self._log_scale = scale
        self.samples += len(values)

    def value(self) -> Tensor:
        """The means of all layers' channels, side by side: float64, on the CPU.

        If all factors are below about 1e-260, the means are too large by a common factor.
        """
        return self._total / self.samples * math.exp(max(self._log_scale, _LOG_SMALLEST))


def _position_sums(values: Tensor, kind: str) -> Tensor:
    """Sum of ``|values|`` over positions: ``(n, C)``, in float32 or wider."""
    positions = [dim for dim in range(1, values.ndim) if dim != _channel_dim(values, kind)]
    dtype = torch.promote_types(values.dtype, torch.float32)
    size = values.detach().abs()
    return size.sum(positions, dtype=dtype) if positions else size.to(dtype)


def _channel_dim(values: Tensor, kind: str) -> int:
    return 1 if kind == "conv2d" else values.ndim - 1
