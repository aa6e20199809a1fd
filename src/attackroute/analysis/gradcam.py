"""Grad-CAM of chosen channels: where in the image the channels on a route speak for the class, and those off it.

Grad-CAM (Selvaraju et al., 2017) weighs each channel's map ``A^c`` by the mean over positions of its class logit's
gradient, ``alpha_c``, and keeps what speaks for the class: ``relu(sum_c alpha_c A^c)``. Here the sum runs over any set
of channels. Before the ReLU the maps of a set and of its complement add up to the whole.

Tokens are maps too: channels are the features, positions the tokens of the image, see :func:`layer_maps`.
Class tokens are no positions: they are left out of the maps and of the means over positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attackroute.analysis.sites import LayerEdits
from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.layers import OUTPUT, LayerCall
from attackroute.core.model_state import frozen

_MAP_DIMS = 4
_MOST_LEADING = 16  # class, distillation and register tokens before those of the image
_UNSEEN_LEADING = 2  # of them, where no convolution shows the grid: a class token, and one of distillation

Grid = tuple[int, int]
"""Rows and columns of tokens."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a layer's channels say for a class, before channels are chosen."""

    maps: Tensor  # the layer's maps A, (N, C, H, W)
    weights: Tensor  # alpha: mean over positions of the class logit's gradient at the maps, (N, C)
    logits: Tensor  # (N, classes)
    target: Tensor  # the class of each image, (N,)

    def __getitem__(self, rows: Tensor) -> Evidence:
        """The evidence of some of the images."""
        return Evidence(self.maps[rows], self.weights[rows], self.logits[rows], self.target[rows])

    def cams(self, sets: Tensor) -> Tensor:
        """Of each set of channels, bool ``(S, C)``: ``relu(sum over the set of alpha_c A^c)``, ``(S, N, H, W)``."""
        chosen = sets.to(self.maps.device, self.maps.dtype)
        weights = self.weights[None] * chosen[:, None]  # (S, N, C)
        return torch.einsum("snc,nchw->snhw", weights, self.maps).relu_()


def grad_cam(
    model: nn.Module,
    images: Tensor,
    layer: str,
    channels: Sequence[int] | Tensor | None = None,
    *,
    target: Tensor | None = None,
    at: str = OUTPUT,
    grid: Grid | None = None,
) -> Tensor:
    """Grad-CAM of some channels of a route layer.

    Args:
        model: Any network of images to logits. It runs in eval mode and comes back as it was.
        images: ``(N, C, H, W)`` on the model's device.
        layer: A convolution, or a linear map over tokens, as traced.
        channels: Indices of the channels to sum over; None for all, which is the usual Grad-CAM.
        target: ``(N,)`` classes; None for those that the model predicts.
        at: Whether the maps are the layer's ``"output"``, before batch norm, or those after its ``"activation"``.
        grid: Rows and columns of the tokens; None to find out, see :func:`layer_maps`. Tokens before are left out.

    Returns:
        ``(N, H, W)`` at the layer's own resolution, at least 0, not normalised.

    Raises:
        UserError: The layer does not run or has no maps, its tokens have no grid, the logits depend on none of them, a
            channel or class is out of range, or ``at`` is unknown.
    """
    evidence = layer_evidence(model, images, layer, target=target, at=at, grid=grid)
    count = evidence.maps.shape[1]
    index = torch.as_tensor(range(count) if channels is None else channels, dtype=torch.int64).cpu().flatten()
    if len(index) and not (int(index.min()) >= 0 and int(index.max()) < count):
        raise UserError(f"a channel of layer {layer!r} is out of range: it has channels 0 to {count - 1}")
    return evidence.cams(torch.zeros(1, count, dtype=torch.bool).index_fill_(1, index, True))[0]


