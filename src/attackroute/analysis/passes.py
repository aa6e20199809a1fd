"""Forward passes, counted: what an experiment cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from attackroute.core.batches import BatchStream

T = TypeVar("T")


@dataclass
class PassCount:
    """Number of forward passes of a model so far."""

    passes: int = 0

    def map(self, stream: BatchStream, work: Callable[[Tensor, Tensor | None], T]) -> Iterator[T]:
        """As :meth:`attackroute.streams.BatchStream.map`; the passes of all processes count, each batch's once."""
        own = 0

        def counted(images: Tensor, labels: Tensor | None) -> tuple[T, int]:
            nonlocal own
            before = self.passes
            found = work(images, labels)
            own += self.passes - before
            return found, self.passes - before

        shared = 0
        for found, passes in stream.map(counted):
            shared += passes
            yield found
        self.passes += shared - own


@contextmanager
def counted_passes(model: nn.Module) -> Iterator[PassCount]:
    """Count every forward pass of ``model`` as a whole, one for a batch, those of attacks included."""
    count = PassCount()

    def add(module: nn.Module, *_: object) -> None:
        if module is model:  # a copy of the model made meanwhile copies its hooks
            count.passes += 1

    handle = model.register_forward_pre_hook(add)
    try:
        yield count
    finally:
        handle.remove()
