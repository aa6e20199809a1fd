"""Critical attacking routes of many samples, one bit a neuron, and what follows from their frequencies."""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, product
from typing import Any

import torch
from torch import Tensor

from attackroute.core.errors import UserError
from attackroute.core.files import INSTANCE_ROUTES_KIND, expect_mapping, file_errors, read_tensors, write_tensors
from attackroute.core.table import Shown, plural
from attackroute.routes.layer_map import LayerMap, channel_counts, require_layers, require_same
from attackroute.routes.masks import (
    PackedMasks,
    has_stray_bits,
    kept,
    pack_all,
    packed_width,
    sample_rows,
    top_k,
    usage_counts,
)
from attackroute.routes.provenance import Provenance
from attackroute.routes.route import Route

Edge = tuple[str, str]

_MASKS, _SCORES = "masks/", "scores/"
_ANSWERS, _UNRANKED = ("labels", "predictions"), "unranked"


class SampleRoutes(Shown, ABC):
    """Routes of N samples, wherever they are kept, and what follows from how many of them use each channel.

    Attributes:
        channels: for each layer, in forward order, how many channels it has.
        provenance: where the routes come from, with N as ``samples`` and the width of each sample's route.
        methods: for each edge (source layer, target layer), how its influence was computed.
        totals: sums over the samples, by name: ``usage/LAYER``, how many routes use each channel, int64 (C,);
            ``unranked``, how many have no score but zero, int64 (L,); and ``correct``, how many predictions are the
            label, where there are labels.
    """

    channels: Mapping[str, int]
    provenance: Provenance
    methods: Mapping[Edge, str]
    totals: Mapping[str, Tensor]

    @property
    def layers(self) -> tuple[str, ...]:
        """Route layers' names in forward order."""
        return tuple(self.channels)

    @property
    def width(self) -> float:
        """Share of each layer's channels that is on each sample's route."""
        return self.provenance.width

    def __len__(self) -> int:
        return self.provenance.samples

    def frequency(self) -> dict[str, Tensor]:
        """Share of the samples whose route uses each channel, float64 (C,) for each layer."""
        totals = self.totals
        return {layer: totals[f"usage/{layer}"].double() / len(self) for layer in self.channels}

    def occurrence(self, share: float = 0.2) -> dict[str, float]:
        """Mean frequency over the most frequent channels of each layer, the paper's Table 1.

        Args:
            share: share of the layer's channels to take the mean over, in (0, 1]. At the width of the instance routes,
                1.0 means that every sample uses the same channels.
        """
        return {
            layer: float(values.topk(kept(share, values.numel())).values.mean())
            for layer, values in self.frequency().items()
        }

    def aggregate(self, width: float = 0.3) -> Route:
        """The model route: each layer's most frequent channels (Eqs. 7-8), ties to the lower index.

        Args:
            width: share of each layer's channels to keep, in (0, 1].
        """
        frequency = self.frequency()
        masks = {layer: top_k(values, width) for layer, values in frequency.items()}
        return Route.from_masks(masks, frequency, replace(self.provenance, width=width, instance_width=self.width))


