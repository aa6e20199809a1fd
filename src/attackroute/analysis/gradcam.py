"""Grad-CAM of chosen channels: where in the image the channels on a route speak for the class, and those off it.

Grad-CAM (Selvaraju et al., 2017) weighs each channel's map ``A^c`` by the mean over positions of its class logit's
gradient, ``alpha_c``, and keeps what speaks for the class: ``relu(sum_c alpha_c A^c)``. Here the sum runs over any set
of channels. Before the ReLU the maps of a set and of its complement add up to the whole.

Tokens are maps too: channels are the features, positions the tokens of the image, see :func:`layer_maps`.
Class tokens are no positions: they are left out of the maps and of the means over positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attackroute.analysis.sites import LayerEdits
from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.layers import OUTPUT, LayerCall, LayerCalls
from attackroute.core.model_state import frozen

_MAP_DIMS = 4
_MOST_LEADING = 16  # class, distillation and register tokens before those of the image

Grid = tuple[int, int]
"""Rows and columns of tokens."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a layer's channels say for a class, before channels are chosen."""

    maps: Tensor  # the layer's maps A, (N, C, H, W)
    weights: Tensor  # alpha: mean over positions of the class logit's gradient at the maps, (N, C)
    logits: Tensor  # (N, classes)
    target: Tensor  # the class of each image, (N,)

    def cams(self, sets: Tensor) -> Tensor:
        """Of each set of channels, bool ``(S, C)``: ``relu(sum over the set of alpha_c A^c)``, ``(S, N, H, W)``.

        The maps are at the layer's own resolution, and not normalised; ``cams(route.mask(layer)[None])`` is a route's.
        """
        chosen = sets.to(self.maps.device, self.maps.dtype)
        weights = self.weights[None] * chosen[:, None]  # (S, N, C)
        return torch.einsum("snc,nchw->snhw", weights, self.maps).relu_()


def layer_evidence(
    model: nn.Module,
    images: Tensor,
    layer: str,
    *,
    target: Tensor | None = None,
    at: str = OUTPUT,
    grid: Grid | None = None,
) -> Evidence:
    """Maps and weights of a route layer from one forward pass, for Grad-CAM of any number of sets of channels.

    Args:
        model: Any network of images to logits. It runs in eval mode and comes back as it was.
        images: ``(N, C, H, W)`` on the model's device.
        layer: A convolution, or a linear map over tokens, as traced.
        target: ``(N,)`` classes; None for those that the model predicts.
        at: Whether the maps are the layer's ``"output"``, before batch norm, or those after its ``"activation"``.
        grid: Rows and columns of the tokens; None for those of the patches, see :func:`layer_maps`.

    Raises:
        UserError: The layer does not run or has no maps, its tokens have no grid, the logits depend on none of them, a
            class is out of range, or ``at`` is unknown.
    """
    calls: list[LayerCall] = []
    leaves: list[Tensor] = []
    grids: list[Grid] = []  # of the maps of the convolutions before the layer

    def run(call: LayerCall) -> Tensor:
        calls.append(call)
        return call.run()

    def leaf(_layer: str, _dim: int, values: Tensor) -> Tensor:
        leaves.append(values.detach().requires_grad_())
        return leaves[-1].clone()  # a copy of the leaf, since what follows may work in place

    def note(call: LayerCall) -> Tensor:
        output = call.run()
        if not calls:
            grids.append((output.shape[-2], output.shape[-1]))
        return output

    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        with LayerCalls(model, note), LayerEdits({layer: None}, leaf, at, run=run).applied_to(model):
            logits = checked_logits(model(images.detach().clone()), images.shape[0])
        grids = grids if grid is None else [grid]
        maps = layer_maps(calls[-1], leaves[-1], grids)
        classes = logits.detach().argmax(1) if target is None else target.to(logits.device)
        classes = checked_labels(classes, logits.shape[1], images.shape[0])
        chosen = logits.gather(1, classes[:, None]).sum()
        gradient = torch.autograd.grad(chosen, leaves[-1], allow_unused=True)[0] if chosen.requires_grad else None
    if gradient is None:
        raise UserError(f"the logits do not depend on layer {layer!r}: does the model's forward detach?")
    slopes = layer_maps(calls[-1], gradient, grids)
    if gradient.count_nonzero() and not slopes.count_nonzero():
        raise UserError(
            f"the logits depend on the class token of layer {layer!r} alone, so the image's tokens say nothing there: "
            "take a layer before the last attention"
        )
    return Evidence(maps.detach(), slopes.mean((2, 3)), logits.detach(), classes)


def enlarged(cams: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps ``(..., H, W)`` at another size, bilinear between the centres of their cells."""
    flat = cams.reshape(-1, 1, *cams.shape[-2:])
    return F.interpolate(flat, size, mode="bilinear", align_corners=False).reshape(*cams.shape[:-2], *size)


def jointly_normalised(cams: Tensor) -> Tensor:
    """Maps ``(S, N, H, W)`` divided by each image's largest value over all S, so that sets can be compared.

    Images whose maps are all zero stay zero.
    """
    largest = cams.amax((0, 2, 3), keepdim=True)
    return cams / largest.where(largest > 0, torch.ones_like(largest))


def layer_maps(call: LayerCall, output: Tensor, grids: Sequence[Grid]) -> Tensor:
    """The output of a layer as maps ``(n, C, rows, columns)``, without the tokens that are no part of the image.

    Tokens ``(n, rows, columns, C)`` have their grid in their shape, if its proportions are those of one of the
    ``grids``: those of the maps of convolutions that ran before. Those in one line, ``(n, T, C)``, lie row by row and
    behind the class token and its like; their grid is that of the patches, the last of these that leaves at most 16
    tokens, and fewer than it has itself.
    """
    shape = tuple(output.shape)
    if call.kind != "linear" and output.ndim == _MAP_DIMS:
        return output
    for rows, columns in () if call.folded or call.kind != "linear" else reversed(grids):
        if output.ndim == _MAP_DIMS and abs(shape[1] * columns - shape[2] * rows) <= max(rows, columns):
            return output.movedim(-1, 1)
        if output.ndim == _MAP_DIMS - 1 and 0 <= shape[1] - rows * columns <= min(_MOST_LEADING, rows * columns - 1):
            image: Tensor = output[:, shape[1] - rows * columns :].unflatten(1, (rows, columns))
            return image.movedim(-1, 1)
    raise UserError(
        f"layer {call.name!r} gives {shape}, no maps (N, C, H, W) and no tokens whose places in the image the "
        "convolutions before it show (tokens in windows have none): take another layer, or for tokens (N, T, C) give "
        "grid=(rows, columns)"
    )
