"""From a layer's output to its activation: tensors followed through normalisation while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from attackroute.errors import UserError

Edit = Callable[[Tensor], Tensor]
"""Takes an activation's output and returns what flows on instead, of the same shape."""


def _functions(*names: str) -> frozenset[Any]:
    """Every spelling of these functions, in place or not, as PyTorch's function modes see them."""
    spellings = [name + suffix for name in names for suffix in ("", "_")]
    return frozenset(getattr(home, name) for home in (torch, F, Tensor) for name in spellings if hasattr(home, name))


_ACTIVATIONS = _functions(
    *("celu", "clamp", "clamp_max", "clamp_min", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh"),
    *("leaky_relu", "logsigmoid", "mish", "prelu", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus"),
    *("softshrink", "softsign", "tanh", "tanhshrink", "threshold"),
)
# Normalisation, which keeps every channel in its place, copies, and what other interventions and measurements do to a
# layer's output before it flows on.
_CARRIERS = _functions(
    *("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"),
    *("clone", "contiguous", "detach", "index_copy", "index_fill", "requires_grad", "to"),
)
_READINGS = (bool, int, torch.Size, torch.dtype, torch.device, torch.layout, RemovableHandle, Node)


class Follower(TorchFunctionMode):
    """Context that follows tensors to the elementwise activation that reads them next, and edits its output.

    Between the two only normalisation and copies may stand. Whatever else reads a followed tensor would carry it past
    the edit, so it is an error; reading its shape and the like is none.

    Attributes:
        reached: Names of the followed tensors whose activation ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reached: set[str] = set()
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
        read = [value for value in _tensors((args, kwargs)) if value in self._followed]
        result = func(*args, **kwargs)
        if not read or isinstance(result, _READINGS) or (result is None and func.__name__ == "__get__"):
            return result
        name, edit = self._followed[read[0]]
        alone = len(read) == 1 and read[0] is (args[0] if args else kwargs.get("input"))
        if alone and func in _ACTIVATIONS:
            self.reached.add(name)
            return edit(result)
        if alone and func in _CARRIERS:
            self.follow(result, name, edit)
            return result
        raise UserError(
            f"layer {name!r} meets {getattr(func, '__name__', func)!r} before any activation, so there is none "
            'to edit: use at="output", or leave the layer out (layers=...)'
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
