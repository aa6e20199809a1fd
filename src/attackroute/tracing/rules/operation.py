"""One ATen call under way, the registries of rules for flows and trails, and what an operation without one does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from attackroute.tracing.flow import Flow, opaque
from attackroute.tracing.trails import UNTOUCHED, Trail

aten = torch.ops.aten


class Ledger(Protocol):
    """Where flows are kept while the model runs."""

    samples: int

    def flow(self, tensor: object) -> Flow: ...
    def record(self, tensor: Tensor, flow: Flow, *, written: bool = False) -> None: ...
    def move(self) -> int: ...


@dataclass(frozen=True)
class Operation:
    """One ATen call under way."""

    ledger: Ledger
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        """Execute the operation."""
        return self.func(*self.args, **self.kwargs)

    def flow(self, index: int = 0) -> Flow:
        """The flow of one argument."""
        return self.ledger.flow(self.args[index])

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """A positional or keyword argument."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name, default)

    def emit(self, output: Tensor, flow: Flow) -> Tensor:
        """Record the output's flow and return it."""
        self.ledger.record(output, flow, written=output is self.args[0])
        return output

    @property
    def name(self) -> str:
        """Its name, without the overload."""
        return str(self.func.overloadpacket.__name__)

    @property
    def operands(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return tensors_in((self.args, tuple(self.kwargs.values())))

    @property
    def written(self) -> list[Tensor]:
        """The tensors that the operation changes in place, also those of a list."""
        schema = self.func._schema
        if not schema.is_mutable:
            return []
        given = zip(schema.arguments, self.args, strict=False)
        changed = [value for argument, value in given if argument.alias_info and argument.alias_info.is_write]
        return tensors_in((changed, self.kwargs.get("out", ())))

    @property
    def sources(self) -> frozenset[int]:
        """Every route layer that reaches an operand."""
        return frozenset[int]().union(*(self.ledger.flow(tensor).sources for tensor in self.operands))

    @property
    def input(self) -> Tensor:
        """The first argument."""
        tensor: Tensor = self.args[0]
        return tensor


Rule = Callable[[Operation], Any]
FlowRule = Callable[[Operation, Flow], Any]
RULES: dict[Any, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the given operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(overloads(*names), function))
        return function

    return register


def flow_rule(*names: str) -> Callable[[FlowRule], FlowRule]:
    """Register a rule that also gets the flow of the first argument, and applies only where that has terms."""

    def register(function: FlowRule) -> FlowRule:
        def applied(operation: Operation) -> Any:
            flow = operation.flow()
            return function(operation, flow) if flow.terms else without_rule(operation)

        rule(*names)(applied)
        return function

    return register


def overloads(*names: str) -> list[Any]:
    """The ATen overloads of these names that this version of PyTorch has."""
    available = []
    for name in names:
        packet, _, overload = name.partition(".")
        operation = getattr(aten, packet, None)
        if operation is not None and (overload or "default") in operation.overloads():
            available.append(getattr(operation, overload or "default"))
    return available


def without_rule(operation: Operation) -> Any:
    """Any other operation: its outputs depend on all that its inputs depend on, opaquely."""
    sources, changed = operation.sources, operation.written
    output = operation.run()
    if sources:
        for tensor in [*tensors_in(output), *changed]:
            if tensor.is_floating_point() or tensor.is_complex():
                written = any(tensor is value for value in changed)
                operation.ledger.record(tensor, opaque(sources), written=written)
    return output


def only_restrides(operation: Operation) -> bool:
    """Whether an ``as_strided_`` changes strides of dimensions of size 1 alone, as pooling to one position does."""
    values, offset = operation.input, operation.argument(3, "storage_offset")
    dims = zip(values.shape, values.stride(), operation.args[2], strict=False)
    same = tuple(operation.args[1]) == tuple(values.shape) and all(size == 1 or old == new for size, old, new in dims)
    return same and offset in (None, values.storage_offset())


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


SUMS = frozenset({"add", "add_", "sub", "sub_"})
PRODUCTS = frozenset({"mul", "mul_", "div", "div_"})
FILLS = frozenset({"masked_fill", "masked_fill_"})
COPIES = frozenset({"clone", "_to_copy", "alias", "contiguous", "lift_fresh"})

TrailRule = Callable[["Reading", Any], Sequence[Trail]]
TRAIL_RULES: dict[Any, TrailRule] = {}


@dataclass(frozen=True)
class Reading(Operation):
    """An operation and the trails of its operands, by the operand's id."""

    trails: Mapping[int, Trail]

    def trail(self, value: object) -> Trail:
        """The trail of an operand, or of a number."""
        return self.trails.get(id(value), UNTOUCHED)

    @property
    def first(self) -> Trail:
        """The trail of the first argument."""
        return self.trail(self.args[0])


def trail_rule(*names: str) -> Callable[[TrailRule], TrailRule]:
    """Register how operations of these names, all overloads or one, take on trails."""

    def register(function: TrailRule) -> TrailRule:
        for name in names:
            packet = getattr(torch.ops.aten, name.partition(".")[0], None)
            every = [] if packet is None else [f"{name}.{overload}" for overload in packet.overloads()]
            TRAIL_RULES.update(dict.fromkeys(overloads(*([name] if "." in name else every)), function))
        return function

    return register
