"""Element by element: how operations take on the trails of what they read.

An operation without a rule here leaves no trail: all sources that reach it are lost to closed forms by elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attackroute.tracing.crossings import Crossing
from attackroute.tracing.factors import Axes, regrouped, unfollowed, whole
from attackroute.tracing.reach import Reach
from attackroute.tracing.rules.mixing import changed_form, mean_form, multiplied_by_deviation
from attackroute.tracing.rules.operation import COPIES, PRODUCTS, SUMS, TRAIL_RULES, Reading, tensors_in, trail_rule
from attackroute.tracing.trails import Strand, Trail, joined, lost, reach_by


def followed(reading: Reading, output: Any) -> list[tuple[Tensor, Trail]]:
    """The trails of an operation's results, from those of its operands before it ran."""
    results = tensors_in(output)
    rule = TRAIL_RULES.get(reading.func)
    if rule is None and torch.Tag.pointwise in reading.func.tags:
        rule = pointwise
    if rule is None:
        return [(tensor, lost(reading.trails.values())) for tensor in results]
    based = [one for value in reading.operands for one in reading.trail(value).reach.values() if one.base.holds(value)]
    pairs = list(zip(results, rule(reading, output), strict=False))
    if not based or rule not in _PLACES or reading.func._schema.is_mutable:
        return pairs
    return [(tensor, replace(trail, reach=trail.reaching(Reach.based, tensor))) for tensor, trail in pairs]


# --- values


@trail_rule("hardswish", "hardswish_", "_prelu_kernel")
def pointwise(reading: Reading, output: Tensor) -> list[Trail]:
    """Whatever is done to each element by itself; operands that are spread over the output lose their trail."""
    operands = {id(value): value for value in reading.operands}
    trails = reading.trails
    dependent = [key for key, trail in trails.items() if trail.sources]
    reach = {key: trail.reaching(Reach.spread, operands[key].shape, output.shape) for key, trail in trails.items()}
    if len(dependent) == 1:
        form = changed_form(reading, operands[dependent[0]], output)
        if form is not None:
            trail = trails[dependent[0]]  # what came through crossings is lost
            layers = trail.changed(strand if isinstance(strand.origin, int) else None for strand in trail.strands)
            return [replace(layers, form=form, reach=reach[dependent[0]])]
    normalised = multiplied_by_deviation(reading, output)

    def kept(strand: Strand, operand: Tensor) -> Strand | None:
        if operand.shape != output.shape:
            return None
        return strand if isinstance(strand.origin, int) else _scaled(reading, strand, operand, len(dependent) == 1)

    changed = [
        replace(trail.changed([kept(strand, operands[key]) for strand in trail.strands]), reach=reach[key])
        for key, trail in trails.items()
    ]
    return [joined(changed) if normalised is None else replace(normalised, reach=reach_by(changed))]


def _scaled(reading: Reading, strand: Strand, operand: Tensor, alone: bool) -> Strand | None:
    """The strand of a crossing behind a sum, or behind a product with a constant for each channel."""
    read = reading.args[:2]
    once = sum(value is operand for value in read) == 1
    if reading.name in SUMS | COPIES | {"rsub"}:
        reversed_sign = reading.name == "rsub" or (reading.name.startswith("sub") and operand is not read[0])
        plain = once and not reversed_sign and reading.argument(2, "alpha", 1) == 1
        return strand if plain else replace(strand, gained=True)
    divides = reading.name.startswith("div")
    if reading.name not in PRODUCTS or not (alone and once) or (divides and operand is not read[0]):
        return None
    factor = next(value for value in read if value is not operand)
    if reading.argument(2, "rounding_mode") is not None:
        return None
    if isinstance(factor, Tensor) and factor.numel() > 1:
        channels = [dim for dim in range(operand.ndim) if _is_channels(strand, dim)]
        shape = (1,) * (operand.ndim - factor.ndim) + tuple(factor.shape)
        if len(channels) != 1 or any(size != 1 for dim, size in enumerate(shape) if dim != channels[0]):
            return None
    return replace(strand, gained=True)


def _is_channels(strand: Strand, dim: int) -> bool:
    """Whether a dimension is the last one of the crossing's output, whole."""
    axes, origin = strand.axes, strand.origin
    return isinstance(origin, Crossing) and axes is not None and axes[dim] == whole(origin.output.shape)[-1] != ()


