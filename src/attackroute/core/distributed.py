"""The processes of a job that ``torchrun`` started, and how they share what they find.

Every process runs the same program. Work on batches is divided among them (:mod:`attackroute.streams`), and whatever
one of them finds is given to all, so that all go the same way; only the first one writes files and prints.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from attackroute.core.errors import UserError
from attackroute.core.interruption import deaf_to_termination

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


WAIT = timedelta(hours=1)
"""How long a process waits for the others; one that is dead is noticed at once, so this is for one that hangs."""


_GRACE_SECONDS = 5.0


_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostProcessError(Exception):
    """Another process of the job is gone, or does not answer."""


_FAILED, _LOST, _INTERRUPTED = "failed", "lost", "interrupted"  # the words that processes leave


_WORDS: Mapping[type[BaseException], str] = {LostProcessError: _LOST, KeyboardInterrupt: _INTERRUPTED}


@dataclass(frozen=True, eq=False)
class Processes:
    """The processes of a job, seen from one of them.

    Attributes:
        rank: Number of this process, from 0.
        count: How many there are.
        local_rank: Number of this process on its machine.
        group: PyTorch's group for objects and tensors on the CPU; None for one process alone.
        store: Where processes leave word for each other; None for one process alone.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    group: Any = None
    store: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """How messages call this process."""
        return named(self.rank, self.count)

    def all(self, value: T) -> list[T]:
        """The values of all processes, by rank; every process must ask at the same point.

        Raises:
            LostProcessError: A process is gone.
        """
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        with _noticing_loss():
            dist.all_gather_object(found, value, group=self.group)
        found[self.rank] = value
        return found

    def first(self, compute: Callable[[], T]) -> T:
        """What the first process computes, for all of them; also the error that it raises.

        Raises:
            LostProcessError: A process is gone.
        """
        if self.count == 1:
            return compute()
        import torch.distributed as dist

        outcome: list[Any] = [attempted(compute) if self.leads else None]
        with _noticing_loss():
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        found: T = unwrapped(outcome[0])
        return found

    def sum_(self, values: Tensor) -> None:
        """Replace a tensor by its sum over all processes, which is the same on each of them, bit for bit.

        Raises:
            LostProcessError: A process is gone.
        """
        if self.count == 1:
            return
        import torch.distributed as dist

        with _noticing_loss():
            dist.all_reduce(values)


@dataclass(frozen=True)
class Outcome:
    """What a piece of work came to, as it travels between processes: a value, or an error and where it arose."""

    value: Any = None
    error: Exception | None = None
    trace: str = ""


def attempted(compute: Callable[[], Any]) -> Outcome:
    """What a computation gives or raises; interruptions pass."""
    try:
        return Outcome(compute())
    except LostProcessError:
        raise
    except Exception as error:
        return Outcome(error=_portable(error), trace=f"in {_current.name}:\n{traceback.format_exc()}")


def unwrapped(outcome: Outcome) -> Any:
    """The value of an outcome, or its error raised."""
    if outcome.error is None:
        return outcome.value
    if isinstance(outcome.error, UserError):
        raise outcome.error
    raise outcome.error from _Elsewhere(outcome.trace)


class _Elsewhere(Exception):
    """Shows the traceback of another process."""


