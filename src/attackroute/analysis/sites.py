"""Sites at which channels are read and changed while a model runs: a layer's output, or the activation after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from attackroute.core.errors import UserError, did_you_mean
from attackroute.core.layers import ACTIVATION, CHANNEL_DIM, OUTPUT, LayerCall, LayerCalls, pass_level
from attackroute.routes.layer_map import require_channels

Edit = Callable[[Tensor], Tensor]
"""Takes an activation's output and returns what flows on instead, of the same shape."""


def _functions(*names: str) -> frozenset[Any]:
    """Every spelling of these functions, in place or not, as PyTorch's function modes see them."""
    spellings = [name + suffix for name in names for suffix in ("", "_")]
    return frozenset(getattr(place, name) for place in (torch, F, Tensor) for name in spellings if hasattr(place, name))


_ACTIVATIONS = _functions(
    *("celu", "clamp", "clamp_max", "clamp_min", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh"),
    *("leaky_relu", "logsigmoid", "mish", "prelu", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus"),
    *("softshrink", "softsign", "tanh", "tanhshrink", "threshold"),
)
# Normalisation, which keeps every channel in its place, copies, and what other interventions and measurements do to a
# layer's output before it flows on.
_PASSES_THROUGH = _functions(
    *("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"),
    *("clone", "contiguous", "detach", "index_copy", "index_fill", "requires_grad", "to"),
)
_READINGS = (bool, int, torch.Size, torch.dtype, torch.device, torch.layout, RemovableHandle, Node)


class ActivationFollower(TorchFunctionMode):
    """Context that follows tensors to the elementwise activation that reads them next, and edits its output.

    Between the two only normalisation and copies may stand. Whatever else reads a followed tensor would carry it past
    the edit, so it is an error; reading its shape and the like is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reached: set[str] = set()  # names of the followed tensors whose activation ran
        self._followed: Any = WeakIdKeyDictionary()

    def follow(self, tensor: Tensor, name: str, edit: Edit) -> None:
        """Follow ``tensor``, the output of layer ``name``, and apply ``edit`` to its activation's output."""
        self._followed[tensor] = (name, edit)

    def clear(self) -> None:
        """Forget all tensors."""
        self.reached.clear()
        self._followed.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        read = [value for value in given if isinstance(value, Tensor) and value in self._followed]
        result = func(*args, **kwargs)
        if not read or isinstance(result, _READINGS) or (result is None and func.__name__ == "__get__"):
            return result
        name, edit = self._followed[read[0]]
        alone = len(read) == 1 and read[0] is (args[0] if args else kwargs.get("input"))
        if alone and func in _ACTIVATIONS:
            self.reached.add(name)
            return edit(result)
        if alone and func in _PASSES_THROUGH:
            self.follow(result, name, edit)
            return result
        raise UserError(
            f"layer {name!r} meets {getattr(func, '__name__', func)!r} before any activation, so there is none "
            'to edit: use at="output", or leave the layer out (layers=...)'
        )


def check_site(at: str) -> None:
    """Raise a `UserError` unless ``at`` names a site, ``"output"`` or ``"activation"``."""
    if at not in (OUTPUT, ACTIVATION):
        raise UserError(
            f"unknown place at={at!r}{did_you_mean(at, (OUTPUT, ACTIVATION))}; give 'output' or 'activation'"
        )


@dataclass
class LayerEdits:
    """Edits the outputs of some layers as they run, and checks that every forward pass had these layers."""

    channels: Mapping[str, int | None]  # the layers, and how many channels each must have; None where that is open
    edit: Callable[[str, int, Tensor], Tensor] | None = None
    """``(layer, dim, values) -> tensor`` that flows on instead of ``values``, whose channels stand at ``dim`` and which
    must not be written to; None for ``values`` themselves."""
    at: str = OUTPUT  # for the layer's own output, or that of the activation that follows it
    run: Callable[[LayerCall], Tensor] = field(default=lambda call: call.run(), kw_only=True)  # runs one of the layers
    begun: Callable[[tuple[Any, ...]], None] = field(default=lambda args: None, kw_only=True)
    """Called as a forward pass begins, with the model's positional arguments."""

    def __post_init__(self) -> None:
        check_site(self.at)
        self._follower = ActivationFollower()  # of activations, where it is entered
        self._ran: set[str] = set()

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Context in which every forward pass of ``model`` is edited; the model itself is left alone."""
        level = pass_level()

        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module is model and pass_level() == level:  # a copy of the model made meanwhile copies its hooks
                self._forget()  # the pass before may have broken off
                self.begun(args)

        def end(module: nn.Module, *_: object) -> None:
            if module is model and pass_level() == level:
                self._require_all()
                self._forget()  # what reads an output after the pass reads it for other ends

        with ExitStack() as stack:
            if self.at == ACTIVATION:
                stack.enter_context(self._follower)
            stack.enter_context(LayerCalls(model, self._visit, linear=True))
            stack.callback(model.register_forward_pre_hook(begin).remove)
            stack.callback(model.register_forward_hook(end).remove)
            yield

    def _visit(self, call: LayerCall) -> Tensor:
        """Run one layer of the model; what it returns flows on."""
        if call.name not in self.channels:
            return call.run()
        output = self.run(call)
        dim, expected = CHANNEL_DIM[call.kind], self.channels[call.name]
        if expected is not None:
            require_channels(call.name, expected, output.shape[dim])
        self._ran.add(call.name)
        if self.edit is None:
            return output
        edit = partial(self.edit, call.name, dim)
        if self.at == OUTPUT:
            return edit(output)
        self._follower.follow(output, call.name, edit)
        return output

    def _require_all(self) -> None:
        """A forward pass is done: every layer must have run, and have been edited."""
        for layer in self.channels:
            if layer not in self._ran:
                raise UserError(
                    f"layer {layer!r} did not run in the model's forward pass: use the model that the route was made "
                    "for, uncompiled, or leave the layer out (layers=...)"
                )
            if self.at == ACTIVATION and layer not in self._follower.reached:
                raise UserError(
                    f"no activation follows layer {layer!r}, so there is none to edit: "
                    'use at="output", or leave the layer out (layers=...)'
                )

    def _forget(self) -> None:
        self._ran.clear()
        self._follower.clear()
