"""Grad-CAM: where the route's channels and the others look, clean and attacked (Fig. 5), in numbers and in pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attackroute.analysis.controls import OFF_ROUTE, ROUTE, Comparison, layer_sets
from attackroute.analysis.experiment import ExperimentResult, experiment
from attackroute.analysis.gradcam import enlarged, jointly_normalised, layer_evidence
from attackroute.analysis.study import Study
from attackroute.core.batches import BatchStream
from attackroute.core.checks import checked_labels
from attackroute.core.distributed import current
from attackroute.core.errors import UserError
from attackroute.core.layers import OUTPUT
from attackroute.core.model_state import frozen
from attackroute.core.statistics import Mean, Moments
from attackroute.core.table import Record, Table
from attackroute.robustness.attack import Attack, attacked
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLEAN = "clean"
INSIDE, ENTROPY, PART, SHIFT = "energy inside", "entropy", "part of all energy", "shift"
_SMALLEST_MAP = 4  # positions each way; maps of fewer show nothing


@dataclass(frozen=True, eq=False)
class MapPanels:
    """Maps of a few images, ready to draw.

    Attributes:
        images: Clean and attacked images, ``(2, n, C, H, W)`` in [0, 1].
        cams: Maps of the route and of all other channels, ``(2, 2, n, H, W)``: clean and attacked, then the set. All
            four of an image share one scale, whose largest value is 1.
        classes: The class that the network sees, ``(2, n)``.
        names: Names of the classes; none where they have none.
        attack: Name of the attack.
        layer: The layer.
        at: Where the maps are taken.
        size: Their own resolution.
    """

    images: Tensor
    cams: Tensor
    classes: Tensor
    names: Sequence[str]
    attack: str
    layer: str
    at: str
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class GradCam(ExperimentResult):
    """Measures of the maps of sets of channels of one layer.

    Attributes:
        table: The mean over images of one measure of one set's maps, a row each. Its ``images`` are ``"clean"``, or
            the attack's name; ``criterion`` is what chose the channels, ``"off-route"`` all that are not on the route;
            ``measure`` is ``"energy inside"``, the share of the map's energy inside the box, ``"entropy"`` of the map
            as a distribution over positions, 1 where it is even, ``"part of all energy"``, the set's energy in that of
            the set and of its complement, or ``"shift"``, half the L1 distance of an attacked image's map from its
            clean image's, as distributions. A mean is over the images whose map is not all zero, and
            ``route_minus_this`` is the mean of the route's measure less this set's, on the same images.
        layer: The layer.
        at: Whether the maps are the layer's ``"output"`` or those after its ``"activation"``.
        size: Height and width of the layer's maps; they are enlarged to the image's size to be measured.
        boxed: Whether the box is the object's; else it is the middle half of the image, each way.
        samples: Images read.
        counted: Those that the network gets right when clean.
        panels: Maps of a few images to look at.
    """

    kind = "gradcam"
    table: Table
    layer: str
    at: str
    size: tuple[int, int]
    boxed: bool
    samples: int
    counted: int
    panels: MapPanels | None = None

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks."""
        return tuple(name for name in self.table.distinct("images") if name != CLEAN)

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria in the order in which they were measured."""
        return tuple(self.table.distinct("criterion"))

    def rows(self, images: str, criterion: str, measure: str) -> list[Record]:
        """The rows of one criterion and measure, one for each draw."""
        return list(self.table.select(images=images, criterion=criterion, measure=measure))

    def reading(self) -> str:
        """One sentence: the shift and energy of the route, beside those of the other channels and the controls."""
        box = "object's box" if self.boxed else "middle of the image"
        clean = self._mean(CLEAN, ROUTE, INSIDE)
        clauses = []
        for attack in self.attacks:
            exceeded = [name for name in self.criteria if name != ROUTE and self._clearly_more(attack, name, SHIFT)]
            more = f"more than {', '.join(exceeded)}" if exceeded else "more than no other set"
            clauses.append(
                f"under {attack} the route's map shifts by {self._mean(attack, ROUTE, SHIFT):.2f} "
                f"(off-route {self._mean(attack, OFF_ROUTE, SHIFT):.2f}; clearly {more}), and its energy in the "
                f"{box} goes from {clean:.0%} to {self._mean(attack, ROUTE, INSIDE):.0%}"
            )
        return f"Grad-CAM of {self.layer} at its {self.at}: {'; '.join(clauses)}."

    def _mean(self, images: str, criterion: str, measure: str) -> float:
        return statistics.fmean(row["mean"] for row in self.rows(images, criterion, measure))

    def _clearly_more(self, images: str, criterion: str, measure: str) -> bool:
        return all(row["route_minus_this_low"] > 0 for row in self.rows(images, criterion, measure))

    def about(self) -> dict[str, Any]:
        """What the measures have in common."""
        return {
            "layer": self.layer,
            "at": self.at,
            "map_size": list(self.size),
            "box": "the object's" if self.boxed else "the middle half of the image, each way",
            "samples": self.samples,
            "counted": self.counted,
            "intervals": "95 %, normal approximation; route_minus_this is paired",
        }

    def summary(self) -> Table:
        """Where the maps' energy is, and how far it moves under the first attack."""
        cases = [(CLEAN, INSIDE), (self.attacks[0], INSIDE), (self.attacks[0], SHIFT)]
        rows = tuple(
            (criterion, *(f"{self._mean(images, criterion, measure):.3f}" for images, measure in cases))
            for criterion in self.criteria
        )
        return Table(("set", *(f"{measure}, {images}" for images, measure in cases)), rows)

    def figures(self) -> dict[str, Figure]:
        """``gradcam``, the maps of a few images where there are some, and ``gradcam-measures``."""
        from attackroute.analysis.figures.gradcam import maps_figure, measures_figure

        maps = {} if self.panels is None else {"gradcam": maps_figure(self.panels)}
        return {**maps, "gradcam-measures": measures_figure(self)}


