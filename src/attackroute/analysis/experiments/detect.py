"""Detect: is an image attacked? The distance of its route from that of the class which the network sees in it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attackroute.analysis.channel_statistics import labelled, worked_on
from attackroute.analysis.controls import ROUTE, Router, batch_router, joined_routes, require_right, sample_routes
from attackroute.analysis.experiment import ExperimentResult, Work, experiment
from attackroute.analysis.figures.style import draw_spread, look, new_figure, shared_legend, tidy, upright_layers
from attackroute.analysis.study import SAMPLE_WIDTH, Study
from attackroute.core.batches import BatchStream, Data
from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.loss import log_doubt
from attackroute.core.model_state import frozen
from attackroute.core.random import random_order
from attackroute.core.statistics import AUROC, LEVEL, associations
from attackroute.core.table import Record, Table
from attackroute.robustness.attack import Attack, attacked
from attackroute.robustness.registry import named_attacks
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.trace import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANDOM_ROUTE, SOFTMAX, MARGIN = "random route", "softmax", "margin"
ALL_LAYERS = "all"


@dataclass(frozen=True, kw_only=True)
class Detection(ExperimentResult):
    """Areas under the ROC curve, by attack, score and layer.

    Attributes:
        table: How well one score tells attacked images from clean ones, a row each. Its ``score`` is ``"route"``,
            another criterion's routes, ``"random route"``, ``"softmax"`` or ``"margin"``; ``layer`` the layer whose
            routes are compared, or ``"all"`` for the mean distance over layers; ``auroc`` the probability that an
            attacked image scores higher than a clean one, ties counting half, with its 95 % bootstrap interval, and
            NaN where no image was fooled. ``attacked`` images are misclassified, ``clean`` ones classified correctly.
            ``route_against_it`` is 1 if the route's area over all layers is clearly larger, -1 if clearly smaller,
            0 if neither.
    """

    kind = "detect"
    table: Table
    reference: int  # samples from which the classes' routes come
    samples: int  # read beside them
    counted: int  # of these, right when clean
    unknown: int  # images left out, because no reference sample bears the class which the network sees in them
    route_width: float  # share of each layer's channels on a class's route

    @property
    def attacks(self) -> list[str]:
        """The attacks."""
        return self.table.distinct("attack")

    @property
    def scores(self) -> list[str]:
        """The scores, the route's first."""
        return self.table.distinct("score")

    def rows(self, attack: str, score: str, layer: str = ALL_LAYERS) -> list[Record]:
        """The rows of one score, one for each random draw."""
        return list(self.table.select(attack=attack, score=score, layer=layer))

    def reading(self) -> str:
        """One sentence: the areas of the route by attack, and the controls that it beats and loses to."""
        clauses = []
        for attack in self.attacks:
            (route,) = self.rows(attack, ROUTE)
            if not route["attacked"]:
                clauses.append(f"{attack} fools the network on no image")
                continue
            controls: dict[str, list[str]] = {"beats": [], "loses to": [], "is level with": []}
            for score in self.scores[1:]:
                signs = {row["route_against_it"] for row in self.rows(attack, score)}
                apart = abs(route["auroc"] - self._mean(attack, score)) >= LEVEL
                verdict = "beats" if signs == {1} else "loses to" if signs == {-1} else "is level with"
                verdict = verdict if apart else "is level with"
                controls[verdict].append(f"{score} {self._mean(attack, score):.2f}")
            verdicts = ", ".join(f"{verdict} {' and '.join(names)}" for verdict, names in controls.items() if names)
            clauses.append(f"{attack} {route['auroc']:.2f} ({verdicts})")
        return f"AUROC of the distance from the predicted class's route: {'; '.join(clauses)}."

    def _mean(self, attack: str, score: str) -> float:
        return statistics.fmean(row["auroc"] for row in self.rows(attack, score))

    def about(self) -> dict[str, Any]:
        """What the areas have in common."""
        return {
            "distance": "1 - Jaccard index of the sample's route and its predicted class's, mean over layers",
            "reference_samples": self.reference,
            "samples": self.samples,
            "counted": self.counted,
            "left_out_for_want_of_a_class_route": self.unknown,
            "width": SAMPLE_WIDTH,
            "route_width": self.route_width,
            "clear": "95 % bootstrap interval of the paired difference, not corrected for the number of tests",
        }

    def summary(self) -> Table:
        """The areas over all layers by score and attack."""
        means = {score: [self._mean(attack, score) for attack in self.attacks] for score in self.scores}
        rows = [(by, *("-" if math.isnan(mean) else f"{mean:.3f}" for mean in each)) for by, each in means.items()]
        return Table(("score", *(f"AUROC, {attack}" for attack in self.attacks)), tuple(rows))

    def figures(self) -> dict[str, Figure]:
        """``detect``: areas under the ROC curve, by score and by layer."""
        return {"detect": _figure(self)}


