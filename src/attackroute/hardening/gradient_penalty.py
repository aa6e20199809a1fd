"""The penalty on the loss gradients of a route's neurons (Eqs. (9)-(12)), whose own gradient is a double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from attackroute.core.checks import check_logits
from attackroute.core.errors import UserError, require_known
from attackroute.core.layers import CHANNEL_DIM, FunctionCalls, LayerCall, LayerCalls
from attackroute.hardening.objective import summed, task_loss
from attackroute.routes.layer_map import require_channels, require_model
from attackroute.routes.route import Route
from attackroute.tracing.config import RAW, UNITS

_aten, _nn = torch.ops.aten, torch._C._nn
_HARD_SIGMOID = frozenset({functional.hardsigmoid, _nn.hardsigmoid, _aten.hardsigmoid, _aten.hardsigmoid.default})
_HARD_SIGMOID_ = frozenset({_nn.hardsigmoid_, _aten.hardsigmoid_, _aten.hardsigmoid_.default})
_WITHOUT_DERIVATIVE = ("torch::autograd::NotImplemented", "torch::autograd::Error")


class WatchingPenalty:
    """A penalty on what a route's neurons do in a forward pass that is watched, for use in any training loop.

    Args:
        model: Any network; call it as a whole inside :meth:`watch`, or through a wrapper.
        route: The neurons, as traced; linear maps may be among the layers.
        units: ``"raw"``, or ``"std"`` for the neurons' standard deviations over the batch and its positions, which are
            differentiated too, since else the penalty would fall by scaling kernels up.

    Raises:
        UserError: The model cannot carry the route, the route has no neuron, or the units are unknown.
    """

    def __init__(self, model: nn.Module, route: Route, *, units: str = RAW) -> None:
        require_model(route.channels, model)
        require_known("units", units, UNITS)
        self._model, self._route, self._units = model, route, units
        self._chosen = [layer for layer in route if len(route.indices[layer])]
        if not self._chosen:
            raise UserError("the route has no neuron, so there is nothing to punish")
        self._on_route = cache(lambda layer, device: route[layer].to(device))
        self._watched: dict[str, Any] | None = None  # of the route's layers in the pass, by name

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Context for the forward pass that is punished; of several passes, the last one counts."""

        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module is self._model:  # a copy of the model made meanwhile copies its hooks
                self._begin(args, kwargs)

        self._watched = None
        handle = self._model.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            with LayerCalls(self._model, self._visit, linear=True):
                yield
        finally:
            handle.remove()

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pass begins with these arguments."""
        self._watched = {}

    def _visit(self, call: LayerCall) -> Tensor:
        """Run a layer, and note what is punished of it."""
        output = call.run()
        if self._watched is None or call.name not in self._chosen:
            return output
        require_channels(call.name, self._route.channels[call.name], output.shape[CHANNEL_DIM[call.kind]])
        if not torch.is_grad_enabled():
            raise UserError("the watched pass runs without gradients; call the model outside no_grad")
        self._watched[call.name], output = self._noted(call, output)
        return output

    def _noted(self, call: LayerCall, output: Tensor) -> tuple[Any, Tensor]:
        """What is watched of a layer's output, and the output that flows on."""
        raise NotImplementedError

    def _sizes(self, chosen: Tensor, dim: int) -> Tensor | None:
        """Deviations of chosen channels over a batch, to be broadcast against it; None for raw units."""
        if self._units == RAW:
            return None
        others = [axis for axis in range(chosen.ndim) if axis != dim % chosen.ndim]
        # no slope at zero, where a channel does not vary
        return chosen.var(others, correction=0, keepdim=True).clamp(min=torch.finfo(chosen.dtype).tiny).sqrt()

    def _taken(self) -> dict[str, Any]:
        """What was watched; each pass serves once."""
        watched, self._watched = self._watched, None
        if watched is None:
            raise UserError("no forward pass was watched: call the model inside penalty.watch(), once for each penalty")
        for layer in self._chosen:
            if layer not in watched:
                raise UserError(
                    f"layer {layer!r} of the route did not run in the model's forward pass: use the model that the "
                    "route was made for, uncompiled, or leave the layer out (route.restrict)"
                )
        return watched


class GradientPenalty(WatchingPenalty):
    """``L_g``, the sum of ``|dL/dZ|`` over a route's neurons and their positions, averaged over the batch (Eq. (10)).

    For use in any training loop::

        penalty = GradientPenalty(model, route)
        with penalty.watch():
            logits = model(images)
        loss = functional.cross_entropy(logits, labels) + lam * penalty(logits, labels)

    L is the cross entropy (Eq. (9)) and Z a layer's own output, before normalisation and activation. The mode of the
    model is the caller's. Where samples meet each other in a layer, as in batch norm in training, ``dL/dZ`` is that of
    the batch's mean loss, through these meetings too; elsewhere the penalty is the mean over the samples of theirs.
    Model, route and errors are those of :class:`WatchingPenalty`.
    """

    _is_checked = False  # whether the first value's graph can be differentiated

    @contextmanager
    def watch(self) -> Iterator[None]:
        """See :class:`WatchingPenalty`."""
        # first, since what is entered after LayerCalls does not see the attention that it opens up
        with FunctionCalls(_twice_differentiable), super().watch():
            yield

    def __call__(self, logits: Any, labels: Tensor) -> Tensor:
        """``L_g`` of the pass that was watched, a scalar that can be differentiated.

        Args:
            logits: The pass's output ``(N, classes)``, or an object whose ``logits`` these are, with its graph.
            labels: ``(N,)``.

        Raises:
            UserError: No pass was watched, it had no gradient, a layer of the route did not run in it, or an operation
                of the model has no second derivative.
        """
        watched = self._taken()
        logits = check_logits(logits, labels, "batch")
        task = task_loss(logits, labels.to(logits.device))
        if not task.requires_grad:
            raise UserError("the logits have no gradient: call the model outside no_grad, and do not detach its output")
        edges = [edge for _, edge, _ in watched.values()]
        sums = []
        gradients = torch.autograd.grad(task, edges, create_graph=True, allow_unused=True)  # Eq. (9)
        for (name, (dim, _, sizes)), gradient in zip(watched.items(), gradients, strict=True):
            if gradient is not None:
                chosen = gradient.index_select(dim, self._on_route(name, gradient.device))
                chosen = chosen if sizes is None else chosen * sizes
                sums.append(chosen.abs().sum(dtype=torch.promote_types(gradient.dtype, torch.float32)))
        if not sums:
            raise UserError("the logits do not depend on any layer of the route: are they those of the watched pass?")
        value = summed(sums)  # the gradients are of the mean loss, so this is the mean over samples
        if not self._is_checked:
            _require_second_derivatives(value)
            self._is_checked = True
        return value

    def _noted(self, call: LayerCall, output: Tensor) -> tuple[Any, Tensor]:
        kind = output.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            raise UserError("float16 loses the small gradients that are punished; use bfloat16, or no autocast")
        if not output.requires_grad:  # all before it is frozen
            output = output.requires_grad_().clone()  # a copy, since what follows may work in place
        dim = CHANNEL_DIM[call.kind]
        sizes = None
        if self._units != RAW:  # of a copy, since the tensor itself may be written to by what follows
            sizes = self._sizes(output.index_select(dim, self._on_route(call.name, output.device)), dim)
        return (dim, get_gradient_edge(output), sizes), output


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
                    "own), which the gradient penalty needs; take the weight penalty"
                )
            further = {parent for parent, _ in node.next_functions} - seen
            seen |= further
            nodes += further
