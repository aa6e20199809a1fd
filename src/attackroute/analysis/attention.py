"""Attention: where the route's channels and the others look, clean and attacked, by Grad-CAM (Fig. 5), in numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.analysis.gradcam import enlarged, evidence
from attackroute.analysis.passes import counted_passes
from attackroute.analysis.rankings import OFF_ROUTE, ROUTE, Rivals, layer_sets, rank
from attackroute.analysis.tables import Record
from attackroute.core.batches import BatchStream, Data
from attackroute.core.checks import checked_labels
from attackroute.core.distributed import current
from attackroute.core.errors import UserError
from attackroute.core.layers import OUTPUT
from attackroute.core.model_state import frozen
from attackroute.core.statistics import Mean, Moments
from attackroute.robustness.attack import Attack, attacked
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress

CLEAN = "clean"


INSIDE, ENTROPY, PART, SHIFT = "energy inside", "entropy", "part of all energy", "shift"


@dataclass(frozen=True)
class Row:
    """The mean over images of one measure of one set's maps.

    Attributes:
        images: ``"clean"``, or the attack's name.
        criterion: What chose the channels; ``"off-route"`` are all that are not on the route.
        draw: Seed of the random draw; None for other criteria.
        neurons: How many channels the set has.
        channels: How many the layer has.
        measure: ``"energy inside"``: share of the map's energy inside the box; ``"entropy"`` of the map as a
            distribution over positions, 1 where it is even; ``"part of all energy"``: the set's energy in that of the
            set and of its complement; ``"shift"``: half the L1 distance of an attacked image's map from its clean
            image's, as distributions.
        mean: The mean, over images whose map is not all zero.
        more: Mean of the route's measure less this set's, on the same images.
    """

    images: str
    criterion: str
    draw: int | None
    neurons: int
    channels: int
    measure: str
    mean: Mean
    more: Mean


@dataclass(frozen=True)
class Attention:
    """Measures of the maps of sets of channels of one layer.

    Attributes:
        rows: The measures.
        layer: The layer.
        at: Whether the maps are the layer's ``"output"`` or those after its ``"activation"``.
        size: Height and width of the layer's maps; they are enlarged to the image's size to be measured.
        boxed: Whether the box is the object's; else it is the middle half of the image, each way.
        samples: Images read.
        counted: Those that the network gets right when clean.
        forward_passes: Forward passes of the model, one for a batch, those of attacks included.
    """

    rows: tuple[Row, ...]
    layer: str
    at: str
    size: tuple[int, int]
    boxed: bool
    samples: int
    counted: int
    forward_passes: int

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks."""
        return tuple(dict.fromkeys(row.images for row in self.rows if row.images != CLEAN))

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria in the order in which they were measured."""
        return tuple(dict.fromkeys(row.criterion for row in self.rows))

    def values(self, images: str, criterion: str, measure: str) -> list[Row]:
        """The rows of one criterion and measure, one for each draw."""
        wanted = (images, criterion, measure)
        return [row for row in self.rows if (row.images, row.criterion, row.measure) == wanted]

    def reading(self) -> str:
        """One sentence: the shift and energy of the route, beside those of the other channels and the controls."""
        where = "object's box" if self.boxed else "middle of the image"
        clean = self._mean(CLEAN, ROUTE, INSIDE)
        texts = []
        for attack in self.attacks:
            beaten = [name for name in self.criteria if name != ROUTE and self._clearly_more(attack, name, SHIFT)]
            told = f"more than {', '.join(beaten)}" if beaten else "more than no other set"
            texts.append(
                f"under {attack} the route's map shifts by {self._mean(attack, ROUTE, SHIFT):.2f} "
                f"(off-route {self._mean(attack, OFF_ROUTE, SHIFT):.2f}; clearly {told}), and its energy in the "
                f"{where} goes from {clean:.0%} to {self._mean(attack, ROUTE, INSIDE):.0%}"
            )
        return f"Grad-CAM of {self.layer} at its {self.at}: {'; '.join(texts)}."

    def _mean(self, images: str, criterion: str, measure: str) -> float:
        return statistics.fmean(row.mean.value for row in self.values(images, criterion, measure))

    def _clearly_more(self, images: str, criterion: str, measure: str) -> bool:
        return all(row.more.interval[0] > 0 for row in self.values(images, criterion, measure))

    def records(self) -> list[Record]:
        """The measures as a tidy table."""
        return [
            {
                "layer": self.layer,
                "images": row.images,
                "criterion": row.criterion,
                "draw": row.draw,
                "neurons": row.neurons,
                "channels": row.channels,
                "measure": row.measure,
                "mean": row.mean.value,
                "low": row.mean.interval[0],
                "high": row.mean.interval[1],
                "samples": row.mean.samples,
                "route_minus_this": row.more.value,
                "route_minus_this_low": row.more.interval[0],
                "route_minus_this_high": row.more.interval[1],
            }
            for row in self.rows
        ]

    def about(self) -> dict[str, Any]:
        """What the measures have in common."""
        return {
            "experiment": "gradcam",
            "layer": self.layer,
            "at": self.at,
            "map_size": list(self.size),
            "box": "the object's" if self.boxed else "the middle half of the image, each way",
            "samples": self.samples,
            "counted": self.counted,
            "forward_passes": self.forward_passes,
            "intervals": "95 %, normal approximation; route_minus_this is paired",
        }


def compare_attention(
    model: nn.Module,
    data: Data,
    route: Route,
    layer: str,
    attacks: Mapping[str, Attack],
    rivals: Rivals | None = None,
    *,
    share: float = 0.3,
    seeds: Sequence[int] = range(5),
    boxes: Tensor | None = None,
    at: str = OUTPUT,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Attention:
    """Measure the Grad-CAM maps of the route's channels, of the other ones, and of controls of the route's size.

    The class is the one that the network predicts: for an attacked image the wrong one, where it is fooled. Clean
    images that the network gets wrong are left out.

    Args:
        model: The network.
        data: Labelled images in [0, 1].
        route: The route; its frequencies rank the channels.
        layer: The convolution whose maps are taken.
        attacks: Attacks by name.
        rivals: Routes by other criteria, or their scores.
        share: Share of the layer's channels.
        seeds: One random set off the route for each.
        boxes: For each image in order ``(left, top, right, bottom)`` in pixels, ``(N, 4)``; None for the middle half.
        at: Whether the maps are the layer's ``"output"`` or those after its ``"activation"``.
        batch_size: Rows per forward pass when ``data`` is tensors.
        progress: Called with (images done, in all or None) after every batch.

    Raises:
        UserError: The layer is not on the route or has no maps, no sample is classified correctly, or there are not
            as many boxes as images.
    """
    if not attacks:
        raise UserError("no attack is given: pass one by name, such as pgd")
    masks = layer_sets(rank(route, rivals, seeds, [layer]), layer, share)
    sets, labels = torch.stack(list(masks.values())), list(masks)
    if boxes is not None and current().count > 1:
        raise UserError("boxes belong to images by their number, which several processes do not see: run one process")
    measure = _Measure(sets, len(labels))
    samples, counted = 0, 0
    size = (0, 0)

    def once(images: Tensor, given: Tensor | None) -> tuple[int, int, tuple[int, int], _Measure]:
        if given is None:
            raise UserError("the data have no labels: give (images, labels)")
        found = evidence(model, images, layer, at=at)
        answers = checked_labels(given, found.logits.shape[1], len(images))
        right = (found.target == answers).nonzero().flatten()
        inside = _inside(images, boxes, samples)[right]
        own = _Measure(sets, len(labels))
        if len(right):
            pixels = (int(images.shape[2]), int(images.shape[3]))
            clean = own.measure(CLEAN, enlarged(found[right].cams(own.sets), pixels), inside, None)
            for name, attack in attacks.items():
                changed, _ = attacked(model, attack, images[right], answers[right])
                then = evidence(model, changed, layer, at=at)
                own.measure(name, enlarged(then.cams(own.sets), pixels), inside, clean)
        return len(images), len(right), (int(found.maps.shape[2]), int(found.maps.shape[3])), own

    with frozen(model), torch.inference_mode(False), counted_passes(model) as count:
        stream = BatchStream(model, data, batch_size)
        for number, right, area, part in count.map(stream, once):
            samples += number
            counted += right
            size = area if right else size
            measure.add(part)
            if progress is not None:
                progress(samples, stream.total)
    if boxes is not None and len(boxes) != samples:
        raise UserError(f"there are {len(boxes)} boxes for {samples} images: give one for each, in order")
    if not counted:
        raise UserError(
            f"the network gets none of the {samples} samples right when they are clean: check its weights and its "
            "labels, or give more samples"
        )
    rows = tuple(
        Row(images, *labels[index], int(sets[index].sum()), sets.shape[1], name, mean, more)
        for images, name, index, mean, more in measure.results()
    )
    return Attention(rows, layer, at, size, boxes is not None, samples, counted, count.passes)


def _inside(images: Tensor, boxes: Tensor | None, start: int) -> Tensor:
    """Bool (n, H, W): the pixels whose centres are in each image's box."""
    count, (height, width) = len(images), images.shape[2:]
    if boxes is None:
        own = torch.tensor([[width / 4, height / 4, 3 * width / 4, 3 * height / 4]], device=images.device)
        own = own.expand(count, 4)
    else:
        own = boxes[start : start + count].to(images.device)
        if own.shape != (count, 4):
            raise UserError(f"boxes have shape {tuple(boxes.shape)}: give (left, top, right, bottom) for each image")
    left, top, right, bottom = own[:, :, None].unbind(1)
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device) + 0.5
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]


