"""The penalty on the weights between a route's neurons in adjacent layers (Eqs. (13)-(15))."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from attackroute.core.batches import batches
from attackroute.core.errors import UserError
from attackroute.core.layers import FunctionCalls, LayerCall, LayerCalls, write_count
from attackroute.core.model_state import frozen
from attackroute.hardening.objective import summed
from attackroute.routes.route import Route
from attackroute.tracing.connections import Connections

_PROBE = 2
_WEIGHT = "weight"


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
            punished = route if layers is None else route.restrict(layers)
            masks = {layer: mask for layer in punished if (mask := connections.between(route, layer)).any()}
            if not masks:
                raise UserError(
                    "no layer of the route follows another one on it, with channels apart in between, so no weight "
                    "joins two of its neurons; take a route of adjacent layers, or the gradient penalty"
                )
            norms = _following_norms(model, probe) if folded else {}
            sources = _weights(model, probe, masks)
        self._model = model
        self._sums = [_LayerSum(sources[layer], mask, norms.get(layer)) for layer, mask in masks.items()]

    def __call__(self) -> Tensor:
        """``L_w`` of the model as it now is, a scalar that can be differentiated."""
        return summed(layer.value(self._model) for layer in self._sums)


@dataclass(eq=False)
class _LayerSum:
    """One layer's part of Eq. (13)."""

    weight: Callable[[], Tensor]  # gives the layer's kernel
    mask: Tensor  # which of its entries count, (outputs, inputs)
    gain: Callable[[nn.Module], Tensor] | None  # of the batch norm to fold in
    _placed: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def value(self, model: nn.Module) -> Tensor:
        """The sum, in float32 or wider."""
        weight = self.weight()
        key = weight.device, torch.promote_types(weight.dtype, torch.float32)
        if key not in self._placed:
            rows = self.mask.any(1).nonzero().flatten()
            self._placed[key] = rows.to(weight.device), self.mask[rows].to(*key)
        rows, entries = self._placed[key]
        sizes = weight.index_select(0, rows).abs().flatten(2) if weight.ndim > 2 else weight[rows].abs()[..., None]
        sums = sizes.mul(entries[..., None]).sum((1, 2))
        if self.gain is not None:
            sums = sums * self.gain(model).to(sums).index_select(0, rows)
        total: Tensor = sums.sum()
        return total


def _weights(model: nn.Module, images: Tensor, layers: Container[str]) -> dict[str, Callable[[], Tensor]]:
    """For each layer, how to get the weight that it executes, with its graph to the parameters."""
    parameters = {value: name for name, value in model.named_parameters()}
    modules = dict(model.named_modules(remove_duplicate=False))
    weights: dict[str, Callable[[], Tensor]] = {}

    def visit(call: LayerCall) -> Tensor:
        if call.name in layers:
            name = parameters.get(call.weight)  # type: ignore[call-overload]
            if name is not None:
                weights[call.name] = partial(model.get_parameter, name)
            else:  # its module computes it from parameters
                module = modules.get(call.name.partition("#")[0], model)
                weights[call.name] = partial(_computed, module)
                value = weights[call.name]()
                if not (isinstance(value, Tensor) and torch.equal(value, call.weight)):
                    raise UserError(
                        f"layer {call.name!r} computes its weight elsewhere than in a parameter or its module's "
                        "weight, so it cannot be punished; leave the layer out (route.restrict)"
                    )
        return call.run()

    with torch.no_grad(), LayerCalls(model, visit, linear=True):
        model(images.clone())
    return weights


def _computed(module: nn.Module) -> Any:
    """A module's weight as its next pass will have it, by a parametrisation or by a hook of pruning or older norms."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == _WEIGHT:
            return hook.apply_mask(module)
        if isinstance(hook, WeightNorm) and hook.name == _WEIGHT:
            return hook.compute_weight(module)
        if isinstance(hook, SpectralNorm) and hook.name == _WEIGHT:
            return hook.compute_weight(module, do_power_iteration=False)
    return getattr(module, _WEIGHT, None)


def _gain(weight: str | None, variance: str, eps: float, model: nn.Module) -> Tensor:
    """A batch norm's ``|gamma / sigma|``, ``(C,)``, with sigma as in eval mode; gamma can be differentiated.

    Given are the names of its parameter gamma, None for a gain of one, and of its buffer of running variances.
    """
    sigma = (model.get_buffer(variance).detach() + eps).sqrt()
    return 1 / sigma if weight is None else model.get_parameter(weight).abs() / sigma


def _following_norms(model: nn.Module, images: Tensor) -> dict[str, Callable[[nn.Module], Tensor]]:
    """The gains of batch norms that read a layer's output and nothing else, by layer, as a frozen model runs on images.

    Raises:
        UserError: A batch norm has running variances, or a gain, that are not the model's own.
    """
    # by output, held, so that no other tensor takes its identity: a layer, and how its output was when it was made
    layers: dict[Tensor, tuple[str, int, Tensor]] = {}
    norms: dict[str, Callable[[nn.Module], Tensor]] = {}
    parameters = {value: name for name, value in model.named_parameters()}
    buffers = {value: name for name, value in model.named_buffers()}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        layers[output] = call.name, write_count(output), output.clone()
        return output

    def layer_of(values: Tensor) -> str | None:
        """The layer whose output these are, unless something, such as an activation, has worked on it in place."""
        layer, writes, before = layers.get(values, (None, 0, values))
        return layer if write_count(values) == writes and torch.equal(values, before) else None

    def see(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is nn.functional.batch_norm:
            bound = inspect.signature(func).bind(*args, **kwargs)
            bound.apply_defaults()
            gamma, variance = bound.arguments["weight"], bound.arguments["running_var"]
            layer = layer_of(bound.arguments["input"])
            if layer is not None and variance is not None:
                if variance not in buffers or not (gamma is None or gamma in parameters):
                    raise UserError(
                        f"the batch norm after layer {layer!r} takes a gain or variances that are not the model's own, "
                        "so they cannot be folded into its kernel; pass folded=False"
                    )
                name = None if gamma is None else parameters[gamma]
                norms[layer] = partial(_gain, name, buffers[variance], float(bound.arguments["eps"]))
        return func(*args, **kwargs)

    with torch.no_grad(), LayerCalls(model, visit, linear=True), FunctionCalls(see):
        model(images.clone())
    return norms
