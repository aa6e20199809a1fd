"""Turns and what is exchanged between them, with threads in place of processes and a clock that the turns move."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from attackroute.core import distributed
from attackroute.core.distributed import END, NOTHING, VALUE, Share, Turn, in_turns, turns_of
from attackroute.core.errors import UserError

Work = Callable[[int], Any]
Seconds = Callable[[int], float]


@dataclass
class Meeting:
    """Where the threads meet, and what each of them brought at every exchange."""

    count: int
    held: list[Any] = field(init=False)
    shares: list[list[Share]] = field(default_factory=list)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.held = [None] * self.count
        self.barrier = threading.Barrier(self.count, action=lambda: self.shares.append(list(self.held)), timeout=20)

    @property
    def turns(self) -> list[list[int]]:
        """Turns of every process, one entry an exchange."""
        return [[len(share.outcomes) for share in shares] for shares in self.shares]


@dataclass(frozen=True)
class Member:
    """Stands in for :class:`attackroute.processes.Processes`."""

    rank: int
    meeting: Meeting

    @property
    def count(self) -> int:
        return self.meeting.count

    def all(self, value: Any) -> list[Any]:
        self.meeting.held[self.rank] = value
        self.meeting.barrier.wait()
        return list(self.meeting.shares[-1])


@dataclass
class Seen:
    """What one process was given and did."""

    values: list[Any] = field(default_factory=list)
    error: Exception | None = None
    worked: list[int] = field(default_factory=list)
    asked: int = 0


@dataclass
class Clock:
    """A clock for each thread, which only work moves."""

    times: dict[int, float] = field(default_factory=dict)

    def perf_counter(self) -> float:
        return self.times.get(threading.get_ident(), 0.0)

    def move(self, seconds: float) -> None:
        self.times[threading.get_ident()] = self.perf_counter() + seconds


@pytest.fixture
def share_out(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Seen], Meeting]]:
    clock = Clock()
    monkeypatch.setattr(distributed, "time", SimpleNamespace(perf_counter=clock.perf_counter))

    def run(
        count: int, batches: int, seconds: Seconds = lambda _: 0.0, work: Work = lambda batch: batch
    ) -> tuple[list[Seen], Meeting]:
        """Let ``count`` threads share the work on ``batches`` batches; one in ten holds nothing."""
        meeting = Meeting(count)
        seen = [Seen() for _ in range(count)]

        def member(rank: int) -> None:
            mine = iter(range(rank, batches, count))

            def take() -> Turn:
                seen[rank].asked += 1
                batch = next(mine, None)
                if batch is None:
                    return END, None
                seen[rank].worked.append(batch)
                clock.move(seconds(batch))
                return (NOTHING, None) if batch % 10 == 9 else (VALUE, work(batch))

            try:
                for value in in_turns(Member(rank, meeting), take):  # type: ignore[arg-type]
                    seen[rank].values.append(value)
            except Exception as error:
                seen[rank].error = error

        threads = [threading.Thread(target=member, args=(rank,)) for rank in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
            assert not thread.is_alive()
        return seen, meeting

    return run


PACES: dict[str, Seconds] = {
    "no time": lambda _: 0.0,
    "a second": lambda _: 1.0,
    "slower than the period": lambda _: 30.0,
    "one process slower": lambda batch: 2.4 if batch % 3 == 1 else 0.3,
    "suddenly slow": lambda batch: 0.0 if batch < 50 else 7.0,
    "slow here and there": lambda batch: 11.0 if batch % 7 == 3 else 0.2,
}


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("count", [2, 3])
def test_all_get_every_value_once_and_in_order(share_out: Any, count: int, pace: str) -> None:
    for batches in (0, 1, 2, 3, 5, 29, 30, 31, 211):
        seen, _ = share_out(count, batches, PACES[pace])
        for rank, own in enumerate(seen):
            assert own.error is None
            assert own.values == [batch for batch in range(batches) if batch % 10 != 9], (batches, rank)
            assert own.worked == list(range(rank, batches, count))


def test_the_slowest_process_decides_how_many_turns_lie_between_exchanges(share_out: Any) -> None:
    def pace(batch: int) -> float:
        return 1.6 if batch % 2 else 0.1

    whole = [[1, 1], [3, 3], [3, 3], [3, 3]]
    for batches, last in ((24, [3, 3]), (25, [3, 3]), (22, [2, 2]), (21, [2, 1])):  # the end is a turn
        seen, meeting = share_out(2, batches, pace)
        assert meeting.turns == [*whole, last], batches
        for rank, own in enumerate(seen):
            assert own.asked <= len(own.worked) + 1, rank  # none goes on after the end


def test_hand_worked_numbers_of_turns() -> None:
    one = b"outcome"
    assert turns_of([Share((one,), 1.6), Share((one, one), 0.2)]) == 3
    assert turns_of([Share((one, one), 3.2), Share((), 0.0)]) == 3
    assert turns_of([Share((one,), 5.0)]) == turns_of([Share((one,), 700.0)]) == 1
    assert turns_of([Share((one,), 2.5)]) == 2
    assert turns_of([Share((one,), 0.0)]) == turns_of([Share((one,) * 10, 0.01)]) == 64


def test_a_batch_that_takes_longer_than_the_period_is_exchanged_at_once(share_out: Any) -> None:
    _, meeting = share_out(2, 8, lambda _: 30.0)
    assert meeting.turns == [[1, 1]] * 5


def test_turns_that_become_slow_are_exchanged_before_all_are_done(share_out: Any) -> None:
    """Process 1 becomes slow among 64 turns: it breaks off, and the other one does not run further ahead."""
    seen, meeting = share_out(2, 200, lambda batch: 60.0 if batch in (9, 11, 13) else 0.0)
    assert meeting.turns[:6] == [[1, 1], [64, 4], [0, 1], [0, 1], [0, 1], [7, 64]]
    assert [own.values for own in seen] == [[batch for batch in range(200) if batch % 10 != 9]] * 2


def test_large_values_are_exchanged_sooner(share_out: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_MOST_BYTES", 10_000)
    seen, meeting = share_out(2, 30, work=lambda batch: bytes(4_000) + bytes([batch]))
    assert max(map(max, meeting.turns)) == 4  # of which one may hold nothing
    assert [value[-1] for value in seen[1].values] == [batch for batch in range(30) if batch % 10 != 9]


@pytest.mark.parametrize("broken", [0, 1, 2, 40, 41, 61])
@pytest.mark.parametrize("count", [2, 3])
def test_an_error_comes_after_the_values_before_it(share_out: Any, count: int, broken: int) -> None:
    def work(batch: int) -> int:
        if batch == broken:
            raise UserError(f"batch {batch} is broken")
        return batch

    seen, meeting = share_out(count, 62, work=work)
    for own in seen:
        assert str(own.error) == f"batch {broken} is broken"
        assert own.values == [batch for batch in range(broken) if batch % 10 != 9]
    assert seen[broken % count].worked[-1] == broken  # it did no more
    assert len(meeting.shares) == (1 if broken < count else 2)


def test_the_first_of_two_errors_counts_wherever_it_happened_first(share_out: Any) -> None:
    def work(batch: int) -> int:
        if batch in (7, 20):
            raise UserError(f"batch {batch} is broken")
        return batch

    seen, _ = share_out(2, 62, lambda batch: 60.0 if batch == 5 else 0.0, work)  # 7 is met an exchange after 20
    assert {str(own.error) for own in seen} == {"batch 7 is broken"}
    assert [own.values for own in seen] == [list(range(7))] * 2