@trail_rule("clone", "_to_copy", "alias", "lift_fresh", "contiguous", "as_strided_")
def copies(reading: Reading, output: Tensor) -> list[Trail]:
    """The same elements."""
    return [reading.first]


@trail_rule("copy_")
def copy(reading: Reading, output: Tensor) -> list[Trail]:
    """The target takes on the trail of what is copied to it."""
    source = reading.args[1]
    trail = reading.trail(source)
    return [trail if source.shape == output.shape else lost([trail])]


# --- places


def _placed(
    trail: Trail, move: tuple[Any, ...], axes: Callable[[Axes], Axes | None], *, partial: bool = False
) -> Trail:
    changed = trail.changed(
        strand.moved(move, None if strand.axes is None else axes(strand.axes), partial=partial)
        for strand in trail.strands
    )
    return replace(changed, reach=trail.reaching(Reach.moved, move))


def _viewed(trail: Trail, old: Sequence[int], new: Sequence[int]) -> Trail:
    if tuple(old) == tuple(new):
        return trail
    placed = _placed(trail, ("view", tuple(old), tuple(new)), lambda axes: regrouped(axes, new))
    if trail.form is not None and tuple(old[-2:]) == tuple(new[-2:]):
        return replace(placed, form=trail.form)
    return placed


@trail_rule("view.default", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "unsqueeze_")
def view(reading: Reading, output: Tensor) -> list[Trail]:
    """The same elements in the same order."""
    return [_viewed(reading.first, reading.args[0].shape, output.shape)]


@trail_rule("expand")
def expand(reading: Reading, output: Tensor) -> list[Trail]:
    """Expansion, also to the same size."""
    values = reading.args[0]
    if values.numel() == output.numel():
        return [_viewed(reading.first, values.shape, output.shape)]
    reach = reading.first.reaching(Reach.spread, values.shape, output.shape)
    return [lost([reading.first], reach=reach)]


@trail_rule("repeat")
def repeat(reading: Reading, output: Tensor) -> list[Trail]:
    """Copies one after another, along some dimensions."""
    values, counts = reading.args[:2]
    shape = [1] * (len(counts) - values.ndim) + [*values.shape]
    apart = [size for pair in zip([1] * len(shape), shape, strict=True) for size in pair]
    copied = [size for pair in zip(counts, shape, strict=True) for size in pair]
    reach = reading.first.reaching(
        lambda each: each.viewed(values.shape, apart).spread(apart, copied).viewed(copied, output.shape)
    )
    return [lost([reading.first], reach=reach)]


@trail_rule("view_as_complex", "view_as_real")
def complex_view(reading: Reading, output: Tensor) -> list[Trail]:
    """Pairs of numbers as one complex number, and back."""
    ends = (None,) if reading.name == "view_as_real" else ()
    reach = reading.first.reaching(lambda each: replace(each, axes=each.axes[: output.ndim - len(ends)] + ends))
    return [lost([reading.first], reach=reach)]


@trail_rule("permute", "transpose.int", "t", "transpose_")
def permute(reading: Reading, output: Tensor) -> list[Trail]:
    """Dimensions in another order."""
    dims = list(range(output.ndim))
    if reading.name == "permute":
        dims = [dim % output.ndim for dim in reading.args[1]]
    elif reading.name == "t":
        dims.reverse()
    else:
        first, second = (dim % output.ndim for dim in reading.args[1:3])
        dims[first], dims[second] = second, first
    return [_placed(reading.first, ("permute", tuple(dims)), lambda axes: tuple(axes[dim] for dim in dims))]


def _cut(trail: Trail, shape: Sequence[int], dim: int, taken: range) -> Trail:
    """What of a tensor lies within a range of one dimension."""
    if taken == range(shape[dim]):
        return trail
    new = [*shape]
    new[dim] = len(taken)
    move = ("cut", (dim, tuple(shape)), taken.start, taken.stop, taken.step)
    return _placed(trail, move, lambda axes: unfollowed(axes, [dim], new), partial=True)


