"""Element by element: how operations take on the trails of what they read.

An operation without a rule here leaves no trail: all sources that reach it are lost to closed forms by elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attackroute.tracing.crossings import Attended, Held, Normalisation, mixed
from attackroute.tracing.rules.operation import Operation, overloads, tensors_in
from attackroute.tracing.trails import UNTOUCHED, Axes, Strand, Trail, joined, lost, regrouped, unfollowed, whole

TrailRule = Callable[["Reading", Any], Sequence[Trail]]
TRAIL_RULES: dict[Any, TrailRule] = {}


@dataclass(frozen=True)
class Reading:
    """An operation and the trails of its operands, by the operand's id, as they were before it ran."""

    operation: Operation
    trails: Mapping[int, Trail]

    def trail(self, value: object) -> Trail:
        """The trail of an operand, or of a number."""
        return self.trails.get(id(value), UNTOUCHED)

    @property
    def first(self) -> Trail:
        """The trail of the first argument."""
        return self.trail(self.operation.args[0])

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """A positional or keyword argument."""
        return self.operation.argument(index, name, default)


def followed(operation: Operation, trails: Mapping[int, Trail], output: Any) -> list[tuple[Tensor, Trail]]:
    """The trails of an operation's results."""
    results = tensors_in(output)
    rule = TRAIL_RULES.get(operation.func)
    if rule is None and torch.Tag.pointwise in operation.func.tags:
        rule = pointwise
    if rule is None:
        return [(tensor, lost(trails.values())) for tensor in results]
    return list(zip(results, rule(Reading(operation, trails), output), strict=False))


def trail_rule(*names: str) -> Callable[[TrailRule], TrailRule]:
    """Register how operations of these names, all overloads or one, take on trails."""

    def register(function: TrailRule) -> TrailRule:
        for name in names:
            packet = getattr(torch.ops.aten, name.partition(".")[0], None)
            every = [] if packet is None else [f"{name}.{overload}" for overload in packet.overloads()]
            TRAIL_RULES.update(dict.fromkeys(overloads(*([name] if "." in name else every)), function))
        return function

    return register


# --- values


@trail_rule("hardswish", "hardswish_", "_prelu_kernel")
def pointwise(reading: Reading, output: Tensor) -> list[Trail]:
    """Whatever is done to each element by itself; operands that are spread over the output lose their trail."""
    operands = list({id(value): value for value in reading.operation.operands}.values())
    trails = [reading.trail(operand) for operand in operands]
    dependent = [index for index, trail in enumerate(trails) if trail.sources]
    if len(dependent) == 1:
        index = dependent[0]
        others = operands[:index] + operands[index + 1 :]
        form = _changed_form(reading, trails[index].form, operands[index], others, output)
        if form is not None:
            kept = trails[index].changed(each if isinstance(each.origin, int) else None for each in trails[index].strands)
            return [replace(kept, form=form)]
    if (normalised := _multiplied_by_deviation(reading, operands, trails, output)) is not None:
        return [normalised]
    spread = [
        replace(trail, form=None)
        if operand.shape == output.shape
        else trail.changed(None for _ in trail.strands)
        for operand, trail in zip(operands, trails, strict=True)
    ]
    changed = [
        trail.changed(
            strand if isinstance(strand.origin, int) else _scaled(reading, strand, operand, operands)
            for strand in trail.strands
        )
        if len(dependent) == 1
        else trail.changed(strand if isinstance(strand.origin, int) else None for strand in trail.strands)
        for operand, trail in zip(operands, spread, strict=True)
    ]
    return [joined(changed)]


_SUMS = frozenset({"add", "add_", "sub", "sub_"})
_PRODUCTS = frozenset({"mul", "mul_", "div", "div_"})
_FILLS = frozenset({"masked_fill", "masked_fill_"})
_COPIES = frozenset({"clone", "_to_copy", "alias", "contiguous", "lift_fresh"})


def _name(reading: Reading) -> str:
    return str(reading.operation.func.overloadpacket.__name__)