@experiment(
    "gradcam",
    order=6,
    title="Grad-CAM: where the channels look",
    help="where the route's channels look, and the others (Fig. 5)",
)
def run(study: Study, progress: Progress) -> GradCam:
    """The experiment on a study's images, in the last layer whose maps show something."""
    layer = _mapped_layer(study)
    result = measure_gradcam(study.comparison(progress), layer, study.attacks)
    name, attack = next(iter(study.attacks.items()))
    panels = map_panels(
        study.model, *study.examples(), study.route, layer, attack, name, at=study.at, names=study.images.classes
    )
    return replace(result, panels=panels)


def measure_gradcam(
    compared: Comparison, layer: str, attacks: Mapping[str, Attack], boxes: Tensor | None = None
) -> GradCam:
    """Measure the Grad-CAM maps of the route's channels, of the other ones, and of controls of the route's size.

    The class is the one that the network predicts: for an attacked image the wrong one, where it is fooled. Clean
    images that the network gets wrong are left out.

    Args:
        compared: The route and its controls.
        layer: The convolution whose maps are taken.
        attacks: Attacks by name.
        boxes: For each image in order ``(left, top, right, bottom)`` in pixels, ``(N, 4)``; None for the middle half.

    Raises:
        UserError: The layer is not on the route or has no maps, no sample is classified correctly, or there are not
            as many boxes as images.
    """
    if not attacks:
        raise UserError("no attack is given: pass one by name, such as pgd")
    model, at = compared.model, compared.at
    masks = layer_sets(compared.rankings([layer]), layer, compared.share)
    sets, labels = torch.stack(list(masks.values())), list(masks)
    if boxes is not None and current().count > 1:
        raise UserError("boxes belong to images by their number, which several processes do not see: run one process")
    measures = _MapMeasures(sets)
    samples, counted = 0, 0
    size = (0, 0)

    def measure_batch(images: Tensor, answers: Tensor | None) -> tuple[int, int, tuple[int, int], _MapMeasures]:
        if answers is None:
            raise UserError("the data have no labels: give (images, labels)")
        evidence = layer_evidence(model, images, layer, at=at)
        answers = checked_labels(answers, evidence.logits.shape[1], len(images))
        right = (evidence.target == answers).nonzero().flatten()
        inside = _inside(images, boxes, samples)[right]
        batch = _MapMeasures(sets)
        if len(right):
            pixels = (int(images.shape[2]), int(images.shape[3]))
            clean = batch.measure(CLEAN, enlarged(evidence[right].cams(batch.sets), pixels), inside, None)
            for name, attack in attacks.items():
                changed, _ = attacked(model, attack, images[right], answers[right])
                then = layer_evidence(model, changed, layer, at=at)
                batch.measure(name, enlarged(then.cams(batch.sets), pixels), inside, clean)
        return len(images), len(right), (int(evidence.maps.shape[2]), int(evidence.maps.shape[3])), batch

    with frozen(model), torch.inference_mode(False):
        stream = BatchStream(model, compared.data, compared.batch_size)
        for number, right, area, batch in stream.map(measure_batch):
            samples += number
            counted += right
            size = area if right else size
            measures.add(batch)
            if compared.progress is not None:
                compared.progress(samples, stream.total)
    if boxes is not None and len(boxes) != samples:
        raise UserError(f"there are {len(boxes)} boxes for {samples} images: give one for each, in order")
    if not counted:
        raise UserError(
            f"the network gets none of the {samples} samples right when they are clean: check its weights and its "
            "labels, or give more samples"
        )
    rows = [
        {
            "layer": layer,
            "images": images,
            "criterion": labels[index][0],
            "draw": labels[index][1],
            "neurons": int(sets[index].sum()),
            "channels": sets.shape[1],
            "measure": name,
            "mean": mean.value,
            "low": mean.low,
            "high": mean.high,
            "samples": mean.samples,
            "route_minus_this": surplus.value,
            "route_minus_this_low": surplus.low,
            "route_minus_this_high": surplus.high,
        }
        for images, name, index, mean, surplus in measures.results()
    ]
    return GradCam(
        table=Table.of(rows), layer=layer, at=at, size=size, boxed=boxes is not None, samples=samples, counted=counted
    )


