"""What tests of networks and of their weights share."""

from __future__ import annotations

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


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message