class _Measure:
    """Running means of the measures, over batches.

    Args:
        sets: Bool (S, C), the route's first; the complements are added.
        count: S.
    """

    def __init__(self, sets: Tensor, count: int) -> None:
        self.sets = torch.cat([sets, ~sets])
        self._count = count
        self._values: dict[tuple[str, str], Moments] = {}
        self._more: dict[tuple[str, str], Moments] = {}

    def add(self, other: _Measure) -> None:
        """Add other samples."""
        for own, new in ((self._values, other._values), (self._more, other._more)):
            for key, moments in new.items():
                own.setdefault(key, Moments(self._count)).add(moments)

    def measure(self, name: str, cams: Tensor, inside: Tensor, clean: Tensor | None) -> Tensor:
        """Take maps (2 S, n, H, W) of a batch; gives them as distributions, (S, n, H * W), NaN where a map is zero."""
        energy = cams.double().flatten(2)
        sums = energy.sum(2)
        own, rest = sums[: self._count], sums[self._count :]
        spread = energy[: self._count] / own[:, :, None]  # NaN where a map is all zero
        found = {
            INSIDE: (spread * inside.flatten(1)).sum(2),
            ENTROPY: -torch.special.xlogy(spread, spread).sum(2) / torch.tensor(float(spread.shape[2])).log(),
            PART: own / (own + rest),
        }
        if clean is not None:
            found[SHIFT] = (spread - clean).abs().sum(2) / 2
        for measure, values in found.items():
            self._values[name, measure] = Moments.of(values)
            self._more[name, measure] = Moments.of(values[:1] - values)
        return spread

    def results(self) -> list[tuple[str, str, int, Mean, Mean]]:
        """(images, measure, set, mean, route's mean surplus)."""
        return [
            (name, measure, index, mean, more)
            for (name, measure), moments in self._values.items()
            for index, (mean, more) in enumerate(zip(moments.means(), self._more[name, measure].means(), strict=True))
        ]
