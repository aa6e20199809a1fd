"""Batches from whatever the user has: a DataLoader, any iterable of batches, or tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.errors import UserError

Data = Iterable[Any] | Tensor | tuple[Tensor, Tensor]
"""A DataLoader or other iterable of ``(images, labels)`` or images; or one such pair or batch of tensors."""

_PAIR = 2


def batches(model: nn.Module, data: Data, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images and labels, batch by batch, checked, on the model's device and in its dtype.

    The caller holds the model frozen.

    Args:
        model: Decides device and floating dtype, by its first parameter.
        data: See :data:`Data`.
        batch_size: Rows per batch when ``data`` is tensors.

    Yields:
        ``(images, labels)``, labels None where there are none.

    Raises:
        UserError: A batch is not images and labels, their numbers differ, a value is not finite, or the model holds
            half-precision weights on a CPU.
    """
    device, dtype = _home(model)
    for number, batch in enumerate(_raw(data, batch_size)):
        for module in model.modules():  # reading the data may have switched it, as some attacks do
            module.training = False
        images, labels = _split(batch, number)
        if images.shape[0] == 0:
            continue
        if dtype is None or not images.is_floating_point():
            dtype = dtype or torch.get_default_dtype()
        images = images.detach().to(device=device, dtype=dtype, non_blocking=True)
        if not _finite(images):
            row = int((~torch.isfinite(images.flatten(1)).all(1)).nonzero()[0, 0])
            raise UserError(f"image {row} of batch {number} holds NaN or inf: remove or repair it")
        yield images, None if labels is None else labels.to(device)


def _finite(images: Tensor) -> bool:
    if images.numel() == 0:
        return True
    lowest, highest = images.aminmax()  # NaN passes through both; several times quicker than a test of every value
    return bool(lowest.isfinite() & highest.isfinite())


def samples_in(data: Data) -> int | None:
    """How many samples ``data`` holds, where that is known without reading it."""
    if isinstance(data, Tensor):
        return data.shape[0] if data.ndim else None
    if _is_pair(data):
        return len(data[0])  # type: ignore[index]
    sampler, dropped = getattr(data, "sampler", None), getattr(data, "drop_last", False)
    try:
        return None if sampler is None or dropped else len(sampler)
    except TypeError:
        return None


def _is_pair(data: object) -> bool:
    if not (isinstance(data, (tuple, list)) and len(data) == _PAIR and all(isinstance(part, Tensor) for part in data)):
        return False
    second = data[1]  # a list may also be two batches of images
    return isinstance(data, tuple) or not (second.is_floating_point() and second.ndim >= _PAIR)


def _raw(data: Data, batch_size: int) -> Iterable[Any]:
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is not positive")
    if isinstance(data, Tensor):
        _check_images(data, 0)
        return data.split(batch_size)  # type: ignore[no-any-return]
    if _is_pair(data):
        images, labels = data  # type: ignore[misc]
        _check_counts(images, labels, 0)
        return zip(images.split(batch_size), labels.split(batch_size), strict=True)
    if not isinstance(data, Iterable):
        raise UserError(f"data is {type(data).__name__}: pass a DataLoader, or tensors (images, labels)")
    return data


def _split(batch: Any, number: int) -> tuple[Tensor, Tensor | None]:
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    images, labels = parts[0] if parts else None, parts[1] if len(parts) > 1 else None
    if not isinstance(images, Tensor) or not (labels is None or isinstance(labels, Tensor)):
        kind = type(images if not isinstance(images, Tensor) else labels).__name__
        raise UserError(f"batch {number} holds {kind} where tensors were expected: (images, labels) or images")
    _check_images(images, number)
    if labels is not None:
        _check_counts(images, labels, number)
    return images, labels


def _check_images(images: Tensor, number: int) -> None:
    if images.layout != torch.strided or images.is_complex():
        kind = "complex numbers" if images.is_complex() else "a sparse tensor"
        raise UserError(f"batch {number} is {kind}: expected a dense, real tensor of images (N, C, H, W)")
    if images.ndim < _PAIR:
        raise UserError(f"batch {number} has shape {tuple(images.shape)}: expected images (N, C, H, W)")


def _check_counts(images: Tensor, labels: Tensor, number: int) -> None:
    if labels.ndim == 0 or images.shape[0] != labels.shape[0]:
        raise UserError(
            f"batch {number} has {images.shape[0]} images but labels of shape {tuple(labels.shape)}: give one per image"
        )


def _home(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return torch.device("cpu"), None
    if parameter.device.type == "cpu" and parameter.dtype == torch.float16:
        raise UserError("the model is in half precision (float16) on the CPU: use model.float(), or bfloat16 autocast")
    return parameter.device, parameter.dtype
