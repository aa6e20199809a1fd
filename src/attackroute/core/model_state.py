"""Holding a model still while it is looked at, and giving it back as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from attackroute.core.errors import UserError
from attackroute.core.files import update_digest
from attackroute.core.layers import unwrapped, write_count


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the model's parameters and buffers, those of its normalisation included."""
    digest = hashlib.sha256()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        update_digest(digest, unwrapped(model, name), value)
    return digest.hexdigest()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Hold ``model`` in eval mode, no parameter requiring grad; flags and buffers come back, also after an error.

    Backward hooks of modules rest meanwhile: they would see products that are none of the user's.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"the model is {type(model).__name__}, not a module (torch.nn.Module): pass the network itself")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise UserError(f"parameter {name!r} of the model is uninitialised (lazy): run the model on a batch first")
        if parameter.is_inference():
            raise UserError(f"parameter {name!r} of the model was made in inference_mode: build the model outside it")
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = [
        (module, name, buffer, write_count(buffer), None if is_lazy(buffer) else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    hooks = [
        (registry, dict(registry))
        for module in model.modules()
        for registry in (module._backward_hooks, module._backward_pre_hooks)
        if registry
    ]
    try:
        for registry, _ in hooks:
            registry.clear()
        with kept_modes(model):
            for module in model.modules():  # not model.eval(), which a class may have made to do more
                module.training = False
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
    finally:
        for registry, registered in hooks:
            registry.update(registered)
        for parameter in learning:
            parameter.requires_grad_(True)
        for module, name, buffer, version, kept in buffers:
            module._buffers[name] = buffer
            if kept is not None:
                _put_back(buffer, kept, counted=write_count(buffer) != version)


def _put_back(buffer: Tensor, values: Tensor, *, counted: bool) -> None:
    """Give a buffer its values back, also where it was written to in C++, as by observers of quantisation.

    Nothing counts such writing, so to undo it does not count either: graphs that hold the buffer stay valid.
    """
    strided = buffer.layout == torch.strided
    repeats = not strided or any(s == 0 and n > 1 for s, n in zip(buffer.stride(), buffer.shape, strict=True))
    if counted or not repeats:  # what is repeated in memory cannot be written to in C++ either
        with torch.inference_mode(buffer.is_inference()), torch.no_grad():
            if buffer.shape != values.shape:
                buffer.resize_(values.shape)
            (buffer if counted else buffer.data).copy_(values)


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and type of a model's first floating parameter; the CPU and PyTorch's default type without one."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def autocast_of(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast in a dtype on the model's device; None for none."""
    return nullcontext() if dtype is None else torch.autocast(placement(model)[0].type, dtype)


class RepeatablePass:
    """What a forward pass of a model that is about to run starts from: inputs, buffers, random states, autocast."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model = model
        self._args = tuple(map(_copied, args))
        self._kwargs = {name: _copied(value) for name, value in kwargs.items()}
        self._buffers = _buffer_copies(model)
        devices = {parameter.device for parameter in model.parameters()}
        self._random = torch.get_rng_state()
        self._random_on = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
        kind = next(iter(devices)).type if devices else "cpu"
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def run(self, *first: Any) -> Any:
        """Run the model again as then, but on copies of ``first``; buffers and generators stay as they are."""
        kind, dtype, enabled = self._autocast
        with (
            torch.random.fork_rng(list(self._random_on)),
            _swapped(self._buffers),
            torch.autocast(kind, dtype, enabled),
        ):
            torch.set_rng_state(self._random)
            for device, state in self._random_on.items():
                torch.cuda.set_rng_state(state, device)
            return self._model(*(_copied(value) for value in first), *self._args[len(first) :], **self._kwargs)


@contextmanager
def spared_buffers(model: nn.Module) -> Iterator[None]:
    """Context in which the model works on copies of its buffers, so that earlier passes can still be differentiated."""
    with _swapped(_buffer_copies(model)):
        yield


@contextmanager
def _swapped(buffers: Iterable[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Put other tensors in the place of buffers meanwhile."""
    originals = [(module, name, module._buffers[name]) for module, name, _ in buffers]
    try:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        yield
    finally:
        for module, name, original in originals:
            module._buffers[name] = original


def _buffer_copies(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _copied(value: Any) -> Any:
    """A copy of a tensor, since a model may work on its input in place."""
    return value.clone() if isinstance(value, Tensor) else value


def explained(images: Tensor) -> AbstractContextManager[None]:
    """Turn what PyTorch says of a forward pass that fails into one line about the model and its input."""
    batch = f"a batch of shape {tuple(images.shape)} and type {images.dtype}"
    return _worded(f"the model cannot run on {batch}", RuntimeError, ValueError, TypeError, IndexError, AssertionError)


def differentiated() -> AbstractContextManager[None]:
    """Turn what PyTorch says of a backward pass that fails into one line about the model."""
    causes = "is activation checkpointing on, or is a tensor changed in-place under no_grad?"
    return _worded(f"PyTorch cannot differentiate the model ({causes})", RuntimeError)


@contextmanager
def _worded(message: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds into one line that begins with the message."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except kinds as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{message}: {lines[0]}") from error


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
def in_format(model: nn.Module, memory_format: torch.memory_format) -> Iterator[None]:
    """Hold the weights in a memory format meanwhile; the same parameter objects, the same values."""
    usual = {tensor: tensor.is_contiguous() for tensor in (*model.parameters(), *model.buffers()) if tensor.ndim == 4}
    model.to(memory_format=memory_format)
    try:
        yield
    finally:
        for tensor, contiguous in usual.items():
            before = torch.contiguous_format if contiguous else torch.channels_last
            tensor.data = tensor.data.contiguous(memory_format=before)
