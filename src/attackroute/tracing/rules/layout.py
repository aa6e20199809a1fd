"""Layout: channels and positions are joined, cut, padded and renamed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from attackroute.tracing.flow import EMPTY, Flow, Term, mapped, opaque, settled
from attackroute.tracing.rules.copies import identity
from attackroute.tracing.rules.operation import Operation, overloads, rule, without_rule


@rule(*overloads("cat"))
def cat(operation: Operation) -> Any:
    """Concatenation of channels."""
    tensors = operation.args[0]
    dim = operation.argument(1, "dim", 0)
    flows = [operation.ledger.flow(tensor) for tensor in tensors]
    known = next((flow for flow in flows if flow.terms), None)
    usable = known is not None and dim % tensors[0].ndim == 1 and not known.flat
    usable = usable and all(flow is EMPTY or (flow.terms and not flow.flat) for flow in flows)
    if known is None or not usable:
        return without_rule(operation)
    output = operation.run()
    terms, lost, start = list[Term](), set[int](), 0
    for tensor, flow in zip(tensors, flows, strict=True):
        terms += [replace(term, dst=term.dst + start) for term in flow.terms]
        lost |= flow.opaque
        start += tensor.shape[1]
    return operation.emit(output, Flow(tuple(output.shape[1:]), tuple(terms), frozenset(lost)))


@rule(*overloads("split.Tensor", "split_with_sizes", "chunk"))
def split(operation: Operation) -> Any:
    """Splitting channels."""
    flow = operation.flow()
    dim = operation.argument(2, "dim", 0) % operation.input.ndim
    if not flow.terms or flow.flat or dim != 1:
        return without_rule(operation)
    outputs, start = operation.run(), 0
    for output in outputs:
        operation.ledger.record(output, _channels(flow, start, start + output.shape[1]))
        start += output.shape[1]
    return outputs


def _channels(flow: Flow, start: int, stop: int) -> Flow:
    parts = [part for term in flow.terms if (part := term.channels(start, stop)) is not None]
    return Flow((stop - start, *flow.spatial), tuple(parts), flow.opaque)


@rule(*overloads("slice.Tensor"))
def slice_(operation: Operation) -> Any:
    """Slicing channels or positions."""
    flow = operation.flow()
    size = operation.input.shape
    dim = operation.argument(1, "dim", 0) % len(size)
    cut = slice(operation.argument(2, "start"), operation.argument(3, "end"), operation.argument(4, "step", 1))
    first, last, step = cut.indices(size[dim])
    if not flow.terms:
        return without_rule(operation)
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


@rule(*overloads("constant_pad_nd"))
def pad(operation: Operation) -> Any:
    """Padding channels or positions with a constant (negative padding crops positions)."""
    flow = operation.flow()
    widths = [int(width) for width in operation.args[1]]
    positions, channels = widths[: 2 * len(flow.spatial)], widths[2 * len(flow.spatial) :]
    if not flow.terms or flow.flat or len(channels) > 2 or min(channels, default=0) < 0:
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


@rule(*overloads("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze.dim", "squeeze.dims", "flatten.using_ints"))
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
