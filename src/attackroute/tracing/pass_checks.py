"""Whether a forward pass keeps samples apart, as far as its operations show it by themselves."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.weak import WeakIdKeyDictionary

from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall, LayerCalls
from attackroute.core.table import plural
from attackroute.tracing.rules.operation import RULES, aten, overloads, tensors_in
from attackroute.tracing.rules.pointwise import BATCH_NORMS

_FOREIGN = ("CppNode", "torch::jit")  # in the names of autograd functions of extensions in C++, and of scripted ones


class GraphWalk:
    """Walks the graph of a forward pass back from each route layer's output to the outputs of earlier ones.

    ``sources`` are the direct predecessors of every layer that has run, by name, and those of them that a path through
    a custom autograd function joins. ``outputs``, if they are to be kept, are what linear maps gave.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.sources: dict[str, tuple[frozenset[str], frozenset[str]]] = {}
        self.outputs: dict[str, Tensor] = {}
        self._keep = keep
        self._outputs: dict[Any, str] = {}

    def visit(self, name: str, kind: str, output: Tensor) -> Tensor:
        """Note the predecessors of a layer that has just run; returns the output that is to flow on."""
        if self._keep and kind == "linear":
            self.outputs[name] = output.detach().clone()
        reached, passed = self._walk([output.grad_fn])
        self.sources[name] = reached, self._walk(passed)[0]
        if output.grad_fn is None:  # behind a detach: what follows depends on the output all the same
            output = output.requires_grad_().clone()
        elif output._is_view():  # what is done to it in place would go past its place in the graph
            output = output.clone()
        self._outputs[output.grad_fn] = name
        return output

    def reached_from(self, output: object) -> frozenset[str]:
        """Layers on which an output of the model depends directly."""
        logits = getattr(output, "logits", output)
        return self._walk([logits.grad_fn])[0] if isinstance(logits, Tensor) else frozenset()

    def _walk(self, start: Iterable[Any]) -> tuple[frozenset[str], list[Any]]:
        """Names of the outputs below some nodes of the graph, and the custom functions on the way."""
        seen, reached, custom = set[Any](), set[str](), list[Any]()
        todo = [node for node in start if node is not None]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            name = self._outputs.get(node)
            if name is not None:
                reached.add(name)
                continue
            if isinstance(node, BackwardCFunction) or any(kind in node.name() for kind in _FOREIGN):
                custom.append(node)
            todo += [following for following, _ in node.next_functions if following is not None]
        return frozenset(reached), custom


_ROWS_MIXED = (
    "so there are no numbers per image: let the model keep the images in the first dimension (batch_first=True), or "
    "leave linear maps out"
)
LOGITS = ""  # stands for the model's answer among the names of layers
STATISTIC = (
    "the model's answer for one image depends on another image of the batch (a statistic over the batch?), "
    "so there is no route per sample: give the model statistics of its own"
)
_ROUNDING = 1e-3  # of an output's largest value; other samples, where they come in, change outputs by much more


def require_rows_apart(
    model: nn.Module, images: Tensor, layers: Container[str] | None = None, seen: Mapping[str, Tensor] | None = None
) -> None:
    """Check, on a frozen model, that one image's rows of the outputs of linear maps do not depend on another image.

    They would where positions stand first, and where windows of several images take turns in the batch. The first and
    the last image run together, and once more with either of them changed. ``layers`` leaves out the other linear maps;
    ``seen`` is what the two give as they are (:func:`with_logits`), where that is known.

    Raises:
        UserError: They do in some layer, or a layer has not one row per image.
    """
    pair, kind = torch.cat([images[:1], images[-1:]]).detach(), images.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype
    rounding = max(_ROUNDING, 16 * torch.finfo(dtype).eps)  # attention in steps rounds otherwise than fused
    before = _outputs(model, pair, layers) if seen is None else seen
    for row in (0, 1):
        other = pair.clone()
        other[1 - row] = 1 - pair[1 - row].flip(-1)
        after = _outputs(model, other, layers)
        for layer, rows in before.items():
            change = (rows[row] - after.get(layer, rows)[row]).abs().amax()
            if change > rounding * rows[row].abs().amax():
                mixed = f"the rows of one image in the output of layer {layer!r} depend on another image, {_ROWS_MIXED}"
                raise UserError(STATISTIC if layer == LOGITS else mixed)


