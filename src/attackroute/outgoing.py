"""Outgoing weight norms: what the layers after a channel make of it, with everything left out that an input decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attackroute.errors import UserError
from attackroute.recorder import RecordedLayer


class MixedChannelsError(UserError):
    """What stands between two layers mixes channels, so that no weight belongs to a channel."""


def outgoing_norms(layers: Sequence[RecordedLayer]) -> dict[str, Tensor]:
    """Weight norm ``|W|_1`` by which each channel is read: the influence of Eqs. (1)-(2) with its masks left out.

    For channel i of layer l it is the sum, over the layers l' directly after l, of
    ``|s_i| * sum over j, u of |W_l'[j, i, u]|``, where s_i is the factor that the channel meets on its way, such as
    batch norm's ``gamma / sigma``. Derivatives that differ between positions (activations, pooling, gates) count as
    one. A sink, which no route layer follows, is scored by its own kernel, ``sum over i, u of |W_l[m, i, u]|``.

    Args:
        layers: The layers of a recording.

    Returns:
        For each layer, float64 ``(C,)`` on the CPU.

    Raises:
        MixedChannelsError: Something between two layers mixes channels or positions, so that no weight belongs to a
            channel.
    """
    norms = {index: torch.zeros(layer.channels, dtype=torch.float64) for index, layer in enumerate(layers)}
    sinks = set(norms)
    for layer in layers:
        sinks -= layer.sources
        if layer.jacobian:
            raise MixedChannelsError(
                f"there is no weight norm for the channels of layer {layers[min(layer.jacobian)].name!r}: what stands "
                f"between it and {layer.name!r} mixes channels or positions; choose another criterion"
            )
        read = _read_norms(layer)
        for piece in layer.pieces:
            part = read[piece.dst : piece.dst + piece.length]
            if piece.scale is not None:
                part = part * _wide(piece.scale).abs()
            norms[piece.source][piece.src : piece.src + piece.length] += part
    for index in sinks:
        norms[index] = _wide(layers[index].weight).abs().flatten(1).sum(1)
    return {layer.name: norms[index] for index, layer in enumerate(layers)}


def _read_norms(layer: RecordedLayer) -> Tensor:
    """``sum over j, u of |W[j, i, u]|`` for each input channel i, ``(C_in,)``."""
    weight = _wide(layer.weight).abs().unflatten(0, (layer.groups, -1))  # (groups, outputs, C_in / groups, kh, kw)
    norms: Tensor = weight.sum((1, 3, 4))
    return norms.flatten()


def _wide(values: Tensor) -> Tensor:
    return values.detach().cpu().to(torch.float64)
