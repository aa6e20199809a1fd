"""Work that processes do in turns: each does some of its turns, then all of them get what every one has found.

To exchange after every turn would cost every turn the time of the slowest process. So as many turns are done between
two exchanges as take a few seconds. What is found comes in one order whatever that number: the first turn of process 0,
of process 1, ..., the second turn of process 0, and so on.
"""

from __future__ import annotations

import pickle
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from attackroute.processes import Outcome, Processes, attempted, unwrapped

PERIOD = 5.0
"""Seconds between exchanges; progress is seen, and a kill loses work, by this measure."""

_OVERDUE = 2 * PERIOD  # turns that suddenly take longer are not waited for, nor those of a process that is slower
_MOST_TURNS = 64  # of one process
_MOST_BYTES = 1 << 26  # of one process, held by all of them at once

Turn = tuple[str, Any]
END, NOTHING, VALUE = "end", "nothing", "value"
"""What a turn came to: there was nothing left, there was nothing in it, or a value."""


@dataclass(frozen=True)
class Share:
    """What a process adds to an exchange.

    Attributes:
        outcomes: Of its turns since the last one, in order, each pickled.
        seconds: How long they took.
    """

    outcomes: tuple[bytes, ...]
    seconds: float


def in_turns(team: Processes, take: Callable[[], Turn]) -> Iterator[Any]:
    """Values of the turns of all processes, in order, until there is nothing left.

    Args:
        team: The processes; each of them must ask at the same point.
        take: Does this process's next turn. Its value is pickled.

    Raises:
        Exception: What ``take`` raises in any process is raised in all, after the values of the turns before.
        LostProcessError: A process is gone.
    """
    own = _OwnTurns(take)
    waiting: list[deque[bytes]] = [deque() for _ in range(team.count)]
    passed, turns = 0, 1
    while True:
        # counted from the first turn that is not known: whoever broke off catches up
        shares = team.all(own.until(passed // team.count + turns))
        for queue, share in zip(waiting, shares, strict=True):
            queue.extend(share.outcomes)
        turns = turns_of(shares)
        while queue := waiting[passed % team.count]:
            outcome: Outcome = pickle.loads(queue.popleft())
            passed += 1
            kind, value = unwrapped(outcome)
            if kind == END:
                return
            if kind == VALUE:
                yield value


def turns_of(shares: Sequence[Share]) -> int:
    """How many turns each process is to do before the next exchange, by the slowest one's time."""
    slowest = max(share.seconds / len(share.outcomes) for share in shares if share.outcomes)
    return int(max(1, min(_MOST_TURNS, PERIOD / max(slowest, 1e-9))))


class _OwnTurns:
    """The turns of this process."""

    def __init__(self, take: Callable[[], Turn]) -> None:
        self._take = take
        self._done = 0
        self._over = False  # at the end, or after an error

    def until(self, stop: int) -> Share:
        """Do all turns before number ``stop``, or fewer where they take far too long or find too much."""
        outcomes: list[bytes] = []
        size, started, seconds = 0, time.perf_counter(), 0.0
        while self._done < stop and not self._over and seconds < _OVERDUE and size < _MOST_BYTES:
            outcome = attempted(self._take)
            self._over = outcome.error is not None or outcome.value[0] == END
            outcomes.append(pickle.dumps(outcome))
            self._done += 1
            size += len(outcomes[-1])
            seconds = time.perf_counter() - started
        return Share(tuple(outcomes), seconds)
