"""Edits of layers' outputs while a model runs: what all interventions have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from attackroute.errors import UserError
from attackroute.fingerprint import require_channels
from attackroute.followers import Follower
from attackroute.layers import LayerCall, LayerCalls, pass_level
from attackroute.nearest import did_you_mean

OUTPUT, ACTIVATION = "output", "activation"

CHANNEL_DIM = {"conv2d": -3, "linear": -1}
"""Where channels stand in the output of each kind of layer, with or without samples before them."""


class LayerEdits:
    """Edits the outputs of some layers as they run, and checks that every forward pass had these layers.

    Subclasses say what happens, in :meth:`begun`, :meth:`run` and :meth:`edited`.

    Args:
        channels: The layers, and how many channels each must have; None where that is open.
        at: ``"output"`` for the layer's own output, or ``"activation"`` for that of the activation that follows it.

    Raises:
        UserError: ``at`` is unknown.
    """

    def __init__(self, channels: Mapping[str, int | None], at: str = OUTPUT) -> None:
        if at not in (OUTPUT, ACTIVATION):
            raise UserError(
                f"unknown place at={at!r}{did_you_mean(at, (OUTPUT, ACTIVATION))}; give 'output' or 'activation'"
            )
        self._channels = channels
        self._follower = Follower() if at == ACTIVATION else None
        self._ran: set[str] = set()

    def begun(self, args: tuple[Any, ...]) -> None:
        """A forward pass begins, with these positional arguments of the model."""

    def run(self, call: LayerCall) -> Tensor:
        """Run one of the layers."""
        return call.run()

    def edited(self, layer: str, dim: int, values: Tensor) -> Tensor:
        """What flows on instead of ``values``, whose channels stand at ``dim``; they must not be written to."""
        return values

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Context in which every forward pass of ``model`` is edited; the model itself is left alone."""
        level = pass_level()

        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module is model and pass_level() == level:  # a copy of the model made meanwhile copies its hooks
                self._begin(args)

        def end(module: nn.Module, *_: object) -> None:
            if module is model and pass_level() == level:
                self._end()

        with ExitStack() as stack:
            if self._follower is not None:
                stack.enter_context(self._follower)
            stack.enter_context(LayerCalls(model, self.visit, linear=True))
            stack.callback(model.register_forward_pre_hook(begin).remove)
            stack.callback(model.register_forward_hook(end).remove)
            yield

    def visit(self, call: LayerCall) -> Tensor:
        """Run one layer of the model; what it returns flows on."""
        if call.name not in self._channels:
            return call.run()
        output = self.run(call)
        dim = CHANNEL_DIM[call.kind]
        self._require_channels(call.name, output.shape[dim])
        self._ran.add(call.name)
        edit = partial(self.edited, call.name, dim)
        if self._follower is None:
            return edit(output)
        self._follower.follow(output, call.name, edit)
        return output

    def _begin(self, args: tuple[Any, ...]) -> None:
        self._forget()  # the pass before may have broken off
        self.begun(args)

    def _end(self) -> None:
        """A forward pass is done: every layer must have run, and have been edited."""
        for layer in self._channels:
            if layer not in self._ran:
                raise UserError(
                    f"layer {layer!r} did not run in the model's forward pass: use the model that the route was made "
                    "for, uncompiled, or leave the layer out (layers=...)"
                )
            if self._follower is not None and layer not in self._follower.reached:
                raise UserError(
                    f"no activation follows layer {layer!r}, so there is none to edit: "
                    'use at="output", or leave the layer out (layers=...)'
                )
        self._forget()  # what reads an output after the pass reads it for other ends

    def _forget(self) -> None:
        self._ran.clear()
        if self._follower is not None:
            self._follower.clear()

    def _require_channels(self, layer: str, found: int) -> None:
        expected = self._channels[layer]
        if expected is not None:
            require_channels(layer, expected, found)
