"""Layout: channels and positions are copied, joined, cut, padded and renamed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from attackroute.tracing.flow import EMPTY, Flow, Term, mapped, opaque, settled
from attackroute.tracing.rules.operation import Operation, flow_rule, only_restrides, rule, without_rule


@rule("clone", "_to_copy", "alias", "lift_fresh", "contiguous")
def identity(operation: Operation) -> Any:
    """Copies: same values, same flow."""
    output = operation.run()
    return operation.emit(output, operation.flow() if output.is_floating_point() else EMPTY)


@rule("as_strided_")
def restride(operation: Operation) -> Any:
    """New strides for dimensions of size 1 alone."""
    if not only_restrides(operation):
        return without_rule(operation)
    flow = operation.flow()
    return operation.emit(operation.run(), flow)


@rule("copy_")
def copy(operation: Operation) -> Any:
    """``copy_``: the target takes the source's flow if the shapes agree."""
    if operation.input.shape != operation.args[1].shape:
        return without_rule(operation)
    return operation.emit(operation.run(), operation.flow(1))


@rule("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full")
def constant(operation: Operation) -> Any:
    """New tensors that take a shape from another one, and no value."""
    return operation.run()


@rule("detach")
def detach(operation: Operation) -> Any:
    """Gradients stop here."""
    return operation.emit(operation.run(), EMPTY)


@rule("cat")
def cat(operation: Operation) -> Any:
    """Concatenation of channels."""
    tensors = operation.args[0]
    dim = operation.argument(1, "dim", 0)
    flows = [operation.ledger.flow(tensor) for tensor in tensors]
    maps = any(flow.terms for flow in flows) and all(flow is EMPTY or (flow.terms and not flow.flat) for flow in flows)
    if not maps or dim % tensors[0].ndim != 1:
        return without_rule(operation)
    output = operation.run()
    terms, lost, start = list[Term](), set[int](), 0
    for tensor, flow in zip(tensors, flows, strict=True):
        terms += [replace(term, dst=term.dst + start) for term in flow.terms]
        lost |= flow.opaque
        start += tensor.shape[1]
    return operation.emit(output, Flow(tuple(output.shape[1:]), tuple(terms), frozenset(lost)))


@flow_rule("split.Tensor", "split_with_sizes", "chunk")
def split(operation: Operation, flow: Flow) -> Any:
    """Splitting channels."""
    if flow.flat or operation.argument(2, "dim", 0) % operation.input.ndim != 1:
        return without_rule(operation)
    outputs, start = operation.run(), 0
    for output in outputs:
        operation.ledger.record(output, _channels(flow, start, start + output.shape[1]))
        start += output.shape[1]
    return outputs


def _channels(flow: Flow, start: int, stop: int) -> Flow:
    terms = (term.channels(start, stop) for term in flow.terms)
    return Flow((stop - start, *flow.spatial), tuple(term for term in terms if term is not None), flow.opaque)


@flow_rule("slice.Tensor")
def slice_(operation: Operation, flow: Flow) -> Any:
    """Slicing channels or positions."""
    size = operation.input.shape
    dim = operation.argument(1, "dim", 0) % len(size)
    cut = slice(operation.argument(2, "start"), operation.argument(3, "end"), operation.argument(4, "step", 1))
    first, last, step = cut.indices(size[dim])
    if (first, last, step) == (0, size[dim], 1):
        return identity(operation)
    if flow.flat or dim == 0 or (dim == 1 and step != 1):
        return without_rule(operation)
    output = operation.run()
    if dim == 1:
        return operation.emit(output, _channels(flow, first, max(first, last)))

    def crop(term: Term) -> Term:
        mask = term.mask
        if isinstance(mask, Tensor) and mask.shape[dim] > 1:
            mask = mask[(slice(None),) * dim + (slice(first, last, step),)]
        return replace(term, mask=mask, path=term.path.moved(("slice", dim, first, last, step)))

    return operation.emit(output, mapped(flow, crop, tuple(output.shape[1:])))


@flow_rule("constant_pad_nd")
def pad(operation: Operation, flow: Flow) -> Any:
    """Padding channels or positions with a constant (negative padding crops positions)."""
    widths = [int(width) for width in operation.args[1]]
    positions, channels = widths[: 2 * len(flow.spatial)], widths[2 * len(flow.spatial) :]
    if flow.flat or len(channels) > 2 or min(channels, default=0) < 0:
        return without_rule(operation)
    if operation.argument(2, "value", 0) != 0:
        flow = settled(flow, operation.input)

    def move(term: Term) -> Term:
        term = replace(term, dst=term.dst + (channels[0] if channels else 0))
        if not any(positions):
            return term
        mask = term.mask
        if mask is None:
            mask = torch.ones((1, 1, *flow.spatial), dtype=torch.bool, device=operation.input.device)
        if isinstance(mask, Tensor):
            mask = functional.pad(mask.expand(-1, -1, *flow.spatial), positions)
        return replace(term, mask=mask, path=term.path.moved(("pad", *positions)))

    output = operation.run()
    return operation.emit(output, mapped(flow, move, tuple(output.shape[1:])))


@rule("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze.dim", "squeeze.dims", "flatten.using_ints")
def view(operation: Operation) -> Any:
    """Reshapes that keep samples and channels apart: of the positions, or flattening for a linear map."""
    flow = operation.flow()
    output = operation.run()
    size = math.prod(flow.spatial)
    if flow.terms and output.ndim > 1 and output.shape[0] == operation.ledger.samples:
        new = tuple(output.shape[1:])
        if new == (flow.shape[0] * size,) and size > 1:
            return operation.emit(output, replace(flow, flat=True))
        if new[0] == flow.shape[0] and math.prod(new[1:]) == size:
            return operation.emit(output, _reshaped(flow, new))
    if flow.sources:
        operation.ledger.record(output, opaque(flow.sources))
    return output


def _reshaped(flow: Flow, shape: tuple[int, ...]) -> Flow:
    """``flow`` with its positions laid out anew as ``shape[1:]``, channels and order kept."""
    if shape == flow.shape:
        return replace(flow, flat=False)

    def move(term: Term) -> Term:
        mask = term.mask
        if isinstance(mask, Tensor):
            whole = mask.expand(*mask.shape[:2], *flow.spatial)
            mask = whole.reshape(*whole.shape[:2], *shape[1:])
        return replace(term, mask=mask, path=term.path.moved(("view", shape[1:])))

    return replace(mapped(flow, move, shape), flat=False)
