"""Pooling: positions are chosen, or averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attackroute.tracing.flow import Flow, Term, Windows, mapped, settled
from attackroute.tracing.rules.operation import Operation, aten, flow_rule, without_rule


def _pair(value: Sequence[int] | int) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])


def _is_image(flow: Flow) -> bool:
    return not flow.flat and len(flow.spatial) == 2


@flow_rule("max_pool2d_with_indices")
def max_pool(operation: Operation, flow: Flow) -> Any:
    """Max pooling: each output has one winner; where windows overlap, a winner may have several outputs."""
    if not _is_image(flow):
        return without_rule(operation)
    kernel = _pair(operation.args[1])
    stride = _pair(operation.argument(2, "stride", ()) or kernel)
    dilation = _pair(operation.argument(4, "dilation", 1))
    extent = tuple(step * (size - 1) + 1 for size, step in zip(kernel, dilation, strict=True))
    return _pooled(operation, flow, (math.ceil(extent[0] / stride[0]), math.ceil(extent[1] / stride[1])))


@flow_rule("adaptive_max_pool2d")
def adaptive_max_pool(operation: Operation, flow: Flow) -> Any:
    """Adaptive max pooling onto a grid that divides the input evenly."""
    size = _pair(operation.args[1])
    if not _is_image(flow) or any(whole % cells for whole, cells in zip(flow.spatial, size, strict=True)):
        return without_rule(operation)
    return _pooled(operation, flow, (1, 1))


def _pooled(operation: Operation, flow: Flow, reach: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Run a max pooling of which up to ``reach`` windows per axis share one input position."""
    output, winners = operation.run()
    move = operation.ledger.move()
    overlapping = max(reach) > 1
    windows = Windows.of(winners, reach) if overlapping else None

    def pool(term: Term) -> Term:
        chosen = winners[:, term.span]
        mask = term.mask
        if isinstance(mask, Tensor):  # a lazy mask stays right: an output is alive where its winner is
            whole = mask.expand(chosen.shape[0], term.length, *flow.spatial)
            mask = whole.flatten(2).gather(2, chosen.flatten(2)).view(chosen.shape)
        path = term.path.moved(("pool", move), many=overlapping)
        if windows is not None and not term.path.many:
            path = replace(path, windows=windows.channels(term.span))
        return replace(term, mask=mask, path=path)

    return operation.emit(output, mapped(flow, pool, tuple(output.shape[1:]))), winners


def _averaged(operation: Operation, flow: Flow, pool: Callable[[Tensor], Tensor], *, many: bool) -> Tensor:
    """Run an average with non-negative weights, ``pool``: absolute derivatives of the inputs are pooled.

    Where one input reached several of the positions that are now pooled together, absolute values add only if their
    signs agree: 0/1 masks do, other masks make the source opaque.
    """
    values, move, output = operation.input, operation.ledger.move(), operation.run()
    size = math.prod(output.shape[2:])

    def average(term: Term) -> Term | None:
        mask = term.mask
        if mask is None:
            mask = values.new_ones((1, 1, *flow.spatial))
        if mask.dtype != torch.bool and term.path.many:  # type: ignore[union-attr]
            return None
        pooled = pool(mask.to(values.dtype).abs().expand(-1, -1, *flow.spatial))  # type: ignore[union-attr]
        path = term.path.moved(("average", move), summed=True, many=many)
        mask = pooled.flatten(1) if output.ndim == 2 else pooled
        return replace(term, mask=mask, path=replace(path, many=path.many and size > 1))

    return operation.emit(output, mapped(settled(flow, values), average, tuple(output.shape[1:])))


@flow_rule("avg_pool2d")
def avg_pool(operation: Operation, flow: Flow) -> Any:
    """Average pooling."""
    if not _is_image(flow):
        return without_rule(operation)
    kernel = _pair(operation.args[1])
    stride = _pair(operation.argument(2, "stride", ()) or kernel)
    many = kernel[0] > stride[0] or kernel[1] > stride[1]
    pool = lambda map_: aten.avg_pool2d(map_, *operation.args[1:], **operation.kwargs)  # noqa: E731
    return _averaged(operation, flow, pool, many=many)


@flow_rule("_adaptive_avg_pool2d")
def adaptive_avg_pool(operation: Operation, flow: Flow) -> Any:
    """Adaptive average pooling; cells of an uneven grid overlap."""
    if not _is_image(flow):
        return without_rule(operation)
    size = _pair(operation.args[1])
    many = any(whole % cells for whole, cells in zip(flow.spatial, size, strict=True))
    pool = lambda map_: aten._adaptive_avg_pool2d(map_, list(size))  # noqa: E731
    return _averaged(operation, flow, pool, many=many)


@flow_rule("mean.dim", "sum.dim_IntList")
def mean(operation: Operation, flow: Flow) -> Any:
    """Mean or sum over all positions."""
    ndim = operation.input.ndim
    dims = operation.argument(1, "dim") or []
    positions = tuple(range(2, ndim))
    if flow.flat or not positions or tuple(sorted(dim % ndim for dim in dims)) != positions:
        return without_rule(operation)
    reduce = torch.mean if "mean" in operation.name else torch.sum
    pool = lambda map_: reduce(map_, dim=positions, keepdim=True)  # noqa: E731
    return _averaged(operation, flow, pool, many=False)
