"""Forward passes that leave no trace: repeated with the same random numbers, or without touching the buffers."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.errors import UserError

_Buffers = list[tuple[nn.Module, str, Tensor]]


class RepeatablePass:
    """What a forward pass starts from: inputs, buffers, states of the random generators, autocast.

    Args:
        model: The model that is about to run.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._model = model
        self._args = tuple(map(_kept, args))
        self._kwargs = {name: _kept(value) for name, value in kwargs.items()}
        self._buffers = _copies(model)
        devices = {parameter.device for parameter in model.parameters()}
        self._random = torch.get_rng_state()
        self._random_on = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
        kind = next(iter(devices)).type if devices else "cpu"
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def run(self, *first: Any) -> Any:
        """Run the model again as it ran then; buffers and generators are afterwards as they were before.

        Args:
            first: What to give it in place of its first positional arguments; a copy is taken.
        """
        kind, dtype, enabled = self._autocast
        with (
            torch.random.fork_rng(list(self._random_on)),
            _swapped(self._buffers),
            torch.autocast(kind, dtype, enabled),
        ):
            torch.set_rng_state(self._random)
            for device, state in self._random_on.items():
                torch.cuda.set_rng_state(state, device)
            return self._model(*(_kept(value) for value in first), *self._args[len(first) :], **self._kwargs)


def require_ran(layers: Iterable[str], ran: Container[str]) -> None:
    """Raise a `UserError` naming the first of a route's layers that did not run in a watched pass."""
    for layer in layers:
        if layer not in ran:
            raise UserError(
                f"layer {layer!r} of the route did not run in the model's forward pass: use the model that the route "
                "was made for, uncompiled, or leave the layer out (route.restrict)"
            )


@contextmanager
def spared_buffers(model: nn.Module) -> Iterator[None]:
    """Context in which the model works on copies of its buffers, such as the running statistics of batch norms.

    The buffers themselves are not even written to, so that earlier passes can still be differentiated.
    """
    with _swapped(_copies(model)):
        yield


@contextmanager
def _swapped(buffers: Iterable[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Put other tensors in the place of buffers meanwhile."""
    own = [(module, name, module._buffers[name]) for module, name, _ in buffers]
    try:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        yield
    finally:
        for module, name, kept in own:
            module._buffers[name] = kept


def _copies(model: nn.Module) -> _Buffers:
    return [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _kept(value: Any) -> Any:
    """A copy of a tensor, since a model may work on its input in place."""
    return value.clone() if isinstance(value, Tensor) else value
