"""Flags and memory format of a model, put back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Give every submodule its own ``training`` flag back at the end, also after an exception."""
    flags = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def in_channels_last(model: nn.Module) -> Iterator[None]:
    """Hold the weights in the channels_last format meanwhile; the same parameter objects, the same values."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_contiguous()]
    model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for tensor in tensors:
            tensor.data = tensor.data.contiguous()