@trail_rule("slice.Tensor", "select.int", "split", "split_with_sizes", "chunk", "unbind.int")
def cut(reading: Reading, output: Any) -> list[Trail]:
    """Parts of one dimension."""
    values, name = reading.args[0], reading.name
    shape, last = values.shape, {"slice": 1, "select": 1, "unbind": 1}.get(name, 2)
    dim = reading.argument(last, "dim", 0) % values.ndim
    size = shape[dim]
    if name == "slice":
        bounds = slice(reading.argument(2, "start"), reading.argument(3, "end"), reading.argument(4, "step", 1))
        return [_cut(reading.first, shape, dim, range(*bounds.indices(size)))]
    if name in ("select", "unbind"):
        indices = [reading.argument(2, "index") % size] if name == "select" else range(size)
        new = [length for number, length in enumerate(shape) if number != dim]
        kept = [*shape[:dim], 1, *shape[dim + 1 :]]
        return [_viewed(_cut(reading.first, shape, dim, range(index, index + 1)), kept, new) for index in indices]
    trails, start = [], 0
    for part in output:
        trails.append(_cut(reading.first, shape, dim, range(start, start + part.shape[dim])))
        start += part.shape[dim]
    return trails


@trail_rule("cat", "stack")
def cat(reading: Reading, output: Tensor) -> list[Trail]:
    """Side by side along one dimension."""
    tensors = reading.args[0]
    dim = reading.argument(1, "dim", 0) % output.ndim
    stacked, start, trails = reading.name == "stack", 0, []
    for tensor in tensors:
        trail, size = reading.trail(tensor), 1 if stacked else tensor.shape[dim]
        if stacked:
            trail = _viewed(trail, tensor.shape, [*tensor.shape[:dim], 1, *tensor.shape[dim:]])
        move = ("cat", dim, start, tuple(output.shape))
        placed = _placed(trail, move, lambda axes: unfollowed(axes, [dim], output.shape), partial=True)
        # channels that are whole and stand beside others begin a block, of which the move tells the place
        blocks = [start if _is_channels(each, dim) else -1 for each in trail.strands]
        begun = tuple(replace(each, block=block) for each, block in zip(placed.strands, blocks, strict=True))
        trails.append(replace(placed, strands=begun))
        start += size
    return [joined(trails)]


@trail_rule("constant_pad_nd")
def pad(reading: Reading, output: Tensor) -> list[Trail]:
    """Constants around, or positions cropped."""
    widths = tuple(int(width) for width in reading.args[1])
    dims = [output.ndim - 1 - place // 2 for place, width in enumerate(widths) if width]
    move = ("pad", tuple(reading.args[0].shape), widths)
    return [_placed(reading.first, move, lambda axes: unfollowed(axes, dims, output.shape), partial=True)]


@trail_rule("roll", "flip")
def turned(reading: Reading, output: Tensor) -> list[Trail]:
    """Positions in another order."""
    numbers = [tuple(values) for values in reading.args[1:]]
    if not numbers or (reading.name == "roll" and (len(numbers) < 2 or not numbers[1])):
        return [lost([reading.first])]
    dims = [dim % output.ndim for dim in numbers[-1]]
    move = (reading.name, tuple(output.shape), *numbers)
    return [_placed(reading.first, move, lambda axes: unfollowed(axes, dims, output.shape))]


@trail_rule(
    "mean.dim", "sum.dim_IntList", "linalg_vector_norm", "norm.ScalarOpt_dim", "var.correction", "std.correction"
)
def reduced(reading: Reading, output: Tensor) -> list[Trail]:
    """Several elements in one."""
    values, sums = reading.args[0], reading.name in ("mean", "sum")
    given = reading.argument(2 if "norm" in reading.name else 1, "dim")
    dims = [dim % values.ndim for dim in given or range(values.ndim)]
    kept = [1 if dim in dims else size for dim, size in enumerate(values.shape)]

    def merged(strand: Strand) -> Strand | None:
        if not sums or any(_is_channels(strand, dim) for dim in dims):
            return None
        axes = None if strand.axes is None else unfollowed(strand.axes, dims, kept)
        return replace(strand.moved(("reduce", tuple(values.shape), tuple(dims)), axes, partial=True), merged=True)

    changed = reading.first.changed(map(merged, reading.first.strands))
    reach = reading.first.reaching(Reach.mixed, dims)
    trail = _viewed(replace(changed, reach=reach), kept, output.shape)
    last = dims == [values.ndim - 1] and output.ndim == values.ndim and reading.name == "mean"
    return [replace(trail, form=mean_form(reading.first.form)) if last else trail]


_PLACES = (copies, view, permute, cut)
"""Rules of operations that give elements of what they read, each once, and nothing else."""
