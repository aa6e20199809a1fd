"""Connections: which kernel slices of a layer join neurons of the layers directly before it to its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from attackroute.carriers import token_carriers
from attackroute.errors import UserError
from attackroute.explanations import explained
from attackroute.layers import LayerCall, LayerCalls, aside, frozen
from attackroute.recorder import RecordedLayer, record
from attackroute.routes import Route
from attackroute.structure import Structure

_NAMED = 4  # layers at most in a message


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

        Args:
            model: The network; it comes back as it was.
            images: ``(N, ...)`` on the model's device.
            linear: Whether linear maps are route layers too.

        Raises:
            UserError: The model cannot run on the images, cannot be followed, or has no route layer.
        """
        with frozen(model), torch.inference_mode(False), aside(), _disable_current_modes():
            probe = _two(images)
            structure, _ = Structure.probe(model, probe, linear=linear)
            layers = structure.applied(record(model, probe, linear=linear, sums=False).layers)
            edges = {
                layer.name: [layers[source].name for source in sorted(layer.jacobian)]
                for layer in layers
                if layer.jacobian and layer.kind == "linear"
            }
            return cls(layers, token_carriers(model, probe, edges) if edges else {})

    @classmethod
    def of_route(cls, model: nn.Module, images: Tensor, route: Route) -> Connections:
        """As :meth:`find`, where linear maps are route layers if some of the route's layers are linear maps."""
        kinds: dict[str, str] = {}

        def note(call: LayerCall) -> Tensor:
            kinds[call.name] = call.kind
            return call.run()

        with (
            frozen(model),
            torch.inference_mode(False),
            torch.no_grad(),
            aside(),
            _disable_current_modes(),
            LayerCalls(model, note, linear=True),
            explained(images),
        ):
            model(_two(images))
        return cls.find(model, images, linear=any(kinds.get(layer) == "linear" for layer in route))

    @property
    def channels(self) -> Mapping[str, int]:
        """Channels of each layer, by name."""
        return {layer.name: layer.channels for layer in self.layers}

    def between(self, route: Route, target: str) -> Tensor:
        """The kernel slices of a layer that join neurons on a route.

        Args:
            route: Layers and their neurons.
            target: One of the route's layers.

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
            rest = f"take layers={joined}" if joined and len(joined) <= _NAMED else "see Connections.joined(route)"
            raise UserError(
                f"no kernel slice of layer {target!r} belongs to a channel of layer {mixed!r}: what stands between "
                f"them mixes channels or positions; leave {target!r} out (layers=...)"
                + (f", or {rest}, where this is not so" if joined else "")
            )
        rows = route.mask(target)
        inputs, positions = layer.weight.shape[1], 1 if layer.kind == "conv2d" else layer.weight.shape[2]
        carried = torch.zeros(layer.groups * inputs, dtype=torch.bool)
        for piece in layer.pieces:
            name = self.layers[piece.source].name
            if name in route:
                carried[piece.dst : piece.dst + piece.length] |= route.mask(name)[piece.src : piece.src + piece.length]
        for source in layer.jacobian:
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
        names = [self.layers[source].name for source in sorted(layer.jacobian)]
        wanted = (name for name in names if name in route and route.indices[name])
        return next((name for name in wanted if (name, layer.name) not in self.tokens), None)


def _two(images: Tensor) -> Tensor:
    """The first and the last image: two even of one, since in a batch of one a gate looks like a constant factor."""
    return torch.cat([images[:1], images[-1:]]).detach().clone()
