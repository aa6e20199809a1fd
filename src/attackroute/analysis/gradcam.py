"""Grad-CAM of chosen channels: where in the image the channels on a route speak for the class, and those off it.

Grad-CAM (Selvaraju et al., 2017) weighs each channel's map ``A^c`` by the mean over positions of its class logit's
gradient, ``alpha_c``, and keeps what speaks for the class: ``relu(sum_c alpha_c A^c)``. Here the sum runs over any set
of channels. Before the ReLU the maps of a set and of its complement add up to the whole.

Tokens are maps too: channels are the features, positions the tokens of the image, see :func:`token_maps`.
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
    """What a layer's channels say for a class, before channels are chosen.

    Attributes:
        maps: The layer's maps ``A``, ``(N, C, H, W)``.
        weights: ``alpha``: mean over positions of the class logit's gradient at the maps, ``(N, C)``.
        logits: The model's logits, ``(N, classes)``.
        target: The class of each image, ``(N,)``.
    """

    maps: Tensor
    weights: Tensor
    logits: Tensor
    target: Tensor

    def __getitem__(self, rows: Tensor) -> Evidence:
        """The evidence of some of the images."""
        return Evidence(self.maps[rows], self.weights[rows], self.logits[rows], self.target[rows])

    def cams(self, sets: Tensor) -> Tensor:
        """Of each set of channels, bool ``(S, C)``: ``relu(sum over the set of alpha_c A^c)``, ``(S, N, H, W)``."""
        if sets.ndim != 2 or sets.shape[1] != self.maps.shape[1]:
            raise UserError(
                f"sets of channels have shape {tuple(sets.shape)}; the layer needs (sets, {self.maps.shape[1]})"
            )
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
        grid: Rows and columns of the tokens; None to find out, see :func:`token_maps`. Tokens
            before the grid are left out.

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
    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        leaf = _Leaf()
        with leaf.edits(layer, at).applied_to(model):
            logits = checked_logits(model(images.detach().clone()), images.shape[0])
        maps = leaf.maps(leaf.values, grid)
        classes = logits.detach().argmax(1) if target is None else target.to(logits.device)
        classes = checked_labels(classes, logits.shape[1], images.shape[0])
        if not logits.requires_grad:
            raise UserError(f"the logits do not depend on layer {layer!r}: does the model's forward detach?")
        chosen = logits.gather(1, classes[:, None]).sum()
        gradient = torch.autograd.grad(chosen, leaf.values, allow_unused=True)[0]
    if gradient is None:
        raise UserError(f"the logits do not depend on layer {layer!r}")
    slopes = leaf.maps(gradient, grid)
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


class _Leaf:
    """Makes a layer's output, or its activation's, a leaf that requires grad.

    Attributes:
        call: The layer's call, once the model has run.
        values: The leaf.
        sizes: Sizes of the maps of the convolutions before it.
    """

    call: LayerCall
    values: Tensor

    def __init__(self) -> None:
        self.sizes: list[Grid] = []
        self._reached = False

    def edits(self, layer: str, at: str) -> LayerEdits:
        """What puts the leaf into the model."""
        return LayerEdits({layer: None}, self._copied, at, run=self._run, seen=self._note)

    def _run(self, call: LayerCall) -> Tensor:
        self.call, self._reached = call, True
        return call.run()

    def _copied(self, layer: str, dim: int, values: Tensor) -> Tensor:
        self.values = values.detach().requires_grad_()
        return self.values.clone()  # a copy of the leaf, since what follows may work in place

    def _note(self, call: LayerCall, output: Tensor) -> None:
        if call.kind == "conv2d" and not self._reached:
            self.sizes.append((output.shape[-2], output.shape[-1]))

    def maps(self, values: Tensor, grid: Grid | None) -> Tensor:
        """What has the shape of the leaf, as maps ``(n, C, H, W)``."""
        if self.call.kind == "linear":
            return token_maps(self.call, values, self.sizes, grid)
        if values.ndim != _MAP_DIMS:
            raise UserError(f"layer {self.call.name!r} gives {tuple(values.shape)}, no maps (N, C, H, W)")
        if grid is not None and tuple(grid) != tuple(values.shape[2:]):
            raise UserError(f"layer {self.call.name!r} has maps of {tuple(values.shape[2:])}: a grid is for tokens")
        return values


def token_maps(call: LayerCall, output: Tensor, sizes: Sequence[Grid], grid: Grid | None) -> Tensor:
    """The output of a linear map as maps, without the tokens that are no part of the image.

    Tokens ``(n, rows, columns, C)`` have their grid in their shape, if its proportions are those of a convolution's
    maps. Those in one line, ``(n, T, C)``, lie row by row and behind the class token and its like. Their grid is the
    one that is given, or that of the patches: the size of the last convolution's maps that leaves at most 16 tokens,
    and fewer than it has itself. Without such a convolution it is square, with none, one, or two tokens before it.

    Args:
        call: The linear map.
        output: What it gives, ``(n, ..., C)``; the maps are a view ``(n, C, rows, columns)`` of it.
        sizes: Sizes of the maps of convolutions that ran before it, in order.
        grid: Rows and columns, where the user knows them.

    Raises:
        UserError: The output has no tokens, or they stand in windows, or their grid cannot be told or does not fit.
    """
    name, shape = call.name, tuple(output.shape)
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
