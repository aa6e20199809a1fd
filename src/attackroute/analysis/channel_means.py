"""Means over samples of what runs of a network say of each channel: its activation, the loss gradient at it, and what
an attack changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall, LayerCalls
from attackroute.core.loss import log_doubt, seed_gradients

_LOG_SMALLEST = -600.0  # exp(-600) and quotients of it are far above float64's smallest number


@dataclass(frozen=True, eq=False)
class Measured:
    """One number per sample and channel, times a factor per sample.

    Attributes:
        values: For each layer, in forward order, ``(n, C)``.
        log_factor: ``(n,)``, float64 on the CPU.
        logits: ``(n, K)``, detached, where a gradient was measured.
        at_images: The gradient at the images, in their shape and up to the factor, where one was measured.
        tokens: Layers whose outputs have positions between samples and channels, where a gradient was measured.
    """

    values: dict[str, Tensor]
    log_factor: Tensor
    logits: Tensor | None = None
    at_images: Tensor | None = None
    tokens: frozenset[str] = frozenset()


Measure = Callable[..., Measured]
"""``(model, images, labels or None, linear=...) -> Measured``, for a frozen model."""


def activations(model: nn.Module, images: Tensor, labels: Tensor | None, *, linear: bool = False) -> Measured:
    """Mean over positions of ``|Z^m|``, the layer's own output."""
    values: dict[str, Tensor] = {}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        values[call.name] = _position_means(output.detach().abs(), call.kind)
        return output

    _run(model, images, visit, linear=linear)
    return Measured(values, torch.zeros(images.shape[0], dtype=torch.float64))


def changes(
    model: nn.Module, images: Tensor, attacked: Tensor, _labels: Tensor | None = None, *, linear: bool = False
) -> Measured:
    """Mean over positions of ``|Z^m(x) - Z^m(x')|``, from one forward pass of the images and one of the attacked ones.

    The clean outputs of the batch are held meanwhile.
    """
    clean = _outputs(model, images, linear=linear)
    values: dict[str, Tensor] = {}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        values[call.name] = _position_means(_less(clean, call.name, output).abs_(), call.kind)
        return output

    _run(model, attacked, visit, linear=linear)
    return Measured(values, torch.zeros(images.shape[0], dtype=torch.float64))


def gradients(model: nn.Module, images: Tensor, labels: Tensor | None, *, linear: bool = False) -> Measured:
    """Sum over positions of ``|dL/dZ^m|``, through all paths, L the cross entropy.

    The factor ``1 - p_y``, which a confident sample's logits cannot hold, is kept apart as a logarithm.

    Raises:
        UserError: The output is not logits, a label is outside them, or the logits do not depend on any layer.
    """
    return _differentiated(model, images, labels, lambda call, _: partial(_magnitudes, kind=call.kind), linear=linear)


def attributions(
    model: nn.Module, images: Tensor, attacked: Tensor, labels: Tensor | None, *, linear: bool = False
) -> Measured:
    """Attribution patching: the first-order estimate of the loss that a transplant of each channel takes away.

    ``- sum over positions of (Z^m(x) - Z^m(x')) * dL/dZ^m(x')``, through all paths, L the cross entropy of the
    attacked image; above zero where clean values would lower the loss. From one forward pass of the images, and one
    forward and one backward pass of the attacked ones. The factor ``1 - p_y`` of the attacked image is kept apart.

    Raises:
        UserError: As :func:`gradients`.
    """
    clean = _outputs(model, images, linear=linear)

    def follow(call: LayerCall, output: Tensor) -> Callable[[Tensor], Tensor]:
        change = _less(clean, call.name, output).neg_()  # Z(x') - Z(x)
        return lambda slope: _position_sums(change.mul_(slope), call.kind)

    return _differentiated(model, attacked, labels, follow, linear=linear)