def map_panels(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    route: Route,
    layer: str,
    attack: Attack,
    name: str,
    *,
    at: str = OUTPUT,
    names: Sequence[str] = (),
) -> MapPanels:
    """Maps of a batch, clean and attacked, of the route's channels of a layer and of all others.

    Args:
        model: The network.
        images: ``(n, C, H, W)`` on its device.
        labels: ``(n,)``.
        route: The route.
        layer: A convolution of it.
        attack: The attack.
        name: Its name.
        at: Whether the maps are the layer's ``"output"`` or those after its ``"activation"``.
        names: Names of the classes.
    """
    mask = route.mask(layer)
    with frozen(model):
        changed, _ = attacked(model, attack, images, labels)
    both = torch.stack([images, changed])
    evidence = [layer_evidence(model, each, layer, at=at) for each in both]
    cams = torch.cat([each.cams(torch.stack([mask, ~mask])) for each in evidence])
    size = (int(cams.shape[2]), int(cams.shape[3]))
    large = jointly_normalised(enlarged(cams, (int(images.shape[2]), int(images.shape[3]))))
    classes = torch.stack([each.target for each in evidence])
    return MapPanels(
        images=both.cpu(), cams=large.unflatten(0, (2, 2)).cpu(), classes=classes.cpu(), names=names, attack=name,
        layer=layer, at=at, size=size,
    )  # fmt: skip


def _mapped_layer(study: Study) -> str:
    """The last layer whose maps have a few positions each way; the last of all if none has."""
    for layer in reversed(study.route.layers):
        try:
            maps = layer_evidence(study.model, study.pair, layer, at=study.at).maps
        except UserError:  # no maps there, or none on which the logits depend
            continue
        if min(maps.shape[2:]) >= _SMALLEST_MAP:
            return layer
    return study.route.layers[-1]


def _inside(images: Tensor, boxes: Tensor | None, start: int) -> Tensor:
    """Bool (n, H, W): the pixels whose centres are in each image's box."""
    count, (height, width) = len(images), images.shape[2:]
    if boxes is None:
        middle = torch.tensor([[width / 4, height / 4, 3 * width / 4, 3 * height / 4]], device=images.device)
        chosen = middle.expand(count, 4)
    else:
        chosen = boxes[start : start + count].to(images.device)
        if chosen.shape != (count, 4):
            raise UserError(f"boxes have shape {tuple(boxes.shape)}: give (left, top, right, bottom) for each image")
    left, top, right, bottom = chosen[:, :, None].unbind(1)
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device) + 0.5
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]


class _MapMeasures:
    """Running means of the measures, over batches.

    Args:
        sets: Bool (S, C), the route's first; the complements are added.
    """

    def __init__(self, sets: Tensor) -> None:
        self.sets = torch.cat([sets, ~sets])
        self._count = len(sets)
        self._values: dict[tuple[str, str], Moments] = {}
        self._surplus: dict[tuple[str, str], Moments] = {}

    def add(self, other: _MapMeasures) -> None:
        """Add other samples."""
        for here, there in ((self._values, other._values), (self._surplus, other._surplus)):
            for key, moments in there.items():
                here.setdefault(key, Moments(self._count)).add(moments)

    def measure(self, name: str, cams: Tensor, inside: Tensor, clean: Tensor | None) -> Tensor:
        """Take maps (2 S, n, H, W) of a batch; gives them as distributions, (S, n, H * W), NaN where a map is zero."""
        energy = cams.double().flatten(2)
        sums = energy.sum(2)
        total, rest = sums[: self._count], sums[self._count :]
        spread = energy[: self._count] / total[:, :, None]  # NaN where a map is all zero
        measures = {
            INSIDE: (spread * inside.flatten(1)).sum(2),
            ENTROPY: -torch.special.xlogy(spread, spread).sum(2) / torch.tensor(float(spread.shape[2])).log(),
            PART: total / (total + rest),
        }
        if clean is not None:
            measures[SHIFT] = (spread - clean).abs().sum(2) / 2
        for measure, values in measures.items():
            self._values[name, measure] = Moments.of(values)
            self._surplus[name, measure] = Moments.of(values[:1] - values)
        return spread

    def results(self) -> list[tuple[str, str, int, Mean, Mean]]:
        """(images, measure, set, mean, route's mean surplus)."""
        return [
            (name, measure, index, mean, surplus)
            for (name, measure), moments in self._values.items()
            for index, (mean, surplus) in enumerate(
                zip(moments.means(), self._surplus[name, measure].means(), strict=True)
            )
        ]
