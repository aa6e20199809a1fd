"""Normalisation and attention as operations spell them: steps on the way to a crossing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from attackroute.tracing.crossings import Attended, Crossing, Deviation, Held, Normalisation
from attackroute.tracing.reach import Reach
from attackroute.tracing.rules.operation import COPIES, FILLS, PRODUCTS, SUMS, Reading, trail_rule
from attackroute.tracing.token_maps import apart
from attackroute.tracing.trails import Trail, lost, mixed


@trail_rule("native_layer_norm")
def layer_norm(reading: Reading, output: Any) -> list[Trail]:
    """Layer norm over the last dimension."""
    values, shape = reading.args[:2]
    scale = reading.argument(2, "weight")
    if len(shape) != 1 or any(reading.trail(each).sources for each in reading.operands[1:]):
        return [lost(reading.trails.values())] * 3
    normalised, mean, reciprocal = output
    deviation = Deviation(Held(values), reciprocal.detach(), mean.detach(), scale)
    reach = reading.first.reaching(Reach.mixed, [values.ndim - 1])
    trail = replace(_normalised(reading.first, values, deviation, normalised), reach=reach)
    return [trail, lost([reading.first]), lost([reading.first])]


def _normalised(trail: Trail, values: Tensor, deviation: Deviation, output: Tensor) -> Trail:
    """The trail behind a normalisation of ``values``; one before it that reaches it unaltered is part of the form."""
    plain = mixed([trail])
    before: list[tuple[Normalisation, Normalisation | None, tuple[int, ...]]] = []
    direct = frozenset[int]().union(*(each.sources for each in trail.strands if isinstance(each.origin, int)))
    blocks: dict[Normalisation, list[int]] = {}
    for strand in trail.strands:
        inner = strand.origin
        if not isinstance(inner, Normalisation) or not inner.kept:
            continue
        if inner.aligned(strand, values.shape):
            before.append((inner, None, ()))
        elif inner.side_by_side(strand, values.shape):
            blocks.setdefault(inner, []).append(strand.block)
    for inner, starts in blocks.items():
        if len(starts) == sum(strand.origin is inner for strand in trail.strands):
            before.append((inner, inner, tuple(starts)))
    crossings, gone = [Normalisation(plain, output, (deviation.stream,), (deviation,))], set(plain.lost)
    for inner, beside, begins in before:
        chain = (deviation, *inner.deviations)
        held = tuple(each.stream for each in chain)
        crossings.append(Normalisation(inner.trail, output, held, chain, beside, begins))
        gone -= inner.sources - trail.lost - direct
    return Crossing.behind(*crossings, lost=frozenset(gone))


@dataclass(frozen=True, eq=False)
class _Moment:
    """RMS norm written out: the square of a tensor, its mean over the last dimension, or one over the mean's root."""

    stream: Held
    step: str


def mean_form(form: object) -> object:
    """The form of a mean over the last dimension."""
    return _Moment(form.stream, "mean") if isinstance(form, _Moment) and form.step == "square" else None


def multiplied_by_deviation(reading: Reading, output: Tensor) -> Trail | None:
    """The trail of a tensor times the reciprocal root of the mean of its squares; None for anything else."""
    if reading.name != "mul":
        return None
    left, right = reading.args[:2]
    for stream, factor in ((left, right), (right, left)):
        form = reading.trail(factor).form
        if isinstance(form, _Moment) and form.step == "root" and form.stream.kept and form.stream.tensor is stream:
            deviation = Deviation(form.stream, factor.detach(), mean=None, scale=None)
            return _normalised(reading.trail(stream), stream, deviation, output)
    return None


# --- attention


@dataclass(frozen=True, eq=False)
class _Logits:
    """Products of queries (b, T, E) and keys (b, E, T'), times a scale, plus constants; or their softmax."""

    queries: Held
    keys: Held
    trails: tuple[Trail, Trail]
    scale: Tensor | float = 1.0
    weights: bool = False


def changed_form(reading: Reading, operand: Tensor, output: Tensor) -> object:
    """What becomes of a tensor's form where one operand alone depends on route layers; None if nothing is known."""
    form = reading.trail(operand).form
    if reading.name == "pow" and form is None and reading.args[1] == 2:
        return _Moment(Held(operand), "square")
    if form is None or output.shape != operand.shape:
        return None
    if reading.name in COPIES:
        return form
    if isinstance(form, _Logits):
        return None if form.weights else _logits(reading, form, operand)
    if reading.name == "rsqrt":
        return _Moment(form.stream, "root") if isinstance(form, _Moment) and form.step == "mean" else None
    adds = reading.name in ("add", "add_") and not isinstance(reading.args[1], Tensor)
    return form if adds and isinstance(form, _Moment) and form.step == "mean" else None


def _logits(reading: Reading, form: _Logits, operand: Tensor) -> _Logits | None:
    """The form of logits plus constants, times a number or one number for each head, or filled in places."""
    read, name = reading.args[:2], reading.name
    first, factor = operand is read[0], next((value for value in read if value is not operand), None)
    if name in FILLS | SUMS:
        return form if first or (name == "add" and reading.argument(2, "alpha", 1) == 1) else None
    divides = name.startswith("div")
    if name not in PRODUCTS or factor is None or (divides and not first) or reading.argument(2, "rounding_mode"):
        return None
    if isinstance(factor, Tensor) and factor.numel() > 1:
        if tuple(factor.shape[-2:]) != (1, 1):
            return None
        factor = factor.expand(*operand.shape[:-2], 1, 1)
    scale = factor.detach().reshape(-1).clone() if isinstance(factor, Tensor) else factor
    return replace(form, scale=form.scale / scale if divides else form.scale * scale)


@trail_rule("_softmax", "_safe_softmax")
def softmax(reading: Reading, output: Tensor) -> list[Trail]:
    """Softmax over the keys."""
    form = reading.first.form
    if isinstance(form, _Logits) and not form.weights and reading.args[1] % output.ndim == output.ndim - 1:
        return [lost([reading.first], replace(form, weights=True))]
    return [lost([reading.first])]


@trail_rule("bmm", "baddbmm")
def product(reading: Reading, output: Tensor) -> list[Trail]:
    """Products of queries and keys, and of attention weights and values."""
    *added, left, right = reading.args[:3] if reading.name == "baddbmm" else reading.args[:2]
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
    trail, maps = apart(((form.trails[0], 1), (form.trails[1], 2), (trails[1], 1)), [each.values for each in held])
    attended = Attended(trail, output, held, scale=form.scale, maps=maps)
    return [Crossing.behind(attended, lost=trail.lost - attended.sources)]
