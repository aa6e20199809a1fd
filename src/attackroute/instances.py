"""Critical attacking routes of many samples, one bit a neuron, and what follows from their frequencies."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from attackroute import bits, routefile
from attackroute.display import layer_table, plural
from attackroute.errors import UserError
from attackroute.fingerprint import LayerMap, channel_counts, require_model, require_same
from attackroute.invariants import Edge, check_masks, check_methods, check_note, check_scores, sample_rows
from attackroute.provenance import Provenance
from attackroute.routes import Route
from attackroute.selection import kept, top_k
from attackroute.sketch_notes import SketchNotes

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
        routefile.write_tensors(path, routefile.INSTANCE_ROUTES, body, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> InstanceRoutes:
        """Read instance routes that `save` wrote.

        Args:
            path: the file.
            model: when given, must have the routes' layers with their channel counts.

        Raises:
            UserError: the file is missing, damaged or something else, or the model does not fit.
        """
        body, tensors = routefile.read_tensors(path, routefile.INSTANCE_ROUTES)
        with routefile.reading(path):
            notes = {name: tensors.pop(name, None) for name in _NOTES}
            packed = _with_prefix(tensors, _MASKS)
            scores = _with_prefix(tensors, _SCORES)
            sketched = _with_prefix(tensors, _SKETCHED)
            if len(packed) + len(scores) + len(sketched) != len(tensors):
                raise UserError("has tensors that are no part of instance routes")
            routes = cls(
                packed,
                routefile.expect_mapping(body, "fingerprint"),
                Provenance.from_json(body.get("provenance")),
                methods=_read_methods(body.get("methods")),
                kept_scores=scores or None,
                sketched=SketchNotes.from_tensors(sketched, routefile.expect_mapping(body, "fingerprint")),
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
