"""Transplants of each image's own route, not of the model's: another reading of Fig. 3 of Li et al. (2021)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.analysis.interventions import record_outputs, transplant
from attackroute.analysis.tables import Record
from attackroute.analysis.trials import Clean, right_when_clean
from attackroute.core.accuracy import Accuracy
from attackroute.core.batches import Data, batches, samples_in
from attackroute.core.checks import checked_logits
from attackroute.core.errors import UserError
from attackroute.core.model_state import frozen
from attackroute.robustness.application import Attack, attacked
from attackroute.routes.masks import kept
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress, trace_routes

OWN, RANDOM = "own route", "own random"


@dataclass(frozen=True)
class Row:
    """Accuracy on attacked images with clean values in some of their channels.

    Attributes:
        layers: The layers that are changed together.
        criterion: ``"own route"``, or ``"own random"``: as many random channels, others for each image.
        accuracy: On the images that the network gets right when they are clean.
    """

    layers: tuple[str, ...]
    criterion: str
    accuracy: Accuracy


@dataclass(frozen=True)
class OwnTransplants:
    """Accuracies with each image's own channels transplanted.

    Attributes:
        rows: The accuracies.
        width: Share of each layer's channels.
        attack: The attack's name.
        samples: Images read.
    """

    rows: tuple[Row, ...]
    width: float
    attack: str
    samples: int

    def reading(self) -> str:
        """One sentence with every accuracy."""
        parts = [f"{row.criterion} in {len(row.layers)} of the layers {row.accuracy.value:.1%}" for row in self.rows]
        share = f"{self.width:.0%} of the channels"
        return f"Accuracy under {self.attack} with {share} as on clean images: {'; '.join(parts)}."

    def records(self) -> list[Record]:
        """The accuracies as a tidy table."""
        return [
            {
                "layers": "+".join(row.layers),
                "criterion": row.criterion,
                "accuracy": row.accuracy.value,
                "accuracy_low": row.accuracy.interval[0],
                "accuracy_high": row.accuracy.interval[1],
                "samples": row.accuracy.total,
            }
            for row in self.rows
        ]

    def about(self) -> dict[str, Any]:
        """What the accuracies have in common."""
        return {"experiment": "own routes", "width": self.width, "attack": self.attack, "images": self.samples}


def own_transplant_accuracy(
    model: nn.Module,
    data: Data,
    attack: Attack,
    groups: Iterable[Sequence[str]],
    *,
    name: str = "attack",
    width: float = 0.3,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> OwnTransplants:
    """Accuracy on attacked images, each with clean values in the channels of its own route, or in random ones.

    Args:
        model: The network.
        data: Labelled images in [0, 1]; only those that the network gets right when clean count.
        attack: What attacks them.
        groups: Layers to change together, in forward order.
        name: The attack's name.
        width: Share of each layer's channels on an image's route, which is traced from the clean image.
        seed: Of the random channels.
        batch_size: Rows per forward pass when ``data`` is tensors.
        progress: Called with (images done, in all or None) after every batch.

    Raises:
        UserError: The data have no labels, a layer is not among the traced ones, or no sample is classified correctly.
    """
    wanted = [tuple(group) for group in groups]
    generator = torch.Generator().manual_seed(seed)
    hits = {(group, criterion): 0 for group in wanted for criterion in (OWN, RANDOM)}
    samples = counted = 0
    layers = list(dict.fromkeys(layer for group in wanted for layer in group))
    with frozen(model), torch.no_grad():
        for images, labels in batches(model, data, batch_size):
            samples += len(images)
            clean = right_when_clean(model, images, labels, layers)
            counted += len(clean.images)
            if len(clean.images):
                moved, _ = attacked(model, attack, clean.images, clean.labels)
                own = trace_routes(model, (clean.images, clean.labels), width).masks
                for group in wanted:
                    chosen = {layer: own[layer] for layer in group}
                    drawn = {layer: _random_mask(mask, width, generator) for layer, mask in chosen.items()}
                    for criterion, masks in ((OWN, chosen), (RANDOM, drawn)):
                        found = _mended(model, clean, moved, masks).argmax(1)
                        hits[group, criterion] += int((found == clean.labels).sum())
            if progress is not None:
                progress(samples, samples_in(data))
    if not counted:
        raise UserError(f"the network gets none of the {samples} samples right when they are clean; check its weights")
    rows = tuple(Row(group, criterion, Accuracy(right, counted)) for (group, criterion), right in hits.items())
    return OwnTransplants(rows, width, name, samples)


def _mended(model: nn.Module, clean: Clean, moved: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    """Logits of attacked images with clean values where each image's own mask (N, C) says so.

    Layer after layer: what a layer would give is recorded under the transplants before it, mixed with what it gives
    for the clean images, and put in its place as a whole.
    """
    mixed: dict[str, Tensor] = {}
    for layer, mask in masks.items():
        with _in_place(model, mixed):
            values = record_outputs(model, moved, [layer])[layer]
        mixed[layer] = torch.where(mask.to(values.device)[:, :, None, None], clean.outputs[layer], values)
    with _in_place(model, mixed):
        return checked_logits(model(moved.clone()), len(moved))


def _in_place(model: nn.Module, outputs: Mapping[str, Tensor]) -> AbstractContextManager[object]:
    """Context in which these layers give this, in all their channels."""
    if not outputs:
        return nullcontext()
    channels = {layer: values.shape[1] for layer, values in outputs.items()}
    return transplant(model, outputs, Route({layer: range(count) for layer, count in channels.items()}, channels))


def _random_mask(like: Tensor, width: float, generator: torch.Generator) -> Tensor:
    """As many channels in every row, at random."""
    rows, channels = like.shape
    chosen = torch.rand(rows, channels, generator=generator).topk(kept(width, channels), dim=1).indices
    return torch.zeros(rows, channels, dtype=torch.bool).scatter_(1, chosen, True)
