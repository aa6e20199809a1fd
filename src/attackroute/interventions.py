"""Interventions: what the model answers when channels of its route layers are changed while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from attackroute.errors import UserError
from attackroute.fingerprint import require_model
from attackroute.followers import Follower
from attackroute.layers import LayerCall, LayerCalls
from attackroute.nearest import did_you_mean
from attackroute.routes import Route

OUTPUT, ACTIVATION = "output", "activation"

_CHANNEL_DIM = {"conv2d": -3, "linear": -1}


@contextmanager
def deactivate(
    model: nn.Module, route: Route, layers: Iterable[str] | None = None, *, at: str = OUTPUT
) -> Iterator[None]:
    """Context in which every forward pass of ``model`` has the route's channels set to zero.

    A zero at a layer's own output ``Z`` equals a kernel row and a bias of zero. Batch norm then makes a constant of
    it, which may pass the activation; a zero after the activation is silence. ``model`` itself is not changed: outputs
    are replaced, never written to, so that contexts nest, also on one layer, and gradients flow through what is left.
    The mode (train or eval), autocast and grad mode are the caller's.

    Args:
        model: Any network; call it as a whole, not its submodules.
        route: The channels, as traced (the k-th call of a module is ``name#k``); linear maps may be among the layers.
        layers: Some of the route's layers; None for all of them.
        at: ``"output"`` for ``Z`` itself, before batch norm, or ``"activation"`` for the output of the elementwise
            activation that follows ``Z``, directly or after batch norm.

    Raises:
        UserError: On entry, if a layer is not on the route, the model cannot carry the route, or ``at`` is unknown.
            In a forward pass, if a layer does not run or has another number of channels, or if a layer has no
            activation of its own, with ``at="activation"`` (as before a residual sum).
    """
    if at not in (OUTPUT, ACTIVATION):
        raise UserError(
            f"unknown place at={at!r}{did_you_mean(at, (OUTPUT, ACTIVATION))}; give 'output' or 'activation'"
        )
    chosen = route if layers is None else route.restrict(layers)
    require_model(chosen.channels, model)
    follower = Follower() if at == ACTIVATION else None
    silence = _Silence(chosen, follower)
    with ExitStack() as stack:
        if follower is not None:
            stack.enter_context(follower)
        stack.enter_context(LayerCalls(model, silence.visit, linear=True))
        # functions that ask for the module, since a copy of the model made meanwhile copies its hooks
        begin = model.register_forward_pre_hook(lambda module, *_: silence.begin() if module is model else None)
        stack.callback(begin.remove)
        end = model.register_forward_hook(lambda module, *_: silence.end() if module is model else None)
        stack.callback(end.remove)
        yield


class _Silence:
    """Sets channels to zero as the layers run, and checks that every forward pass had the layers.

    Args:
        route: The channels.
        follower: Carries the zeros to where the activation is; None sets them at once.
    """

    def __init__(self, route: Route, follower: Follower | None) -> None:
        self._route = route
        self._follower = follower
        self._indices: dict[tuple[str, torch.device], Tensor] = {}
        self._ran: set[str] = set()

    def visit(self, call: LayerCall) -> Tensor:
        """Run one layer; what it returns flows on."""
        output = call.run()
        if call.name not in self._route:
            return output
        self._require_channels(call, output)
        self._ran.add(call.name)
        silent = partial(self._silent, call.name, _CHANNEL_DIM[call.kind])
        if self._follower is None:
            return silent(output)
        self._follower.follow(output, call.name, silent)
        return output

    def begin(self) -> None:
        """A forward pass begins; the one before may have broken off."""
        self._forget()

    def end(self) -> None:
        """A forward pass is done: every layer must have run, and have been silenced."""
        for layer in self._route:
            if layer not in self._ran:
                raise UserError(
                    f"layer {layer!r} of the route did not run in the model's forward pass: use the model that the "
                    "route was made for, uncompiled, or leave the layer out (layers=...)"
                )
            if self._follower is not None and layer not in self._follower.reached:
                raise UserError(
                    f"no activation follows layer {layer!r}, so it cannot be deactivated after one: "
                    'use at="output", or leave the layer out (layers=...)'
                )
        self._forget()  # what reads an output after the pass reads it for other ends

    def _forget(self) -> None:
        self._ran.clear()
        if self._follower is not None:
            self._follower.clear()

    def _silent(self, layer: str, dim: int, values: Tensor) -> Tensor:
        # not a product with zeros, which would make NaN of an infinite value
        return values.index_fill(dim, self._index(layer, values.device), 0)

    def _index(self, layer: str, device: torch.device) -> Tensor:
        if (layer, device) not in self._indices:
            with torch.inference_mode(False):  # an index made in inference mode could not serve a backward pass
                self._indices[layer, device] = self._route[layer].to(device)
        return self._indices[layer, device]

    def _require_channels(self, call: LayerCall, output: Tensor) -> None:
        expected, found = self._route.channels[call.name], output.shape[_CHANNEL_DIM[call.kind]]
        if found != expected:
            raise UserError(
                f"layer {call.name!r} has {expected} channels in the route but {found} in the model: "
                "use the model that the route was made for"
            )
