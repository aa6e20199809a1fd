"""Detection: is an image attacked? The distance of its route from that of the class which the network sees in it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.analysis.passes import counted_passes
from attackroute.analysis.rankings import ROUTE
from attackroute.analysis.sample_routes import SampleRouter, joined_routes, sample_routes
from attackroute.analysis.tables import Record
from attackroute.core.batches import BatchStream, Data
from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.loss import log_doubt
from attackroute.core.model_state import frozen
from attackroute.core.random import random_order
from attackroute.core.statistics import AUROC, associations
from attackroute.robustness.attack import Attack, attacked
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route
from attackroute.tracing.sketches import Sketches
from attackroute.tracing.trace import Progress

RANDOM_ROUTE = "random route"


SOFTMAX, MARGIN = "softmax", "margin"


ALL_LAYERS = "all"


@dataclass(frozen=True)
class Row:
    """How well one score tells attacked images from clean ones.

    Attributes:
        attack: The attack.
        score: ``"route"``, another criterion's routes, ``"random route"``, ``"softmax"`` or ``"margin"``.
        draw: Seed of a random route; else None.
        layer: The layer whose routes are compared, or ``"all"`` for the mean distance over layers.
        auroc: Probability that an attacked image scores higher than a clean one, ties counting half; NaN where no
            image was fooled.
        low: Lower end of its 95 % bootstrap interval.
        high: Upper end.
        attacked: Images of the attack, all of them misclassified.
        clean: Clean images, all of them classified correctly.
        beaten: 1 if the route's area over all layers is clearly larger, -1 if clearly smaller, 0 if neither.
    """

    attack: str
    score: str
    draw: int | None
    layer: str
    auroc: float
    low: float
    high: float
    attacked: int
    clean: int
    beaten: int


@dataclass(frozen=True)
class Detection:
    """Areas under the ROC curve, by attack, score and layer.

    Attributes:
        rows: The areas.
        reference: Samples from which the classes' routes come.
        samples: Samples read beside them.
        counted: Those that the network gets right when clean.
        unknown: Images left out, because no reference sample bears the class which the network sees in them.
        width: Share of each layer's channels on a sample's route.
        route_width: Share of each layer's channels on a class's route.
        forward_passes: Forward passes of the model, one for a batch, those of attacks included.
    """

    rows: tuple[Row, ...]
    reference: int
    samples: int
    counted: int
    unknown: int
    width: float
    route_width: float
    forward_passes: int

    @property
    def attacks(self) -> tuple[str, ...]:
        """The attacks."""
        return tuple(dict.fromkeys(row.attack for row in self.rows))

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores."""
        return tuple(dict.fromkeys(row.score for row in self.rows))

    def values(self, attack: str, score: str, layer: str = ALL_LAYERS) -> list[Row]:
        """The rows of one score, one for each random draw."""
        return [row for row in self.rows if (row.attack, row.score, row.layer) == (attack, score, layer)]

    def reading(self) -> str:
        """One sentence: the areas of the route by attack, and the controls that it beats and loses to."""
        texts = []
        for attack in self.attacks:
            (ours,) = self.values(attack, ROUTE)
            if not ours.attacked:
                texts.append(f"{attack} fools the network on no image")
                continue
            verdicts: dict[str, list[str]] = {"beats": [], "loses to": [], "is level with": []}
            for score in self.scores[1:]:
                rows = self.values(attack, score)
                found = {row.beaten for row in rows}
                verdict = "beats" if found == {1} else "loses to" if found == {-1} else "is level with"
                verdicts[verdict].append(f"{score} {statistics.fmean(row.auroc for row in rows):.2f}")
            told = ", ".join(f"{verdict} {' and '.join(names)}" for verdict, names in verdicts.items() if names)
            texts.append(f"{attack} {ours.auroc:.2f} ({told})")
        return f"AUROC of the distance from the predicted class's route: {'; '.join(texts)}."

    def records(self) -> list[Record]:
        """The areas as a tidy table."""
        return [
            {
                "attack": row.attack,
                "score": row.score,
                "draw": row.draw,
                "layer": row.layer,
                "auroc": row.auroc,
                "auroc_low": row.low,
                "auroc_high": row.high,
                "attacked": row.attacked,
                "clean": row.clean,
                "route_against_it": row.beaten,
            }
            for row in self.rows
        ]

    def about(self) -> dict[str, Any]:
        """What the areas have in common."""
        return {
            "experiment": "detect",
            "distance": "1 - Jaccard index of the sample's route and its predicted class's, mean over layers",
            "reference_samples": self.reference,
            "samples": self.samples,
            "counted": self.counted,
            "left_out_for_want_of_a_class_route": self.unknown,
            "width": self.width,
            "route_width": self.route_width,
            "forward_passes": self.forward_passes,
            "clear": "95 % bootstrap interval of the paired difference, not corrected for the number of tests",
        }


