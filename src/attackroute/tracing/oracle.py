"""Eqs. (1)-(5) by brute force, for influence and for noise: slow, short, and there to check the fast engine against.

Every route layer's output is cut out of the autograd graph while the model runs, so that a gradient between two
recorded outputs runs along direct paths only. Then each element of each output costs one vector-Jacobian product.

For noise every neuron is cleaned by itself: the network runs on the attacked images once more with all route layers'
outputs put in from a plain pass, that neuron's from the clean images. What then differs at a later layer's input is
carried on by the layer itself, with the absolute values of its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attackroute.core.errors import UserError

Loss = Callable[[Tensor, Tensor], Tensor]

_ATTENTION = nn.functional.multi_head_attention_forward
_OPEN_ATTENTION = FunctionType(  # the same function, which hands itself to a mode unless it is told that there is none
    _ATTENTION.__code__, {**vars(nn.functional), "has_torch_function": lambda _: False}, argdefs=_ATTENTION.__defaults__
)
_OPEN_ATTENTION.__kwdefaults__ = _ATTENTION.__kwdefaults__


@dataclass(frozen=True)
class OracleTrace:
    """What Eqs. (1)-(5) give for N samples, in the dtype and on the device of the layers' outputs.

    Attributes:
        layers: Route layers' names in execution order.
        edges: Adjacent pairs (source, target), ordered by target, then by source, in execution order.
        influence: Eqs. (1)-(2) for each edge, (N, C_target, C_source); for noise what each neuron's adds to the next
            layer's.
        scores: The metric that top-k ranked, Eqs. (3)-(5), for each layer, (N, C).
        masks: The critical neurons of each layer, bool (N, C).
    """

    layers: tuple[str, ...]
    edges: tuple[tuple[str, str], ...]
    influence: dict[tuple[str, str], Tensor]
    scores: dict[str, Tensor]
    masks: dict[str, Tensor]


class _Call(NamedTuple):
    """One call of a route layer, both (N, C, ...)."""

    output: Tensor  # Z as a function of the earlier leaves
    leaf: Tensor  # the same values, cut from the graph: what the rest of the network depends on


def trace(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    clean: Tensor | None = None,
    width: float = 0.2,
    loss: Loss | None = None,
    linear: bool = False,
    deviations: Mapping[str, Tensor] | None = None,
) -> OracleTrace:
    """Critical attacking routes of single samples, Eqs. (1)-(5).

    Args:
        model: Maps x to logits (N, K), each sample on its own. It runs in eval mode and is left as it was.
        x: Samples, (N, ...).
        y: Labels, int (N,); None takes the model's own predictions.
        clean: The same samples before an attack, where routes follow the noise between the two; None for influence.
        width: Share of each layer's neurons that is critical, in (0, 1].
        loss: Maps (logits, y) to losses per sample, (N,); None is cross entropy, scaled as `_cross_entropy_seed` says.
        linear: Whether linear layers are route layers too.
        deviations: For each layer (C,), of which everything is in units; None for raw values.

    Raises:
        UserError: If an argument is out of range, or the model has no route layer or no logits.
    """
    if not 0 < width <= 1:
        raise UserError(f"width is {width}: give a share of the channels above 0 and at most 1")
    every_call, logits = _run(model, x, linear)
    objective, cotangent = _objective(logits, _labels(logits, y, x.shape[0]), loss)
    calls = _needed(every_call, objective, cotangent)
    edges = [(source, target) for target in calls for source in _sources(calls, target)]
    before: dict[str, Tensor] = {}
    influences: dict[tuple[str, str], Tensor] = {}
    if clean is None:
        for target in calls:
            influences |= _influences(calls, [source for source, end in edges if end == target], target)
    else:
        before = {name: call.leaf.detach() for name, call in _run(model, clean, linear)[0].items()}
        influences = _noise_influences(model, x, every_call, before, edges, linear)
    if deviations is not None:
        for source, target in influences:
            # noise comes in its source's own units, whatever these are
            own = torch.ones(()) if clean is not None else deviations[source]
            factor = (own / deviations[target].unsqueeze(1)).nan_to_num(0, 0, 0)
            influences[source, target] = influences[source, target] * factor.to(x)
    scores: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name in reversed(calls):
        successors = [target for source, target in edges if source == name]
        if successors:  # Eq. (5)
            critical = [influences[name, target].masked_fill(~masks[target].unsqueeze(2), 0) for target in successors]
            scores[name] = torch.stack([matrix.sum(dim=1) for matrix in critical]).sum(dim=0)
        else:  # Eqs. (3)-(4); nothing where the loss does not depend on Z
            leaf = calls[name].leaf
            (gradient,) = _gradients(objective, [leaf], cotangent)
            gradient = torch.zeros_like(leaf) if gradient is None else gradient
            size = gradient.abs() if clean is None else (leaf.detach() - before[name]) * gradient
            scores[name] = _per_channel(size)
            if deviations is not None and clean is None:
                scores[name] = scores[name] * deviations[name].to(size)
        masks[name] = _top(scores[name], width)
    scores, masks = ({name: values[name] for name in calls} for values in (scores, masks))
    return OracleTrace(tuple(calls), tuple(edges), influences, scores, masks)


def _needed(calls: dict[str, _Call], objective: Tensor, cotangent: Tensor) -> dict[str, _Call]:
    """Without the layers on which the loss does not depend, directly or through others: they are not on the route."""
    gradients = _gradients(objective, [call.leaf for call in calls.values()], cotangent)
    needed = {name for name, gradient in zip(calls, gradients, strict=True) if gradient is not None}
    for target in reversed(calls):
        if target in needed:
            needed.update(_sources(calls, target))
    return {name: call for name, call in calls.items() if name in needed}


def influence(model: nn.Module, x: Tensor, source: str, target: str, *, linear: bool = False) -> Tensor:
    """Influence of each neuron of `source` on each of `target`, Eqs. (1)-(2): (N, C_target, C_source).

    Arguments as for `trace`; the model may return anything.

    Raises:
        UserError: If a name is unknown, or the two layers are not adjacent.
    """
    calls, _ = _run(model, x, linear)
    for name in (source, target):
        if name not in calls:
            raise UserError(f"no route layer is named {name!r}: choose from {', '.join(calls)}")
    if source not in _sources(calls, target):
        raise UserError(f"{source!r} is not adjacent to {target!r}: its sources are {_sources(calls, target)}")
    return _influences(calls, [source], target)[source, target]


def _sources(calls: Mapping[str, _Call], target: str) -> list[str]:
    """Names of the layers whose leaves the target's output depends on."""
    output = calls[target].output
    gradients = _gradients(output, [call.leaf for call in calls.values()], torch.ones_like(output))
    return [name for name, gradient in zip(calls, gradients, strict=True) if gradient is not None]


