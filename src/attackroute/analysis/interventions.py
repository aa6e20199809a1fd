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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.analysis.sites import LayerEdits
from attackroute.core.errors import UserError
from attackroute.core.layers import CHANNEL_DIM, OUTPUT, LayerCall
from attackroute.core.model_state import explained, frozen
from attackroute.routes.layer_map import require_model
from attackroute.routes.route import Route
from attackroute.tracing.connections import Connections
from attackroute.tracing.recorder import is_recording


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
    with _Silence(_chosen(model, route, layers), at).applied_to(model):
        yield


@contextmanager
def transplant(
    model: nn.Module,
    clean: Tensor | Mapping[str, Tensor],
    route: Route,
    layers: Iterable[str] | None = None,
    *,
    at: str = OUTPUT,
) -> Iterator[Graft]:
    """Context in which every forward pass of ``model`` has the route's channels as they were on clean images.

    With ``with transplant(model, x, route): model(x_adv)`` what the network makes of ``x_adv`` meets, in these
    channels, what it makes of ``x``, sample by sample (Fig. 3 of the paper).

    Args:
        model: Any network.
        clean: The clean images, as many and of the same shape as those that the model will meet, in the same order:
            they run once, on entry, in the model's mode and under the interventions that are active, and only the
            chosen channels are kept. Or what :func:`record_outputs` made of them at the same place, which serves any
            number of transplants. Either way they are constants to autograd.
        route: The channels, as traced; linear maps may be among the layers.
        layers: Some of the route's layers; None for all of them.
        at: Where the channels are replaced, as for :func:`deactivate`.

    Yields:
        How much of the network is replaced.

    Raises:
        UserError: As :func:`deactivate`; or if the clean images cannot run, a layer's clean outputs are missing, or
            the outputs in a forward pass have another shape than the clean ones.
    """
    chosen = _chosen(model, route, layers)
    graft = Graft(chosen, frozenset(route))
    picked = isinstance(clean, Tensor)
    if isinstance(clean, Tensor):
        recording = _Recording(chosen.channels, at, chosen)
        recording.read(model, clean)
        graft.sizes.update(recording.sizes)
        clean = recording.values
    else:
        if not isinstance(clean, Mapping):
            raise UserError(f"clean is {type(clean).__name__}, neither images nor clean outputs by layer")
        for layer in chosen:
            if not isinstance(clean.get(layer), Tensor):
                raise UserError(f"there are no clean outputs of layer {layer!r}: record them, or leave the layer out")
    with _Transplant(graft, clean, at, picked=picked).applied_to(model):
        yield graft


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
    with _Weakening(model, route, targets, beta, connections).applied_to(model):
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
    recording = _Recording(dict.fromkeys([layers] if isinstance(layers, str) else layers), at)
    recording.read(model, x)
    return recording.values


@dataclass(frozen=True)
class LayerSize:
    """What a layer gives for one sample: its kind, its channels, and the elements of all of them together."""

    kind: str
    channels: int
    elements: int


@dataclass(frozen=True, eq=False)
class Graft:
    """How much of the network a transplant replaces.

    The network is its convolutions, and its linear maps as well if the route has some. Shares are known once the model
    has run, be it on the clean images.

    Attributes:
        route: The channels that are replaced.
        traced: The layers of the whole route.
        sizes: Every layer that ran, by name.
    """

    route: Route
    traced: frozenset[str]
    sizes: dict[str, LayerSize] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Share of the network's channels that is replaced (1.8 % in the paper's example)."""
        return self._share(lambda size: size.channels)

    @property
    def element_share(self) -> float:
        """Share of the elements of the network's layer outputs that is replaced: each channel counts its positions."""
        return self._share(lambda size: size.elements)

    def _share(self, amount: Callable[[LayerSize], int]) -> float:
        if any(layer not in self.sizes for layer in self.route):
            raise UserError("the share of a transplant is known once the model has run: run it first")
        linear = any(self.sizes[layer].kind == "linear" for layer in self.traced if layer in self.sizes)
        whole = sum(amount(size) for size in self.sizes.values() if linear or size.kind == "conv2d")
        indices, channels = self.route.indices, self.route.channels
        return sum(len(indices[at]) * amount(self.sizes[at]) / channels[at] for at in self.route) / whole


class _Silence(LayerEdits):
    """Sets channels to zero."""

    def __init__(self, route: Route, at: str) -> None:
        super().__init__(route.channels, at)
        self._indices = _Indices(route)

    def edited(self, layer: str, dim: int, values: Tensor) -> Tensor:
        # not a product with zeros, which would make NaN of an infinite value
        return values.index_fill(dim, self._indices.on(layer, values.device), 0)


class _Sized(LayerEdits):
    """Takes note of every layer's size; ``sizes`` is added to."""

    sizes: dict[str, LayerSize]

    def visit(self, call: LayerCall) -> Tensor:
        output = super().visit(call)
        per_sample = output.numel() // max(1, output.shape[0])
        self.sizes[call.name] = LayerSize(call.kind, output.shape[CHANNEL_DIM[call.kind]], per_sample)
        return output