def _differentiated(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    follow: Callable[[LayerCall, Tensor], Callable[[Tensor], Tensor]],
    *,
    linear: bool,
) -> Measured:
    """Values made of the loss gradient at each layer: ``follow(call, output)`` gives what makes them of it.

    Values are zero where no gradient arrives.
    """
    values: dict[str, Tensor] = {}
    tokens: set[str] = set()
    start = images.detach().requires_grad_()
    leaves = {"": start}  # where gradients end: all that lies between these and the logits is differentiated

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        if not output.requires_grad:  # the model cut the graph before this layer
            leaves[call.name] = output.detach().requires_grad_()
            output = leaves[call.name].clone()  # a copy, since what follows may work in place
        shape = (output.shape[0], output.shape[_channel_dim(output, call.kind)])
        values[call.name] = torch.zeros(shape, device=output.device)
        if call.kind == "linear" and output.ndim > 2:
            tokens.add(call.name)
        if output.requires_grad:
            output.register_hook(partial(keep, call.name, follow(call, output)))
        return output

    def keep(layer: str, measure: Callable[[Tensor], Tensor], gradient: Tensor) -> None:
        values[layer] = measure(gradient.detach())

    with torch.enable_grad(), LayerCalls(model, visit, linear=linear):
        logits = checked_logits(model(start.clone()), images.shape[0])
    answers = logits.detach().argmax(1) if labels is None else checked_labels(labels, logits.shape[1], images.shape[0])
    ends = seed_gradients(logits, answers, leaves, None)
    logits = logits.detach()
    doubt = log_doubt(logits.cpu().to(torch.float64), answers.cpu())
    return Measured(values, doubt, logits, ends[""], frozenset(tokens))


def _run(model: nn.Module, images: Tensor, visit: Callable[[LayerCall], Tensor], *, linear: bool) -> None:
    with torch.no_grad(), LayerCalls(model, visit, linear=linear):
        model(images.clone())  # a copy, since a model may work on its input in place


def _outputs(model: nn.Module, images: Tensor, *, linear: bool) -> dict[str, Tensor]:
    """Copies of the outputs of all layers."""
    values: dict[str, Tensor] = {}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        values[call.name] = output.detach().clone()  # a copy, since what follows may work in place
        return output

    _run(model, images, visit, linear=linear)
    return values


def _less(clean: dict[str, Tensor], layer: str, output: Tensor) -> Tensor:
    """``Z(x) - Z(x')`` as a tensor of its own, in float32 or wider; the clean output is given up."""
    if layer not in clean or clean[layer].shape != output.shape:
        raise UserError("the model ran other layers on the attacked images: its structure must not vary")
    dtype = torch.promote_types(output.dtype, torch.float32)
    return clean.pop(layer).to(dtype).sub_(output.detach())


@dataclass
class RunningMean:
    """Mean over samples, in float64, that no factor can push below what float64 holds.

    Attributes:
        samples: How many samples are in.
    """

    samples: int = 0
    _total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    _log_scale: float = -math.inf
    _channels: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, measured: Measured) -> RunningMean:
        """That of one batch alone."""
        values = torch.cat(list(measured.values.values()), dim=1).cpu().to(torch.float64)
        scale = float(measured.log_factor.max())
        total = (measured.log_factor - scale).exp() @ values
        return cls(len(values), total, scale, {layer: each.shape[1] for layer, each in measured.values.items()})

    def add(self, other: RunningMean | Measured) -> None:
        """Add other samples; the same parts in the same order give the same sum, bit for bit."""
        part = other if isinstance(other, RunningMean) else self.of(other)
        scale = max(self._log_scale, part._log_scale)
        own, new = math.exp(self._log_scale - scale), math.exp(part._log_scale - scale)
        self._total = self._total * own + part._total * new
        self._log_scale = scale
        self._channels = part._channels
        self.samples += part.samples

    def by_layer(self) -> dict[str, Tensor]:
        """The means of each layer's channels, ``(C,)``: float64, on the CPU.

        If all factors are below about 1e-260, the means are too large by a common factor.
        """
        means = self._total / self.samples * math.exp(max(self._log_scale, _LOG_SMALLEST))
        return dict(zip(self._channels, means.split(list(self._channels.values())), strict=True))


def _magnitudes(values: Tensor, kind: str) -> Tensor:
    return _position_sums(values.abs(), kind)


def _position_means(values: Tensor, kind: str) -> Tensor:
    totals = _position_sums(values, kind)
    return totals * (totals.numel() / values.numel())


def _position_sums(values: Tensor, kind: str) -> Tensor:
    """Sum over positions: ``(n, C)``, in float32 or wider."""
    positions = [dim for dim in range(1, values.ndim) if dim != _channel_dim(values, kind)]
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.sum(positions, dtype=dtype) if positions else values.to(dtype)


def _channel_dim(values: Tensor, kind: str) -> int:
    return 1 if kind == "conv2d" else values.ndim - 1
