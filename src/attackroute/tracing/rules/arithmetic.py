"""Sums, products and batch norm: a factor per channel or position, paths that meet."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attackroute.core.errors import UserError
from attackroute.tracing.flow import Flow, added, mapped, opaque, scaled, settled, times
from attackroute.tracing.rules.operation import Operation, overloads, rule, without_rule


@rule(*overloads("add.Tensor", "add_.Tensor", "sub.Tensor", "sub_.Tensor", "add.Scalar", "add_.Scalar"))
def add(operation: Operation) -> Any:
    """Sums and differences of tensors of one layout, or of a tensor and constants."""
    first, other = operation.args[0], operation.args[1]
    alpha = operation.argument(2, "alpha", 1)
    alpha = -alpha if "sub" in operation.func.overloadpacket.__name__ else alpha
    shape = _broadcast(first, other)
    left = _of_shape(operation.ledger.flow(first), first, shape)
    right = _of_shape(operation.ledger.flow(other), other, shape)
    if right.terms and alpha != 1:
        right = scaled(right, other.new_full((right.shape[0],), alpha))
    return operation.emit(operation.run(), _sum(left, right))


@rule(*overloads("mul.Tensor", "mul_.Tensor", "mul.Scalar", "mul_.Scalar", "div.Tensor", "div_.Tensor", "div.Scalar"))
def mul(operation: Operation) -> Any:
    """Products (quotients by constants): each factor carries the other, by the product rule."""
    first, other = operation.args[0], operation.args[1]
    divides = "div" in operation.func.overloadpacket.__name__
    left, right = operation.ledger.flow(first), operation.ledger.flow(other)
    shape = _broadcast(first, other)
    move = operation.ledger.move()
    if divides and not isinstance(other, Tensor) and other == 0:
        return without_rule(operation)
    left = _multiplied(left, first, 1 / other if divides else other, shape, move)
    right = opaque(right.sources) if divides else _multiplied(right, other, first, shape, move)
    return operation.emit(operation.run(), _sum(left, right))


def _broadcast(first: Tensor, other: Any) -> torch.Size:
    shape = other.shape if isinstance(other, Tensor) else first.shape
    return shape if shape == first.shape else torch.broadcast_shapes(first.shape, shape)


def _of_shape(flow: Flow, value: Any, shape: torch.Size) -> Flow:
    """``flow`` of a summand, with its masks settled; opaque where the summand is broadcast."""
    return settled(flow, value) if flow.terms and value.shape == shape else opaque(flow.sources)


def _sum(left: Flow, right: Flow) -> Flow:
    """Flow of a sum: terms of both where they have one layout, the right side's opaque where they do not."""
    if not left.terms:
        left, right = right, left
    if right.terms and (left.shape, left.flat) == (right.shape, right.flat):
        return added(left, right)
    return replace(left, opaque=left.opaque | right.sources)


def _multiplied(flow: Flow, value: Any, factor: Any, shape: torch.Size, move: int) -> Flow:
    """``flow`` of ``value`` times ``factor``, for an output of ``shape``; opaque where no rule covers it."""
    if not flow.terms:
        return flow
    flow = settled(flow, value)
    if not isinstance(factor, Tensor) or factor.numel() == 1:
        number = factor.reshape(()).to(value.dtype) if isinstance(factor, Tensor) else factor
        return scaled(flow, value.new_ones(flow.shape[0]) * number) if value.shape == shape else opaque(flow.sources)
    if value.shape == shape:
        channel_dim = len(flow.spatial) + 1
        if not flow.flat and factor.ndim >= channel_dim and factor.numel() == factor.shape[-channel_dim]:
            return scaled(flow, factor.reshape(-1).clone())  # clones, since the model may write to its tensor later
        return times(flow, flow.view(factor.clone().expand(shape)))
    # a gate of one value per channel, spread over the positions of its partner
    if flow.flat or value.ndim != len(shape) or value.shape[:2] != shape[:2] or math.prod(flow.spatial) != 1:
        return opaque(flow.sources)
    spread = mapped(
        flow, lambda term: replace(term, path=term.path.moved(("spread", move), many=True)), tuple(shape[1:])
    )
    return times(spread, factor.expand(shape))


@rule(*overloads("index_fill.int_Scalar", "index_fill_.int_Scalar"))
def index_fill(operation: Operation) -> Any:
    """Channels set to a constant carry nothing."""
    flow = operation.flow()
    if not flow.terms or flow.flat or operation.args[1] % operation.input.ndim != 1:
        return without_rule(operation)
    flow = settled(flow, operation.input)
    kept = operation.input.new_ones(flow.shape[0]).index_fill(0, operation.args[2], 0)
    return operation.emit(operation.run(), scaled(flow, kept))


BATCH_NORMS = {
    # name: index of (weight, mean, variance, training, eps)
    "native_batch_norm": (1, 3, 4, 5, 7),
    "cudnn_batch_norm": (1, 3, 4, 5, 7),
    "miopen_batch_norm": (1, 3, 4, 5, 7),
    "_native_batch_norm_legit": (1, 3, 4, 5, 7),
    "_native_batch_norm_legit_no_training": (1, 3, 4, None, 6),
    "_batch_norm_no_update": (1, 3, 4, None, 6),
}


@rule(*overloads(*BATCH_NORMS))
def batch_norm(operation: Operation) -> Any:
    """Batch norm with running statistics: a factor per channel, of either sign."""
    weight, _, variance, training, eps = BATCH_NORMS[operation.func.overloadpacket.__name__]
    flow = operation.flow()
    if training is not None and operation.args[training]:
        if operation.input.shape[0] == operation.ledger.samples > 1:
            raise UserError(
                "a batch norm uses the statistics of the batch in eval mode, so samples depend on one another and have "
                "no routes of their own: give it running statistics"
            )
        return without_rule(operation)
    if not flow.terms:
        return without_rule(operation)
    flow = settled(flow, operation.input)
    scale = (operation.args[variance] + operation.args[eps]).rsqrt()
    if operation.args[weight] is not None:
        scale = scale * operation.args[weight]
    output, *rest = operation.run()
    if flow.flat and math.prod(flow.spatial) != 1:
        return operation.emit(output, times(flow, scale.view(1, *flow.shape))), *rest
    return operation.emit(output, scaled(flow, scale)), *rest