def _scaled(reading: Reading, strand: Strand, operand: Tensor, operands: Sequence[Tensor]) -> Strand | None:
    """The strand of a crossing behind a sum with a constant, or a product with a factor per channel."""
    name = _name(reading)
    if name in _SUMS | _COPIES:
        swapped = name.startswith("sub") and operand is not reading.operation.args[0]
        plain = reading.argument(2, "alpha", 1) == 1 and not swapped
        return strand if plain else replace(strand, gained=True)
    if name not in _PRODUCTS or (name.startswith("div") and operand is not reading.operation.args[0]):
        return None
    if reading.argument(2, "rounding_mode") is not None:
        return None
    for factor in operands:
        if factor is operand or factor.numel() == 1:
            continue
        axes = strand.axes
        channels = [dim for dim in range(operand.ndim) if axes and _is_channels(strand, axes, dim)]
        shape = (1,) * (operand.ndim - factor.ndim) + tuple(factor.shape)
        if len(channels) != 1 or any(size != 1 for dim, size in enumerate(shape) if dim != channels[0]):
            return None
    return replace(strand, gained=True)


def _is_channels(strand: Strand, axes: Axes, dim: int) -> bool:
    """Whether a dimension is the last one of the crossing's output, whole."""
    origin = strand.origin
    return not isinstance(origin, int) and axes[dim] == whole(origin.output.shape)[-1] != ()  # type: ignore[attr-defined]


@trail_rule("clone", "_to_copy", "alias", "lift_fresh", "contiguous")
def copies(reading: Reading, output: Tensor) -> list[Trail]:
    """The same elements."""
    return [reading.first]


@trail_rule("copy_")
def copy(reading: Reading, output: Tensor) -> list[Trail]:
    """The target takes on the trail of what is copied to it."""
    source = reading.operation.args[1]
    trail = reading.trail(source)
    return [trail if source.shape == output.shape else lost([trail])]


# --- places


def _placed(
    trail: Trail, move: tuple[Any, ...], axes: Callable[[Axes], Axes | None], *, partial: bool = False
) -> Trail:
    return trail.changed(
        strand.moved(move, None if strand.axes is None else axes(strand.axes), partial=partial)
        for strand in trail.strands
    )


def _viewed(trail: Trail, old: Sequence[int], new: Sequence[int]) -> Trail:
    if tuple(old) == tuple(new):
        return trail
    placed = _placed(trail, ("view", tuple(old), tuple(new)), lambda axes: regrouped(axes, new))
    if trail.form is not None and tuple(old[-2:]) == tuple(new[-2:]):
        return replace(placed, form=trail.form)
    return placed


