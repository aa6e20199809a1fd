"""Forward passes, counted: what an experiment cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass
class PassCount:
    """Number of forward passes of a model so far."""

    passes: int = 0


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