class _Recording(_Sized):
    """Keeps copies of outputs; of some channels only if a route is given."""

    def __init__(self, channels: Mapping[str, int | None], at: str, route: Route | None = None) -> None:
        super().__init__(channels, at)
        self.sizes = {}
        self.values: dict[str, Tensor] = {}
        self._indices = None if route is None else _Indices(route)

    def read(self, model: nn.Module, images: Tensor) -> None:
        """Run the model once, in its own mode; its buffers stay as they are."""
        modes = {module: module.training for module in model.modules()}
        with frozen(model), torch.inference_mode(False), torch.no_grad(), self.applied_to(model), explained(images):
            for module, training in modes.items():
                module.training = training
                for name, buffer in list(module._buffers.items()) if training else ():
                    if buffer is not None:  # batch statistics go to a copy that is thrown away
                        module._buffers[name] = buffer.clone()
            model(images.clone())  # a copy, since a model may work on its input in place

    def edited(self, layer: str, dim: int, values: Tensor) -> Tensor:
        kept = values.detach()
        self.values[layer] = (
            kept.clone() if self._indices is None else kept.index_select(dim, self._indices.on(layer, values.device))
        )
        return values.view_as(values)  # a tensor of its own, since an activation in place gives what was followed


class _Transplant(_Sized):
    """Replaces channels by values that were kept."""

    def __init__(self, graft: Graft, values: Mapping[str, Tensor], at: str, *, picked: bool) -> None:
        super().__init__(graft.route.channels, at)
        self.sizes = graft.sizes
        self._values = values
        self._picked = picked  # whether the values are those of the route's channels alone
        self._indices = _Indices(graft.route)

    def edited(self, layer: str, dim: int, values: Tensor) -> Tensor:
        index = self._indices.on(layer, values.device)
        clean = self._values[layer]
        expected = list(values.shape)
        if self._picked:
            expected[dim] = len(index)
        if list(clean.shape) != expected:
            raise UserError(
                f"layer {layer!r} gives {tuple(expected)} here but {tuple(clean.shape)} for the clean images: "
                "both batches must have the same images in the same order"
            )
        clean = clean.to(values.device, values.dtype)  # not to(values), which a follower would take for a use of it
        if not self._picked:
            clean = clean.index_select(dim, index)
        return values.clone().index_copy_(dim, index, clean)  # a clone keeps the memory format


class _Weakening(LayerEdits):
    """Multiplies kernel slices as the layers run."""

    def __init__(
        self, model: nn.Module, route: Route, targets: Route, beta: float, connections: Connections | None
    ) -> None:
        super().__init__(targets.channels)
        self._model = model
        self._route = route
        self._beta = beta
        self._connections = connections
        self._factors: dict[tuple[str, torch.device, torch.dtype], Tensor | None] = {}

    def begun(self, args: tuple[Any, ...]) -> None:
        if self._connections is None:
            if not args or not isinstance(args[0], Tensor):
                raise UserError("weaken looks at the first batch, so call model(images), or pass connections=...")
            self._connections = Connections.of_route(self._model, args[0], self._route)

    def run(self, call: LayerCall) -> Tensor:
        factor = self._factor(call.name, call.weight)
        if factor is None:
            return call.run()
        if call.kind == "linear" and is_recording():  # which takes a linear map's weight before this changes it
            raise UserError(
                f"linear layer {call.name!r} is weakened, so the network cannot be traced here: trace a copy with "
                "these weights"
            )
        return call.run(call.weight * factor)

    def _factor(self, layer: str, weight: Tensor) -> Tensor | None:
        """What to multiply the kernel by; None for ones."""
        key = (layer, weight.device, weight.dtype)
        if key not in self._factors:
            assert self._connections is not None
            with torch.inference_mode(False):  # a factor made in inference mode could not serve a backward pass
                slices = self._connections.between(self._route, layer)
                factor = weight.new_ones(slices.shape).masked_fill_(slices.to(weight.device), self._beta)
                factor = factor.reshape(*slices.shape, *(1,) * (weight.ndim - slices.ndim))
            self._factors[key] = factor if slices.any() else None
        return self._factors[key]


class _Indices:
    """A route's channels as indices on the device where they are needed."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self._known: dict[tuple[str, torch.device], Tensor] = {}

    def on(self, layer: str, device: torch.device) -> Tensor:
        if (layer, device) not in self._known:
            with torch.inference_mode(False):  # an index made in inference mode could not serve a backward pass
                self._known[layer, device] = self._route[layer].to(device)
        return self._known[layer, device]


def _chosen(model: nn.Module, route: Route, layers: Iterable[str] | None) -> Route:
    chosen = route if layers is None else route.restrict(layers)
    require_model(chosen.channels, model)
    return chosen
