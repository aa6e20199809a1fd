"""Connections: which kernel slices of a layer join neurons of the layers directly before it to its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from attackroute.core.errors import UserError
from attackroute.core.layers import CHANNEL_DIM, LayerCall, LayerCalls, aside, two_of
from attackroute.core.model_state import explained, frozen
from attackroute.routes.route import Route
from attackroute.tracing.recorder import RecordedLayer, record
from attackroute.tracing.structure import Structure

_LISTED_LAYERS = 4  # layers at most in a message
_SPREAD = 3.0  # of the values that layers give instead of their own, so that no activation is dead throughout


def token_carriers(
    model: nn.Module, images: Tensor, edges: Mapping[str, Iterable[str]]
) -> dict[tuple[str, str], Tensor]:
    """Find edges on which each neuron reaches one input feature at most, whatever becomes of its positions.

    Every source is replaced by random values and cut off from what is before it. Input features are numbered in
    binary: for each digit, one vector-Jacobian product of the features that have a 1 there and one of the others
    show what a neuron reaches. What reaches both, for any digit, is mixed into several features.

    Of the ``edges``, ``target -> sources`` of a frozen model whose linear maps are route layers, only those to a linear
    map over tokens can be such. Returns for each such edge (source, target), for each neuron of the source the input
    feature of the target that carries it, or -1 where none does: int64 ``(C_source,)`` on the CPU.
    """
    sources_cut = {source for sources in edges.values() for source in sources}
    leaves: dict[str, tuple[Tensor, str]] = {}
    inputs: dict[str, Tensor] = {}
    draws = torch.Generator().manual_seed(0)

    def visit(call: LayerCall) -> Tensor:
        if call.name in edges and call.kind == "linear" and call.input.ndim > 2:
            inputs[call.name] = call.input.clone()  # a copy, since what reads it too may work in place
        output = call.run()
        if call.name not in sources_cut:
            return output.detach()
        values = torch.randn(output.shape, generator=draws) * _SPREAD
        leaf = values.to(output.device, output.dtype).requires_grad_()
        leaves[call.name] = leaf, call.kind
        return leaf.clone()

    with torch.enable_grad(), LayerCalls(model, visit, linear=True):
        model(images.clone())
    features: dict[tuple[str, str], Tensor] = {}
    for target, values in inputs.items():
        sources = {source: leaves[source] for source in edges[target] if source in leaves}
        features |= {(source, target): numbers for source, numbers in _carried(values, sources).items()}
    return features


def _carried(values: Tensor, leaves: Mapping[str, tuple[Tensor, str]]) -> dict[str, Tensor]:
    """For each source that is not mixed, the features of ``values``, ``(..., F)``, that carry its neurons."""
    features = torch.arange(values.shape[-1], device=values.device)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values)
    unmixed = dict(leaves) if values.requires_grad else {}
    numbers = dict.fromkeys(unmixed, torch.tensor(0))
    touched = dict.fromkeys(unmixed, torch.tensor(False))
    for digit in range(max(1, (len(features) - 1).bit_length())):
        if not unmixed:
            break
        bits = (features >> digit) & 1
        zeros, ones = (_reached(values, unmixed, weights * (bits == bit)) for bit in (0, 1))
        for source in zeros:
            if (zeros[source] & ones[source]).any():
                del unmixed[source]
            numbers[source] = numbers[source] + (ones[source].long() << digit)
            touched[source] = touched[source] | zeros[source] | ones[source]
    return {source: numbers[source].where(touched[source], -1) for source in unmixed}


def _reached(values: Tensor, leaves: Mapping[str, tuple[Tensor, str]], weights: Tensor) -> dict[str, Tensor]:
    """Whether each neuron of each source reaches what is weighed, bool ``(C_source,)``."""
    outputs = [leaf for leaf, _ in leaves.values()]
    slopes = torch.autograd.grad(values, outputs, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
    return {
        source: slope.movedim(CHANNEL_DIM[kind], -1).flatten(0, -2).count_nonzero(0).cpu() > 0
        for (source, (_, kind)), slope in zip(leaves.items(), slopes, strict=True)
    }


@dataclass(frozen=True, eq=False)
class Connections:
    """What each input channel of each route layer carries; made by :meth:`find`.

    Attributes:
        layers: The route layers of a recording, in forward order.
        tokens: For edges (source, target) to a linear map over tokens on which channels stay apart: for each neuron of
            the source the input feature that carries it, or -1.
    """

    layers: tuple[RecordedLayer, ...]
    tokens: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)

    @classmethod
    def find(cls, model: nn.Module, images: Tensor, *, linear: bool = False) -> Connections:
        """Learn the connections from a few passes of two images, in eval mode, whatever interventions are active.

        Raises:
            UserError: The model cannot run on the images, cannot be followed, or has no route layer.
        """
        with _unseen(model):
            probe = two_of(images).detach()
            structure, _ = Structure.probe(model, probe, linear=linear)
            layers = structure.applied(record(model, probe, linear=linear, sums=False, expected=structure.names).layers)
            edges = {
                layer.name: [layers[source].name for source in sorted(layer.mixing)]
                for layer in layers
                if layer.mixing and layer.kind == "linear"
            }
            return cls(layers, token_carriers(model, probe, edges) if edges else {})

    @classmethod
    def of_route(cls, model: nn.Module, images: Tensor, route: Route) -> Connections:
        """As :meth:`find`, where linear maps are route layers if some of the route's layers are linear maps."""
        kinds: dict[str, str] = {}

        def note(call: LayerCall) -> Tensor:
            kinds[call.name] = call.kind
            return call.run()

        with _unseen(model), torch.no_grad(), LayerCalls(model, note, linear=True), explained(images):
            model(two_of(images).detach())
        return cls.find(model, images, linear=any(kinds.get(layer) == "linear" for layer in route))

    @property
    def channels(self) -> Mapping[str, int]:
        """Channels of each layer, by name."""
        return {layer.name: layer.channels for layer in self.layers}

    def between(self, route: Route, target: str) -> Tensor:
        """The kernel slices of one of a route's layers that join neurons on the route.

        Returns:
            Bool on the CPU, ``(C_out, C_in / groups)`` for a convolution and ``(C_out, F_in)`` for a linear map: True
            where the output and the neuron that the input carries are both on the route. An input channel that
            carries several neurons counts if any of them is.

        Raises:
            UserError: The network lacks a layer of the route or has it in another size, or what stands between two
                of the route's layers mixes channels, or positions of maps.
        """
        route.check(self.channels)
        layer = next(layer for layer in self.layers if layer.name == target)
        mixed = self._mixed(route, layer)
        if mixed is not None:
            joined = self.joined(route)
            advice = f"take layers={joined}" if len(joined) <= _LISTED_LAYERS else "see Connections.joined(route)"
            raise UserError(
                f"no kernel slice of layer {target!r} belongs to a channel of layer {mixed!r}: what stands between "
                f"them mixes channels or positions; leave {target!r} out (layers=...)"
                + (f", or {advice}, where this is not so" if joined else "")
            )
        rows = route.mask(target)
        inputs, positions = layer.weight.shape[1], 1 if layer.kind == "conv2d" else layer.weight.shape[2]
        carried = torch.zeros(layer.groups * inputs, dtype=torch.bool)
        for piece in layer.pieces:
            name = self.layers[piece.source].name
            if name in route:
                carried[piece.dst : piece.dst + piece.length] |= route.mask(name)[piece.src : piece.src + piece.length]
        for source in layer.mixing:
            name = self.layers[source].name
            if name in route and (name, target) in self.tokens:
                features = self.tokens[name, target][route.mask(name)]
                carried[features[features >= 0]] = True
        # group g of the outputs reads group g of the inputs
        grouped = rows.view(layer.groups, -1, 1) & carried.view(layer.groups, 1, -1)
        return grouped.flatten(0, 1).repeat_interleave(positions, dim=1)

    def joined(self, route: Route) -> list[str]:
        """Layers of a route, in forward order, whose kernels have slices that join its neurons and mixed ones none."""
        layers = [layer for layer in self.layers if layer.name in route and self._mixed(route, layer) is None]
        return [layer.name for layer in layers if self.between(route, layer.name).any()]

    def mixed(self, route: Route) -> list[str]:
        """Layers of a route, in forward order, before which its channels are mixed."""
        layers = [layer for layer in self.layers if layer.name in route]
        return [layer.name for layer in layers if self._mixed(route, layer) is not None]

    def _mixed(self, route: Route, layer: RecordedLayer) -> str | None:
        """A layer of the route that reaches another one's route neurons through what mixes channels; None if none."""
        if not route.indices[layer.name]:
            return None
        names = [self.layers[source].name for source in sorted(layer.mixing)]
        route_sources = (name for name in names if name in route and route.indices[name])
        return next((name for name in route_sources if (name, layer.name) not in self.tokens), None)


@contextmanager
def _unseen(model: nn.Module) -> Iterator[None]:
    """Context of passes that neither interventions nor other modes see; the model comes back as it was."""
    with frozen(model), torch.inference_mode(False), aside(), _disable_current_modes():
        yield
