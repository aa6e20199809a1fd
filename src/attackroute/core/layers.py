"""Route layers as the model executes them: their names, and a place to read or replace their outputs.

A route layer is a *call* of a 2-D convolution (or of a linear map, when asked), not a module: functional calls,
lambdas and reused modules all count. A call bears the name of the innermost module whose forward is running, as in
``model.named_modules()``, without what ``torch.compile`` and ``DataParallel`` put before it; the k-th call under one
name, k >= 2, is ``name#k``. Calls made by the root module itself are named ``model``.
"""

from __future__ import annotations

import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from attackroute.core.errors import UserError

OUTPUT, ACTIVATION = "output", "activation"
"""Places at which a layer's channels are read and changed: its own output, or that of the activation that follows."""

CHANNEL_DIM = {"conv2d": -3, "linear": -1}
"""Where channels stand in the output of each kind of layer, with or without samples before them."""

_CONVOLUTIONS = frozenset(
    {
        torch.conv2d,
        torch.convolution,
        torch.ops.aten.conv2d.default,
        torch.ops.aten.conv2d.padding,
        torch.ops.aten.convolution.default,
    }
)
_GENERAL = frozenset({torch.convolution, torch.ops.aten.convolution.default})
_TRANSPOSED_ARGUMENT = 6  # of a general convolution
_ATTENTION = nn.functional.multi_head_attention_forward
_OPENED = FunctionType(  # the same function, except that it does not hand itself to the mode that is to look inside it
    _ATTENTION.__code__, {**vars(nn.functional), "has_torch_function": lambda _: False}, argdefs=_ATTENTION.__defaults__
)
_OPENED.__kwdefaults__ = _ATTENTION.__kwdefaults__

_COMPILED, _PARALLEL = re.compile(r"\._orig_mod(?=\.|$)"), re.compile(r"^\.module(?=\.|$)")
_LEVEL: ContextVar[int] = ContextVar("pass_level", default=0)
_ATTENDED: ContextVar[int | None] = ContextVar("attended", default=None)
"""Size of the batch of the multi-head attention under way, where positions come first; shared by nested contexts."""


@dataclass(frozen=True)
class LayerCall:
    """One execution of a route layer.

    Attributes:
        name: The layer's name, unique within one forward pass.
        kind: ``"conv2d"`` or ``"linear"``.
        run: Executes the layer, with another weight if one is given, and returns its output ``Z``.
        folded: Whether rows were gathered into samples: right only if the model keeps each sample's rows together.
    """

    name: str
    kind: str
    input: Tensor
    weight: Tensor
    run: Callable[..., Tensor]
    folded: bool = False

    def of_images(self, samples: int) -> bool:
        """Whether a call in a pass of images that require grad is on them: a linear map may be on parameters alone."""
        rows = not self.folded and self.input.shape[:1] == (samples,)
        return self.kind != "linear" or rows or self.input.requires_grad


def two_of(images: Tensor) -> Tensor:
    """Two images that show a model's structure, a batch's first and last.

    Two even of one: in a batch of one a gate looks like a constant factor.
    """
    return torch.cat([images[:1], images[-1:]])


def unwrapped(model: nn.Module, name: str) -> str:
    """The name of a module, parameter or buffer without what ``torch.compile`` and ``DataParallel`` put before it."""
    name = _COMPILED.sub("", f".{name}")
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        name = _PARALLEL.sub("", name)
    return name[1:]


@contextmanager
def aside() -> Iterator[None]:
    """Context of forward passes that nothing entered before it sees, such as a look at the network amid a pass."""
    token = _LEVEL.set(_LEVEL.get() + 1)
    try:
        yield
    finally:
        _LEVEL.reset(token)


def pass_level() -> int:
    """How many :func:`aside` contexts are open: what was entered at another level leaves a pass alone."""
    return _LEVEL.get()


