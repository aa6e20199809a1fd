"""What acts on each element: activations, sums, products and batch norm, as a factor per channel or position."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attackroute.core.errors import UserError
from attackroute.tracing.flow import Alive, Flow, added, mapped, opaque, scaled, settled, times
from attackroute.tracing.rules.operation import FlowRule, Operation, aten, flow_rule, rule, without_rule


@flow_rule("relu", "relu_")
def relu(operation: Operation, flow: Flow) -> Any:
    """ReLU: alive where its output is positive."""
    output = operation.run()
    return operation.emit(output, _alive(flow, output, Alive()))


@flow_rule("hardtanh", "hardtanh_")
def hardtanh(operation: Operation, flow: Flow) -> Any:
    """ReLU6 and its kin: alive strictly between the bounds."""
    low, high = operation.argument(1, "min_val", -1.0), operation.argument(2, "max_val", 1.0)
    if low == 0 and not any(isinstance(term.mask, Alive) for term in flow.terms):
        output = operation.run()
        return operation.emit(output, _alive(flow, output, Alive(float(high))))
    flow = settled(flow, operation.input)
    output = operation.run()
    return operation.emit(output, times(flow, flow.view((output > low) & (output < high))))


def _alive(flow: Flow, output: Tensor, alive: Alive) -> Flow:
    """Multiply by ``alive``, lazily where nothing but ones (or an older ReLU of the same values) stands before it."""
    eager = [term for term in flow.terms if isinstance(term.mask, Tensor)]
    # an older lazy mask stays: a ReLU does not change the values of another activation that it is lazy about
    lazy = [replace(term, mask=term.mask or alive) for term in flow.terms if not isinstance(term.mask, Tensor)]
    if eager:
        eager = list(times(replace(flow, terms=tuple(eager)), alive.of(flow.view(output))).terms)
    return replace(flow, terms=(*lazy, *eager))


def _slope(derivative: Callable[[Operation, Tensor, Tensor], Tensor]) -> FlowRule:
    """Rule of a smooth or two-sided activation whose derivative is a function of ones and of its input."""

    def activation(operation: Operation, flow: Flow) -> Any:
        values = operation.input
        flow = settled(flow, values)
        slope = derivative(operation, torch.ones_like(values), values)  # before the operation, which may work in place
        return operation.emit(operation.run(), times(flow, flow.view(slope)))

    return activation


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # the constants of its definition

_SLOPES: dict[str, Callable[[Operation, Tensor, Tensor], Tensor]] = {
    "leaky_relu": lambda op, one, x: aten.leaky_relu_backward(one, x, op.argument(1, "negative_slope", 0.01), False),
    "elu": lambda op, one, x: aten.elu_backward(
        one, op.argument(1, "alpha", 1), op.argument(2, "scale", 1), op.argument(3, "input_scale", 1), False, x
    ),
    "celu": lambda op, one, x: aten.elu_backward(one, alpha := op.argument(1, "alpha", 1.0), 1, 1 / alpha, False, x),
    "selu": lambda _, one, x: aten.elu_backward(one, _SELU_ALPHA, _SELU_SCALE, 1, False, x),
    "silu": lambda _, one, x: aten.silu_backward(one, x),
    "gelu": lambda op, one, x: aten.gelu_backward(one, x, approximate=op.argument(1, "approximate", "none")),
    "mish": lambda _, one, x: aten.mish_backward(one, x),
    "hardswish": lambda _, one, x: aten.hardswish_backward(one, x),
    "hardsigmoid": lambda _, one, x: aten.hardsigmoid_backward(one, x),
    "softplus": lambda op, one, x: aten.softplus_backward(
        one, x, op.argument(1, "beta", 1), op.argument(2, "threshold", 20)
    ),
    "sigmoid": lambda _, one, x: aten.sigmoid_backward(one, torch.sigmoid(x)),
    "tanh": lambda _, one, x: aten.tanh_backward(one, torch.tanh(x)),
    "_prelu_kernel": lambda op, one, x: torch.where(x > 0, one, op.args[1].to(x.dtype)),
    "neg": lambda _, one, x: -one,
    "abs": lambda _, one, x: x.sign(),
    "exp": lambda _, one, x: x.exp(),
}


for _name, _derivative in _SLOPES.items():
    flow_rule(_name, f"{_name}_")(_slope(_derivative))


def _clamp_slope_at_bounds() -> bool:
    """Whether this version of PyTorch lets gradients pass where a value equals the bound that clamps it."""
    with torch.inference_mode(False), torch.enable_grad():
        value = torch.ones(1, requires_grad=True)
        (slope,) = torch.autograd.grad(value.clamp(min=1.0).sum(), value)
    return bool(slope)


_PASSES_AT_BOUNDS = _clamp_slope_at_bounds()


@flow_rule("clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_")
def clamp(operation: Operation, flow: Flow) -> Any:
    """Clamping by numbers: alive between the bounds; at the bounds as this version of PyTorch has it."""
    name = operation.name
    low = None if "max" in name else operation.argument(1, "min")
    high = operation.argument(1, "max") if "max" in name else operation.argument(2, "max")
    flow, values = settled(flow, operation.input), operation.input
    inside = torch.ones_like(values, dtype=torch.bool)
    if low is not None:
        inside &= values >= low if _PASSES_AT_BOUNDS else values > low
    if high is not None:
        inside &= values <= high if _PASSES_AT_BOUNDS else values < high
    return operation.emit(operation.run(), times(flow, flow.view(inside)))


@rule("add.Tensor", "add_.Tensor", "sub.Tensor", "sub_.Tensor", "add.Scalar", "add_.Scalar")
def add(operation: Operation) -> Any:
    """Sums and differences of tensors of one layout, or of a tensor and constants."""
    first, other = operation.args[0], operation.args[1]
    alpha = operation.argument(2, "alpha", 1)
    alpha = -alpha if "sub" in operation.name else alpha
    shape = _broadcast(first, other)
    left = _of_shape(operation.ledger.flow(first), first, shape)
    right = _of_shape(operation.ledger.flow(other), other, shape)
    if right.terms and alpha != 1:
        right = scaled(right, other.new_full((right.shape[0],), alpha))
    return operation.emit(operation.run(), _sum(left, right))


@rule("mul.Tensor", "mul_.Tensor", "mul.Scalar", "mul_.Scalar", "div.Tensor", "div_.Tensor", "div.Scalar")
def mul(operation: Operation) -> Any:
    """Products (quotients by constants): each factor carries the other, by the product rule."""
    first, other = operation.args[0], operation.args[1]
    divides = "div" in operation.name
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


@flow_rule("index_fill.int_Scalar", "index_fill_.int_Scalar")
def index_fill(operation: Operation, flow: Flow) -> Any:
    """Channels set to a constant carry nothing."""
    if flow.flat or operation.args[1] % operation.input.ndim != 1:
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


@rule(*BATCH_NORMS)
def batch_norm(operation: Operation) -> Any:
    """Batch norm with running statistics: a factor per channel, of either sign."""
    weight, _, variance, training, eps = BATCH_NORMS[operation.name]
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
