"""Critical attacking routes of many samples, one bit a neuron, and what follows from their frequencies."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError
from attackroute.core.files import INSTANCE_ROUTES_KIND, expect_mapping, file_errors, read_tensors, write_tensors
from attackroute.core.table import layer_table, plural
from attackroute.routes import masks as bits
from attackroute.routes.layer_map import LayerMap, channel_counts, require_model, require_same
from attackroute.routes.masks import check_width, kept, top_k
from attackroute.routes.provenance import Provenance
from attackroute.routes.route import Route
from attackroute.routes.sketch_errors import SketchNotes

Edge = tuple[str, str]


def check_masks(packed: Mapping[str, Tensor], channels: Mapping[str, int], samples: int) -> None:
    """Require packed masks uint8 (samples, ceil(C / 8)) on the CPU for every layer, with no bit beyond the channels."""
    if samples < 1:
        raise UserError("instance routes need at least one sample: see whether the data are empty")
    _check_layers("masks", packed, channels)
    for layer, count in channels.items():
        what = f"the packed masks of layer {layer!r}"
        _check_tensor(what, packed[layer], (samples, bits.packed_width(count)))
        if packed[layer].dtype != torch.uint8 or packed[layer].device.type != "cpu":
            raise UserError(f"{what} must be uint8 on the CPU, not {packed[layer].dtype} on {packed[layer].device}")
        if bits.has_stray_bits(packed[layer], count):
            raise UserError(f"{what} have bits set beyond the last of its {count} channels")


def check_scores(scores: Mapping[str, Tensor], channels: Mapping[str, int], samples: int) -> None:
    """Require floating-point scores (samples, C) for every layer."""
    _check_layers("scores", scores, channels)
    for layer, count in channels.items():
        what = f"the scores of layer {layer!r}"
        _check_tensor(what, scores[layer], (samples, count))
        if not scores[layer].is_floating_point():
            raise UserError(f"{what} must be floating point, not {scores[layer].dtype}")


def check_note(name: str, values: Tensor | None, samples: int) -> None:
    """Require one integer for each sample, int64 (samples,), or None."""
    if values is None:
        return
    _check_tensor(name, values, (samples,))
    if values.dtype != torch.int64:
        raise UserError(f"{name} must be int64, not {values.dtype}")


def check_methods(methods: Mapping[Edge, str], channels: Mapping[str, int]) -> None:
    """Require that every edge joins two of the layers and states its method in words."""
    for edge, method in methods.items():
        for layer in edge:
            if layer not in channels:
                raise UserError(f"edge {edge!r} names layer {layer!r}, which is not a layer of the routes")
        if not isinstance(method, str):
            raise UserError(f"edge {edge!r}: the method must be a string, not {method!r}")


def sample_rows(index: slice | Sequence[int] | Tensor, samples: int) -> Tensor:
    """The samples that an index selects, as int64 positions on the CPU, negative ones from the end.

    Raises:
        UserError: the index selects no sample, is out of range, or is neither a slice, integers nor a mask (samples,).
    """
    if isinstance(index, slice):
        rows = torch.tensor(range(samples)[index], dtype=torch.int64, device="cpu")
    else:
        rows = _positions(torch.as_tensor(index, device="cpu"), samples)
    if rows.numel() == 0:
        raise UserError(f"the index selects none of the {samples} samples")
    return rows


def _positions(index: Tensor, samples: int) -> Tensor:
    if index.dtype == torch.bool:
        if index.shape != (samples,):
            raise UserError(f"a mask of samples must have shape ({samples},), not {tuple(index.shape)}")
        return index.nonzero().flatten()
    if index.dim() != 1 or (index.numel() and (index.is_floating_point() or index.is_complex())):
        raise UserError(
            f"samples are selected by a slice, a list of integers or a mask, not by {index.dtype} {tuple(index.shape)}"
        )
    rows = index.to(torch.int64)
    outside = rows[(rows < -samples) | (rows >= samples)]
    if outside.numel():
        raise UserError(f"sample {int(outside[0])} is out of range: there are {samples} samples")
    return rows


def _check_layers(what: str, values: Mapping[str, Tensor], channels: Mapping[str, int]) -> None:
    for layer in channels:
        if layer not in values:
            raise UserError(f"there are no {what} for layer {layer!r}")
    for layer in values:
        if layer not in channels:
            raise UserError(f"there are {what} for layer {layer!r}, but no channel count")


def _check_tensor(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{what} must have shape {shape}, not {tuple(tensor.shape)}")


_MASKS, _SCORES, _SKETCHED = "masks/", "scores/", "sketched/"


_NOTES = ("labels", "predictions")


_SHOWN_TARGETS = 2


class PackedMasks(LayerMap[Tensor]):
    """Packed masks by layer; a layer is unpacked to a new bool tensor (N, C) whenever it is asked for."""

    def __init__(self, packed: Mapping[str, Tensor], channels: Mapping[str, int]) -> None:
        super().__init__(packed)
        self._channels = channels

    def __getitem__(self, layer: str) -> Tensor:
        return bits.unpack(super().__getitem__(layer), self._channels[layer])

    def __repr__(self) -> str:
        return f"PackedMasks({', '.join(self)})"


@dataclass(frozen=True, eq=False, repr=False)
class InstanceRoutes:
    """The routes of N samples (Eq. 6): for each sample and layer, the set of its critical neurons.

    Two are equal when layers, channel counts, width, masks, labels and predictions are; scores, methods and
    provenance are notes on how they were computed. Everything lies on the CPU.

    Attributes:
        packed: for each layer the masks, packed to uint8 (N, ceil(C / 8)): bit b of byte k is channel 8k + b.
        channels: for each layer, in forward order, how many channels it has.
        provenance: where the routes come from, with N as ``samples`` and the width of each sample's route.
        labels: the samples' labels, int64 (N,), or None.
        predictions: the network's predictions, int64 (N,), or None.
        methods: for each edge (source layer, target layer), how its influence was computed.
        kept_scores: for each layer the scores that were ranked, float (N, C); None when they were not kept.
        sketched: where edges were sketched, how far the routes can be trusted; None for exact routes.

    Raises:
        UserError: tensors, channel counts and sample count do not agree.
    """

    packed: Mapping[str, Tensor]
    channels: Mapping[str, int]
    provenance: Provenance
    labels: Tensor | None = None
    predictions: Tensor | None = None
    methods: Mapping[Edge, str] = field(default_factory=dict)
    kept_scores: Mapping[str, Tensor] | None = None
    sketched: SketchNotes | None = None

    def __post_init__(self) -> None:
        channels = channel_counts(self.channels)
        check_masks(self.packed, channels, len(self))
        for name in _NOTES:
            check_note(name, getattr(self, name), len(self))
        check_methods(self.methods, channels)
        object.__setattr__(self, "channels", channels)
        object.__setattr__(self, "packed", LayerMap({layer: self.packed[layer] for layer in channels}))
        object.__setattr__(self, "methods", dict(self.methods))
        if self.kept_scores is not None:
            check_scores(self.kept_scores, channels, len(self))
            object.__setattr__(self, "kept_scores", LayerMap({layer: self.kept_scores[layer] for layer in channels}))
        if self.sketched is not None and len(self.sketched) != len(self):
            raise UserError(f"there are notes on {len(self.sketched)} sketched samples, and {len(self)} samples")

    @property
    def layers(self) -> tuple[str, ...]:
        """Route layers' names in forward order."""
        return tuple(self.channels)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Adjacent layers, as (source, target)."""
        return tuple(self.methods)

    @property
    def width(self) -> float:
        """Share of each layer's channels that is on each sample's route."""
        return self.provenance.width

    @property
    def masks(self) -> PackedMasks:
        """Bool (N, C) for each layer, unpacked when asked for."""
        return PackedMasks(self.packed, self.channels)

    @property
    def scores(self) -> Mapping[str, Tensor]:
        """The scores that were ranked, float (N, C) for each layer.

        Raises:
            UserError: they were not kept.
        """
        if self.kept_scores is None:
            raise UserError("scores were not kept with these routes: trace them again with keep_scores=True")
        return self.kept_scores

    def __len__(self) -> int:
        return self.provenance.samples

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, InstanceRoutes):
            return NotImplemented
        return (
            list(self.channels.items()) == list(other.channels.items())
            and (len(self), self.width) == (len(other), other.width)
            and all(torch.equal(self.packed[layer], other.packed[layer]) for layer in self.channels)
            and all(_equal(getattr(self, name), getattr(other, name)) for name in _NOTES)
        )

    __hash__ = None  # type: ignore[assignment]  # equality looks at tensors, which can change

    def __repr__(self) -> str:
        sizes = [plural(len(self), "sample"), plural(len(self.channels), "layer")]
        title = ", ".join([*sizes, plural(sum(self.channels.values()), "channel"), f"width {self.width:g}"])
        title += "" if self.sketched is None else f", {self.provenance.criterion}"
        targets: dict[str, list[str]] = {layer: [] for layer in self.channels}
        for (source, target), method in self.methods.items():
            targets[source].append(f"{target} ({method})")
        rows = [
            (layer, str(count), str(kept(self.width, count)), _preview(targets[layer]))
            for layer, count in self.channels.items()
        ]
        return f"InstanceRoutes({title})\n{layer_table(('layer', 'channels', 'kept', 'leads to'), rows)}"

    def frequency(self) -> dict[str, Tensor]:
        """Share of the samples whose route uses each channel, float64 (C,) for each layer."""
        return {
            layer: bits.count(self.packed[layer], count).double() / len(self) for layer, count in self.channels.items()
        }

    def occurrence(self, share: float = 0.2) -> dict[str, float]:
        """Mean frequency over the most frequent channels of each layer, the paper's Table 1.

        Args:
            share: share of the layer's channels to take the mean over. At the width of the instance routes, 1.0
                means that every sample uses the same channels.

        Raises:
            UserError: the share is outside (0, 1].
        """
        return mean_of_most_frequent(self.frequency(), share)

    def aggregate(self, width: float = 0.3) -> Route:
        """The model route: each layer's most frequent channels (Eqs. 7-8), ties to the lower index.

        Args:
            width: share of each layer's channels to keep, in (0, 1].

        Raises:
            UserError: the width is outside (0, 1].
        """
        return aggregated(self.frequency(), width, self.provenance)

    def by_label(self, width: float = 0.3) -> dict[int, Route]:
        """One route for each label, aggregated over the samples that bear it.

        Raises:
            UserError: the routes have no labels, or the width is outside (0, 1].
        """
        if self.labels is None:
            raise UserError("these routes have no labels to group by: trace (image, label) pairs")
        routes = {}
        for label in sorted(set(self.labels.tolist())):
            part = self.select(self.labels == label)
            data = f"label {label}" if self.provenance.data is None else f"{self.provenance.data}, label {label}"
            routes[label] = replace(part, provenance=replace(part.provenance, data=data)).aggregate(width)
        return routes

    def select(self, index: slice | Sequence[int] | Tensor) -> InstanceRoutes:
        """The routes of some samples.

        Args:
            index: a slice, integers (negative ones count from the end, repeats are allowed), or a bool mask (N,).

        Raises:
            UserError: the index selects no sample, is out of range, or has the wrong shape.
        """
        rows = sample_rows(index, len(self))

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[rows]

        return InstanceRoutes(
            {layer: tensor[rows] for layer, tensor in self.packed.items()},
            self.channels,
            replace(self.provenance, samples=rows.numel()),
            pick(self.labels),
            pick(self.predictions),
            self.methods,
            None if self.kept_scores is None else {layer: tensor[rows] for layer, tensor in self.kept_scores.items()},
            None if self.sketched is None else self.sketched.select(rows),
        )

    @classmethod
    def concatenate(cls, parts: Iterable[InstanceRoutes]) -> InstanceRoutes:
        """The samples of several sets of routes, one after another.

        An edge whose method differs between the parts gets the methods joined with " + "; see `Provenance.merge` for
        the provenance.

        Raises:
            UserError: there is no part; layers, channel counts or widths differ; or some parts have labels,
                predictions or scores and others have none.
        """
        parts = list(parts)
        if not parts:
            raise UserError("nothing to concatenate: give at least one set of instance routes")
        first = parts[0]
        for number, part in enumerate(parts[1:], start=2):
            require_same(first.channels, part.channels, f"part {number}")
            if part.width != first.width:
                raise UserError(
                    f"part {number} has width {part.width} in every layer, from {first.layers[0]!r} on, and part 1 has "
                    f"{first.width}: trace both at one width"
                )
        methods: dict[Edge, list[str]] = {}
        for part in parts:
            for edge, method in part.methods.items():
                methods.setdefault(edge, []).append(method)
        scores = {
            layer: _join("scores", [None if part.kept_scores is None else part.kept_scores[layer] for part in parts])
            for layer in first.layers
        }
        return cls(
            {layer: torch.cat([part.packed[layer] for part in parts]) for layer in first.layers},
            first.channels,
            Provenance.merge([part.provenance for part in parts]),
            _join("labels", [part.labels for part in parts]),
            _join("predictions", [part.predictions for part in parts]),
            {edge: " + ".join(dict.fromkeys(names)) for edge, names in methods.items()},
            {layer: values for layer, values in scores.items() if values is not None} or None,
            _join_notes([part.sketched for part in parts]),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write masks, notes and scores as safetensors, replacing a file of that name in one step.

        Raises:
            UserError: the file cannot be written.
        """
        tensors = {_MASKS + layer: packed for layer, packed in self.packed.items()}
        tensors |= {_SCORES + layer: values for layer, values in (self.kept_scores or {}).items()}
        tensors |= {} if self.sketched is None else self.sketched.tensors(_SKETCHED)
        tensors |= {name: values for name in _NOTES if (values := getattr(self, name)) is not None}
        body = {
            "provenance": self.provenance.to_json(),
            "fingerprint": dict(self.channels),
            "methods": [[source, target, method] for (source, target), method in self.methods.items()],
        }
        write_tensors(path, INSTANCE_ROUTES_KIND, body, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> InstanceRoutes:
        """Read instance routes that `save` wrote.

        Args:
            path: the file.
            model: when given, must have the routes' layers with their channel counts.

        Raises:
            UserError: the file is missing, damaged or something else, or the model does not fit.
        """
        body, tensors = read_tensors(path, INSTANCE_ROUTES_KIND)
        with file_errors(path):
            notes = {name: tensors.pop(name, None) for name in _NOTES}
            packed = _with_prefix(tensors, _MASKS)
            scores = _with_prefix(tensors, _SCORES)
            sketched = _with_prefix(tensors, _SKETCHED)
            if len(packed) + len(scores) + len(sketched) != len(tensors):
                raise UserError("has tensors that are no part of instance routes")
            routes = cls(
                packed,
                expect_mapping(body, "fingerprint"),
                Provenance.from_json(body.get("provenance")),
                methods=_read_methods(body.get("methods")),
                kept_scores=scores or None,
                sketched=SketchNotes.from_tensors(sketched, expect_mapping(body, "fingerprint")),
                **notes,
            )
            if model is not None:
                require_model(routes.channels, model)
        return routes


def mean_of_most_frequent(frequency: Mapping[str, Tensor], share: float) -> dict[str, float]:
    """Occurrence (Table 1) from the frequencies of each layer's channels."""
    return {layer: float(values.topk(kept(share, values.numel())).values.mean()) for layer, values in frequency.items()}


def aggregated(frequency: Mapping[str, Tensor], width: float, origin: Provenance) -> Route:
    """The model route (Eqs. 7-8) from the frequencies of instance routes of that origin."""
    masks = {layer: top_k(values, width) for layer, values in frequency.items()}
    return Route.from_masks(masks, frequency, replace(origin, width=width, instance_width=origin.width))


def _join(what: str, parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) != len(parts):
        lacking = next(number for number, part in enumerate(parts, start=1) if part is None)
        raise UserError(f"part {lacking} has no {what} but others have: trace all parts in the same way")
    return torch.cat(present)


def _join_notes(parts: Sequence[SketchNotes | None]) -> SketchNotes | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) != len(parts):
        raise UserError("some parts are exact and others approximate (sketches): trace all parts in the same way")
    return SketchNotes.concatenate(present)


