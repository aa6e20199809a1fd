"""The penalty on the loss gradients of a route's neurons (Eqs. (9)-(12)).

With v = sign(g) held fixed, the parameters' gradient of ``L_g = sum |g|`` is that of ``sum v * g``, the derivative of
the loss along v at the route's outputs. Double backward gives it exactly. Two ordinary passes approximate it by the
difference quotient ``(L(Z + eps v) - L(Z)) / eps``, the second on the same side of every kink as the first: a network
of ReLUs and max pooling is linear in pieces, and a quotient across pieces is no derivative, however small the step.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from attackroute.core.checks import check_logits
from attackroute.core.errors import UserError
from attackroute.core.layers import CHANNEL_DIM, FunctionCalls, LayerCall, LayerCalls
from attackroute.core.model_state import RepeatablePass
from attackroute.hardening.objective import summed, task_loss
from attackroute.hardening.settings import APPROXIMATE, EXACT, METHODS, require_known
from attackroute.routes.layer_map import require_channels, require_model
from attackroute.routes.route import Route

_RELU = frozenset({functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})
_LEAKY = frozenset({functional.leaky_relu, functional.leaky_relu_})
_POOL = frozenset({functional.max_pool2d, torch.max_pool2d})
_aten, _nn = torch.ops.aten, torch._C._nn
_HARD_SIGMOID = frozenset({functional.hardsigmoid, _nn.hardsigmoid, _aten.hardsigmoid, _aten.hardsigmoid.default})
_HARD_SIGMOID_ = frozenset({_nn.hardsigmoid_, _aten.hardsigmoid_, _aten.hardsigmoid_.default})
_WITHOUT_DERIVATIVE = ("torch::autograd::NotImplemented", "torch::autograd::Error")
_KINKED = _RELU | _LEAKY | _POOL | {functional.relu6}


class GradientPenalty:
    """``L_g``, the sum of ``|dL/dZ|`` over a route's neurons and their positions, averaged over the batch (Eq. (10)).

    For use in any training loop::

        penalty = GradientPenalty(model, route)
        with penalty.watch():
            logits = model(images)
        loss = functional.cross_entropy(logits, labels) + lam * penalty(logits, labels)

    L is the cross entropy (Eq. (9)) and Z a layer's own output, before normalisation and activation. The mode of the
    model is the caller's. Where samples meet each other in a layer, as in batch norm in training, ``dL/dZ`` is that of
    the batch's mean loss, through these meetings too; elsewhere the penalty is the mean over the samples of theirs.

    Args:
        model: Any network; call it as a whole inside :meth:`watch`, or through a wrapper.
        route: The neurons, as traced; linear maps may be among the layers.
        method: ``"exact"`` is a double backward, for which attention runs without its fused kernels.
            ``"finite-difference (approximation)"`` gives the same value, with a gradient from a second pass at outputs
            moved by ``eps`` and held on the same side of its kinks (ReLU, ReLU6, leaky ReLU, max pooling): cheaper,
            most of all in :meth:`with_task`. Its error falls with ``eps`` until rounding takes over; the default
            leaves 0.3 % in float32 on a trained VGG-16.
        eps: The approximation's step, as a share of the root mean square of the route's outputs, in the layer where
            that is smallest.

    Raises:
        UserError: The model cannot carry the route, the method is unknown, or ``eps`` is not above 0.
    """

    def __init__(self, model: nn.Module, route: Route, *, method: str = EXACT, eps: float = 1e-4) -> None:
        require_known("method", method, METHODS)
        if not (isinstance(eps, (int, float)) and 0 < eps < float("inf")):
            raise UserError(f"eps {eps} is not a step above 0; the usual one is 1e-4")
        require_model(route.channels, model)
        self._model, self._route, self._method, self._eps = model, route, method, float(eps)
        self._chosen = [layer for layer in route if len(route.indices[layer])]
        if not self._chosen:
            raise UserError("the route has no neuron, so there is no gradient to punish")
        self._on_route = cache(lambda layer, device: route[layer].to(device))
        self._off_route = cache(lambda layer, device: (~route.mask(layer)).nonzero().flatten().to(device))
        self._watched: _Watched | None = None
        self._is_checked = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context for the forward pass whose gradients are to be punished; of several passes, the last one counts."""

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is self._model:  # a copy of the model made meanwhile copies its hooks
                kinks.sides = []
                repeat = RepeatablePass(module, args, kwargs) if self._method == APPROXIMATE else None
                self._watched = _Watched(repeat, kinks)

        self._watched = None
        kinks = Kinks()
        handle = self._model.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            with (
                # first, since what is entered after LayerCalls does not see the attention that it opens up
                FunctionCalls(_twice_differentiable) if self._method == EXACT else nullcontext(),
                LayerCalls(self._model, self._visit, linear=True),
                kinks if self._method == APPROXIMATE else nullcontext(),
            ):
                yield
        finally:
            handle.remove()

    def __call__(self, logits: Any, labels: Tensor) -> Tensor:
        """``L_g`` of the pass that was watched, a scalar that can be differentiated.

        Args:
            logits: The pass's output ``(N, classes)``, or an object whose ``logits`` these are, with its graph.
            labels: ``(N,)``.

        Raises:
            UserError: No pass was watched, it had no gradient, a layer of the route did not run in it, or, with the
                exact method, an operation of the model has no second derivative.
        """
        watched = self._taken()
        task = _task(logits, labels)
        exact = self._method == EXACT
        gradients, _ = watched.gradients(task, keep_graph=True, create_graph=exact)
        value = self._sum(watched, gradients)
        if exact:
            if not self._is_checked:
                _require_second_derivatives(value)
                self._is_checked = True
            return value
        moved, eps = self._moved(watched, gradients, labels)
        quotient = (moved - task) / eps
        return quotient + (value - quotient).detach()  # the value is known exactly, only the gradient is not

    def with_task(self, logits: Any, labels: Tensor, lam: float) -> tuple[Tensor, Tensor]:
        """The cross entropy plus ``lam * L_g`` (Eq. (11)) in one: two ordinary steps' work with the approximation.

        The approximation reads the gradients at the neurons off the very pass that gives the parameters theirs. Its
        result can be differentiated once, with respect to the model's parameters alone.

        Args:
            logits: The output ``(N, classes)`` of the pass that was watched.
            labels: ``(N,)``.
            lam: The penalty's weight.

        Returns:
            The whole loss, and ``L_g`` by itself, detached.

        Raises:
            UserError: As for a call.
        """
        if self._method == EXACT:
            value = self(logits, labels)
            return _task(logits, labels) + lam * value, value.detach()
        watched = self._taken()
        task = _task(logits, labels)
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        gradients, plain = watched.gradients(task, parameters)
        value = self._sum(watched, gradients)
        moved, eps = self._moved(watched, gradients, labels)
        factor = lam / eps
        rest = task.detach() + lam * value - factor * moved.detach()
        return _GivenGradients.apply(rest, 1 - factor, plain, *parameters) + factor * moved, value

    def _visit(self, call: LayerCall) -> Tensor:
        output = call.run()
        watched = self._watched
        if watched is None or call.name not in self._chosen:
            return output
        dim = CHANNEL_DIM[call.kind]
        require_channels(call.name, self._route.channels[call.name], output.shape[dim])
        if watched.shifts is not None:  # the second pass of the approximation
            shift = watched.shifts.pop(call.name, None)
            return output if shift is None else output + shift.to(output.dtype)
        if not torch.is_grad_enabled():
            raise UserError("the watched pass runs without gradients; call the model outside no_grad")
        if torch.is_autocast_enabled(output.device.type):
            if self._method == APPROXIMATE:
                raise UserError(f"autocast is too coarse for the difference quotient; use method={EXACT!r}")
            if torch.get_autocast_dtype(output.device.type) == torch.float16:
                raise UserError("float16 loses the small gradients that are punished; use bfloat16, or no autocast")
        if not output.requires_grad:  # all before it is frozen
            output = output.requires_grad_().clone()  # a copy, since what follows may work in place
        watched.dims[call.name] = dim
        # an edge of the graph, since the tensor itself may be written to by what follows
        watched.edges[call.name] = get_gradient_edge(output)
        if self._method == APPROXIMATE:
            chosen = output.detach().index_select(dim, self._on_route(call.name, output.device))
            watched.squares.append(chosen.square().mean(dtype=_wide(output)))
        return output

    def _sum(self, watched: _Watched, gradients: dict[str, Tensor]) -> Tensor:
        """Eq. (10) for a batch: the gradients are of the mean loss, so their sum is the mean over samples."""
        sums = []
        for name, gradient in gradients.items():
            chosen = gradient.index_select(watched.dims[name], self._on_route(name, gradient.device))
            sums.append(chosen.abs().sum(dtype=_wide(gradient)))
        return summed(sums)

    def _moved(self, watched: _Watched, gradients: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss at outputs moved by eps along the signs of the gradients, and eps."""
        assert watched.repeat is not None
        squares = [square.to(watched.squares[0].device) for square in watched.squares]
        eps = self._eps * torch.stack(squares).min().sqrt()
        if not eps > 0:
            raise UserError("the outputs of a route layer are zero or NaN, so there is no step for the approximation")
        shifts = {}
        for name, gradient in gradients.items():
            # a new tensor, since two layers whose outputs are added share their gradient
            shift = gradient.sign().mul_(eps.to(gradient.device))
            shifts[name] = shift.index_fill_(watched.dims[name], self._off_route(name, gradient.device), 0)
        self._watched = _Watched(None, watched.kinks, shifts)
        try:
            with LayerCalls(self._model, self._visit, linear=True), watched.kinks.held():
                return _task(watched.repeat.run(), labels), eps
        finally:
            self._watched = None

    def _taken(self) -> _Watched:
        """What was watched; each pass serves once."""
        watched, self._watched = self._watched, None
        if watched is None:
            raise UserError("no forward pass was watched: call the model inside penalty.watch(), once for each penalty")
        require_ran(self._chosen, watched.edges)
        return watched


@dataclass(eq=False)
class _Watched:
    """What a forward pass left behind, by layer; the approximation alone has a second pass, its kinks and shifts."""

    repeat: RepeatablePass | None
    kinks: Kinks
    shifts: dict[str, Tensor] | None = None  # what the second pass is to add to the layers' outputs
    edges: dict[str, GradientEdge] = field(default_factory=dict)  # where the outputs stand in the graph
    dims: dict[str, int] = field(default_factory=dict)  # of the channels
    squares: list[Tensor] = field(default_factory=list)  # mean squares of the route's outputs

    def gradients(
        self, task: Tensor, parameters: Sequence[Tensor] = (), *, keep_graph: bool = False, create_graph: bool = False
    ) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
        """Eq. (9) at every layer that the loss depends on, and the gradients of parameters."""
        if not task.requires_grad:
            raise UserError("the logits have no gradient: call the model outside no_grad, and do not detach its output")
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            task,
            [*self.edges.values(), *parameters],  # type: ignore[arg-type]
            retain_graph=keep_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
        outputs = zip(self.edges, gradients, strict=False)
        at_layers = {name: gradient for name, gradient in outputs if gradient is not None}
        if not at_layers:
            raise UserError("the logits do not depend on any layer of the route: are they those of the watched pass?")
        return at_layers, gradients[len(self.edges) :]


class Kinks(FunctionCalls):
    """Context that notes the kinks of a pass: ReLU, ReLU6, leaky ReLU and 2-D max pooling.

    Attributes:
        sides: In the order of the calls, where each activation's output was positive (and below 6), or the winners of
            each pooling.
    """

    def __init__(self) -> None:
        super().__init__(self._note)
        self.sides: list[Tensor] = []

    def _note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _POOL:
            output, winners = functional.max_pool2d_with_indices(*args[:6], **{**kwargs, "return_indices": True})
            self.sides.append(winners)
            return (output, winners) if kwargs.get("return_indices", False) else output
        output = func(*args, **kwargs)
        if func in _KINKED:
            positive = output.detach() > 0
            self.sides.append(positive.logical_and_(output.detach() < 6) if func is functional.relu6 else positive)
        return output

    def held(self) -> FunctionCalls:
        """Context in which another pass of the same network stays on these sides."""
        sides = iter(self.sides)

        def hold(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if func not in _KINKED:
                return func(*args, **kwargs)
            values = args[0] if args else kwargs["input"]
            side = next(sides, None)
            if side is None:
                raise UserError("the model ran other operations on the same batch a second time: use the exact method")
            if func in _POOL:
                winners = values.flatten(2).gather(2, side.flatten(2)).view(side.shape)
                return (winners, side) if kwargs.get("return_indices", False) else winners
            if func in _LEAKY:
                slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
                return torch.where(side, values, values * slope)
            if func is functional.relu6:
                return torch.where(side, values, values.detach().clamp(0, 6))
            return values * side

        return FunctionCalls(hold)


class _GivenGradients(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor, gradients: Sequence[Tensor | None], *_: Tensor) -> Tensor:
        """The value; the parameters' gradients are kept, each to be multiplied by the factor."""
        ctx.factor, ctx.gradients = factor, gradients
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """The gradients, as they were given."""
        factor = ctx.factor * gradient
        return (None, None, None, *(None if given is None else given * factor for given in ctx.gradients))


def _task(output: object, labels: Tensor) -> Tensor:
    """The cross entropy, averaged over the batch."""
    logits = check_logits(output, labels, "batch")
    return task_loss(logits, labels.to(logits.device))


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _twice_differentiable(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute attention and hard sigmoid of operations with a second derivative, the same up to rounding."""
    if func is functional.scaled_dot_product_attention:  # the fused kernels' backward has no derivative
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)
    if func in _HARD_SIGMOID_:
        return _hard_sigmoid(*args, **{**kwargs, "inplace": True})
    return _hard_sigmoid(*args, **kwargs) if func in _HARD_SIGMOID else func(*args, **kwargs)


def _hard_sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    values = functional.relu6(input + 3) / 6
    return input.copy_(values) if inplace else values


def _require_second_derivatives(value: Tensor) -> None:
    """Look in a gradient's graph for what raises an error only when it is differentiated."""
    nodes = [value.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is not None:
            if node.name() in _WITHOUT_DERIVATIVE:
                raise UserError(
                    "the network has an operation without a second derivative (in PyTorch, or in a function of its "
                    f"own); take the method {APPROXIMATE!r} (--approximate)"
                )
            further = {parent for parent, _ in node.next_functions} - seen
            seen |= further
            nodes += further


def require_ran(layers: Iterable[str], ran: Container[str]) -> None:
    """Raise a `UserError` naming the first of a route's layers that did not run in a watched pass."""
    for layer in layers:
        if layer not in ran:
            raise UserError(
                f"layer {layer!r} of the route did not run in the model's forward pass: use the model that the route "
                "was made for, uncompiled, or leave the layer out (route.restrict)"
            )
