"""Influence between the channels of adjacent layers (Eqs. (1)-(2)), of each image or averaged over samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attackroute.core.batches import Data, batches
from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall, LayerCalls
from attackroute.core.model_state import frozen
from attackroute.tracing.closed_form import influence_matrix, passage_matrix
from attackroute.tracing.config import RAW, TraceConfig
from attackroute.tracing.deviations import Deviations, Progress
from attackroute.tracing.recorder import RecordedLayer, record
from attackroute.tracing.segments import Segments
from attackroute.tracing.structure import AUTOGRAD, Structure
from attackroute.tracing.windows import PatternSums

Edge = tuple[str, str]

_PRODUCTS = 4096  # vector-Jacobian products that one layer may cost per batch, when its edges have no closed form


def influence(
    model: nn.Module, x: Tensor, source: str, target: str, *, linear: bool = False, units: str | Deviations = RAW
) -> Tensor:
    """Influence of every channel of one route layer on every channel of an adjacent one (Eqs. (1)-(2)).

    Args:
        model: The network.
        x: ``(N, C, H, W)`` batch of images.
        source: Name of the earlier layer.
        target: Name of a layer that follows it directly.
        linear: Whether linear maps are route layers too.
        units: As of :class:`attackroute.TraceConfig`: raw, or of standard deviations, over these images or given.

    Returns:
        ``(N, C_target, C_source)``: the sum over both channels' positions of ``|dZ_target / dZ_source|``.

    Raises:
        UserError: A name is unknown, or the layers are not adjacent.
    """
    if not isinstance(x, Tensor):
        raise UserError(f"x is {type(x).__name__}: pass the images as one tensor (N, C, H, W)")
    matrix = _influence(model, x, source, target, linear)
    deviations = TraceConfig(units=units).measured(model, x, len(x)).deviations
    return matrix if deviations is None else per_deviation_of_both(matrix, source, target, deviations)


def per_deviation_of_both(matrix: Tensor, source: str, target: str, deviations: Deviations) -> Tensor:
    """``C[j, i] * sigma_i / sigma_j`` for influence ``(..., C_target, C_source)``."""
    return matrix * deviations.power(1, source, matrix) * deviations.power(-1, target, matrix).unsqueeze(-1)


def _influence(model: nn.Module, x: Tensor, source: str, target: str, linear: bool) -> Tensor:
    """The same in raw units."""
    with frozen(model):
        for images, _ in batches(model, x, x.shape[0] or 1):
            structure, _ = Structure.probe(model, images, linear=linear)
            names, methods = structure.names, structure.methods
            for name in (source, target):
                if name not in names:
                    raise UserError(f"no route layer {name!r} ran: the layers are {', '.join(names)}")
            if (source, target) not in methods:
                after = ", ".join(later for earlier, later in methods if earlier == source) or "no route layer"
                raise UserError(f"{source!r} and {target!r} are not adjacent; directly after {source!r}: {after}")
            if methods[source, target] == AUTOGRAD:
                return Segments(model, images, {target: [source]}, linear=linear).influence(target)[source]
            recording = record(model, images, linear=linear, leaves=structure.cut, expected=names)
            layer, index = structure.applied(recording.layers)[names.index(target)], names.index(source)
            if index in layer.passed:
                return passage_matrix(layer, index, recording)
            return influence_matrix(layer, index, structure.counts[index], images.shape[0])
    raise UserError("the batch holds no image")


@dataclass(frozen=True)
class MeanInfluence:
    """Mean influence over samples, of route layers in forward order."""

    samples: int
    channels: Mapping[str, int]
    methods: Mapping[Edge, str]
    matrices: Mapping[Edge, Tensor]  # (C_target, C_source) float64 on the CPU
    unmeasured: tuple[Edge, ...]  # have no matrix: without a closed form, it would take too long


def mean_influence(
    model: nn.Module,
    data: Data,
    *,
    linear: bool = False,
    units: str | Deviations = RAW,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> MeanInfluence:
    """Mean over samples of the influence of every channel on every channel of each layer that follows directly.

    The model runs once a batch, and is left as it was. A closed form is linear in the window sums of the recording,
    so these are averaged, and a matrix is made once a batch and not once a sample. Arguments as of ``ar.trace_routes``.

    Raises:
        UserError: There is no sample, no route layer, or values are not finite.
    """
    structure: Structure | None = None
    costly: set[str] = set()
    totals: dict[Edge, Tensor] = {}
    done = 0
    with frozen(model):
        for images, _ in batches(model, data, batch_size):
            if structure is None:
                structure, _ = Structure.probe(model, images, linear=linear)
                costly = _costly(model, images[:1], structure, linear)
            for edge, matrix in _matrices(model, images, structure, costly, linear):
                # sums, for batches of different sizes
                totals[edge] = totals.get(edge, 0) + matrix.double().cpu() * images.shape[0]
            done += images.shape[0]
            if progress is not None:
                progress(done, None)
    if structure is None:
        raise UserError("the data hold no sample: the loader is empty")
    matrices = {edge: totals[edge] / done for edge in structure.methods if edge in totals}
    for (source, target), matrix in matrices.items():
        if not matrix.isfinite().all():
            raise UserError(
                f"the influence of {source!r} on {target!r} is not finite: look for inf or NaN in images and weights"
            )
    deviations = TraceConfig(units=units).measured(model, data, batch_size).deviations
    if deviations is not None:
        matrices = {edge: per_deviation_of_both(matrix, *edge, deviations) for edge, matrix in matrices.items()}
    unmeasured = tuple(edge for edge in structure.methods if edge not in matrices)
    return MeanInfluence(done, structure.channels, methods=structure.methods, matrices=matrices, unmeasured=unmeasured)


def _matrices(
    model: nn.Module, images: Tensor, structure: Structure, costly: set[str], linear: bool
) -> Iterable[tuple[Edge, Tensor]]:
    """Every edge's mean influence over one batch."""
    recording = record(model, images, linear=linear, leaves=structure.cut, expected=structure.names)
    for layer, closed in zip(structure.applied(recording.layers), structure.closed, strict=True):
        averaged = _averaged(layer)
        for source in sorted(layer.passed if layer.name not in costly else ()):
            yield (structure.names[source], layer.name), passage_matrix(layer, source, recording).mean(0)
        for source in sorted(closed - layer.passed):
            matrices = influence_matrix(averaged, source, structure.counts[source], 1)
            yield (structure.names[source], layer.name), matrices[0]
    jacobian = {target: sources for target, sources in structure.jacobian_edges.items() if target not in costly}
    if jacobian:
        segments = Segments(model, images, jacobian, linear=linear)
        for target in jacobian:
            for name, matrix in segments.influence(target).items():
                yield (name, target), matrix.mean(0)


def _averaged(layer: RecordedLayer) -> RecordedLayer:
    """The layer with the mean of its samples' window sums, on which a closed form depends linearly."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)

    def mean(sums: Tensor) -> Tensor:
        return sums.mean(0, keepdim=True, dtype=torch.promote_types(sums.dtype, dtype))

    def averaged(sums: Tensor | list[PatternSums]) -> Tensor | list[PatternSums]:
        return mean(sums) if isinstance(sums, Tensor) else [replace(each, sums=mean(each.sums)) for each in sums]

    return replace(layer, pieces=tuple(replace(piece, sums=averaged(piece.sums)) for piece in layer.pieces))


def _costly(model: nn.Module, image: Tensor, structure: Structure, linear: bool) -> set[str]:
    """Layers with edges that would take too many vector-Jacobian products: one for each output element.

    Closed forms that go element by element take one for each channel, with more work for each.
    """
    targets, costly = {*structure.jacobian_edges, *structure.passing}, set[str]()

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        if call.name in targets and output[0].numel() > _PRODUCTS:
            costly.add(call.name)
        return output

    if targets:
        with torch.no_grad(), LayerCalls(model, visit, linear=linear):
            model(image.clone())
    return costly
