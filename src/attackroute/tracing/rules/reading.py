"""What rules for trails read: an operation, its operands' trails; and the registry of these rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attackroute.tracing.rules.operation import Operation, overloads
from attackroute.tracing.trails import UNTOUCHED, Trail

SUMS = frozenset({"add", "add_", "sub", "sub_"})
PRODUCTS = frozenset({"mul", "mul_", "div", "div_"})
FILLS = frozenset({"masked_fill", "masked_fill_"})
COPIES = frozenset({"clone", "_to_copy", "alias", "contiguous", "lift_fresh"})

TrailRule = Callable[["Reading", Any], Sequence[Trail]]
TRAIL_RULES: dict[Any, TrailRule] = {}


@dataclass(frozen=True)
class Reading:
    """An operation and the trails of its operands, by the operand's id, as they were before it ran."""

    operation: Operation
    trails: Mapping[int, Trail]

    def trail(self, value: object) -> Trail:
        """The trail of an operand, or of a number."""
        return self.trails.get(id(value), UNTOUCHED)

    @property
    def name(self) -> str:
        """The operation's name, without the overload."""
        return str(self.operation.func.overloadpacket.__name__)

    @property
    def first(self) -> Trail:
        """The trail of the first argument."""
        return self.trail(self.operation.args[0])

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """A positional or keyword argument."""
        return self.operation.argument(index, name, default)


def trail_rule(*names: str) -> Callable[[TrailRule], TrailRule]:
    """Register how operations of these names, all overloads or one, take on trails."""

    def register(function: TrailRule) -> TrailRule:
        for name in names:
            packet = getattr(torch.ops.aten, name.partition(".")[0], None)
            every = [] if packet is None else [f"{name}.{overload}" for overload in packet.overloads()]
            TRAIL_RULES.update(dict.fromkeys(overloads(*([name] if "." in name else every)), function))
        return function

    return register
