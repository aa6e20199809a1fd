"""The penalty on the weights between a route's neurons in adjacent layers (Eqs. (13)-(15))."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attackroute.core.batches import batches
from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall, LayerCalls
from attackroute.core.model_state import frozen
from attackroute.hardening.folding import FollowingNorm, following_norms
from attackroute.routes.route import Route
from attackroute.tracing.connections import Connections

_PROBE = 2


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
            ``Connections.of_route(model, images, route).joined(route)`` gives those that can stay.

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
    ) -> None:
        with frozen(model), torch.inference_mode(False):
            probe, _ = next(batches(model, images[:_PROBE], _PROBE))
            connections = Connections.of_route(model, probe, route)
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
        self._terms = [_Term.of(sources[layer], mask, norms.get(layer)) for layer, mask in masks.items()]

    def __call__(self) -> Tensor:
        """``L_w`` of the model as it now is, a scalar that can be differentiated."""
        parts = [term.value(self._model) for term in self._terms]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()


@dataclass(eq=False)
class _Term:
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
    def of(cls, weight: Callable[[], Tensor], mask: Tensor, norm: FollowingNorm | None) -> _Term:
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


def _weights(model: nn.Module, images: Tensor, wanted: Container[str]) -> dict[str, Callable[[], Tensor]]:
    """For each layer, how to get the weight that it executes, with its graph to the parameters."""
    parameters = {value: name for name, value in model.named_parameters()}
    found: dict[str, Callable[[], Tensor]] = {}

    def visit(call: LayerCall) -> Tensor:
        if call.name in wanted:
            name = parameters.get(call.weight)  # type: ignore[call-overload]
            if name is not None:
                found[call.name] = lambda: model.get_parameter(name)
            else:
                found[call.name] = _computed(model, call)
        return call.run()

    with torch.no_grad(), LayerCalls(model, visit, linear=True):
        model(images.clone())
    return found


def _computed(model: nn.Module, call: LayerCall) -> Callable[[], Tensor]:
    """A weight that its module computes from parameters, as a parametrisation does."""
    module = dict(model.named_modules(remove_duplicate=False)).get(call.name.partition("#")[0], model)
    own = getattr(module, "weight", None)
    if not isinstance(own, Tensor) or own.shape != call.weight.shape or not torch.equal(own, call.weight):
        raise UserError(
            f"layer {call.name!r} computes its weight elsewhere than in a parameter or its module's weight, "
            "so it cannot be punished; leave the layer out (route.restrict)"
        )
    return lambda: module.weight  # type: ignore[return-value]