def _outputs(model: nn.Module, images: Tensor, layers: Container[str] | None) -> dict[str, Tensor]:
    """The outputs of linear maps for two images, by layer, and the logits."""
    outputs: dict[str, Tensor] = {}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        if call.kind == "linear" and (layers is None or call.name in layers):
            if len(output) != 2:
                raise UserError(f"layer {call.name!r} gives {plural(len(output), 'row')} for 2 images, {_ROWS_MIXED}")
            outputs[call.name] = output.detach().clone()
        return output

    with torch.no_grad(), LayerCalls(model, visit, linear=True):
        answer = model(images.clone())
    return with_logits(answer, outputs)


def with_logits(answer: object, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers' outputs for two images, behind the model's answer where that has a row for each."""
    logits = getattr(answer, "logits", answer)
    rows = {LOGITS: logits.detach()} if isinstance(logits, Tensor) and logits.shape[:1] == (2,) else {}
    return {**rows, **outputs}


_OPERAND = {aten.addmm.default: 1, aten.mm.default: 0, aten.convolution.default: 0}
"""Which argument holds samples; another one that depends on the images would take each sample to all of them."""

_REDUCTIONS = frozenset(overloads("mean.dim", "sum.dim_IntList"))
_SIGNS = (f"{name}{end}.Tensor" for name in ("add", "sub", "mul", "div") for end in ("", "_"))
_BROADCASTING = frozenset(overloads(*_SIGNS, "copy_"))

_BATCH_NORMS = frozenset(overloads(*BATCH_NORMS))


class Separation:
    """Watches the operations of a forward pass on images that require grad.

    Attributes:
        proven: Whether every operation so far on what depends on the images works on each sample by itself. False
            says only that it is not known.
    """

    def __init__(self, samples: int) -> None:
        self.proven = True
        self._samples = samples
        self._detached: Any = WeakIdKeyDictionary()

    def watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take note of an ATen operation that has run."""
        if not self.proven:
            return
        read = tensors_in((args, tuple(kwargs.values())))
        dependent = [value for value in read if value.requires_grad]
        if (
            func is aten.detach.default and dependent
        ):  # autograd detaches what it saves; what else is done with it is not followed
            self._detached[output] = True
        elif any(value in self._detached for value in read):
            self.proven = False
        elif dependent:
            self.proven = torch.is_grad_enabled() and self._apart(func, args, dependent, output)

    def _apart(self, func: Any, args: tuple[Any, ...], dependent: list[Tensor], output: Any) -> bool:
        results = tensors_in(output[0] if func in _BATCH_NORMS else output)  # the others are statistics
        if not all(tensor.shape[:1] == (self._samples,) for tensor in (*dependent, *results)):
            return False
        if func in _BROADCASTING:
            return all(value.ndim == results[0].ndim for value in dependent)
        if func is not aten.cat.default and any(value is not args[_OPERAND.get(func, 0)] for value in dependent):
            return False
        return func in _OPERAND or (func in RULES and not _meets_samples(func, args, dependent[0].ndim))


def _meets_samples(func: Any, args: tuple[Any, ...], ndim: int) -> bool:
    """Whether an operation that has a rule works, or may work, along the first dimension."""
    if func in _REDUCTIONS:
        return not args[1] or 0 in (dim % ndim for dim in args[1])
    if func is aten.constant_pad_nd.default:
        return len(args[1]) >= 2 * ndim
    if func in _BATCH_NORMS:
        training = BATCH_NORMS[func.overloadpacket.__name__][3]
        return training is not None and bool(args[training])
    return func is aten.as_strided_.default  # a rearrangement of any kind