@dataclass(frozen=True, eq=False, repr=False)
class InstanceRoutes(SampleRoutes):
    """The routes of N samples (Eq. 6): for each sample and layer, the set of its critical neurons.

    Two are equal when layers, channel counts, width, masks, labels and predictions are; scores, methods and
    provenance are notes on how they were computed. Everything lies on the CPU.

    Attributes:
        packed: for each layer the masks, packed to uint8 (N, ceil(C / 8)): bit b of byte k is channel 8k + b.
        channels, provenance, methods: see :class:`SampleRoutes`.
        labels: the samples' labels, int64 (N,), or None.
        predictions: the network's predictions, int64 (N,), or None.
        kept_scores: for each layer the scores that were ranked, float (N, C); None when they were not kept.
        unranked: for each layer, the samples all of whose scores there are zero, so that its channels are no more than
            the first by index: bool (N, L); None where there is no such sample.

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
    unranked: Tensor | None = None

    def __post_init__(self) -> None:
        channels = channel_counts(self.channels)
        if len(self) < 1:
            raise UserError("instance routes need at least one sample: see whether the data are empty")
        require_layers("masks", self.packed, channels)
        if self.kept_scores is not None:
            require_layers("scores", self.kept_scores, channels)
        for layer, size in channels.items():
            what = f"the packed masks of layer {layer!r}"
            _check_tensor(what, self.packed[layer], (len(self), packed_width(size)), torch.uint8)
            if has_stray_bits(self.packed[layer], size):
                raise UserError(f"{what} have bits set beyond the last of its {size} channels")
            if self.kept_scores is not None:
                _check_tensor(f"the scores of layer {layer!r}", self.kept_scores[layer], (len(self), size))
        for name, shape, dtype in (
            *((answer, (len(self),), torch.int64) for answer in _ANSWERS),
            (_UNRANKED, (len(self), len(channels)), torch.bool),
        ):
            if (values := getattr(self, name)) is not None:
                _check_tensor(name, values, shape, dtype)
        for edge in self.methods:
            for layer in edge:
                if layer not in channels:
                    raise UserError(f"edge {edge!r} names layer {layer!r}, which is not a layer of the routes")
        object.__setattr__(self, "channels", channels)
        object.__setattr__(self, "packed", LayerMap({layer: self.packed[layer] for layer in channels}))
        object.__setattr__(self, "methods", dict(self.methods))
        if self.kept_scores is not None:
            object.__setattr__(self, "kept_scores", LayerMap({layer: self.kept_scores[layer] for layer in channels}))

    @classmethod
    def from_masks(
        cls,
        masks: Mapping[str, Tensor],
        provenance: Provenance,
        *,
        labels: Tensor | None = None,
        predictions: Tensor | None = None,
        methods: Mapping[Edge, str] | None = None,
        scores: Mapping[str, Tensor] | None = None,
        unranked: Tensor | None = None,
    ) -> InstanceRoutes:
        """Routes from the masks of one batch, on any device; nothing is shared with what is given.

        Masks are bool (n, C) for each layer, in forward order; labels and predictions, integers (n,); scores, what the
        masks were chosen by, float (n, C). Everything else is as in the class.
        """
        for layer, mask in masks.items():
            if mask.dtype != torch.bool or mask.ndim != 2:
                raise UserError(f"the masks of layer {layer!r} must be bool (n, C), not {mask.dtype} {mask.shape}")
        return cls(
            pack_all(masks),
            {layer: mask.shape[1] for layer, mask in masks.items()},
            provenance,
            labels=_on_cpu("labels", labels),
            predictions=_on_cpu("predictions", predictions),
            methods=methods or {},
            kept_scores=scores and {layer: each.detach().to("cpu", copy=True) for layer, each in scores.items()},
            unranked=None if unranked is None or not unranked.any() else unranked.detach().cpu(),
        )

    @property
    def unranked_layers(self) -> tuple[str, ...]:
        """Layers in which some sample has no score but zero."""
        return () if self.unranked is None else tuple(compress(self.layers, self.unranked.any(0).tolist()))

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

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, InstanceRoutes):
            return NotImplemented
        return (
            list(self.channels.items()) == list(other.channels.items())
            and (len(self), self.width) == (len(other), other.width)
            and _compared(self).keys() == _compared(other).keys()
            and all(torch.equal(values, _compared(other)[name]) for name, values in _compared(self).items())
        )

    __hash__ = None  # type: ignore[assignment]  # equality looks at tensors, which can change

    def __repr__(self) -> str:
        sizes = [plural(len(self), "sample"), plural(len(self.channels), "layer")]
        title = ", ".join([*sizes, plural(sum(self.channels.values()), "channel"), f"width {self.width:g}"])
        title += f", {self.provenance.criterion}" if "approximate" in self.provenance.criterion else ""
        title += f", {plural(len(unranked), 'layer')} without scores" if (unranked := self.unranked_layers) else ""
        return f"InstanceRoutes({title})"

    @property
    def totals(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Sums over the samples, see :class:`SampleRoutes`."""
        totals = {f"usage/{layer}": usage_counts(self.packed[layer], count) for layer, count in self.channels.items()}
        totals[_UNRANKED] = torch.zeros(len(self.channels)).long() if self.unranked is None else self.unranked.sum(0)
        if self.labels is not None and self.predictions is not None:
            totals["correct"] = (self.labels == self.predictions).sum()
        return totals

    def by_label(self, width: float = 0.3) -> dict[int, Route]:
        """One route for each label, aggregated over the samples that bear it.

        Raises:
            UserError: the routes have no labels, or the width is outside (0, 1].
        """
        if self.labels is None:
            raise UserError("these routes have no labels to group by: trace (image, label) pairs")
        routes = {}
        for label in sorted(set(self.labels.tolist())):
            labelled = self.select(self.labels == label)
            data = f"label {label}" if self.provenance.data is None else f"{self.provenance.data}, label {label}"
            routes[label] = replace(labelled, provenance=replace(labelled.provenance, data=data)).aggregate(width)
        return routes

    def select(self, index: slice | Sequence[int] | Tensor) -> InstanceRoutes:
        """The routes of some samples.

        Args:
            index: a slice, integers (negative ones count from the end, repeats are allowed), or a bool mask (N,).

        Raises:
            UserError: the index selects no sample, is out of range, or has the wrong shape.
        """
        rows = sample_rows(index, len(self))
        tensors = {name: values[rows] for name, values in self._tensors().items()}
        return self._of_tensors(tensors, self.channels, replace(self.provenance, samples=rows.numel()), self.methods)

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
        for number, routes in enumerate(parts[1:], start=2):
            require_same(first.channels, routes.channels, f"part {number}")
            if routes.width != first.width:
                raise UserError(
                    f"part {number} has width {routes.width} in every layer, from {first.layers[0]!r} on, and part 1 "
                    f"has {first.width}: trace both at one width"
                )
        tensors = [routes._tensors() for routes in parts]
        if any(_UNRANKED in part for part in tensors):
            blank = (torch.zeros(len(routes), len(first.channels), dtype=torch.bool) for routes in parts)
            tensors = [{_UNRANKED: none, **part} for none, part in zip(blank, tensors, strict=True)]
        names = dict.fromkeys(name for part in tensors for name in part)
        for name, (number, part) in product(names, enumerate(tensors, start=1)):
            if name not in part:
                kind = name.partition("/")[0]
                raise UserError(f"part {number} has no {kind} but others have: trace all parts in the same way")
        return cls._of_tensors(
            {name: torch.cat([part[name] for part in tensors]) for name in names},
            first.channels,
            Provenance.merge([routes.provenance for routes in parts]),
            joined_methods([routes.methods for routes in parts]),
        )

    def save(self, path: str | os.PathLike[str], part: Mapping[str, Any] | None = None) -> None:
        """Write masks, notes and scores as safetensors, replacing a file of that name in one step.

        Args:
            path: the file.
            part: what the file is to say of its place in a trace, as JSON values.
        """
        body = {
            "provenance": self.provenance.to_json(),
            "fingerprint": dict(self.channels),
            "methods": [[source, target, method] for (source, target), method in self.methods.items()],
        } | ({} if part is None else {"part": part})
        write_tensors(path, INSTANCE_ROUTES_KIND, body, self._tensors())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InstanceRoutes:
        """Read instance routes that `save` wrote; a `UserError` if the file is missing, damaged or something else."""
        body, tensors = read_tensors(path, INSTANCE_ROUTES_KIND)
        with file_errors(path):
            origin, methods = Provenance.from_json(body.get("provenance")), read_methods(body.get("methods"))
            return cls._of_tensors(tensors, expect_mapping(body, "fingerprint"), origin, methods)

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors, a row for each sample, by the names that they have in files."""
        tensors = {_MASKS + layer: packed for layer, packed in self.packed.items()}
        tensors |= {_SCORES + layer: values for layer, values in (self.kept_scores or {}).items()}
        optional = (*_ANSWERS, _UNRANKED)
        return tensors | {name: values for name in optional if (values := getattr(self, name)) is not None}

    @classmethod
    def _of_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        channels: Mapping[str, int],
        provenance: Provenance,
        methods: Mapping[Edge, str],
    ) -> InstanceRoutes:
        """Undo :meth:`_tensors`."""
        packed, scores = (
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for prefix in (_MASKS, _SCORES)
        )
        answers = {name: tensors[name] for name in (*_ANSWERS, _UNRANKED) if name in tensors}
        if len(packed) + len(scores) + len(answers) != len(tensors):
            raise UserError("has tensors that are no part of instance routes")
        return cls(packed, channels, provenance, methods=methods, kept_scores=scores or None, **answers)


def read_methods(values: object) -> dict[Edge, str]:
    """How each edge was computed, from a file's list of ``[source, target, method]``."""
    if not isinstance(values, list) or not all(
        isinstance(item, list) and len(item) == 3 and all(isinstance(text, str) for text in item) for item in values
    ):
        raise UserError("'methods' must be a list of [source, target, method], all of them strings")
    return {(source, target): method for source, target, method in values}


