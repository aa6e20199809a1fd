"""One ATen call under way, the registry of rules, and what happens to an operation without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from attackroute.tracing.flow import Flow, opaque

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
    def input(self) -> Tensor:
        """The first argument."""
        tensor: Tensor = self.args[0]
        return tensor


Rule = Callable[[Operation], Any]


RULES: dict[Any, Rule] = {}


def rule(*overloads: Any) -> Callable[[Rule], Rule]:
    """Register a rule for the given operations."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(overloads, function))
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
    tensors = [value for value in tensors_in((operation.args, tuple(operation.kwargs.values())))]
    sources = frozenset[int]().union(*(operation.ledger.flow(tensor).sources for tensor in tensors))
    output = operation.run()
    if sources:
        for tensor in tensors_in(output):
            if tensor.is_floating_point() or tensor.is_complex():
                written = any(tensor is value for value in tensors)
                operation.ledger.record(tensor, opaque(sources), written=written)
    return output


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []
