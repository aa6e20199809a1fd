"""Pooling: positions are chosen, or averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attackroute.tracing.flow import Flow, Term, Windows, mapped, settled
from attackroute.tracing.rules.operation import Operation, aten, overloads, rule, without_rule


def _pair(value: Sequence[int] | int) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])


def _is_image(flow: Flow) -> bool:
    return bool(flow.terms) and not flow.flat and len(flow.spatial) == 2


@rule(*overloads("max_pool2d_with_indices"))
def max_pool(operation: Operation) -> Any:
    """Max pooling: each output has one winner; where windows overlap, a winner may have several outputs."""
    flow = operation.flow()
    if not _is_image(flow):
        return without_rule(operation)
    kernel = _pair(operation.args[1])
    stride = _pair(operation.argument(2, "stride", ()) or kernel)
    dilation = _pair(operation.argument(4, "dilation", 1))
    extent = tuple(step * (size - 1) + 1 for size, step in zip(kernel, dilation, strict=True))
    reach = (math.ceil(extent[0] / stride[0]), math.ceil(extent[1] / stride[1]))
    output, winners = operation.run()
    return operation.emit(output, _pooled(flow, output, winners, reach, operation.ledger.move())), winners


@rule(*overloads("adaptive_max_pool2d"))
def adaptive_max_pool(operation: Operation) -> Any:
    """Adaptive max pooling onto a grid that divides the input evenly."""
    flow = operation.flow()
    size = _pair(operation.args[1])
    if not _is_image(flow) or any(whole % part for whole, part in zip(flow.spatial, size, strict=True)):
        return without_rule(operation)
    output, winners = operation.run()
    return operation.emit(output, _pooled(flow, output, winners, (1, 1), operation.ledger.move())), winners


def _pooled(flow: Flow, output: Tensor, winners: Tensor, reach: tuple[int, int], move: int) -> Flow:
    overlapping = max(reach) > 1
    windows = Windows.of(winners, reach) if overlapping else None

    def pool(term: Term) -> Term:
        chosen = winners[:, term.dst : term.dst + term.length]
        mask = term.mask
        if isinstance(mask, Tensor):  # a lazy mask stays right: an output is alive where its winner is
            whole = mask.expand(chosen.shape[0], term.length, *flow.spatial)
            mask = whole.flatten(2).gather(2, chosen.flatten(2)).view(chosen.shape)
        path = term.path.moved(("pool", move), many=overlapping)
        if windows is not None and not term.path.many:
            path = replace(path, windows=windows.channels(slice(term.dst, term.dst + term.length)))
        return replace(term, mask=mask, path=path)

    return mapped(flow, pool, tuple(output.shape[1:]))


def _averaged(flow: Flow, values: Tensor, pool: Callable[[Tensor], Tensor], move: int, *, many: bool) -> Flow:
    """Flow behind an average with non-negative weights, ``pool``: absolute derivatives of the inputs are pooled.

    Where one input reached several of the positions that are now pooled together, absolute values add only if their
    signs agree: 0/1 masks do, other masks make the source opaque.
    """
    flow = settled(flow, values)

    def average(term: Term) -> Term | None:
        mask = term.mask
        if mask is None:
            mask = values.new_ones((1, 1, *flow.spatial))
        if mask.dtype != torch.bool and term.path.many:  # type: ignore[union-attr]
            return None
        pooled = pool(mask.to(values.dtype).abs().expand(-1, -1, *flow.spatial))  # type: ignore[union-attr]
        path = term.path.moved(("average", move), summed=True, many=many)
        if math.prod(pooled.shape[2:]) == 1:
            path = replace(path, many=False)
        return replace(term, mask=pooled, path=path)

    averaged = mapped(flow, average)
    probe = pool(values.new_ones((1, 1, *flow.spatial)))
    return replace(averaged, shape=(flow.shape[0], *probe.shape[2:]))


@rule(*overloads("avg_pool2d"))
def avg_pool(operation: Operation) -> Any:
    """Average pooling."""
    flow = operation.flow()
    if not _is_image(flow):
        return without_rule(operation)
    values, rest = operation.input, operation.args[1:]
    kernel = _pair(rest[0])
    stride = _pair(operation.argument(2, "stride", ()) or kernel)
    many = kernel[0] > stride[0] or kernel[1] > stride[1]
    result = _averaged(
        flow, values, lambda map_: aten.avg_pool2d(map_, *rest, **operation.kwargs), operation.ledger.move(), many=many
    )
    return operation.emit(operation.run(), result)


@rule(*overloads("_adaptive_avg_pool2d"))
def adaptive_avg_pool(operation: Operation) -> Any:
    """Adaptive average pooling; cells of an uneven grid overlap."""
    flow = operation.flow()
    if not _is_image(flow):
        return without_rule(operation)
    size = _pair(operation.args[1])
    many = any(whole % part for whole, part in zip(flow.spatial, size, strict=True))
    pool = lambda map_: aten._adaptive_avg_pool2d(map_, list(size))  # noqa: E731
    result = _averaged(flow, operation.input, pool, operation.ledger.move(), many=many)
    return operation.emit(operation.run(), result)


def _without_positions(term: Term) -> Term:
    mask = term.mask
    return replace(term, mask=mask.reshape(mask.shape[:2])) if isinstance(mask, Tensor) else term


@rule(*overloads("mean.dim", "sum.dim_IntList"))
def mean(operation: Operation) -> Any:
    """Mean or sum over all positions."""
    flow = operation.flow()
    values = operation.input
    dims = operation.argument(1, "dim") or []
    keep = operation.argument(2, "keepdim", False)
    positions = tuple(range(2, values.ndim))
    if not flow.terms or flow.flat or not positions or tuple(sorted(dim % values.ndim for dim in dims)) != positions:
        return without_rule(operation)
    reduce = torch.mean if "mean" in operation.func.overloadpacket.__name__ else torch.sum
    pool = lambda map_: reduce(map_, dim=positions, keepdim=True)  # noqa: E731
    result = _averaged(flow, values, pool, operation.ledger.move(), many=False)
    if not keep:
        result = replace(mapped(result, _without_positions), shape=result.shape[:1])
    return operation.emit(operation.run(), result)