def _preview(targets: Sequence[str]) -> str:
    more = len(targets) - _SHOWN_TARGETS
    return ", ".join([*targets[:_SHOWN_TARGETS], *([f"{more} more"] if more > 0 else [])])


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    return left is right or (left is not None and right is not None and torch.equal(left, right))


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _read_methods(values: object) -> dict[Edge, str]:
    if not isinstance(values, list) or not all(isinstance(item, list) and len(item) == 3 for item in values):
        raise UserError("'methods' must be a list of [source, target, method]")
    return {(source, target): method for source, target, method in values}


class InstanceRoutesBuilder:
    """Collects the masks of one batch after another and packs each at once, on the CPU.

    Args:
        layers: route layers' names in forward order.
        channels: channel count of each layer.
        width: share of each layer's channels that the masks mark.
        keep_scores: keep the scores of every batch too.

    Raises:
        UserError: a layer has no channel count, a count is not positive, or the width is outside (0, 1].
    """

    def __init__(
        self, layers: Sequence[str], channels: Mapping[str, int], width: float, keep_scores: bool = False
    ) -> None:
        check_width(width)
        self._channels = channel_counts({layer: channels.get(layer) for layer in layers})
        self._width = width
        self._keep_scores = keep_scores
        # One growing buffer a layer: small batches of small layers would cost more as tensors than as bits.
        self._packed = {layer: bytearray() for layer in layers}
        self._scores: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        self._notes: dict[str, list[Tensor]] = {"labels": [], "predictions": []}
        self._sketched: list[SketchNotes] = []
        self._batches = 0
        self._samples = 0

    def __len__(self) -> int:
        """Number of samples added so far."""
        return self._samples

    def add(
        self,
        masks: Mapping[str, Tensor],
        labels: Tensor | None,
        predictions: Tensor | None,
        scores: Mapping[str, Tensor] | None = None,
        sketched: SketchNotes | None = None,
    ) -> None:
        """Add a batch; a batch that is refused leaves what was collected as it was.

        Args:
            masks: for each layer the neurons on the samples' routes, bool (n, C), on any device.
            labels: the samples' labels, integers (n,), or None; all batches have them or none has.
            predictions: the network's predictions, likewise.
            scores: for each layer what the masks were chosen by, float (n, C); kept only with ``keep_scores``.
            sketched: what is known of the errors, where edges were sketched; all batches have it or none has.

        Raises:
            UserError: a layer is missing, a shape is wrong, or labels come with some batches only.
        """
        if self._keep_scores and scores is None:
            raise UserError("keep_scores=True needs the scores of every batch")
        samples = self._batch_size(masks)
        notes = {"labels": labels, "predictions": predictions}
        for name, values in notes.items():
            self._check_note(name, values, samples)
        kept_scores = scores if self._keep_scores and scores is not None else {}
        for layer in self._channels if kept_scores else ():
            _check_shape("scores", layer, kept_scores, (samples, self._channels[layer]))

        if self._batches and (sketched is None) == bool(self._sketched):
            raise UserError("notes on sketches must come with every batch or with none")

        for layer in self._channels:
            self._packed[layer] += bits.pack(masks[layer]).numpy().tobytes()
        for layer in kept_scores:
            self._scores[layer].append(kept_scores[layer].detach().to("cpu", copy=True))
        for name, values in notes.items():
            if values is not None:
                self._notes[name].append(values.detach().to("cpu", torch.int64, copy=True))
        if sketched is not None:
            self._sketched.append(sketched)
        self._batches += 1
        self._samples += samples

    def build(self, methods: Mapping[Edge, str], provenance: Provenance | None = None) -> InstanceRoutes:
        """The routes of all samples added so far.

        Args:
            methods: for each edge (source, target), how its influence was computed.
            provenance: where the samples come from; its sample count and width are set here.

        Raises:
            UserError: no sample was added, or an edge names an unknown layer.
        """
        if self._samples == 0:
            raise UserError("there are no samples: the data are empty")
        origin = provenance or Provenance(samples=self._samples, width=self._width)
        notes = {name: torch.cat(batches) if batches else None for name, batches in self._notes.items()}
        return InstanceRoutes(
            {layer: self._masks(layer) for layer in self._packed},
            self._channels,
            replace(origin, samples=self._samples, width=self._width),
            notes["labels"],
            notes["predictions"],
            methods,
            {layer: torch.cat(batches) for layer, batches in self._scores.items()} if self._keep_scores else None,
            SketchNotes.concatenate(self._sketched) if self._sketched else None,
        )

    def _masks(self, layer: str) -> Tensor:
        # A clone, since the buffer could not grow any more while a tensor looks into it.
        return torch.frombuffer(self._packed[layer], dtype=torch.uint8).view(self._samples, -1).clone()

    def _batch_size(self, masks: Mapping[str, Tensor]) -> int:
        for layer in masks:
            if layer not in self._channels:
                raise UserError(f"there are masks for layer {layer!r}, which is not a layer of the routes")
        first = next(iter(self._channels))
        samples = len(masks[first]) if first in masks else 0
        for layer, count in self._channels.items():
            _check_shape("masks", layer, masks, (samples, count))
            if masks[layer].dtype != torch.bool:
                raise UserError(f"the masks of layer {layer!r} must be bool, not {masks[layer].dtype}")
        return samples

    def _check_note(self, name: str, values: Tensor | None, samples: int) -> None:
        if self._batches and (values is None) == bool(self._notes[name]):
            raise UserError(f"{name} must come with every batch or with none")
        if values is None:
            return
        if values.shape != (samples,) or values.is_floating_point() or values.is_complex():
            raise UserError(f"{name} must be {samples} integers, not {values.dtype} {tuple(values.shape)}")


def _check_shape(what: str, layer: str, values: Mapping[str, Tensor], shape: tuple[int, int]) -> None:
    if layer not in values:
        raise UserError(f"the batch has no {what} for layer {layer!r}")
    if tuple(values[layer].shape) != shape:
        raise UserError(f"the {what} of layer {layer!r} must have shape {shape}, not {tuple(values[layer].shape)}")