def _portable(error: Exception) -> Exception:
    """The error, if it can travel; else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an error's own constructor makes of the attempt
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


_ALONE = Processes()


_current: Processes = _ALONE


def current() -> Processes:
    """The processes that share their work now; this one alone outside of :func:`joined`."""
    return _current


@contextmanager
def joined(*, timeout: timedelta = WAIT, hint: str = "") -> Iterator[Processes]:
    """Share work with the other processes of the job that ``torchrun`` started, until the block ends.

    Without ``torchrun``, or where it starts a single process, nothing changes. If a process fails, one of them says
    so, and the others end without a word.

    Args:
        timeout: How long to wait for a process that is alive and does not answer.
        hint: What to do after a failure, as the end of a message.

    Raises:
        UserError: The processes do not find each other.
    """
    global _current  # noqa: PLW0603  # one job, one group: as PyTorch has it
    if not started_by_torchrun() or _current.count > 1:
        yield _current
        return
    team = _connect(os.environ, timeout)
    _current = team
    try:
        try:
            yield team
            team.all(None)  # the first process may hold the store
        except BaseException as error:
            _part(team, error, hint)
    finally:
        _current = _ALONE
        _disconnect()


@contextmanager
def apart() -> Iterator[None]:
    """Work alone meanwhile, whatever the other processes do."""
    global _current  # noqa: PLW0603
    team, _current = _current, _ALONE
    try:
        yield
    finally:
        _current = team


def started_by_torchrun() -> bool:
    """Whether this process is one of several of a job."""
    return all(name in os.environ for name in _NEEDED) and os.environ["WORLD_SIZE"] != "1"


def leading() -> bool:
    """Whether this process writes files and prints."""
    return _current.leads


def named(rank: int, count: int) -> str:
    """How messages call a process."""
    return f"process {rank} of {count}"


def own_device(kind: str) -> torch.device:
    """The device for this process where ``kind`` names several, such as ``cuda``; they are dealt out in turn.

    Raises:
        UserError: The machine has fewer devices than processes.
    """
    import torch

    device = torch.device(kind)
    if _current.count == 1 or device.type == "cpu" or ":" in kind:
        return device
    module = torch.get_device_module(device)
    if _current.local_rank >= module.device_count():
        raise UserError(
            f"{_current.name} finds {module.device_count()} {device.type} devices on its machine, fewer than there are "
            "processes: give torchrun a smaller --nproc-per-node, or take --device cpu"
        )
    module.set_device(_current.local_rank)
    return torch.device(device.type, _current.local_rank)


def _connect(environment: Mapping[str, str], timeout: timedelta) -> Processes:
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    try:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        devices = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if devices else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
        group = dist.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{named(rank, count)} does not find the others ({str(error).partition(chr(10))[0]}): check torchrun's "
            "--nnodes, --rdzv-endpoint and that the machines reach each other"
        ) from error
    store.set(f"attackroute/at/{rank}", f"{socket.gethostname()} {os.getpid()}")
    return Processes(rank, count, int(environment.get("LOCAL_RANK", rank)), group, store)


def _disconnect() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        try:
            dist.destroy_process_group()
        except RuntimeError:  # after a loss, there may be nothing left to take leave of
            return


@contextmanager
def _noticing_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(str(error).partition("\n")[0]) from error


def _part(team: Processes, error: BaseException, hint: str) -> None:
    """Leave after an error, so that one process speaks for all.

    Raises:
        BaseException: The error, by the process that is to speak, with a message that names a lost process.
        SystemExit: By the others.
    """
    if team.count == 1:
        raise error
    code = _exit_code(error)
    deaf_to_termination()  # torchrun terminates those that are left
    try:
        word = _WORDS.get(type(error), _FAILED)
        team.store.set(f"attackroute/left/{team.rank}", word)
        if word == _FAILED:
            if _speaks(team):
                raise error
            raise SystemExit(code)
        gone, words = _missing(team)
        if _FAILED in words.values() or (gone and not _speaks(team)):
            raise SystemExit(code)
    except (RuntimeError, ConnectionError) as lost:  # the store went with the process that held it
        raise LostProcessError(f"{named(0, team.count)} is gone{hint}") from lost
    if gone:
        names = ", ".join(str(rank) for rank in gone)
        who = f"process {names}" if len(gone) == 1 else f"processes {names}"
        what = "ended without a word (killed, or out of memory)"
        raise LostProcessError(f"{who} of {team.count} {what}{hint}") from error
    if isinstance(error, LostProcessError):
        if not _speaks(team):
            raise SystemExit(code)
        stopped = [named(rank, team.count) for rank, word in words.items() if word == _INTERRUPTED]
        what = f"{stopped[0]} was interrupted" if stopped else f"{team.name} lost the others: {error}"
        raise LostProcessError(f"{what}{hint}") from error
    raise error


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    known = {KeyboardInterrupt: 130, UserError: 2}
    return next((code for kind, code in known.items() if isinstance(error, kind)), getattr(error, "exit_code", 1))


def _speaks(team: Processes) -> bool:
    return bool(team.store.add("attackroute/speaker", 1) == 1)


def _missing(team: Processes) -> tuple[list[int], dict[int, str]]:
    """Processes that left no word, and the words of the others, so far as they came before one had failed."""
    silent = [rank for rank in range(team.count) if rank != team.rank]
    limit = time.monotonic() + _GRACE_SECONDS
    gone: list[int] = []
    words: dict[int, str] = {}
    while silent and time.monotonic() < limit:
        for rank in list(silent):
            if team.store.check([f"attackroute/left/{rank}"]):  # here and below, word may come at any moment
                words[rank] = team.store.get(f"attackroute/left/{rank}").decode()
                silent.remove(rank)
            elif _is_gone(team.store.get(f"attackroute/at/{rank}").decode()) and not team.store.check(
                [f"attackroute/left/{rank}"]
            ):
                gone.append(rank)
                silent.remove(rank)
        if _FAILED in words.values():
            break
        time.sleep(0.02)
    return gone, words


def _is_gone(place: str) -> bool:
    """Whether a process of this machine has ended; those of others cannot be seen."""
    host, _, number = place.rpartition(" ")
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:
        with open(f"/proc/{number}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return False


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