@dataclass(frozen=True)
class _Layout:
    """Where the samples are in what a linear map reads, if not simply in the first dimension.

    ``attended`` is the batch size of the multi-head attention around the call, whose tensors have positions first;
    ``folded``, whether each sample has several rows of the batch.
    """

    samples: int
    attended: int | None
    folded: bool

    @classmethod
    def of(cls, values: Tensor, samples: int | None, attended: int | None) -> _Layout | None:
        """The layout of ``values``; None where they have one row per sample, or cannot be brought to that."""
        if values.ndim < 2 or not samples:
            return None
        if attended is not None and math.prod(values.shape[:-1]) % attended:
            return None
        rows = values.shape[0] if attended is None else attended
        if rows % samples or (attended is None and rows == samples):
            return None
        return cls(samples, attended, rows != samples)

    def rows(self, values: Tensor) -> Tensor:
        """``values`` as ``(samples, ..., C)``."""
        if self.attended is not None:
            values = values.reshape(-1, self.attended, values.shape[-1]).transpose(0, 1)
        return values.unflatten(0, (self.samples, -1)) if self.folded else values

    def restored(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Undo :meth:`rows`, for the original shape without its last dimension."""
        values = rows.flatten(0, 1) if self.folded else rows
        if self.attended is not None:
            values = values.transpose(0, 1).contiguous()  # what follows may take a view
        return values.reshape(*shape, rows.shape[-1])


class LayerCalls(TorchFunctionMode):
    """Context in which every route-layer call of ``model`` passes through ``visit``.

    ``visit`` returns the tensor that flows on, usually ``call.run()``. Calls outside the model's own forward are left
    alone, so that contexts of different models nest. What torch.compile has compiled runs eagerly meanwhile.
    """

    def __init__(self, model: nn.Module, visit: Callable[[LayerCall], Tensor], *, linear: bool = False) -> None:
        super().__init__()
        self._model, self._visit, self._linear = model, visit, linear
        self._names: dict[nn.Module, str] = {}
        self._running: list[str] = []
        self._calls: dict[str, int] = {}
        self._stack = ExitStack()
        self._level = pass_level()
        self._samples: int | None = None

    def __enter__(self) -> LayerCalls:
        # two global hooks, since two for every module would take longer to set than a small network to run
        self._names = {module: unwrapped(self._model, name) or "model" for name, module in self._model.named_modules()}
        self._stack.callback(register_module_forward_pre_hook(self._enter_module).remove)
        self._stack.callback(register_module_forward_hook(self._leave_module, always_call=True).remove)
        self._stack.enter_context(_without_compilation())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            super().__exit__(*exc)  # type: ignore[no-untyped-call]
        finally:
            self._stack.close()

    def _enter_module(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self._names.get(module)
        if name is None or pass_level() != self._level:
            return
        if module is self._model:
            self._running.clear()
        if not self._running:  # a new forward pass: names count from one again
            self._calls.clear()
            self._samples = args[0].shape[0] if args and isinstance(args[0], Tensor) and args[0].ndim else None
        self._running.append(name)

    def _leave_module(self, module: nn.Module, *_: object) -> None:
        if self._running and module in self._names and pass_level() == self._level:
            self._running.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        watched = bool(self._running) and pass_level() == self._level
        if watched and func is _ATTENTION:
            return self._attention(args, kwargs)
        kind = self._kind(func, args, kwargs) if watched else None
        if kind is None:
            return func(*args, **kwargs)
        name = self._running[-1]
        count = self._calls[name] = self._calls.get(name, 0) + 1
        if kind == "linear" and not self._linear:  # counted all the same, so that names do not depend on ``linear``
            return func(*args, **kwargs)
        label = name if count == 1 else f"{name}#{count}"
        images, weight, *rest = (*args, *(kwargs[key] for key in ("input", "weight")[len(args) :]))
        options = {key: value for key, value in kwargs.items() if key not in ("input", "weight")}
        layout = _Layout.of(images, self._samples, _ATTENDED.get()) if kind == "linear" else None
        rows = images if layout is None else layout.rows(images)

        def run(weight: Tensor = weight) -> Tensor:
            return func(rows, weight, *rest, **options)  # type: ignore[no-any-return]

        call = LayerCall(label, kind, input=rows, weight=weight, run=run, folded=layout is not None and layout.folded)
        if layout is None:
            return self._visit(call)
        token = _ATTENDED.set(None)  # what looks at the call next finds its samples first
        try:
            return layout.restored(self._visit(call), images.shape[:-1])
        finally:
            _ATTENDED.reset(token)

    def _attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """PyTorch's multi-head attention, with this mode looking at what it calls."""
        query = args[0] if args else kwargs["query"]
        token = _ATTENDED.set(query.shape[1] if query.ndim == 3 else None)
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            return _OPENED(*args, **kwargs)
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]
            _ATTENDED.reset(token)

    def _kind(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if func is nn.functional.linear:
            return "linear"
        if func not in _CONVOLUTIONS:
            return None
        if func in _GENERAL:
            transposed = kwargs.get("transposed", args[_TRANSPOSED_ARGUMENT] if len(args) > _TRANSPOSED_ARGUMENT else 0)
            source = args[0] if args else kwargs["input"]
            if transposed or source.ndim != 4:  # one image without a batch
                return None
        return "conv2d"


def others_visit_linear_maps() -> bool:
    """Whether a :class:`LayerCalls` entered before the one whose visit is under way changes linear maps too."""
    return any(
        isinstance(mode, LayerCalls) and mode._linear and mode._level == pass_level()
        for mode in _get_current_function_mode_stack()
    )


@contextmanager
def _without_compilation() -> Iterator[None]:
    """Compiled code does not pass through Python: where torch.compile was used, run what it was given."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds, and nothing is compiled without it
        yield
        return
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):  # type: ignore[no-untyped-call]
        # the wrapper counts as a module of its own, which the names allow for
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks", UserWarning)
        yield


def require_gradients(name: str) -> None:
    """Check that the layer under way can be differentiated."""
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise UserError(
            f"layer {name!r} runs under no_grad or inference_mode inside the model, where PyTorch knows no "
            "derivative: switch that off, or activation checkpointing, for tracing"
        )


class FunctionCalls(TorchFunctionMode):
    """Context in which ``call(func, args, kwargs)`` takes the place of every call of a PyTorch function."""

    def __init__(self, call: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]) -> None:
        super().__init__()
        self._call = call

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._call(func, args, kwargs or {})


def write_count(tensor: Tensor) -> int:
    """How often a tensor was written to; tensors made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
