"""The kernel slices between route neurons of adjacent layers: the ``w_l^{m,n}`` of Eq. (13)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attackroute.errors import UserError
from attackroute.recorder import RecordedLayer
from attackroute.routes import Route


def route_slices(layers: Sequence[RecordedLayer], route: Route) -> dict[str, Tensor]:
    """Mark the kernel entries by which route neurons of one layer read route neurons of the layers before it.

    An entry belongs to the pair (m, n) if it weights an input channel that carries source channel n, alone or, as in a
    residual stream, in a sum. An entry that serves two sources is marked once. Layers that are not on the route, as a
    target or as a source, take no part; a layer none of whose adjacent earlier layers is on the route has no entry.

    Args:
        layers: The layers of a recording; only their structure is used.
        route: The neurons.

    Returns:
        For each route layer that follows another, in forward order, a bool mask on the CPU that broadcasts to its
        weight as the model executes it: ``(C_out, C_in / groups, 1, 1)`` for a convolution, ``(C_out, C_in)`` for a
        linear map. Layers without a marked entry are left out.

    Raises:
        UserError: Something between two of the route's layers mixes channels or positions, so that no kernel entry
            belongs to a channel; or the route does not fit the layers.
    """
    by_name = {layer.name: layer for layer in layers}
    route.check({name: layer.channels for name, layer in by_name.items()}, "model")
    marked = {}
    for name in route:
        entries = _entries(by_name[name], layers, route)
        if entries.any():
            marked[name] = entries
    return marked


def _entries(layer: RecordedLayer, layers: Sequence[RecordedLayer], route: Route) -> Tensor:
    """The mask of one layer."""
    for source in sorted(layer.jacobian):
        if layers[source].name in route:
            raise UserError(
                f"no weight of layer {layer.name!r} belongs to a channel of {layers[source].name!r}: what stands "
                "between them mixes channels or positions; leave one of them off the route (route.restrict)"
            )
    inputs = torch.zeros(layer.weight.shape[1] * layer.groups, dtype=torch.bool, device="cpu")
    for piece in layer.pieces:
        name = layers[piece.source].name
        if name in route:
            carried = route.mask(name)[piece.src : piece.src + piece.length]
            inputs[piece.dst : piece.dst + piece.length] |= carried
    read = inputs.unflatten(0, (layer.groups, -1)).repeat_interleave(layer.channels // layer.groups, 0)
    entries: Tensor = route.mask(layer.name)[:, None] & read  # (C_out, C_in / groups)
    if layer.kind == "linear":  # the recording splits a linear map's inputs into channels and positions
        return entries.repeat_interleave(layer.weight.shape[2], 1)
    return entries[..., None, None]
