"""Operations that change no value: copies, and the end of a gradient."""

from __future__ import annotations

from typing import Any

from attackroute.tracing.flow import EMPTY
from attackroute.tracing.rules.operation import Operation, overloads, rule, without_rule


@rule(*overloads("clone", "_to_copy", "alias", "lift_fresh", "contiguous"))
def identity(operation: Operation) -> Any:
    """Copies: same values, same flow."""
    output = operation.run()
    return operation.emit(output, operation.flow() if output.is_floating_point() else EMPTY)


@rule(*overloads("as_strided_"))
def restride(operation: Operation) -> Any:
    """``as_strided_`` that only renames the strides of dimensions of size 1, as pooling to one position does."""
    values = operation.input
    size, stride, offset = operation.args[1], operation.args[2], operation.argument(3, "storage_offset")
    same = all(
        length == 1 or old == new for length, old, new in zip(values.shape, values.stride(), stride, strict=False)
    )
    if tuple(size) != tuple(values.shape) or not same or offset not in (None, values.storage_offset()):
        return without_rule(operation)
    flow = operation.flow()
    return operation.emit(operation.run(), flow)


@rule(*overloads("copy_"))
def copy(operation: Operation) -> Any:
    """``copy_``: the target takes the source's flow if the shapes agree."""
    if operation.input.shape != operation.args[1].shape:
        return without_rule(operation)
    return operation.emit(operation.run(), operation.flow(1))


@rule(
    *overloads("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full")
)
def constant(operation: Operation) -> Any:
    """New tensors that take a shape from another one, and no value."""
    return operation.run()


@rule(*overloads("detach"))
def detach(operation: Operation) -> Any:
    """Gradients stop here."""
    return operation.emit(operation.run(), EMPTY)
