"""Interleaved repeats, and the ratios of pairs of them.

A machine that is shared slows down and speeds up; runs that follow each other at once meet the same machine. So the
candidates take turns (A B A B ...), a ratio is taken within each turn, and the median over the turns is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

SECONDS, BYTES = "s", "bytes"


@dataclass(frozen=True)
class Spread:
    """A quantity's values over the repeats, in order.

    Attributes:
        values: At least one.
    """

    values: tuple[float, ...]

    def __truediv__(self, other: Spread) -> Spread:
        """Ratios of runs that took place in the same turn."""
        return Spread(tuple(top / bottom for top, bottom in zip(self.values, other.values, strict=True)))

    def __sub__(self, other: Spread) -> Spread:
        """Differences of runs that took place in the same turn."""
        return Spread(tuple(one - two for one, two in zip(self.values, other.values, strict=True)))

    def times(self, factor: float) -> Spread:
        """All values multiplied."""
        return Spread(tuple(factor * value for value in self.values))

    @property
    def median(self) -> float:
        """The middle value; of an even number, the mean of the middle two."""
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest value."""
        return max(self.values)


@dataclass(frozen=True)
class Measurement:
    """A quantity of one case.

    Attributes:
        case: Name of the case.
        quantity: What was measured; ``"trace / forward"`` is a ratio of two runs in the same turn.
        spread: Its values.
        unit: :data:`SECONDS`, :data:`BYTES`, or empty for a ratio or a count.
        bound: What is to be kept, in words; empty where nothing was set.
    """

    case: str
    quantity: str
    spread: Spread
    unit: str = ""
    bound: str = ""

    def record(self) -> dict[str, Any]:
        """A row of a tidy table, every repeat included."""
        return {
            "case": self.case, "quantity": self.quantity, "median": self.spread.median, "lowest": self.spread.low,
            "highest": self.spread.high, "unit": self.unit, "bound": self.bound, "values": list(self.spread.values),
        }  # fmt: skip

    def cells(self) -> list[str]:
        """A row for the screen: case, quantity, median, range, bound."""
        factor, unit, digits = 1.0, "", 2
        if self.unit == SECONDS:
            factor, unit, digits = (1.0, " s", 0) if self.spread.median >= 10 else (1e3, " ms", 1)
        elif self.unit == BYTES:
            factor, unit, digits = (1e-6, " MB", 0) if self.spread.median >= 1e6 else (1.0, " bytes", 0)
        median, low, high = (
            _digits(factor * value, digits) for value in (self.spread.median, self.spread.low, self.spread.high)
        )
        return [self.case, self.quantity, f"{median}{unit}", f"{low} to {high}", self.bound]


def _digits(value: float, digits: int) -> str:
    """With so many digits behind the point, or as many as show three figures of a small number."""
    if value and abs(value) < 10**-digits:
        return f"{value:.3g}"
    return f"{value:,.{0 if abs(value) >= 1000 else digits}f}"


@dataclass(frozen=True)
class Stopclock:
    """A clock for work that may be done elsewhere.

    Attributes:
        clock: Gives seconds.
        finish: Waits until the work that was handed to the device is done.
    """

    clock: Callable[[], float] = time.perf_counter
    finish: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, device: torch.device) -> Stopclock:
        """The clock for work on this device."""
        if device.type == "cpu":
            return cls()
        return cls(finish=lambda: torch.accelerator.synchronize(device))

    def seconds(self, action: Callable[[], object]) -> float:
        """How long the action takes."""
        self.finish()
        started = self.clock()
        action()
        self.finish()
        return self.clock() - started

    def interleaved(
        self, actions: Mapping[str, Callable[[], object]], repeats: int, advance: Callable[[], None] = lambda: None
    ) -> dict[str, Spread]:
        """Time actions in turn; see :func:`interleaved`."""
        return interleaved(
            {name: lambda action=action: self.seconds(action) for name, action in actions.items()},  # type: ignore[misc]
            repeats,
            advance,
        )


def interleaved(
    measurements: Mapping[str, Callable[[], float]], repeats: int, advance: Callable[[], None] = lambda: None
) -> dict[str, Spread]:
    """Run every measurement once for warming up, then all of them in turn, ``repeats`` times.

    Args:
        measurements: By name; each measures once when it is called.
        repeats: Turns that count.
        advance: Called after every turn, the one for warming up included.
    """
    turns: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        turns.append({name: measure() for name, measure in measurements.items()})
        advance()
    return {name: Spread(tuple(turn[name] for turn in turns[1:])) for name in measurements}


@contextmanager
def in_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use this many threads meanwhile; None leaves the number as it is."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
