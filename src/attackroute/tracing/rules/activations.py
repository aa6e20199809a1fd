"""Activations: a derivative per position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attackroute.tracing.flow import Alive, Flow, settled, times
from attackroute.tracing.rules.operation import Operation, Rule, aten, overloads, rule, without_rule


@rule(*overloads("relu", "relu_"))
def relu(operation: Operation) -> Any:
    """ReLU: alive where its output is positive."""
    flow = operation.flow()
    if not flow.terms:
        return without_rule(operation)
    output = operation.run()
    return operation.emit(output, _alive(flow, output, Alive()))


@rule(*overloads("hardtanh", "hardtanh_"))
def hardtanh(operation: Operation) -> Any:
    """ReLU6 and its kin: alive strictly between the bounds."""
    low, high = operation.argument(1, "min_val", -1.0), operation.argument(2, "max_val", 1.0)
    flow = operation.flow()
    if not flow.terms:
        return without_rule(operation)
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


def _slope(derivative: Callable[[Operation, Tensor], Tensor]) -> Rule:
    """Rule of a smooth or two-sided activation whose derivative is a function of its input."""

    def activation(operation: Operation) -> Any:
        flow = operation.flow()
        if not flow.terms:
            return without_rule(operation)
        flow = settled(flow, operation.input)
        slope = derivative(operation, operation.input)  # before the operation, which may work in place
        return operation.emit(operation.run(), times(flow, flow.view(slope)))

    return activation


def _ones(values: Tensor) -> Tensor:
    return torch.ones_like(values)


def _celu_slope(values: Tensor, alpha: float) -> Tensor:
    slope: Tensor = aten.elu_backward(_ones(values), alpha, 1, 1 / alpha, False, values)
    return slope


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # the constants of its definition


_SLOPES: dict[str, Callable[[Operation, Tensor], Tensor]] = {
    "leaky_relu": lambda op, x: aten.leaky_relu_backward(_ones(x), x, op.argument(1, "negative_slope", 0.01), False),
    "elu": lambda op, x: aten.elu_backward(
        _ones(x),
        op.argument(1, "alpha", 1),
        op.argument(2, "scale", 1),
        op.argument(3, "input_scale", 1),
        False,
        x,
    ),
    "celu": lambda op, x: _celu_slope(x, op.argument(1, "alpha", 1.0)),
    "selu": lambda _, x: aten.elu_backward(_ones(x), _SELU_ALPHA, _SELU_SCALE, 1, False, x),
    "silu": lambda _, x: aten.silu_backward(_ones(x), x),
    "gelu": lambda op, x: aten.gelu_backward(_ones(x), x, approximate=op.argument(1, "approximate", "none")),
    "mish": lambda _, x: aten.mish_backward(_ones(x), x),
    "hardswish": lambda _, x: aten.hardswish_backward(_ones(x), x),
    "hardsigmoid": lambda _, x: aten.hardsigmoid_backward(_ones(x), x),
    "softplus": lambda op, x: aten.softplus_backward(
        _ones(x), x, op.argument(1, "beta", 1), op.argument(2, "threshold", 20)
    ),
    "sigmoid": lambda _, x: aten.sigmoid_backward(_ones(x), torch.sigmoid(x)),
    "tanh": lambda _, x: aten.tanh_backward(_ones(x), torch.tanh(x)),
    "_prelu_kernel": lambda op, x: torch.where(x > 0, torch.ones_like(x), op.args[1].to(x.dtype)),
    "neg": lambda _, x: -_ones(x),
    "abs": lambda _, x: x.sign(),
    "exp": lambda _, x: x.exp(),
}


for _name, _derivative in _SLOPES.items():
    rule(*overloads(_name, f"{_name}_"))(_slope(_derivative))


def _clamp_slope_at_bounds() -> bool:
    """Whether this version of PyTorch lets gradients pass where a value equals the bound that clamps it."""
    with torch.inference_mode(False), torch.enable_grad():
        value = torch.ones(1, requires_grad=True)
        (slope,) = torch.autograd.grad(value.clamp(min=1.0).sum(), value)
    return bool(slope)


_PASSES_AT_BOUNDS = _clamp_slope_at_bounds()


@rule(*overloads("clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_"))
def clamp(operation: Operation) -> Any:
    """Clamping by numbers: alive between the bounds; at the bounds as this version of PyTorch has it."""
    name = operation.func.overloadpacket.__name__
    flow = operation.flow()
    low = None if "max" in name else operation.argument(1, "min")
    high = operation.argument(1, "max") if "max" in name else operation.argument(2, "max")
    if not flow.terms:
        return without_rule(operation)
    flow = settled(flow, operation.input)
    values = operation.input
    inside = torch.ones_like(values, dtype=torch.bool)
    if low is not None:
        inside &= values >= low if _PASSES_AT_BOUNDS else values > low
    if high is not None:
        inside &= values <= high if _PASSES_AT_BOUNDS else values < high
    return operation.emit(operation.run(), times(flow, flow.view(inside)))