def _influences(calls: Mapping[str, _Call], sources: Sequence[str], target: str) -> dict[tuple[str, str], Tensor]:
    """Eqs. (1)-(2) by edge: sum over z in channel j, s in channel i of |dz/ds|, (N, C_target, C_source)."""
    output, leaves = calls[target].output, [calls[source].leaf for source in sources]
    samples, channels = output.shape[:2]
    elements = output[0].numel()
    sums = [leaf.new_zeros(samples, channels, leaf.shape[1], dtype=torch.float64) for leaf in leaves]
    for z in range(elements if sources else 0):
        # Samples do not interact, so one product differentiates the element z of every sample.
        cotangent = output.new_zeros(samples, elements)
        cotangent[:, z] = 1
        gradients = _gradients(output, leaves, cotangent.view(output.shape))
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total[:, z // (elements // channels)] += _per_channel(gradient.abs())
    return {(source, target): total.to(output.dtype) for source, total in zip(sources, sums, strict=True)}


def _noise_influences(
    model: nn.Module,
    attacked: Tensor,
    calls: Mapping[str, _Call],
    before: Mapping[str, Tensor],
    edges: Sequence[tuple[str, str]],
    linear: bool,
) -> dict[tuple[str, str], Tensor]:
    """Eqs. (1)-(2) with an attack's noise in place of ones, by edge: (N, C_target, C_source).

    ``before`` are the outputs of the calls on the clean samples, as ``calls`` are those on the attacked ones.
    """
    outputs = {name: call.leaf.detach() for name, call in calls.items()}
    inputs = _Replay.of(model, attacked, outputs, {}, linear).inputs
    influences: dict[tuple[str, str], Tensor] = {}
    for source in dict.fromkeys(source for source, _ in edges):
        targets = {target: inputs[target] for start, target in edges if start == source}
        columns: dict[str, list[Tensor]] = {target: [] for target in targets}
        for channel in range(outputs[source].shape[1]):
            cleaned = outputs[source].clone()
            cleaned[:, channel] = before[source][:, channel]
            replay = _Replay.of(model, attacked, {**outputs, source: cleaned}, targets, linear)
            for target in targets:
                columns[target].append(_per_channel(replay.carried[target]))
        for target in targets:
            influences[source, target] = torch.stack(columns[target], dim=2)
    return influences


def _objective(logits: Tensor, y: Tensor, loss: Loss | None) -> tuple[Tensor, Tensor]:
    """What Eq. (3) differentiates, and the cotangent to start with."""
    if loss is None:
        return logits, _cross_entropy_seed(logits, y)
    with torch.inference_mode(False), torch.enable_grad():
        losses = loss(logits, y)
    if losses.shape != y.shape:
        raise UserError(f"loss returned shape {tuple(losses.shape)}: return one loss per sample, {tuple(y.shape)}")
    return losses, torch.ones_like(losses)


def _cross_entropy_seed(logits: Tensor, y: Tensor) -> Tensor:
    """Gradient of cross entropy at the logits, divided by 1 - p_y > 0: q - onehot(y), q the softmax without class y.

    softmax - onehot loses its label entry once p_y rounds to 1; this does not, and ranks the neurons alike.
    """
    label = nn.functional.one_hot(y, logits.shape[1]).bool()
    others = logits.detach().double().masked_fill(label, -torch.inf).softmax(dim=1)
    return (others - label.double()).to(logits.dtype)


def _top(scores: Tensor, width: float) -> Tensor:
    """Top-k: a mask of the max(1, round(width * C)) highest scores of each row; ties go to the lower index."""
    keep = max(1, round(width * scores.shape[1]))
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for sample, row in enumerate(scores.tolist()):
        mask[sample, sorted(range(len(row)), key=lambda c: (-row[c], c))[:keep]] = True
    return mask


def _per_channel(values: Tensor) -> Tensor:
    """Sum over everything but samples and channels, (N, C)."""
    return values.reshape(*values.shape[:2], -1).sum(dim=2)


def _gradients(output: Tensor, leaves: Sequence[Tensor], cotangent: Tensor) -> Sequence[Tensor | None]:
    """Vector-Jacobian product of `output` for each leaf; None where it does not depend on the leaf."""
    if not output.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(output, leaves, cotangent, retain_graph=True, allow_unused=True)


def _labels(logits: Any, y: Tensor | None, samples: int) -> Tensor:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != samples or logits.shape[1] < 2:
        returned = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the model returned {returned}: wrap it to return logits, ({samples}, 2 or more classes)")
    if y is None:
        return logits.detach().argmax(dim=1)
    if y.shape != (samples,) or y.is_floating_point() or not bool(((y >= 0) & (y < logits.shape[1])).all()):
        raise UserError(f"y must hold {samples} integer labels from 0 to {logits.shape[1] - 1}")
    return y.to(logits.device, torch.int64)


def _run(model: nn.Module, x: Tensor, linear: bool) -> tuple[dict[str, _Call], Any]:
    """Runs the model once: the route layers' calls by name, in execution order, and what the model returned."""
    recorder = _Recorder(x.shape[0], linear)
    with torch.inference_mode(False), torch.enable_grad(), _prepared(model, recorder.running), recorder:
        result = model(x.detach().clone().requires_grad_().clone())
    if not recorder.calls:
        raise UserError("the model called no route layer: give a network with 2-D convolutions, or set linear=True")
    return recorder.calls, result


class _Recorder(TorchFunctionMode):
    """Cuts route layers' outputs out of the graph; blind inside scripted code."""

    def __init__(self, samples: int, linear: bool) -> None:
        super().__init__()
        self.running: list[str] = []  # modules whose forward runs, the innermost last
        self.calls: dict[str, _Call] = {}
        self._counts: dict[str, int] = {}
        self._samples, self._linear = samples, linear
        self._attending = 0  # batch size of the multi-head attention under way

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION and args[0].dim() == 3:
            self._attending = args[0].shape[1]
            with self:
                result = _OPEN_ATTENTION(*args, **kwargs)
            self._attending = 0
            return result
        output = func(*args, **kwargs)
        if func is torch.convolution:
            transposed = kwargs["transposed"] if "transposed" in kwargs else args[6]
            return output if transposed or output.dim() != 4 else self._cut(output, 1)
        if func is torch.conv2d:
            return self._cut(output, 1)
        if func is not nn.functional.linear:
            return output
        read = args[0] if args else kwargs["input"]
        if self._linear and self._of_images(read):
            return self._cut_linear(output)
        self._name()  # no route layer, but counted: names do not depend on what is recorded
        return output

    def _of_images(self, read: Tensor) -> bool:
        """Whether a linear map reads something of the images, and not parameters alone."""
        return read.requires_grad or bool(self._attending) or read.shape[0] == self._samples

    def _cut_linear(self, output: Tensor) -> Tensor:
        """Cuts a linear map's output in the shape (samples, ..., C); windows may be folded into the batch."""
        rows, shape = output, output.shape
        if self._attending:  # (positions, batch, C), or the first two as one
            rows = output.reshape(-1, self._attending, shape[-1]).transpose(0, 1)
        folded = rows.shape[0] != self._samples and rows.shape[0] % self._samples == 0
        if folded:
            rows = rows.reshape(self._samples, rows.shape[0] // self._samples, *rows.shape[1:])
        cut = self._cut(rows, rows.dim() - 1)
        if folded:
            cut = cut.flatten(0, 1)
        return (cut.transpose(0, 1).contiguous() if self._attending else cut).reshape(shape)

    def _name(self) -> str:
        name, module = self._next_name(), self.running[-1] or "model"
        self._counts[module] = self._counts.get(module, 0) + 1
        return name

    def _next_name(self) -> str:
        module = self.running[-1] or "model"
        count = self._counts.get(module, 0) + 1
        return module if count == 1 else f"{module}#{count}"

    def _cut(self, output: Tensor, axis: int) -> Tensor:
        """Records the output with its neurons in dimension `axis`; returns a copy, as the next op may be in place."""
        name = self._name()
        unbatched = axis == 0 or (output.dim() == 3 and axis == 1)  # (C,) or (C, H, W)
        if unbatched or output.shape[0] != self._samples:
            raise UserError(f"{name!r} gave {tuple(output.shape)}: dimension 0 must be the {self._samples} samples")
        leaf = output.detach().movedim(axis, 1).requires_grad_()
        self.calls[name] = _Call(output.movedim(axis, 1), leaf)
        return leaf.movedim(1, axis).clone()


class _Replay(_Recorder):
    """One forward pass with the route layers' outputs put in, and their inputs measured.

    Attributes:
        inputs: What each layer read.
        carried: For the layers whose former inputs are given, what the change is worth to their neurons, (N, C, ...).
    """

    def __init__(self, samples: int, linear: bool, given: Mapping[str, Tensor], former: Mapping[str, Tensor]) -> None:
        super().__init__(samples, linear)
        self.inputs: dict[str, Tensor] = {}
        self.carried: dict[str, Tensor] = {}
        self._given, self._former = given, former
        self._last = ""
        self._measuring = False

    @classmethod
    def of(
        cls, model: nn.Module, x: Tensor, given: Mapping[str, Tensor], former: Mapping[str, Tensor], linear: bool
    ) -> _Replay:
        """Run the model on x with the outputs that are given."""
        replay = cls(len(x), linear, given, former)
        with torch.inference_mode(False), torch.no_grad(), _prepared(model, replay.running), replay:
            model(x.detach().clone())
        return replay

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        self._last = ""
        convolves = func in (torch.convolution, torch.conv2d)
        read = None
        if convolves or func is nn.functional.linear:
            read = (args[0] if args else kwargs["input"]).clone()
        output = super().__torch_function__(func, types, args, kwargs)
        if read is None or not self._last:
            return output
        name = self._last
        self.inputs[name] = read
        if name in self._former:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            options = {key: value for key, value in kwargs.items() if key not in ("input", "weight", "bias")}
            noise = (read - self._former[name]).abs()
            carried = func(noise, weight.abs(), None, *args[3:], **options)
            self._measuring = True
            _ = self._cut(carried, 1) if convolves else self._cut_linear(carried)
            self._measuring = False
        return output

    def _of_images(self, read: Tensor) -> bool:
        return self._next_name() in self._given

    def _cut(self, output: Tensor, axis: int) -> Tensor:
        if self._measuring:
            self.carried[self._last] = output.movedim(axis, 1)
            return output
        self._last = self._name()
        return self._given[self._last].movedim(1, axis).clone()


@contextmanager
def _prepared(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Eval mode, no gradients for parameters, and in `running` the modules whose forward runs, the innermost last."""

    def leave(*_: object) -> None:
        running.pop()

    with ExitStack() as undo:
        for name, module in model.named_modules():
            undo.callback(setattr, module, "training", module.training)
            module.training = False
            enter = module.register_forward_pre_hook(lambda *_, name=name: running.append(name), prepend=True)
            undo.callback(enter.remove)
            undo.callback(module.register_forward_hook(leave, always_call=True).remove)
        for parameter in model.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        yield