def layer_evidence(
    model: nn.Module,
    images: Tensor,
    layer: str,
    *,
    target: Tensor | None = None,
    at: str = OUTPUT,
    grid: Grid | None = None,
) -> Evidence:
    """Maps and weights of a layer from one forward pass, for Grad-CAM of any number of sets; see :func:`grad_cam`."""
    calls: list[LayerCall] = []
    leaves: list[Tensor] = []
    sizes: list[Grid] = []  # of the maps of the convolutions before the layer

    def run(call: LayerCall) -> Tensor:
        calls.append(call)
        return call.run()

    def leaf(_layer: str, _dim: int, values: Tensor) -> Tensor:
        leaves.append(values.detach().requires_grad_())
        return leaves[-1].clone()  # a copy of the leaf, since what follows may work in place

    def note(call: LayerCall, output: Tensor) -> None:
        if call.kind == "conv2d" and not calls:
            sizes.append((output.shape[-2], output.shape[-1]))

    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        with LayerEdits({layer: None}, leaf, at, run=run, seen=note).applied_to(model):
            logits = checked_logits(model(images.detach().clone()), images.shape[0])
        maps = layer_maps(calls[-1], leaves[-1], sizes, grid)
        classes = logits.detach().argmax(1) if target is None else target.to(logits.device)
        classes = checked_labels(classes, logits.shape[1], images.shape[0])
        chosen = logits.gather(1, classes[:, None]).sum()
        reached = logits.requires_grad
        gradient = torch.autograd.grad(chosen, leaves[-1], allow_unused=True)[0] if reached else None
    if gradient is None:
        raise UserError(f"the logits do not depend on layer {layer!r}: does the model's forward detach?")
    slopes = layer_maps(calls[-1], gradient, sizes, grid)
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


def layer_maps(call: LayerCall, output: Tensor, sizes: Sequence[Grid], grid: Grid | None) -> Tensor:
    """The output of a layer as maps ``(n, C, rows, columns)``, without the tokens that are no part of the image.

    Tokens ``(n, rows, columns, C)`` have their grid in their shape, if its proportions are those of a convolution's
    maps. Those in one line, ``(n, T, C)``, lie row by row and behind the class token and its like. Their grid is the
    one that is given, or that of the patches: of the ``sizes`` of the maps of convolutions that ran before, the last
    that leaves at most 16 tokens, and fewer than it has itself. Without such a convolution it is square, with none,
    one, or two tokens before it.
    """
    name, shape = call.name, tuple(output.shape)
    if call.kind != "linear":
        if output.ndim != _MAP_DIMS:
            raise UserError(f"layer {name!r} gives {shape}, no maps (N, C, H, W)")
        if grid is not None and tuple(grid) != shape[2:]:
            raise UserError(f"layer {name!r} has maps of {shape[2:]}: a grid is for tokens")
        return output
    if output.ndim < 3:
        raise UserError(
            f"layer {name!r} gives {shape}, no maps (N, C, H, W) and no tokens (N, T, C): Grad-CAM needs a convolution "
            "or a linear map over tokens"
        )
    if call.folded or output.ndim > _MAP_DIMS:
        raise UserError(
            f"layer {name!r} gives {shape}, tokens in windows, whose places in the image cannot be told: take a layer "
            "outside the windows, such as the MLP after the attention"
        )
    if output.ndim == _MAP_DIMS:
        if grid is not None and tuple(grid) != shape[1:3]:
            raise UserError(f"layer {name!r} has a grid of {shape[1]} x {shape[2]} tokens, not {grid[0]} x {grid[1]}")
        if grid is None and sizes and not any(_alike((shape[1], shape[2]), size) for size in sizes):
            raise UserError(
                f"layer {name!r} gives {shape}, whose {shape[1]} x {shape[2]} tokens have not the shape of the "
                f"convolutions' maps (windows?): if they are rows and columns, give grid=({shape[1]}, {shape[2]})"
            )
        return output.movedim(-1, 1)
    rows, columns = _token_grid(name, shape[1], sizes) if grid is None else grid
    leading = shape[1] - rows * columns
    if rows < 1 or columns < 1 or leading < 0:
        raise UserError(f"layer {name!r} has {shape[1]} tokens, too few for a grid of {rows} x {columns}")
    image: Tensor = output[:, leading:].unflatten(1, (rows, columns))
    return image.movedim(-1, 1)


def _alike(grid: Grid, size: Grid) -> bool:
    """Whether both have the same proportions, up to rounding to whole tokens."""
    return abs(grid[0] * size[1] - grid[1] * size[0]) <= max(size)


def _token_grid(name: str, tokens: int, sizes: Sequence[Grid]) -> Grid:
    for size in reversed(sizes):
        if 0 <= tokens - math.prod(size) <= min(_MOST_LEADING, math.prod(size) - 1):
            return size
    for leading in range(_UNSEEN_LEADING + 1):
        side = math.isqrt(max(0, tokens - leading))
        if side > 1 and side**2 == tokens - leading:
            return side, side
    raise UserError(
        f"the {tokens} tokens of layer {name!r} fit no grid that the network shows: give grid=(rows, columns); tokens "
        "that are left over count as class tokens at the front"
    )
