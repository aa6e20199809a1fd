"""Grad-CAM: where the route's channels and the others look, clean and attacked (Fig. 5), in numbers and in pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.analysis.channel_statistics import labelled
from attackroute.analysis.controls import OFF_ROUTE, ROUTE, Comparison, layer_sets, require_right
from attackroute.analysis.experiment import ExperimentResult, Work, experiment
from attackroute.analysis.figures.style import Figure, new_figure
from attackroute.analysis.gradcam import Grid, enlarged, jointly_normalised, layer_evidence
from attackroute.analysis.study import Study
from attackroute.core.checks import checked_labels
from attackroute.core.errors import UserError
from attackroute.core.layers import OUTPUT
from attackroute.core.model_state import frozen
from attackroute.core.statistics import LEVEL, Moments
from attackroute.core.table import Record, Table
from attackroute.robustness.attack import Attack, attacked
from attackroute.robustness.registry import named_attacks
from attackroute.tracing.trace import Progress

CLEAN = "clean"
INSIDE, SHIFT = "energy inside", "shift"
_SMALLEST_MAP = 4  # positions each way; maps of fewer show nothing


@dataclass(frozen=True, eq=False)
class MapPanels:
    """Maps of a few images, ready to draw."""

    images: Tensor  # clean and attacked, (2, n, C, H, W) in [0, 1]
    cams: Tensor  # maps of the route and of all others, (2, 2, n, H, W): clean and attacked, then the set; an image's
    #               four share one scale, whose largest value is 1
    classes: Tensor  # that the network sees, (2, n)
    names: Sequence[str] = ()  # of the classes, where they have some


@dataclass(frozen=True, kw_only=True)
class GradCam(ExperimentResult):
    """Measures of the maps of sets of channels of one layer.

    Attributes:
        table: The mean over images of one measure of one set's maps, a row each. Its ``images`` are ``"clean"``, or the
            attack's name; ``criterion`` is what chose the channels, ``"off-route"`` all that are not on the route;
            ``measure`` is ``"energy inside"``, the share of the map's energy in the middle half of the image, each way,
            or ``"shift"``, half the L1 distance of an attacked image's map from its clean image's, as distributions. A
            mean is over the images whose map is not all zero, and ``route_minus_this`` is the mean of the route's
            measure less this set's, on the same images.
    """

    kind = "gradcam"
    layer: str
    at: str  # whether the maps are the layer's output or those after its activation
    size: tuple[int, int]  # height and width of the layer's maps; they are enlarged to the image's size to be measured
    samples: int
    counted: int  # of these, right when clean
    panels: MapPanels | None = None  # maps of a few images to look at, attacked by the first attack

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks."""
        return tuple(name for name in self.table.distinct("images") if name != CLEAN)

    def rows(self, images: str, criterion: str, measure: str) -> list[Record]:
        """The rows of one criterion and measure, one for each draw."""
        return list(self.table.select(images=images, criterion=criterion, measure=measure))

    def reading(self) -> str:
        """One sentence: the shift and energy of the route, beside those of the other channels and the controls."""
        clean = self._mean(CLEAN, ROUTE, INSIDE)
        clauses = []
        for attack in self.attacks:
            exceeded = [
                name for name in self.criteria
                if name != ROUTE and all(
                    row["route_minus_this_low"] > 0 and row["route_minus_this"] >= LEVEL
                    for row in self.rows(attack, name, SHIFT)
                )
            ]  # fmt: skip
            more = f"more than {', '.join(exceeded)}" if exceeded else "more than no other set"
            clauses.append(
                f"under {attack} the route's map shifts by {self._mean(attack, ROUTE, SHIFT):.2f} "
                f"(off-route {self._mean(attack, OFF_ROUTE, SHIFT):.2f}; clearly {more}), and its energy in the "
                f"middle of the image goes from {clean:.0%} to {self._mean(attack, ROUTE, INSIDE):.0%}"
            )
        return f"Grad-CAM of {self.layer} at its {self.at}: {'; '.join(clauses)}."

    def _mean(self, images: str, criterion: str, measure: str) -> float:
        return statistics.fmean(row["mean"] for row in self.rows(images, criterion, measure))

    def about(self) -> dict[str, Any]:
        """What the measures have in common."""
        return {
            "layer": self.layer,
            "at": self.at,
            "map_size": list(self.size),
            "box": "the middle half of the image, each way",
            "samples": self.samples,
            "counted": self.counted,
            "intervals": "95 %, normal approximation; route_minus_this is paired",
        }

    def figures(self) -> dict[str, Figure]:
        """``gradcam``, the maps of a few images where there are some."""
        return {} if self.panels is None else {"gradcam": _maps_figure(self, self.panels)}


@experiment("gradcam", order=8, title="Grad-CAM: where the channels look", work=Work(1))
def run(study: Study, progress: Progress) -> GradCam:
    """Where the route's channels look, and the others (Fig. 5)."""
    layer = _mapped_layer(study)
    result = measure_gradcam(study.comparison(progress), layer, study.named_attacks)
    panels = map_panels(study.model, *study.examples(), study.route.mask(layer), layer, study.attack, study.at)
    return replace(result, panels=replace(panels, names=study.images.classes))


