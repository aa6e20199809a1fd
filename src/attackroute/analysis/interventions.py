"""Interventions: what the model answers when channels of its route layers are changed while it runs.

Every intervention is a context. The model itself is not changed: outputs are replaced, never written to, so that
contexts nest, also on one layer, and gradients flow through what is left. On one layer the context entered last has
the last word. The mode (train or eval), autocast and grad mode are the caller's. Call the model as a whole inside, not
its submodules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.analysis.sites import LayerEdits
from attackroute.core.errors import UserError
from attackroute.core.layers import OUTPUT, LayerCall
from attackroute.core.model_state import explained, spared_buffers
from attackroute.routes.layer_map import require_model
from attackroute.routes.route import Route
from attackroute.tracing.connections import Connections
from attackroute.tracing.recorder import is_recording


class OtherRowsError(UserError):
    """A forward pass is on other images than those whose outputs are put into it."""


@contextmanager
def deactivate(
    model: nn.Module, route: Route, layers: Iterable[str] | None = None, *, at: str = OUTPUT
) -> Iterator[None]:
    """Context in which every forward pass of ``model`` has the route's channels set to zero.

    A zero at a layer's own output ``Z`` equals a kernel row and a bias of zero. Batch norm then makes a constant of
    it, which may pass the activation; a zero after the activation is silence.

    Args:
        model: Any network.
        route: The channels, as traced (the k-th call of a module is ``name#k``); linear maps may be among the layers.
        layers: Some of the route's layers; None for all of them.
        at: ``"output"`` for ``Z`` itself, before batch norm, or ``"activation"`` for the output of the elementwise
            activation that follows ``Z``, directly or after a normalisation.

    Raises:
        UserError: On entry, if a layer is not on the route, the model cannot carry the route, or ``at`` is unknown.
            In a forward pass, if a layer does not run or has another number of channels, or if a layer has no
            activation of its own, with ``at="activation"`` (as before a residual sum).
    """
    chosen = _chosen(model, route, layers)
    indices = _indices(chosen)

    def silenced(layer: str, dim: int, values: Tensor) -> Tensor:
        # not a product with zeros, which would make NaN of an infinite value
        return values.index_fill(dim, indices(layer, values.device), 0)

    with LayerEdits(chosen.channels, silenced, at).applied_to(model):
        yield


@contextmanager
def transplant(
    model: nn.Module,
    clean: Tensor | Mapping[str, Tensor],
    route: Route,
    layers: Iterable[str] | None = None,
    *,
    at: str = OUTPUT,
) -> Iterator[None]:
    """Context in which every forward pass of ``model`` has the route's channels as they were on clean images.

    With ``with transplant(model, x, route): model(x_adv)`` what the network makes of ``x_adv`` meets, in these
    channels, what it makes of ``x``, sample by sample (Fig. 3 of the paper).

    Args:
        model: Any network.
        clean: The clean images, as many and of the same shape as those that the model will meet, in the same order:
            they run once, on entry, in the model's mode and under the interventions that are active. Or what
            :func:`record_outputs` made of them at the same place, which serves any number of transplants. Either way
            they are constants to autograd.
        route: The channels, as traced; linear maps may be among the layers.
        layers: Some of the route's layers; None for all of them.
        at: Where the channels are replaced, as for :func:`deactivate`.

    Raises:
        UserError: As :func:`deactivate`; or if the clean images cannot run, a layer's clean outputs are missing, or
            the outputs in a forward pass have another shape than the clean ones.
    """
    chosen = _chosen(model, route, layers)
    indices = _indices(chosen)
    outputs = record_outputs(model, clean, chosen, at=at) if isinstance(clean, Tensor) else clean
    if not isinstance(outputs, Mapping):
        raise UserError(f"clean is {type(clean).__name__}, neither images nor clean outputs by layer")
    for layer in chosen:
        if not isinstance(outputs.get(layer), Tensor):
            raise UserError(f"there are no clean outputs of layer {layer!r}: record them, or leave the layer out")

    def grafted(layer: str, dim: int, values: Tensor) -> Tensor:
        index, kept = indices(layer, values.device), outputs[layer]
        if kept.shape != values.shape:
            raise OtherRowsError(
                f"layer {layer!r} gives {tuple(values.shape)} here but {tuple(kept.shape)} for the clean images: "
                "both batches must have the same images in the same order"
            )
        kept = kept.to(values.device, values.dtype)  # not to(values), which a follower would take for a use of it
        kept = kept.index_select(dim, index)
        return values.clone().index_copy_(dim, index, kept)  # a clone keeps the memory format

    with LayerEdits(chosen.channels, grafted, at).applied_to(model):
        yield


@contextmanager
def weaken(
    model: nn.Module,
    route: Route,
    beta: float,
    layers: Iterable[str] | None = None,
    *,
    connections: Connections | None = None,
) -> Iterator[None]:
    """Context in which every forward pass of ``model`` has the connections along the route multiplied by ``beta``.

    These are the kernel slices ``W[j, i]`` of a layer l' on the route (Fig. 4b of the paper), where neuron j of l' is
    on the route, and the input channel i of l' carries a neuron on the route of a layer directly before l': through
    activations, normalisation, pooling, concatenation, slices and flattening. An input channel that carries several
    neurons, as after a residual sum or a gate, counts if any of them is on the route. Biases stay. A layer with no
    layer of the route directly before it has no such connection and stays as it is.

    Args:
        model: Any network, called as ``model(images)``.
        route: The neurons, as traced. Linear maps count as layers if some of the route's are.
        beta: The factor, at least 0; 1 changes nothing.
        layers: The layers l' whose kernels are weakened; None for all of the route's.
        connections: Which input channel carries which neuron, from ``Connections.find(model, images)``; None to
            find out from the first batch that runs inside, at the cost of a few passes of two of its samples.

    Raises:
        UserError: On entry, if ``beta`` is no such factor, a layer is not on the route, or the model cannot carry the
            route. In a forward pass, if a layer does not run, or if what stands between two layers of the route mixes
            channels or positions (an edge of the method ``"autograd"``), so that no kernel slice belongs to a neuron.
    """
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 <= beta < math.inf:
        raise UserError(f"beta {beta!r} is no factor of at least 0: give one in [0, 1], such as 0.5")
    targets = _chosen(model, route, layers)
    require_model(route.channels, model)

    def look(args: tuple[Any, ...]) -> None:
        nonlocal connections
        if connections is None:
            if not args or not isinstance(args[0], Tensor):
                raise UserError("weaken looks at the first batch, so call model(images), or pass connections=...")
            connections = Connections.of_route(model, args[0], route)

    @cache
    def factor_of(layer: str, dims: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """What to multiply the kernel by; None for ones."""
        assert connections is not None
        with torch.inference_mode(False):  # a factor made in inference mode could not serve a backward pass
            slices = connections.between(route, layer).to(device)
            factor = torch.ones(slices.shape, device=device, dtype=dtype).masked_fill_(slices, beta)
            return factor.reshape(*slices.shape, *(1,) * (dims - slices.ndim)) if slices.any() else None

    def run(call: LayerCall) -> Tensor:
        factor = factor_of(call.name, call.weight.ndim, call.weight.device, call.weight.dtype)
        if factor is None:
            return call.run()
        if call.kind == "linear" and is_recording():  # which takes a linear map's weight before this changes it
            raise UserError(
                f"linear layer {call.name!r} is weakened, so the network cannot be traced here: trace a copy with "
                "these weights"
            )
        return call.run(call.weight * factor)

    with LayerEdits(targets.channels, run=run, begun=look).applied_to(model):
        yield


def record_outputs(model: nn.Module, x: Tensor, layers: Iterable[str], *, at: str = OUTPUT) -> dict[str, Tensor]:
    """Outputs of some layers for a batch of images, from one forward pass, for :func:`transplant`.

    The model runs in its own mode, under the interventions that are active, and comes back as it was.

    Args:
        model: Any network.
        x: ``(N, ...)`` images on the model's device.
        layers: Names of layers as traced, such as a route; linear maps too.
        at: ``"output"`` for the layer's own output, or ``"activation"`` for that of the activation that follows it.

    Returns:
        For each layer ``(N, C, H, W)``, or for a linear map what it gives, detached copies. Rows may be selected.

    Raises:
        UserError: The model cannot run on the images, a layer does not run, or has no activation of its own with
            ``at="activation"``.
    """
    outputs: dict[str, Tensor] = {}

    def keep(layer: str, dim: int, values: Tensor) -> Tensor:
        outputs[layer] = values.detach().clone()
        return values.view_as(values)  # a tensor of its own, since an activation in place gives what was followed

    edits = LayerEdits(dict.fromkeys([layers] if isinstance(layers, str) else layers), keep, at)
    apart = spared_buffers(model)
    with explained(x), apart, torch.inference_mode(False), torch.no_grad(), edits.applied_to(model):
        model(x.clone())  # a copy, since a model may work on its input in place
    return outputs


def _indices(route: Route) -> Callable[[str, torch.device], Tensor]:
    """A route's channels as indices, made once for each device where they are needed."""

    @cache
    def indices(layer: str, device: torch.device) -> Tensor:
        with torch.inference_mode(False):  # an index made in inference mode could not serve a backward pass
            return route[layer].to(device)

    return indices


def _chosen(model: nn.Module, route: Route, layers: Iterable[str] | None) -> Route:
    chosen = route if layers is None else route.restrict(layers)
    require_model(chosen.channels, model)
    return chosen