def joined_methods(parts: Sequence[Mapping[Edge, str]]) -> dict[Edge, str]:
    """How each edge was computed in several sets of routes; methods that differ are joined with " + "."""
    methods: dict[Edge, list[str]] = {}
    for edge, method in (item for edges in parts for item in edges.items()):
        methods.setdefault(edge, []).append(method)
    return {edge: " + ".join(dict.fromkeys(names)) for edge, names in methods.items()}


def _compared(routes: InstanceRoutes) -> dict[str, Tensor]:
    """What makes routes equal: masks, labels and predictions."""
    notes = (_SCORES, _UNRANKED)
    return {name: values for name, values in routes._tensors().items() if not name.startswith(notes)}


def _on_cpu(name: str, answers: Tensor | None) -> Tensor | None:
    if answers is None:
        return None
    if answers.is_floating_point() or answers.is_complex():
        raise UserError(f"{name} must be integers, not {answers.dtype}")
    return answers.detach().to("cpu", torch.int64, copy=True)


def _check_tensor(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Require a shape and a type, by default any floating one."""
    if tuple(tensor.shape) != shape:
        raise UserError(f"{what} must have shape {shape}, not {tuple(tensor.shape)}")
    if (dtype or tensor.dtype) != tensor.dtype or (dtype is None and not tensor.is_floating_point()):
        kind = str(dtype or "floating point").removeprefix("torch.")
        raise UserError(f"{what} must be {kind}, not {tensor.dtype}")
