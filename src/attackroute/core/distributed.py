"""The processes of a job that ``torchrun`` started, and how they share what they find.

Every process runs the same program. Work on batches is divided among them, and whatever one of them finds is given to
all, so that all go the same way; only the first one writes files and prints. A process that fails says why and ends;
the others notice that it is gone and end without a word, and ``torchrun`` reports which one it was.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from attackroute.core.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
WAIT = timedelta(hours=1)
"""How long a process waits for the others; one that is dead is noticed at once, so this is for one that hangs."""


class LostProcessError(Exception):
    """Another process of the job is gone, as one that was killed is, or does not answer."""


@dataclass(frozen=True, eq=False)
class Processes:
    """The processes of a job, seen from one of them, number ``rank``, which is number ``local_rank`` on its machine.

    All of them must call the same methods in the same order. Errors do not travel: a process that raises one leaves the
    others with a :class:`LostProcessError`, as does one that is gone. The ``store`` knows the first one to fail; one
    process alone has none.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    store: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @contextmanager
    def _exchange(self) -> Iterator[Any]:
        """PyTorch's module for what processes exchange; its errors say that one of them is gone."""
        import torch.distributed

        try:
            yield torch.distributed
        except RuntimeError as error:
            raise LostProcessError(
                f"process {self.rank} of {self.count} lost another one (killed, or out of memory): torchrun says "
                "which; what is in --out is kept, so give the same command with --resume to go on"
            ) from error

    def all(self, value: T) -> list[T]:
        """The values of all processes, by rank; they are pickled."""
        if self.count == 1:
            return [value]
        gathered: list[Any] = [None] * self.count
        with self._exchange() as dist:
            dist.all_gather_object(gathered, value)
        gathered[self.rank] = value
        return gathered

    def first(self, compute: Callable[[], T]) -> T:
        """What the first process computes, for all of them."""
        if self.count == 1:
            return compute()
        values: list[Any] = [compute() if self.leads else None]
        with self._exchange() as dist:
            dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[no-any-return]

    def in_turns(self, take: Callable[[], tuple[T, ...] | None]) -> Iterator[T]:
        """Values of the turns of all processes: of process 0, of process 1, ..., again of process 0, and so on.

        ``take`` does this process's next turn, and gives the values that came of it; None when nothing is left.
        """
        while True:
            for values in self.all(take()):
                if values is None:  # turns are dealt out in order, so nothing is left for those that follow, either
                    return
                yield from values


_ALONE = Processes()
_current: Processes = _ALONE


def current() -> Processes:
    """The processes that share their work now; this one alone outside of :func:`joined`."""
    return _current


def leading() -> bool:
    """Whether this process writes files and prints."""
    return _current.leads


@contextmanager
def joined(*, timeout: timedelta = WAIT) -> Iterator[Processes]:
    """Share work with the other processes of the job that ``torchrun`` started, until the block ends.

    Without ``torchrun``, or where it starts a single process, nothing changes. The first process to fail raises its
    error, and those that fail in consequence end without a word.
    """
    global _current  # noqa: PLW0603  # one job, one group: as PyTorch has it
    if not started_by_torchrun() or _current.count > 1:
        yield _current
        return
    team = _connect(timeout)
    _current = team
    try:
        yield team
        team.all(None)  # the first process may hold the store
    except BaseException:
        if not _fails_first(team):
            raise SystemExit(1) from None  # what it says is an effect of what was said
        raise
    finally:
        _current = _ALONE
        import torch.distributed as dist

        with suppress(RuntimeError):  # after a loss, there may be nothing left to take leave of
            if dist.is_initialized():
                dist.destroy_process_group()


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
    needed = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return needed <= os.environ.keys() and os.environ["WORLD_SIZE"] != "1"


def own_device(kind: str) -> torch.device:
    """The device for this process where ``kind`` names several, such as ``cuda``; they are dealt out in turn."""
    import torch

    device = torch.device(kind)
    if _current.count == 1 or device.type == "cpu" or ":" in kind:
        return device
    module = torch.get_device_module(device)
    if _current.local_rank >= module.device_count():
        raise UserError(
            f"process {_current.rank} of {_current.count} finds {module.device_count()} {device.type} devices on its "
            "machine, fewer than there are processes: give torchrun a smaller --nproc-per-node, or take --device cpu"
        )
    module.set_device(_current.local_rank)
    return torch.device(device.type, _current.local_rank)


def terminated_as_interrupted() -> AbstractContextManager[None]:
    """Let SIGTERM raise KeyboardInterrupt in the main thread, unless the caller handles it already."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt("terminated")

    return _handled(interrupt, [signal.SIGTERM] if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else [])


def interrupted_at_once() -> AbstractContextManager[None]:
    """Let SIGINT and SIGTERM end the process without a word, while nothing but modules is loaded."""
    signals = [each for each in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(each))]
    return _handled(lambda *_: os._exit(130), signals)


@contextmanager
def _handled(handler: Callable[[int, Any], object], signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Handle some signals so meanwhile, where this is the main thread, which alone can."""
    before = {each: signal.signal(each, handler) for each in signals if _in_main_thread()}
    try:
        yield
    finally:
        for each, earlier in before.items():
            signal.signal(each, earlier)


def _connect(timeout: timedelta) -> Processes:
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    rank, local_rank = os.environ["RANK"], os.environ.get("LOCAL_RANK")
    try:
        store, number, count = next(rendezvous("env://", timeout=timeout))
        team = Processes(number, count, number if local_rank is None else int(local_rank), store=store)
        store.set_timeout(timeout)
        dist.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"this process (its RANK is {rank!r}) does not find the others ({str(error).partition(chr(10))[0]}): check "
            "torchrun's --nnodes, --rdzv-endpoint and that the machines reach each other"
        ) from error
    return team


def _fails_first(team: Processes) -> bool:
    """Whether this process, which has failed, is the first one to do so, and so the one that says why."""
    if _in_main_thread():  # torchrun terminates those that are left, and this one has something to say
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return bool(team.store.add("attackroute/failed", 1) == 1)
    except RuntimeError:  # the store went with the process that held it
        return True


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
