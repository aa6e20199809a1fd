"""Interleaved repeats, and the ratios of pairs of them.

A machine that is shared slows down and speeds up; runs that follow each other at once meet the same machine. So the
candidates take turns (A B A B ...), a ratio is taken within each turn, and the median over the turns is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Clock = Callable[[], float]
Parts = Mapping[str, float]
"""Seconds of one run, by part."""


@dataclass(frozen=True)
class Spread:
    """A quantity's values over the repeats, in order.

    Attributes:
        values: At least one.
    """

    values: tuple[float, ...]

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """Ratios of runs that took place in the same turn."""
        return cls(tuple(top / bottom for top, bottom in zip(numerators, denominators, strict=True)))

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

    def to_json(self) -> dict[str, Any]:
        """Median, extremes and every value."""
        return {"median": self.median, "min": self.low, "max": self.high, "values": list(self.values)}


@dataclass(frozen=True)
class Runs:
    """The repeats of one measurement.

    Attributes:
        parts: Seconds by part, one entry a repeat.
    """

    parts: tuple[Parts, ...]

    @property
    def totals(self) -> tuple[float, ...]:
        """Seconds of each repeat."""
        return tuple(sum(part.values()) for part in self.parts)

    def of(self, name: str) -> tuple[float, ...]:
        """Seconds of one part in each repeat; 0 where it did not occur."""
        return tuple(part.get(name, 0.0) for part in self.parts)


@dataclass(frozen=True)
class Stopclock:
    """A clock for work that may be done elsewhere.

    Attributes:
        clock: Gives seconds.
        finish: Waits until the work that was handed to the device is done.
    """

    clock: Clock = time.perf_counter
    finish: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, device: torch.device) -> Stopclock:
        """The clock for work on this device."""
        if device.type == "cpu":
            return cls()
        return cls(finish=lambda: torch.accelerator.synchronize(device))

    def read(self) -> float:
        """The time at which all work so far is done."""
        self.finish()
        return self.clock()

    def seconds(self, action: Callable[[], object]) -> float:
        """How long the action takes."""
        started = self.read()
        action()
        return self.read() - started

    def whole(self, action: Callable[[], object]) -> Callable[[], Parts]:
        """A measurement of the action with a single part."""
        return lambda: {"all": self.seconds(action)}


def interleaved(
    measurements: Mapping[str, Callable[[], Parts]], repeats: int, advance: Callable[[], None] = lambda: None
) -> dict[str, Runs]:
    """Run every measurement once for warming up, then all of them in turn, ``repeats`` times.

    Args:
        measurements: By name; each runs once when it is called.
        repeats: Turns that count.
        advance: Called after every turn, the one for warming up included.
    """
    turns: list[dict[str, Parts]] = []
    for _ in range(repeats + 1):
        turns.append({name: measure() for name, measure in measurements.items()})
        advance()
    return {name: Runs(tuple(turn[name] for turn in turns[1:])) for name in measurements}


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
