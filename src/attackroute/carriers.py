"""Which input feature of a linear map over tokens carries which neuron, asked of autograd."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from attackroute.edits import CHANNEL_DIM
from attackroute.layers import LayerCall, LayerCalls

_SPREAD = 3.0  # of the values that layers give instead of their own, so that no activation is dead throughout


def token_carriers(
    model: nn.Module, images: Tensor, edges: Mapping[str, Iterable[str]]
) -> dict[tuple[str, str], Tensor]:
    """Find edges on which each neuron reaches one input feature at most, whatever becomes of its positions.

    Every source is replaced by random values and cut off from what is before it. Input features are numbered in
    binary: for each digit, one vector-Jacobian product of the features that have a 1 there and one of the others
    show what a neuron reaches. What reaches both, for any digit, is mixed into several features.

    Args:
        model: A frozen model; linear maps are route layers.
        images: A few images on the model's device.
        edges: ``target -> sources``; a target that is not a linear map over tokens has no such edge.

    Returns:
        For each such edge (source, target), for each neuron of the source the input feature of the target that
        carries it, or -1 where none does: int64 ``(C_source,)`` on the CPU.
    """
    wanted = {source for sources in edges.values() for source in sources}
    leaves: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    inputs: dict[str, Tensor] = {}
    draws = torch.Generator().manual_seed(0)

    def visit(call: LayerCall) -> Tensor:
        if call.name in edges and call.kind == "linear" and call.input.ndim > 2:
            inputs[call.name] = call.input.clone()  # a copy, since what reads it too may work in place
        output = call.run()
        if call.name not in wanted:
            return output.detach()
        values = torch.randn(output.shape, generator=draws) * _SPREAD
        leaves[call.name] = values.to(output.device, output.dtype).requires_grad_()
        kinds[call.name] = call.kind
        return leaves[call.name].clone()

    with torch.enable_grad(), LayerCalls(model, visit, linear=True):
        model(images.clone())
    found: dict[tuple[str, str], Tensor] = {}
    for target, values in inputs.items():
        sources = {source: leaves[source] for source in edges[target] if source in leaves}
        for source, carried in _carried(values, sources, kinds).items():
            found[source, target] = carried
    return found


def _carried(values: Tensor, leaves: Mapping[str, Tensor], kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """For each source that is not mixed, the features of ``values``, ``(..., F)``, that carry its neurons."""
    features = torch.arange(values.shape[-1], device=values.device)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1)).to(values)
    left = dict(leaves) if values.requires_grad else {}
    numbers = {source: torch.tensor(0) for source in left}
    touched = {source: torch.tensor(False) for source in left}
    for digit in range(max(1, (len(features) - 1).bit_length())):
        if not left:
            break
        bits = (features >> digit) & 1
        zeros, ones = (_reached(values, left, kinds, weights * (bits == bit)) for bit in (0, 1))
        for source in zeros:
            if (zeros[source] & ones[source]).any():
                del left[source]
            numbers[source] = numbers[source] + (ones[source].long() << digit)
            touched[source] = touched[source] | zeros[source] | ones[source]
    return {source: numbers[source].where(touched[source], -1) for source in left}


def _reached(
    values: Tensor, leaves: Mapping[str, Tensor], kinds: Mapping[str, str], weights: Tensor
) -> dict[str, Tensor]:
    """Whether each neuron of each source reaches what is weighed, bool ``(C_source,)``."""
    slopes = torch.autograd.grad(
        values, list(leaves.values()), weights, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return {
        source: slope.movedim(CHANNEL_DIM[kinds[source]], -1).flatten(0, -2).count_nonzero(0).cpu() > 0
        for source, slope in zip(leaves, slopes, strict=True)
    }
