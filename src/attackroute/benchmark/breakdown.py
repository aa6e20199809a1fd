"""Where a trace spends its time: the engine's functions, timed while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from attackroute.benchmark.timing import Parts, Stopclock
from attackroute.core import batches
from attackroute.routes.instance_routes import InstanceRoutesBuilder
from attackroute.tracing import open_edges, recorder, structure, trace
from attackroute.tracing.rules.operation import Operation
from attackroute.tracing.segments import Segments

PROBE = "structure probe"
REST = "rest"
PHASES: Mapping[str, tuple[tuple[object, str], ...]] = {
    # phase: where its functions are looked up, and their names
    "network's own operations": ((Operation, "run"), (recorder.Tracker, "_convolution")),
    "following gains, masks": ((trace, "record"), (recorder.Tracker, "_add_layer")),
    "window sums": ((recorder, "mask_sums"), (recorder, "alive_sums"), (recorder, "pattern_sums")),
    "critical sums": ((trace, "critical_sums"),),
    "vector-Jacobian products": ((Segments, "__init__"), (Segments, "scores")),
    "seeds": ((trace, "checked_logits"), (trace, "seed_gradients")),
    "top-k": ((trace, "top_k"), (open_edges, "top_k")),
    "packing": ((InstanceRoutesBuilder, "add"), (InstanceRoutesBuilder, "build")),
    "input checks": ((batches, "_ready"),),
    PROBE: ((structure, "record_first"), (structure, "_require_independent")),
}
"""The parts of a trace. A phase's time is its functions' own: what they call belongs to the phase of what is called,
except that all of the structure probe, a forward and a backward pass on two images, is its own."""


class Stopwatch:
    """Seconds by phase.

    Args:
        clock: The clock; the device's work is waited for at every change of phase.
    """

    def __init__(self, clock: Stopclock) -> None:
        self._clock = clock
        self._running = [REST]
        self._seconds: dict[str, float] = {}
        self._since = 0.0

    def measure(self, action: Callable[[], object]) -> Parts:
        """Run a trace and say how long each phase took; their sum is the whole."""
        self._running, self._seconds = [REST], dict.fromkeys((*PHASES, REST), 0.0)
        with self._watching():
            self._since = self._clock.read()
            action()
            self._charge()
        return self._seconds

    def _charge(self) -> None:
        now = self._clock.read()
        self._seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._running.append(PROBE if self._running[-1] == PROBE else name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    @contextmanager
    def _watching(self) -> Iterator[None]:
        originals = [(home, name, getattr(home, name)) for places in PHASES.values() for home, name in places]
        try:
            for phase, places in PHASES.items():
                for home, name in places:
                    setattr(home, name, self._timed(phase, getattr(home, name)))
            yield
        finally:
            for home, name, original in originals:
                setattr(home, name, original)

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.isgeneratorfunction(function):

            @wraps(function)
            def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
                iterator = function(*args, **kwargs)
                while True:
                    with self._phase(phase):
                        try:
                            item = next(iterator)
                        except StopIteration:
                            return
                    yield item

            return steps

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._phase(phase):
                return function(*args, **kwargs)

        return call
