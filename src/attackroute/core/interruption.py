"""Signals that end a run: SIGTERM as an exception, and both it and SIGINT put off until work is at a safe place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt in the main thread, unless the caller handles it already."""
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt("terminated")

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def deaf_to_termination() -> None:
    """Let SIGTERM no longer end this process, which is about to end and has something to say."""
    if _in_main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class HeldSignals:
    """Context in whose :meth:`held` blocks SIGINT and SIGTERM wait for the block's end, in the main thread.

    There the first one is handled as it would have been at once. A second one does not wait.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._holding = False
        self._waiting: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> HeldSignals:
        if _in_main_thread():
            for number in _ENDING:
                handler = signal.getsignal(number)
                if callable(handler):  # else the process ends, or the signal is ignored
                    self._handlers[number] = handler
                    signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def waiting(self) -> bool:
        """Whether a signal waits for the end of a :meth:`held` block."""
        return self._waiting is not None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context that is left before a signal is handled."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            waiting, self._waiting = self._waiting, None
            if waiting is not None:
                self._handlers[waiting[0]](*waiting)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._holding and self._waiting is None:
            self._waiting = number, frame
            return
        self._handlers[number](number, frame)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