@trail_rule("view.default", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten.using_ints", "unsqueeze_", "as_strided_")
def view(reading: Reading, output: Tensor) -> list[Trail]:
    """The same elements in the same order."""
    values = reading.operation.args[0]
    if _name(reading) == "as_strided_" and values.shape != output.shape:
        return [lost([reading.first])]
    return [_viewed(reading.first, values.shape, output.shape)]


@trail_rule("expand")
def expand(reading: Reading, output: Tensor) -> list[Trail]:
    """Expansion to the same size."""
    values = reading.operation.args[0]
    if values.numel() == output.numel():
        return [_viewed(reading.first, values.shape, output.shape)]
    return [lost([reading.first])]


@trail_rule("permute", "transpose.int", "t", "movedim.intlist", "transpose_")
def permute(reading: Reading, output: Tensor) -> list[Trail]:
    """Dimensions in another order."""
    dims = list(range(output.ndim))
    name = _name(reading)
    if name == "permute":
        dims = [dim % output.ndim for dim in reading.operation.args[1]]
    elif name.startswith("transpose"):
        first, second = (dim % output.ndim for dim in reading.operation.args[1:3])
        dims[first], dims[second] = second, first
    elif name == "t":
        dims.reverse()
    else:
        return [lost([reading.first])]
    return [_placed(reading.first, ("permute", tuple(dims)), lambda axes: tuple(axes[dim] for dim in dims))]


def _cut(trail: Trail, shape: Sequence[int], dim: int, taken: range) -> Trail:
    """What of a tensor lies within a range of one dimension."""
    if taken == range(shape[dim]):
        return trail
    new = [*shape]
    new[dim] = len(taken)
    move = ("cut", (dim, tuple(shape)), taken.start, taken.stop, taken.step)
    return _placed(trail, move, lambda axes: unfollowed(axes, [dim], new), partial=True)


@trail_rule("slice.Tensor", "select.int", "split", "split_with_sizes", "chunk", "unbind.int", "narrow")
def cut(reading: Reading, output: Any) -> list[Trail]:
    """Parts of one dimension."""
    values, name = reading.operation.args[0], _name(reading)
    shape, last = values.shape, {"slice": 1, "select": 1, "unbind": 1}.get(name, 2)
    dim = reading.argument(last, "dim", 0) % values.ndim
    size = shape[dim]
    if name == "slice":
        bounds = slice(reading.argument(2, "start"), reading.argument(3, "end"), reading.argument(4, "step", 1))
        return [_cut(reading.first, shape, dim, range(*bounds.indices(size)))]
    if name == "narrow":
        return [lost([reading.first])]
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
    tensors = reading.operation.args[0]
    dim = reading.argument(1, "dim", 0) % output.ndim
    stacked, start, trails = _name(reading) == "stack", 0, []
    for tensor in tensors:
        trail, size = reading.trail(tensor), 1 if stacked else tensor.shape[dim]
        if stacked:
            trail = _viewed(trail, tensor.shape, [*tensor.shape[:dim], 1, *tensor.shape[dim:]])
        move = ("cat", dim, start, tuple(output.shape))
        trails.append(_placed(trail, move, lambda axes: unfollowed(axes, [dim], output.shape), partial=True))
        start += size
    return [joined(trails)]


@trail_rule("constant_pad_nd")
def pad(reading: Reading, output: Tensor) -> list[Trail]:
    """Constants around, or positions cropped."""
    widths = tuple(int(width) for width in reading.operation.args[1])
    dims = [output.ndim - 1 - place // 2 for place, width in enumerate(widths) if width]
    move = ("pad", tuple(reading.operation.args[0].shape), widths)
    return [_placed(reading.first, move, lambda axes: unfollowed(axes, dims, output.shape), partial=True)] if dims else [reading.first]


@trail_rule("roll", "flip")
def turned(reading: Reading, output: Tensor) -> list[Trail]:
    """Positions in another order."""
    numbers = [tuple(values) for values in reading.operation.args[1:]]
    if not numbers or (_name(reading) == "roll" and (len(numbers) < 2 or not numbers[1])):
        return [lost([reading.first])]
    dims = [dim % output.ndim for dim in numbers[-1]]
    move = (_name(reading), tuple(output.shape), *numbers)
    return [_placed(reading.first, move, lambda axes: unfollowed(axes, dims, output.shape))]


@trail_rule("mean.dim", "sum.dim_IntList")
def reduced(reading: Reading, output: Tensor) -> list[Trail]:
    """Several elements in one."""
    values = reading.operation.args[0]
    dims = [dim % values.ndim for dim in reading.argument(1, "dim") or range(values.ndim)]
    kept = [1 if dim in dims else size for dim, size in enumerate(values.shape)]
    ends = len(dims) == 1 and dims[0] == values.ndim - 1

    def merged(strand: Strand) -> Strand | None:
        axes = strand.axes
        if axes is not None and any(_is_channels(strand, axes, dim) for dim in dims):
            return None
        moved = strand.moved(("reduce", tuple(values.shape), tuple(dims)), None if axes is None else unfollowed(axes, dims, kept), partial=True)
        return replace(moved, merged=True)

    trail = _viewed(reading.first.changed(map(merged, reading.first.strands)), kept, output.shape)
    form = reading.first.form
    if isinstance(form, _Square) and ends and _name(reading) == "mean" and output.ndim == values.ndim:
        return [replace(trail, form=_Mean(form.stream))]
    return [trail]


# --- normalisation


@trail_rule("native_layer_norm")
def layer_norm(reading: Reading, output: Any) -> list[Trail]:
    """Layer norm over the last dimension."""
    values, shape = reading.operation.args[:2]
    scale = reading.argument(2, "weight")
    if len(shape) != 1 or any(reading.trail(each).sources for each in reading.operation.operands[1:]):
        return [lost(reading.trails.values())] * 3
    normalised, mean, reciprocal = output
    trail = mixed([reading.first])
    crossing = Normalisation(trail, normalised, (Held(values),), reciprocal=reciprocal.detach(), mean=mean.detach(), scale=scale)
    return [_behind(crossing), lost([reading.first]), lost([reading.first])]


def _behind(crossing: Normalisation | Attended) -> Trail:
    """The trail of a crossing's own output."""
    if not crossing.sources:
        return Trail(lost=crossing.trail.lost)
    return Trail((Strand(crossing, (), whole(crossing.output.shape)),), crossing.trail.lost)


@dataclass(frozen=True, eq=False)
class _Square:
    stream: Held


@dataclass(frozen=True, eq=False)
class _Mean:
    """The mean of the squares of a tensor over its last dimension, plus a constant."""

    stream: Held


@dataclass(frozen=True, eq=False)
class _Reciprocal:
    """One over the root of it."""

    stream: Held


def _multiplied_by_deviation(
    reading: Reading, operands: Sequence[Tensor], trails: Sequence[Trail], output: Tensor
) -> Trail | None:
    """RMS norm written out: a tensor times the reciprocal root of the mean of its squares."""
    if _name(reading) != "mul" or len(operands) != 2:
        return None
    pairs = list(zip(operands, trails, strict=True))
    for (stream, trail), (other, factor) in (pairs, pairs[::-1]):
        form = factor.form
        if isinstance(form, _Reciprocal) and form.stream.kept and form.stream.holds(stream):
            crossing = Normalisation(
                mixed([trail]), output, (form.stream,), reciprocal=other.detach(), mean=None, scale=None
            )
            return _behind(crossing)
    return None


# --- attention


@dataclass(frozen=True, eq=False)
class _Logits:
    """Products of queries and keys, ``(b, T, E)`` and ``(b, E, T')``, times a scale, plus constants; or their softmax."""

    queries: Held
    keys: Held
    trails: tuple[Trail, Trail]
    scale: Tensor | float = 1.0
    weights: bool = False


def _changed_form(
    reading: Reading, form: object, operand: Tensor, others: Sequence[Tensor], output: Tensor
) -> object:
    """What an elementwise operation with constants makes of a tensor on its way to a crossing; None if nothing known."""
    name = _name(reading)
    if name == "pow" and form is None and not others and reading.operation.args[1:] == (2,):
        return _Square(Held(operand))
    if name in ("add", "add_") and isinstance(form, _Mean) and not others:
        return form
    if name == "rsqrt" and isinstance(form, _Mean):
        return _Reciprocal(form.stream)
    if form is None or output.shape != operand.shape:
        return None
    if name in _COPIES:
        return form
    if not isinstance(form, _Logits) or form.weights:
        return None
    if name in _FILLS or (name in _SUMS and operand is reading.operation.args[0]):
        return form
    if name == "add" and reading.argument(2, "alpha", 1) == 1:
        return form
    if name not in _PRODUCTS or reading.argument(2, "rounding_mode") is not None:
        return None
    number = next(iter(others), None)
    if number is None:
        numbers = [value for value in reading.operation.args[:2] if isinstance(value, (int, float))]
        if len(numbers) != 1:
            return None
        number = numbers[0]
    elif number.numel() == 1:
        number = number.detach().reshape(()).clone()
    elif number.ndim >= 2 and tuple(number.shape[-2:]) == (1, 1):
        number = number.detach().expand(*operand.shape[:-2], 1, 1).reshape(-1).clone()
    else:
        return None
    if name.startswith("div"):
        if operand is not reading.operation.args[0]:
            return None
        number = 1 / number
    return replace(form, scale=form.scale * number)


@trail_rule("_softmax", "_safe_softmax")
def softmax(reading: Reading, output: Tensor) -> list[Trail]:
    """Softmax over the keys."""
    form = reading.first.form
    if isinstance(form, _Logits) and not form.weights and reading.operation.args[1] % output.ndim == output.ndim - 1:
        return [lost([reading.first], replace(form, weights=True))]
    return [lost([reading.first])]


@trail_rule("bmm", "baddbmm")
def product(reading: Reading, output: Tensor) -> list[Trail]:
    """Products of queries and keys, and of attention weights and values."""
    *added, left, right = reading.operation.args[:3] if _name(reading) == "baddbmm" else reading.operation.args[:2]
    trails = reading.trail(left), reading.trail(right)
    form = trails[0].form
    everything = lost(reading.trails.values())
    if added and (reading.trail(added[0]).sources or trails[0].form is not None):
        return [everything]
    if not isinstance(form, _Logits):
        scale = float(reading.argument(4, "alpha", 1))
        return [replace(everything, form=_Logits(Held(left), Held(right), trails, scale))]
    if not form.weights or not (form.queries.kept and form.keys.kept):
        return [everything]
    held = (form.queries, form.keys, Held(right), Held(left))
    crossing = Attended(mixed([*form.trails, trails[1]]), output, held, scale=form.scale)
    return [_behind(crossing)]
