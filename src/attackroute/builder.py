"""Instance routes grown batch by batch, holding nothing but packed bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attackroute import bits
from attackroute.errors import UserError
from attackroute.fingerprint import channel_counts
from attackroute.instances import InstanceRoutes
from attackroute.invariants import Edge
from attackroute.provenance import Provenance
from attackroute.selection import check_width
from attackroute.sketch_notes import SketchNotes


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