def detect(
    model: nn.Module,
    data: Data,
    reference: Data,
    attacks: Mapping[str, Attack],
    *,
    width: float = 0.2,
    route_width: float = 0.3,
    seeds: Sequence[int] = range(5),
    linear: bool = False,
    sketches: Sketches = None,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Detection:
    """Tell attacked images from clean ones by their routes, beside scores that need no route.

    An image is traced for the class that the network predicts, so no label is needed to judge it. Its score is the
    distance of its route from the route of that class: 1 less the Jaccard index, the mean over layers. Attacked
    images count if they fool the network, clean ones if they are classified correctly. Controls: routes of samples
    and classes by activation and by gradient, random routes of the classes' size, the largest softmax probability
    (as ``log(1 - p)``, which never saturates), and the margin of the two largest logits.

    Args:
        model: The network.
        data: Labelled images in [0, 1] to judge.
        reference: Other labelled images, from which the classes' routes come.
        attacks: Attacks by name.
        width: Share of each layer's channels on a sample's route.
        route_width: Share of each layer's channels on a class's route.
        seeds: One set of random routes for each.
        linear: Whether linear maps are route layers too.
        sketches: As :func:`attackroute.trace_routes` takes them: approximate.
        batch_size: Rows per forward pass when data are tensors.
        progress: Called with (images traced, in all or None).

    Raises:
        UserError: No attack, labels are missing, or no sample is classified correctly or has a class route.
    """
    if not attacks:
        raise UserError("no attack is given: pass one by name, such as pgd")
    with frozen(model), torch.inference_mode(False), counted_passes(model) as count:
        known = sample_routes(
            model, reference, width, linear=linear, sketches=sketches, batch_size=batch_size, passes=count
        )
        if known[ROUTE].labels is None:
            raise UserError("the reference data have no labels: give (images, labels)")
        stream = BatchStream(model, data, batch_size)
        router = SampleRouter.probe(model, stream.first[0], width, linear=linear, sketches=sketches)
        judge = _Judge(model, attacks, router)
        judged: list[_Judged] = []
        samples = 0
        for part in count.map(stream, judge.judge):
            judged.append(part)
            samples += part.samples
            if progress is not None:
                progress(samples, stream.total)
    seen_parts = [group for part in judged for group in part.groups]
    counted = sum(part.counted for part in judged)
    if not counted:
        raise UserError(
            f"the network gets none of the {samples} samples right when they are clean: check its weights "
            "and its labels, or give more samples"
        )
    routes = joined_routes([part.routes for part in seen_parts])
    group, seen, softmax, margin = (
        torch.cat([getattr(part, name) for part in seen_parts]) for name in ("group", "seen", "softmax", "margin")
    )
    plain = {SOFTMAX: softmax, MARGIN: margin}
    classes = {by: own.by_label(route_width) for by, own in known.items()}
    has_route = torch.tensor([int(label) in classes[ROUTE] for label in seen], dtype=torch.bool)
    if not has_route[group == 0].any():
        raise UserError(
            "no clean sample's class has a route: give reference samples of the classes that the network predicts"
        )
    distances: dict[tuple[str, int | None], Tensor] = {
        (by, None): _distances(own, classes[by], seen, has_route) for by, own in routes.items()
    }
    for seed in seeds:
        fake = {label: _random_route(route, seed, label) for label, route in classes[ROUTE].items()}
        distances[RANDOM_ROUTE, seed] = _distances(routes[ROUTE], fake, seen, has_route)
    layers = routes[ROUTE].layers
    rows: list[Row] = []
    for number, attack in enumerate(attacks, start=1):
        clean, fooled = (group == 0) & has_route, (group == number) & has_route
        scores: dict[tuple[str, int | None, str], Tensor] = {}
        for (by, draw), values in distances.items():
            scores[by, draw, ALL_LAYERS] = values.mean(1)
            for column, layer in enumerate(layers):
                scores[by, draw, layer] = values[:, column]
        scores |= {(name, None, ALL_LAYERS): values for name, values in plain.items()}
        rows += _rows(attack, scores, clean, fooled)
    return Detection(
        tuple(rows), len(known[ROUTE]), samples, counted, int((~has_route).sum()), width, route_width,
        count.passes,
    )  # fmt: skip


def _rows(
    attack: str, scores: Mapping[tuple[str, int | None, str], Tensor], clean: Tensor, fooled: Tensor
) -> Iterator[Row]:
    sizes = int(fooled.sum()), int(clean.sum())
    chosen = clean | fooled
    names = {f"{score}/{draw}/{layer}": (score, draw, layer) for score, draw, layer in scores}
    predictors = {name: scores[key][chosen].double().numpy() for name, key in names.items()}
    for found in associations(predictors, fooled[chosen].numpy(), AUROC):
        value, interval, lead = found.estimate.value, found.estimate.interval, found.lead.interval
        beaten = 0 if lead is None else int(lead[0] > 0) - int(lead[1] < 0)
        score, draw, layer = names[found.predictor]
        low, high = (math.nan, math.nan) if interval is None else interval
        yield Row(attack, score, draw, layer, math.nan if value is None else value, low, high, *sizes, beaten)


@dataclass(frozen=True, eq=False)
class _Group:
    """Images of one batch that are all clean, or all of one attack.

    Attributes:
        group: For each image 0, or its attack's number.
        seen: The class that the network sees in it.
        softmax: Its score by the largest probability.
        margin: Its score by the margin of the two largest logits.
        routes: Its routes by criterion.
    """

    group: Tensor
    seen: Tensor
    softmax: Tensor
    margin: Tensor
    routes: dict[str, InstanceRoutes]


@dataclass(frozen=True, eq=False)
class _Judged:
    """What was found in one batch: how many images it has, how many count, and these by group."""

    samples: int
    counted: int
    groups: list[_Group]


@dataclass(frozen=True)
class _Judge:
    """Takes batches one by one: clean images that the model gets right, then those with which each attack fools it."""

    model: nn.Module
    attacks: Mapping[str, Attack]
    router: SampleRouter

    def judge(self, images: Tensor, given: Tensor | None) -> _Judged:
        logits = self._logits(images)
        labels = _require(given, logits)
        right = logits.argmax(1) == labels
        groups = []
        if right.any():
            groups.append(self._group(0, images[right], logits[right]))
            for number, attack in enumerate(self.attacks.values(), start=1):
                changed, _ = attacked(self.model, attack, images[right], labels[right])
                logits_then = self._logits(changed)
                fooled = logits_then.argmax(1) != labels[right]
                if fooled.any():
                    groups.append(self._group(number, changed[fooled], logits_then[fooled]))
        return _Judged(len(images), int(right.sum()), groups)

    def _logits(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return checked_logits(self.model(images.clone()), len(images)).detach()

    def _group(self, number: int, images: Tensor, logits: Tensor) -> _Group:
        seen = logits.argmax(1)
        two = logits.double().topk(2, dim=1).values
        return _Group(
            torch.full((len(images),), number),
            seen.cpu(),
            log_doubt(logits.double(), seen).cpu(),
            (two[:, 1] - two[:, 0]).cpu(),
            self.router.routes(images, None),
        )


def _require(labels: Tensor | None, logits: Tensor) -> Tensor:
    if labels is None:
        raise UserError("the data have no labels: give (images, labels)")
    return checked_labels(labels, logits.shape[1], len(logits))


def _distances(routes: InstanceRoutes, classes: Mapping[int, Route], seen: Tensor, has_route: Tensor) -> Tensor:
    """1 less the Jaccard index with the class's route: float64 (samples, layers), NaN without a class route."""
    columns = []
    known = sorted(classes)
    row = {label: index for index, label in enumerate(known)}
    index = torch.tensor([row.get(int(label), 0) for label in seen])
    for layer in routes.layers:
        own = routes.masks[layer]
        theirs = torch.stack([classes[label].mask(layer) for label in known])[index]
        columns.append(1 - (own & theirs).sum(1).double() / (own | theirs).sum(1))
    return torch.stack(columns, dim=1).masked_fill(~has_route[:, None], torch.nan)


def _random_route(route: Route, seed: int, label: int) -> Route:
    """Random channels, as many as the route has, whether on it or not; others for each class."""
    indices = {
        layer: random_order(seed, f"class {label}/{layer}", range(count))[: len(route.indices[layer])]
        for layer, count in route.channels.items()
    }
    return Route(indices, route.channels)
