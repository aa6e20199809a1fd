"""What PyTorch says of a model that fails, as one line for the user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from attackroute.errors import UserError


@contextmanager
def explained(images: Tensor) -> Iterator[None]:
    """Turn what PyTorch says of a forward pass that fails into one line about the model and its input."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        shape = tuple(images.shape)
        raise UserError(
            f"the model cannot run on a batch of shape {shape} and type {images.dtype}: {_first_line(error)}"
        ) from error


@contextmanager
def differentiated() -> Iterator[None]:
    """Turn what PyTorch says of a backward pass that fails into one line about the model."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise UserError(
            f"PyTorch cannot differentiate the model (is activation checkpointing on, or is a tensor changed in-place "
            f"under no_grad?): {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