@experiment("detect", order=7, title="Detection: whether an image's route gives an attack away", work=Work(1, traces=3))
def run(study: Study, progress: Progress) -> Detection:
    """Whether an image's route gives an attack away."""
    if study.config.follows_noise:
        study.note("note: detect goes by influence, since an image to judge has no clean partner")
    return detect(
        study.model, study.measured, study.reference, study.named_attacks, route_width=study.share,
        seeds=study.seeds, config=study.plain_config, progress=progress,
    )  # fmt: skip


def detect(
    model: nn.Module,
    data: Data,
    reference: Data,
    attacks: Mapping[str, Attack | str],
    *,
    route_width: float = 0.3,
    seeds: Sequence[int] = range(5),
    config: TraceConfig | None = None,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Detection:
    """Tell attacked images from clean ones by their routes, beside scores that need no route.

    An image is traced for the class that the network predicts, so no label is needed to judge it. Its score is the
    distance of its route from the route of that class: 1 less the Jaccard index, the mean over layers. Attacked
    images count if they fool the network, clean ones if they are classified correctly. Controls: routes of samples
    and classes by activation and by gradient, random routes of the classes' size, the largest softmax probability
    (as ``log(1 - p)``, which never saturates), and the margin of the two largest logits.

    Data are labelled images in [0, 1]; the classes' routes come from the ``reference``. ``route_width`` is the
    share of each layer's channels on a class's route; random routes are drawn once for each seed.
    """
    named = named_attacks(attacks)
    config = config or TraceConfig()
    if config.follows_noise:
        raise UserError("an image to judge has no clean partner, so no noise to follow: detect by influence")
    with frozen(model), torch.inference_mode(False):
        reference_routes = sample_routes(model, reference, SAMPLE_WIDTH, config=config, batch_size=batch_size)
        if reference_routes[ROUTE].labels is None:
            raise UserError("the reference data have no labels: give (images, labels)")
        stream = BatchStream(model, data, batch_size)
        judge = partial(_judge, model, named, batch_router(model, stream.first[0], SAMPLE_WIDTH, config=config))
        judged = list(worked_on(stream, judge, progress))
    samples, counted = sum(number for number, _ in judged), sum(right for _, (right, _) in judged)
    require_right(counted, samples)
    groups = [group for _, (_, of_batch) in judged for group in of_batch]
    routes = joined_routes([each.routes for each in groups])
    group, seen, softmax, margin = (
        torch.cat([getattr(each, name) for each in groups]) for name in ("attack", "seen", "softmax", "margin")
    )
    classes = {by: each.by_label(route_width) for by, each in reference_routes.items()}
    has_route = torch.tensor([int(label) in classes[ROUTE] for label in seen], dtype=torch.bool)
    if not has_route[group == 0].any():
        raise UserError(
            "no clean sample's class has a route: give reference samples of the classes that the network predicts"
        )
    distances: dict[tuple[str, int | None], Tensor] = {
        (by, None): _distances(each, classes[by], seen, has_route) for by, each in routes.items()
    }
    for seed in seeds:
        drawn = {label: _random_route(route, seed, label) for label, route in classes[ROUTE].items()}
        distances[RANDOM_ROUTE, seed] = _distances(routes[ROUTE], drawn, seen, has_route)
    layers = routes[ROUTE].layers
    rows: list[Record] = []
    for number, attack in enumerate(named, start=1):
        clean, fooled = (group == 0) & has_route, (group == number) & has_route
        scores = {
            (by, draw, layer): of_layer
            for (by, draw), values in distances.items()
            for layer, of_layer in zip((ALL_LAYERS, *layers), (values.mean(1), *values.unbind(1)), strict=True)
        }
        scores |= {(name, None, ALL_LAYERS): values for name, values in ((SOFTMAX, softmax), (MARGIN, margin))}
        rows += _rows(attack, scores, clean, fooled)
    return Detection(
        table=Table.of(rows), reference=len(reference_routes[ROUTE]), samples=samples, counted=counted,
        unknown=int((~has_route).sum()), route_width=route_width,
    )  # fmt: skip


def _rows(
    attack: str, scores: Mapping[tuple[str, int | None, str], Tensor], clean: Tensor, fooled: Tensor
) -> Iterator[Record]:
    """The areas of all scores under one attack, the first of which is the route's over all layers."""
    chosen = clean | fooled
    names = {f"{score}/{draw}/{layer}": (score, draw, layer) for score, draw, layer in scores}
    predictors = {name: scores[key][chosen].double().numpy() for name, key in names.items()}
    for each in associations(predictors, fooled[chosen].numpy(), AUROC):
        score, draw, layer = names[each["predictor"]]
        area = (math.nan if each[name] is None else each[name] for name in ("value", "low", "high"))
        behind = 0 if each["lead"] is None else int(each["lead_low"] > 0) - int(each["lead_high"] < 0)
        yield {
            "attack": attack, "score": score, "draw": draw, "layer": layer,
            **dict(zip(("auroc", "auroc_low", "auroc_high"), area, strict=True)),
            "attacked": int(fooled.sum()), "clean": int(clean.sum()), "route_against_it": behind,
        }  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class _Group:
    """Images of one batch that are all clean, or all of one attack; a number, a class or a score for each image."""

    attack: Tensor  # its number; 0 for clean images
    seen: Tensor  # the class that the network sees
    softmax: Tensor
    margin: Tensor
    routes: dict[str, InstanceRoutes]  # by criterion


def _judge(
    model: nn.Module, attacks: Mapping[str, Attack], routes_of: Router, images: Tensor, answers: Tensor | None
) -> tuple[int, list[_Group]]:
    """How many of a batch's samples the model gets right, and of these the clean ones and those that fool it."""
    logits = _logits(model, images)
    labels = checked_labels(labelled(answers), logits.shape[1], len(logits))
    right = logits.argmax(1) == labels
    if not right.any():
        return 0, []
    groups = [_group(0, images[right], logits[right], routes_of)]
    for number, attack in enumerate(attacks.values(), start=1):
        changed, _ = attacked(model, attack, images[right], labels[right])
        logits_then = _logits(model, changed)
        fooled = logits_then.argmax(1) != labels[right]
        if fooled.any():
            groups.append(_group(number, changed[fooled], logits_then[fooled], routes_of))
    return int(right.sum()), groups


def _group(number: int, images: Tensor, logits: Tensor, routes_of: Router) -> _Group:
    seen = logits.argmax(1)
    two = logits.double().topk(2, dim=1).values
    return _Group(
        attack=torch.full((len(images),), number), seen=seen.cpu(), softmax=log_doubt(logits.double(), seen).cpu(),
        margin=(two[:, 1] - two[:, 0]).cpu(), routes=routes_of(images, None),
    )  # fmt: skip


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return checked_logits(model(images.clone()), len(images)).detach()


def _distances(routes: InstanceRoutes, classes: Mapping[int, Route], seen: Tensor, has_route: Tensor) -> Tensor:
    """1 less the Jaccard index with the class's route: float64 (samples, layers), NaN without a class route."""
    columns = []
    rows = {label: row for row, label in enumerate(classes)}
    index = torch.tensor([rows.get(int(label), 0) for label in seen])
    for layer in routes.layers:
        masks = routes.masks[layer]
        of_class = torch.stack([route.mask(layer) for route in classes.values()])[index]
        columns.append(1 - (masks & of_class).sum(1).double() / (masks | of_class).sum(1))
    return torch.stack(columns, dim=1).masked_fill(~has_route[:, None], torch.nan)


def _random_route(route: Route, seed: int, label: int) -> Route:
    """Random channels, as many as the route has, whether on it or not; others for each class."""
    indices = {
        layer: random_order(seed, f"class {label}/{layer}", range(count))[: len(route.indices[layer])]
        for layer, count in route.channels.items()
    }
    return Route(indices, route.channels)


def _figure(result: Detection) -> Figure:
    """Areas under the ROC curve: over all layers with intervals on the left, of single layers' routes on the right."""
    attacks, scores = result.attacks, result.scores
    layers = [name for name in result.table.distinct("layer") if name != ALL_LAYERS]
    figure = new_figure(max(6.5, 0.36 * len(layers) + 3.6), 1.9 * len(attacks) + 1.6)
    panels = figure.subplots(len(attacks), 2, squeeze=False, sharey=True, width_ratios=(1, max(1.2, len(layers) / 7)))
    handles: dict[str, Any] = {}
    for (left, right), attack in zip(panels, attacks, strict=True):
        for place, score in enumerate(scores):
            rows = result.rows(attack, score)
            for index, row in enumerate(rows):
                at = place + (index - (len(rows) - 1) / 2) * 0.14
                errors = [[row["auroc"] - row["auroc_low"]], [row["auroc_high"] - row["auroc"]]]
                drawn = left.errorbar(at, row["auroc"], errors, elinewidth=1.2, capsize=2, **look(score, line=False))
            handles[score + (f" ({len(rows)} draws)" if len(rows) > 1 else "")] = drawn
            by_layer = [result.rows(attack, score, layer) for layer in layers]
            if all(by_layer):
                values = [[row["auroc"] for row in each] for each in by_layer]
                draw_spread(right, range(len(layers)), values, score)
        counts = result.rows(attack, ROUTE)[0]
        left.set_title(f"{attack}\n{counts['attacked']} attacked, {counts['clean']} clean", fontsize=8, loc="left")
        right.set_title("by the routes of one layer", fontsize=8, loc="left")
        for axes, names in ((left, scores), (right, layers)):
            axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
            axes.set_ylim(-0.02, 1.04)
            tidy(axes)
            upright_layers(axes, names)
            axes.tick_params(labelbottom=attack == attacks[-1])
    figure.supylabel("AUROC (dotted: chance)", fontsize=9)
    figure.suptitle("Attacked images told by the distance of their routes from the predicted class's", fontsize=9.5)
    shared_legend(figure, handles)
    return figure