def measure_gradcam(compared: Comparison, layer: str, attacks: Mapping[str, Attack | str]) -> GradCam:
    """Measure the Grad-CAM maps of the route's channels, of the other ones, and of controls of the route's size.

    The class is the one that the network predicts: for an attacked image the wrong one, where it is fooled. Clean
    images that the network gets wrong are left out.
    """
    named = named_attacks(attacks)
    model, at = compared.model, compared.at
    masks = layer_sets(compared.rankings([layer]), layer, compared.share)
    sets = torch.stack(list(masks.values()))
    moments: dict[tuple[str, str], Moments] = {}
    samples, counted = 0, 0
    size = (0, 0)

    def measure_batch(images: Tensor, answers: Tensor | None) -> tuple[int, Grid, dict[tuple[str, str], Moments]]:
        """How many samples count, the size of the maps, and each measure by images and name."""
        evidence = layer_evidence(model, images, layer, at=at)
        answers = checked_labels(labelled(answers), evidence.logits.shape[1], len(images))
        right = (evidence.target == answers).nonzero().flatten()
        values: dict[tuple[str, str], Tensor] = {}
        if len(right):
            clean, values[CLEAN, INSIDE] = _spread(evidence.cams(sets)[:, right], *images.shape[2:])
            for name, attack in named.items():
                changed, _ = attacked(model, attack, images[right], answers[right])
                cams = layer_evidence(model, changed, layer, at=at).cams(sets)
                spread, values[name, INSIDE] = _spread(cams, *images.shape[2:])
                values[name, SHIFT] = (spread - clean).abs().sum(2) / 2
        # the numbers of each set, and by how much the route's are larger
        batch = {key: Moments.of(torch.cat([numbers, numbers[:1] - numbers])) for key, numbers in values.items()}
        height, width = evidence.maps.shape[2:]
        return len(right), (height, width), batch

    for number, (right, area, batch) in compared.measured(measure_batch):
        samples += number
        counted += right
        size = area if right else size
        for key, each in batch.items():
            moments.setdefault(key, Moments(2 * len(sets))).add(each)
    require_right(counted, samples)
    rows = []
    for (images, measure), each in moments.items():
        of_sets, surpluses = each.means()[: len(sets)], each.means()[len(sets) :]
        for ((criterion, draw), mask), mean, surplus in zip(masks.items(), of_sets, surpluses, strict=True):
            chosen = {"criterion": criterion, "draw": draw, "neurons": int(mask.sum()), "channels": len(mask)}
            ends = {"mean": mean.value, "low": mean.low, "high": mean.high, "samples": mean.samples}
            paired = zip(("", "_low", "_high"), surplus[:3], strict=True)
            less = {f"route_minus_this{end}": value for end, value in paired}
            rows.append({"layer": layer, "images": images, **chosen, "measure": measure, **ends, **less})
    return GradCam(table=Table.of(rows), layer=layer, at=at, size=size, samples=samples, counted=counted)


def map_panels(
    model: nn.Module, images: Tensor, labels: Tensor, mask: Tensor, layer: str, attack: Attack, at: str = OUTPUT
) -> MapPanels:
    """Maps of a batch, clean and attacked, of a layer's channels under a mask ``(C,)`` and of all others."""
    with frozen(model):
        changed, _ = attacked(model, attack, images, labels)
    both = torch.stack([images, changed])
    evidence = [layer_evidence(model, each, layer, at=at) for each in both]
    cams = torch.cat([each.cams(torch.stack([mask, ~mask])) for each in evidence])
    height, width = images.shape[2:]
    cams = jointly_normalised(enlarged(cams, (height, width))).unflatten(0, (2, 2))
    return MapPanels(both.cpu(), cams.cpu(), torch.stack([each.target for each in evidence]).cpu())


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


def _spread(cams: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Maps ``(S, n, h, w)`` as distributions ``(S, n, height * width)``, and their energy inside, ``(S, n)``.

    Both are NaN where a map is all zero.
    """
    energy = enlarged(cams, (height, width)).double().flatten(2)
    spread = energy / energy.sum(2, keepdim=True)
    y, x = (torch.arange(side, device=cams.device) + 0.5 for side in (height, width))  # centres of pixels
    rows, columns = (y >= height / 4) & (y < 3 * height / 4), (x >= width / 4) & (x < 3 * width / 4)
    return spread, (spread * (rows[:, None] & columns).flatten()).sum(2)


def _maps_figure(result: GradCam, panels: MapPanels) -> Figure:
    """Each image as two rows, clean and attacked: the image, then the route's map and the others' over it."""
    count = panels.images.shape[1]
    pairs = min(2, count)
    rows = -(-count // pairs)
    figure = new_figure(3.5 * pairs + 0.6, 2.45 * rows + 0.9)
    grid = figure.subplots(2 * rows, 3 * pairs, squeeze=False)
    for axes in grid.flatten():
        axes.set_axis_off()
    for index, state in product(range(count), range(2)):
        image = panels.images[state, index].permute(1, 2, 0).float().clamp(0, 1)
        pixels = image.expand(-1, -1, 3) if image.shape[2] == 1 else image[..., :3]
        column = 3 * (index % pairs)
        first, *others = grid[2 * (index // pairs) + state, column : column + 3]
        first.imshow(pixels.numpy())
        predicted = int(panels.classes[state, index])
        text = panels.names[predicted] if predicted < len(panels.names) else f"class {predicted}"
        first.set_title(f"{'attacked' if state else 'clean'}: {text}", fontsize=7.5, pad=2)
        for axes, title, cams in zip(others, ("route", "off-route"), panels.cams[state], strict=True):
            axes.imshow(pixels.mean(2).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.imshow(cams[index].float().numpy(), cmap="inferno", alpha=0.62, vmin=0, vmax=1)
            axes.set_title(title, fontsize=7.5, pad=2)
    bar = figure.colorbar(grid[0, -1].images[-1], ax=grid, fraction=0.02, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(
        f"Grad-CAM of {result.layer} ({result.size[0]}x{result.size[1]}), at its {result.at}; {result.attacks[0]}\n"
        "the four maps of an image share one scale",
        fontsize=9,
    )
    return figure
