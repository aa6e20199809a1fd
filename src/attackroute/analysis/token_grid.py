"""Tokens as maps: which tokens are parts of the image, and how they lie in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall

_MOST_LEADING = 16  # class, distillation and register tokens before those of the image


_UNSEEN_LEADING = 2  # of them, where no convolution shows the grid: a class token, and one of distillation


Grid = tuple[int, int]
"""Rows and columns of tokens."""


def token_maps(call: LayerCall, output: Tensor, seen: Sequence[Grid], grid: Grid | None) -> Tensor:
    """The output of a linear map as maps, without the tokens that are no part of the image.

    Tokens ``(n, rows, columns, C)`` have their grid in their shape, if its proportions are those of a convolution's
    maps. Those in one line, ``(n, T, C)``, lie row by row and behind the class token and its like. Their grid is the
    one that is given, or that of the patches: the size of the last convolution's maps that leaves at most 16 tokens,
    and fewer than it has itself. Without such a convolution it is square, with none, one, or two tokens before it.

    Args:
        call: The linear map.
        output: What it gives, ``(n, ..., C)``.
        seen: Sizes of the maps of convolutions that ran before it, in order.
        grid: Rows and columns, where the user knows them.

    Returns:
        ``(n, C, rows, columns)``, a view.

    Raises:
        UserError: The output has no tokens, or they stand in windows, or their grid cannot be told or does not fit.
    """
    name, shape = call.name, tuple(output.shape)
    if output.ndim < 3:
        raise UserError(
            f"layer {name!r} gives {shape}, no maps (N, C, H, W) and no tokens (N, T, C): Grad-CAM needs a convolution "
            "or a linear map over tokens"
        )
    if call.folded or output.ndim > 4:
        raise UserError(
            f"layer {name!r} gives {shape}, tokens in windows, whose places in the image cannot be told: take a layer "
            "outside the windows, such as the MLP after the attention"
        )
    if output.ndim == 4:
        if grid is not None and tuple(grid) != shape[1:3]:
            raise UserError(f"layer {name!r} has a grid of {shape[1]} x {shape[2]} tokens, not {grid[0]} x {grid[1]}")
        if grid is None and seen and not any(_alike((shape[1], shape[2]), size) for size in seen):
            raise UserError(
                f"layer {name!r} gives {shape}, whose {shape[1]} x {shape[2]} tokens have not the shape of the "
                f"convolutions' maps (windows?): if they are rows and columns, give grid=({shape[1]}, {shape[2]})"
            )
        return output.movedim(-1, 1)
    rows, columns = _grid(name, shape[1], seen) if grid is None else grid
    leading = shape[1] - rows * columns
    if rows < 1 or columns < 1 or leading < 0:
        raise UserError(f"layer {name!r} has {shape[1]} tokens, too few for a grid of {rows} x {columns}")
    image: Tensor = output[:, leading:].unflatten(1, (rows, columns))
    return image.movedim(-1, 1)


def _alike(grid: Grid, size: Grid) -> bool:
    """Whether both have the same proportions, up to rounding to whole tokens."""
    return abs(grid[0] * size[1] - grid[1] * size[0]) <= max(size)


def _grid(name: str, tokens: int, seen: Sequence[Grid]) -> Grid:
    for size in reversed(seen):
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
