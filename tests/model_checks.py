"""What tests of networks, of their weights and of errors share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from attackroute.core.errors import UserError


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give batch norms statistics that matter."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 2.0)):
                assert tensor is not None
                tensor.uniform_(low, high, generator=generator)
            nn.init.uniform_(module.weight, -1, 1, generator=generator)


@contextmanager
def one_line(*parts: object, match: str | None = None) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Require a user's error, in one line that has these parts, and in which the pattern is found."""
    with pytest.raises(UserError, match=match) as error:
        yield error
    message = str(error.value)
    assert message and "\n" not in message
    assert all(str(part) in message for part in parts), message


class Trap:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)
