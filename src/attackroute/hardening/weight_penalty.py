"""The penalty on the weights between a route's neurons in adjacent layers (Eqs. (13)-(15))."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attackroute.core.batches import batches
from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall, LayerCalls
from attackroute.core.model_state import frozen
from attackroute.routes.route import Route
from attackroute.tracing.connections import Connections

_PROBE = 2
_BATCH_NORM = inspect.signature(nn.functional.batch_norm)


class WeightPenalty:
    """``L_w``, the sum of ``||w_l^{m,n}||_1`` over pairs of route neurons m, n of adjacent layers (Eq. (13)).

    For use in any training loop::

        penalty = WeightPenalty(model, route, images)
        loss = functional.cross_entropy(model(batch), labels) + lam * penalty()

    A batch norm that follows a layer undoes any factor on the layer's kernel. So the printed sum can be made as small
    as one likes by shrinking kernels, and the network stays the same function. By default the kernel is the *folded*
    one, ``W * |gamma / sigma|`` with gamma and the running variance of the batch norm that reads the layer's output:
    what the network in eval mode does, whatever the scale of W. Its gradient reaches W and gamma; sigma is held fixed.
    A layer without such a batch norm counts with its own kernel either way.

    An entry that reads the sum of several layers' channels, as in a residual stream, counts once.

    Args:
        model: Any network.
        route: The neurons, as traced; linear maps may be among the layers.
        images: One or more images ``(n, ...)``, which show how the layers are joined.
        folded: False for the kernels as they are, as printed in Eq. (13).
        layers: The layers whose kernels count; None for all of the route's. Where attention or normalisation over
            channels stands before a layer, no weight joins two neurons, and the layer must be left out:
            ``Connections.joined`` gives those that can stay.
        connections: How the layers are joined, where ``Connections.of_route(model, images, route)`` was asked before;
            None asks it.

    Raises:
        UserError: The route does not fit the model, no two of its layers are adjacent, channels mix before one of
            ``layers``, or a layer's weight is not the model's own.
    """

    def __init__(
        self,
        model: nn.Module,
        route: Route,
        images: Tensor,
        *,
        folded: bool = True,
        layers: Iterable[str] | None = None,
        connections: Connections | None = None,
    ) -> None:
        with frozen(model), torch.inference_mode(False):
            probe, _ = next(batches(model, images[:_PROBE], _PROBE))
            connections = connections or Connections.of_route(model, probe, route)
            masks = {
                layer: connections.between(route, layer)
                for layer in (route if layers is None else route.restrict(layers))
            }
            masks = {layer: mask for layer, mask in masks.items() if mask.any()}
            if not masks:
                raise UserError(
                    "no layer of the route follows another one on it, with channels apart in between, so no weight "
                    "joins two of its neurons; take a route of adjacent layers, or the gradient penalty"
                )
            norms = following_norms(model, probe) if folded else {}
            sources = _weights(model, probe, masks)
        self._model = model
        self._sums = [_LayerSum.of(sources[layer], mask, norms.get(layer)) for layer, mask in masks.items()]

    def __call__(self) -> Tensor:
        """``L_w`` of the model as it now is, a scalar that can be differentiated."""
        parts = [layer.value(self._model) for layer in self._sums]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()


@dataclass(eq=False)
class _LayerSum:
    """One layer's part of Eq. (13).

    Attributes:
        weight: Gives the layer's kernel.
        rows: The layer's neurons that read a route neuron, ``(k,)``.
        entries: Which inputs of these rows count, ``(k, inputs)``.
        norm: The batch norm to fold in.
    """

    weight: Callable[[], Tensor]
    rows: Tensor
    entries: Tensor
    norm: FollowingNorm | None
    _placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, weight: Callable[[], Tensor], mask: Tensor, norm: FollowingNorm | None) -> _LayerSum:
        rows = mask.any(1).nonzero().flatten()
        return cls(weight, rows, mask[rows], norm)

    def value(self, model: nn.Module) -> Tensor:
        """The sum, in float32 or wider."""
        weight = self.weight()
        key = weight.device, torch.promote_types(weight.dtype, torch.float32)
        if key not in self._placed:
            self._placed[key] = self.rows.to(weight.device), self.entries.to(*key)
        rows, entries = self._placed[key]
        sizes = weight.index_select(0, rows).abs().flatten(2) if weight.ndim > 2 else weight[rows].abs()[..., None]
        sums = sizes.mul(entries[..., None]).sum((1, 2))
        if self.norm is not None:
            sums = sums * self.norm.gain(model).to(sums).index_select(0, rows)
        total: Tensor = sums.sum()
        return total


def _weights(model: nn.Module, images: Tensor, layers: Container[str]) -> dict[str, Callable[[], Tensor]]:
    """For each layer, how to get the weight that it executes, with its graph to the parameters."""
    parameters = {value: name for name, value in model.named_parameters()}
    weights: dict[str, Callable[[], Tensor]] = {}

    def visit(call: LayerCall) -> Tensor:
        if call.name in layers:
            name = parameters.get(call.weight)  # type: ignore[call-overload]
            if name is not None:
                weights[call.name] = lambda: model.get_parameter(name)
            else:
                weights[call.name] = _computed(model, call)
        return call.run()

    with torch.no_grad(), LayerCalls(model, visit, linear=True):
        model(images.clone())
    return weights


def _computed(model: nn.Module, call: LayerCall) -> Callable[[], Tensor]:
    """A weight that its module computes from parameters, as a parametrisation does."""
    module = dict(model.named_modules(remove_duplicate=False)).get(call.name.partition("#")[0], model)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != call.weight.shape or not torch.equal(weight, call.weight):
        raise UserError(
            f"layer {call.name!r} computes its weight elsewhere than in a parameter or its module's weight, "
            "so it cannot be punished; leave the layer out (route.restrict)"
        )
    return lambda: module.weight  # type: ignore[return-value]


@dataclass(frozen=True)
class FollowingNorm:
    """A batch norm that reads a layer's output and nothing else.

    Attributes:
        weight: Name of the parameter gamma; None for a gain of one.
        variance: Name of the buffer of running variances.
        eps: What is added to the variance.
    """

    weight: str | None
    variance: str
    eps: float

    def gain(self, model: nn.Module) -> Tensor:
        """``|gamma / sigma|``, ``(C,)``, with sigma as in eval mode; gamma can be differentiated."""
        sigma = (model.get_buffer(self.variance).detach() + self.eps).sqrt()
        return 1 / sigma if self.weight is None else model.get_parameter(self.weight).abs() / sigma


def following_norms(model: nn.Module, images: Tensor) -> dict[str, FollowingNorm]:
    """Run a frozen model on a few images and find the batch norms that read a layer's output directly.

    Args:
        model: The model.
        images: ``(n, ...)`` on the model's device.

    Returns:
        For each layer's name, its batch norm; layers without one are left out.

    Raises:
        UserError: A batch norm has running variances, or a gain, that are not the model's own.
    """
    outputs: list[tuple[Tensor, str]] = []
    norms: dict[str, FollowingNorm] = {}
    parameters = {value: name for name, value in model.named_parameters()}
    buffers = {value: name for name, value in model.named_buffers()}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        outputs.append((output, call.name))  # held, so that no other tensor takes its identity
        return output

    def see(images: Tensor, arguments: dict[str, Any]) -> None:
        for output, layer in outputs:
            if output is images and arguments["running_var"] is not None:
                gamma, variance = arguments["weight"], arguments["running_var"]
                if variance not in buffers or not (gamma is None or gamma in parameters):
                    raise UserError(
                        f"the batch norm after layer {layer!r} takes a gain or variances that are not the model's own, "
                        "so they cannot be folded into its kernel; pass folded=False"
                    )
                name = None if gamma is None else parameters[gamma]
                norms[layer] = FollowingNorm(name, buffers[variance], float(arguments["eps"]))

    with torch.no_grad(), LayerCalls(model, visit, linear=True), _BatchNorms(see):
        model(images.clone())
    return norms


class _BatchNorms(TorchFunctionMode):
    """Shows every call of batch norm to ``see``."""

    def __init__(self, see: Callable[[Tensor, dict[str, Any]], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.batch_norm:
            given = _BATCH_NORM.bind(*args, **(kwargs or {}))
            given.apply_defaults()
            self._see(given.arguments["input"], given.arguments)
        return func(*args, **(kwargs or {}))
