"""Does the hardness metric tell who is fooled? Success by V (Fig. 6), gradients of both sides (Table 4), baselines.

The claim is that of section 5.2 of Li et al. (2021); the baselines are ours: what any reader would try first, and the
same metric on other neurons. Only samples that the model classifies correctly count, since only they can be fooled.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attackroute.analysis.experiment import ExperimentResult
from attackroute.analysis.figures.style import ROUTE_COLOUR, new_figure, tidy
from attackroute.analysis.hardness import GradientReader, Hardness, SampleGradients
from attackroute.core.batches import BatchStream, Data
from attackroute.core.errors import UserError
from attackroute.core.model_state import frozen
from attackroute.core.statistics import AUROC, SPEARMAN, Floats, associations
from attackroute.core.table import Record, Table
from attackroute.robustness.attack import Perturbation, check_count, check_eps
from attackroute.robustness.gradient_attacks import attacking, input_gradient, predicted
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = "hardness V"
LOSS, MARGIN, INPUT_GRADIENT, ALL = "loss", "margin", "input gradient", "V on all neurons"
BASELINES = (LOSS, MARGIN, INPUT_GRADIENT, ALL)
RANDOM = "V on random neurons"
PAPER = "V on the paper's route"
LAYER = "layer"
SMALLEST_EPS = "smallest eps"

_TITLE = 36  # letters in a line over a panel
_PALE, _GREY, _BASELINE = "#E3E3E3", "#8A8A8A", "#0072B2"
_CHANCE = {AUROC: 0.5, SPEARMAN: 0.0}
_AXIS = {AUROC: "AUROC for being fooled", SPEARMAN: "Spearman's rank correlation with -eps"}
_ROUTE = "route"
_BINS = 10
_LISTED = 10
_REACH = 2.5  # the steps together go 2.5 times as far as the ball's radius, as Madry et al. (2018) have it


@dataclass(frozen=True)
class EpsSearch:
    """Bisection over the radius of the L-infinity ball.

    Each trial is PGD from the image itself, without restarts, with steps of ``2.5 eps / steps``. What is found is the
    smallest radius *at which this attack fools the model*, an upper bound of the distance to the decision boundary.

    Attributes:
        largest: Radius above which no sample is searched.
        tolerance: An eps found is one that fools the model, at most this much above one that does not.
        steps: Steps of PGD in each trial.
    """

    largest: float = 16 / 255
    tolerance: float = 0.1 / 255
    steps: int = 10

    def __post_init__(self) -> None:
        check_eps(self.largest)
        check_count("steps", self.steps)
        if not 0 < self.tolerance <= self.largest:
            raise UserError(f"tolerance {self.tolerance} is outside (0, {self.largest:g}]: 0.1/255 is a good one")

    @property
    def rounds(self) -> int:
        """Trials after the one at the largest radius."""
        return math.ceil(math.log2(self.largest / self.tolerance) - 1e-9)

    def smallest_eps(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The smallest eps for each of some correctly classified images, float64 ``(n,)`` on the CPU; else infinity.

        Raises:
            UserError: An image is not in [0, 1], or the model's gradient is not finite.
        """
        with attacking(model, images, labels) as (x, y):
            high = torch.full((len(x),), self.largest, dtype=torch.float64)
            within = self._fooled(model, x, y, high)
            smallest = torch.full_like(high, math.inf)
            batch, high = (x[within.to(x.device)], y[within.to(y.device)]), high[within]
            low = torch.zeros_like(high)
            for _ in range(self.rounds if len(high) else 0):
                middle = (low + high) / 2
                fooled = self._fooled(model, *batch, middle)
                high, low = torch.where(fooled, middle, high), torch.where(fooled, low, middle)
            smallest[within] = high
            return smallest

    def _fooled(self, model: nn.Module, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        """Whether PGD within each sample's own radius fools the model, bool ``(n,)`` on the CPU."""
        radius = eps.to(x.dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        lowest, highest = (x - radius).clamp_(min=0), (x + radius).clamp_(max=1)
        step = radius * (_REACH / self.steps)
        current = x.clone()
        for _ in range(self.steps):
            current = (current + step * input_gradient(model, current, y).sign()).clamp_(lowest, highest)
        return (predicted(model, current) != y).cpu()


class Bin(NamedTuple):
    """How many correctly classified samples are next to each other in the order of V, and how many of them fooled."""

    samples: int
    fooled: int


@dataclass(frozen=True, eq=False, kw_only=True)
class HardnessStudy(ExperimentResult):
    """Hardness of samples, and what attacks did to those that the model classifies correctly.

    Attributes:
        hardness: Of all samples, ranked among themselves.
        predictors: For each name, ``(C,)`` numbers of the C correctly classified samples, larger for samples that
            should be easier to fool; :data:`OURS` is the first.
        fooled: For each attack, whether it fools the model, bool ``(C,)``.
        smallest_eps: The smallest eps that fools the model, ``(C,)``, infinity beyond the largest one searched; None
            without a search.
        search: How that was searched.
        table: How well each predictor ranks each target, an attack's success or the smallest eps, as
            :func:`attackroute.core.statistics.associations` has it; a lead is that of V.
    """

    kind = "hardness"
    table: Table
    hardness: Hardness
    predictors: Mapping[str, Floats]
    fooled: Mapping[str, NDArray[np.bool_]]
    smallest_eps: Floats | None
    search: EpsSearch | None

    @property
    def targets(self) -> tuple[str, ...]:
        """The attacks, and the smallest eps where that was searched."""
        return tuple(self.table.distinct("target"))

    def judged(self, target: str) -> dict[str, Record]:
        """Each predictor's row on a target, by the first statistic that there is."""
        rows = self.table.select(target=target)
        return {row["predictor"]: row for row in rows.select(statistic=rows[0]["statistic"])}

    @property
    def baselines(self) -> tuple[str, ...]:
        """What V is compared with, apart from random neurons and single layers."""
        return (*BASELINES, PAPER) if PAPER in self.predictors else BASELINES

    @property
    def correct(self) -> int:
        """How many samples the model classifies correctly."""
        return int(self.hardness.correct.sum())

    def tenths(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Numbers ``(C,)`` of the correctly classified samples by falling V, in ten parts of about equal size."""
        order = np.argsort(self.predictors[OURS], kind="stable")  # of -V
        return np.array_split(values[order], min(_BINS, self.correct))

    def bins(self, attack: str) -> list[Bin]:
        """Fig. 6: how many are fooled of each tenth of the correctly classified samples, by falling V."""
        return [Bin(len(tenth), int(tenth.sum())) for tenth in self.tenths(self.fooled[attack])]

    def gradients(self, attack: str) -> Table:
        """Table 4: loss gradients on each layer's route neurons (Eq. (16)), of hard and of weak samples.

        Hard samples are those on which the attack fails, weak ones those on which it succeeds. A mean is that of the
        numbers, which the few largest decide; None where there is no such sample.
        """
        logs = self.hardness.log_gradients[self.hardness.correct]
        weak = torch.from_numpy(self.fooled[attack])
        rows = []
        for layer, of_layer in zip(self.hardness.layers, logs.T, strict=True):
            means, medians = zip(_mean_and_median(of_layer[~weak]), _mean_and_median(of_layer[weak]), strict=True)
            rows.append((layer, *means, *medians))
        return Table(("layer", "hard_mean", "weak_mean", "hard_median", "weak_median"), tuple(rows))

    def sentences(self) -> list[str]:
        """For each attack, and the smallest eps: who is fooled at both ends of V, and how V does."""
        openings = {SMALLEST_EPS: "Smallest eps: "}
        for attack in self.fooled:
            first, last = (self.bins(attack)[end] for end in (0, -1))
            openings[attack] = (
                f"{attack} fools the model on {first.fooled} of the {first.samples} hardest and {last.fooled} of "
                f"the {last.samples} weakest of {self.correct} correctly classified samples; "
            )
        return [openings[target] + _verdict(self.judged(target)) for target in self.targets]

    def reading(self) -> str:
        """One line with all the sentences."""
        return f"{'. '.join(self.sentences())}."

    def about(self) -> dict[str, Any]:
        """Everything but the associations and the samples, as plain values."""
        count, correct = min(_LISTED, len(self.hardness)), min(_LISTED, self.correct)
        return {
            "samples": len(self.hardness),
            "correctly_classified": self.correct,
            "counted": "only samples that the model classifies correctly",
            "classes": self.hardness.by_class(),
            "attacks": {
                attack: {
                    "fooled": int(fooled.sum()),
                    "bins_hardest_first": [list(each) for each in self.bins(attack)],
                    "gradients": self.gradients(attack).to_json(),
                }
                for attack, fooled in self.fooled.items()
            },
            "smallest_eps": self._searched(),
            "hardest": self.hardness.hardest(count).tolist(),
            "weakest": self.hardness.weakest(count).tolist(),
            "weakest_correct": self.hardness.weakest(correct, self.hardness.correct).tolist(),
        }

    def summary(self) -> Table:
        """What tells best who is fooled, by target; random neurons share one row, and so do single layers."""
        judged = [self.judged(target) for target in self.targets]
        rows = [(name, *(_value_text(rows[name]) for rows in judged)) for name in (OURS, *self.baselines)]
        for title, start in ((f"{RANDOM}, draws", RANDOM), ("votes of single layers", f"{LAYER} ")):
            ranges = [_range_text(rows, start) for rows in judged]
            if any(ranges):
                rows.append((title, *ranges))
        heads = (f"{target}, {rows[OURS]['statistic']}" for target, rows in zip(self.targets, judged, strict=True))
        return Table(("predictor", *heads), tuple(rows))

    def figures(self) -> dict[str, Figure]:
        """``hardness``: Fig. 6, and V beside its baselines."""
        title = f"How hard the model is to fool on each of {len(self.hardness)} images"
        return {"hardness": _figure(self, title)}

    def _searched(self) -> dict[str, Any] | None:
        if self.search is None or self.smallest_eps is None:
            return None
        finite = np.isfinite(self.smallest_eps)
        return {
            "largest": self.search.largest,
            "tolerance": self.search.tolerance,
            "pgd_steps": self.search.steps,
            "beyond_the_largest": int((~finite).sum()),
            "median": float(np.median(self.smallest_eps)) if finite.sum() * 2 > len(finite) else None,
        }


def study_hardness(
    model: nn.Module,
    route: Route,
    data: Data,
    attacks: Sequence[Perturbation],
    *,
    paper: Route | None = None,
    search: EpsSearch | None = None,
    draws: int = 5,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> HardnessStudy:
    """Measure the samples' hardness, attack them, and see whether V tells who is fooled; the data are read once.

    Beside V stand the loss, the logit margin, the L1 norm of the loss gradient at the image, the metric on all neurons
    of the route's layers, on random ones off the route, and each layer's votes alone. The AUROC is the probability
    that a sample on which the attack succeeds comes before one on which it fails. Spearman's correlation is with the
    success, and with minus the smallest eps: positive is good throughout.

    ``paper`` is the paper's route, where ``route`` is another, to compare with. Of ``draws`` sets of random neurons
    there is none where the route takes more than half of a layer. Intervals come from bootstrap ``resamples``.

    Raises:
        UserError: As :func:`attackroute.hardness`; there is no attack and no search; images are not in [0, 1]; or no
            sample is classified correctly.
    """
    if not attacks and search is None:
        raise UserError("nothing to judge hardness by: give an attack, or search the smallest eps")
    routes = _routes(route, paper, draws, seed)
    named = {str(attack): attack for attack in attacks}
    batches: list[tuple[SampleGradients, dict[str, Tensor], Tensor | None]] = []
    done = 0
    with frozen(model), torch.inference_mode(False):
        reader = GradientReader(model, routes)

        def judge(images: Tensor, labels: Tensor | None) -> tuple[SampleGradients, dict[str, Tensor], Tensor | None]:
            gradients = reader.read(images, labels)
            assert labels is not None  # or the reader would have refused
            right = (gradients.labels == gradients.predictions).to(images.device)
            clean, answers = images[right], labels[right]
            events = {name: _fooled(model, attack, clean, answers) for name, attack in named.items()}
            return gradients, events, None if search is None else search.smallest_eps(model, clean, answers)

        stream = BatchStream(model, data, batch_size)
        for batch in stream.map(judge):
            batches.append(batch)
            done += len(batch[0])
            if progress is not None:
                progress(done, stream.total)
    samples = SampleGradients.concatenate(gradients for gradients, _, _ in batches)
    hardness = Hardness.from_gradients(samples, route)
    if not hardness.correct.any():
        raise UserError(
            f"the model classifies none of the {len(samples)} samples correctly, so none can be attacked: "
            "check its weights and the labels"
        )
    predictors = _predictors(samples, routes, hardness)
    success = {name: torch.cat([events[name] for _, events, _ in batches]).numpy() for name in named}
    radii = [eps for _, _, eps in batches if eps is not None]
    smallest = torch.cat(radii).numpy() if radii else None
    targets: list[tuple[str, NDArray[Any], str]] = [
        (attack, events, statistic) for attack, events in success.items() for statistic in (AUROC, SPEARMAN)
    ]
    if smallest is not None:
        targets.append((SMALLEST_EPS, -smallest, SPEARMAN))
    table = Table.of(
        {"target": name, **row}
        for name, numbers, statistic in targets
        for row in associations(predictors, numbers, statistic, resamples=resamples, seed=seed)
    )
    return HardnessStudy(
        table=table, hardness=hardness, predictors=predictors, fooled=success, smallest_eps=smallest, search=search
    )


def _routes(route: Route, paper: Route | None, draws: int, seed: int) -> dict[str, Route]:
    """The route, and the other sets of neurons on which V is tried."""
    routes = {_ROUTE: route, ALL: route | route.complement()} | ({} if paper is None else {PAPER: paper})
    narrow = [layer for layer in route if 2 * len(route.indices[layer]) <= route.channels[layer]]
    if len(narrow) == len(route):
        routes |= {f"{RANDOM} {draw}": route.random_like(seed + draw) for draw in range(draws)}
    return routes


def _fooled(model: nn.Module, attack: Perturbation, images: Tensor, labels: Tensor) -> Tensor:
    if not len(images):
        return torch.zeros(0, dtype=torch.bool)
    changed = attack(model, images, labels)
    with torch.no_grad():
        return (predicted(model, changed) != labels).cpu()


def _predictors(samples: SampleGradients, routes: Mapping[str, Route], hardness: Hardness) -> dict[str, Floats]:
    """Numbers of the correctly classified samples, larger for those that should be easier to fool."""
    values = {
        OURS: -hardness.values,
        LOSS: samples.log_losses,
        MARGIN: -samples.margins,
        INPUT_GRADIENT: samples.log_input_gradients,
    }
    for index, (name, route) in enumerate(routes.items()):
        if name != _ROUTE:
            values[name] = -Hardness.from_gradients(samples, route, index).values
    values |= {f"{LAYER} {layer}": -hardness.votes[:, at] for at, layer in enumerate(hardness.layers)}
    return {name: numbers[hardness.correct].numpy() for name, numbers in values.items()}


def _verdict(judged: Mapping[str, Record]) -> str:
    """How V does on one target, from the predictors' rows.

    Single layers are no baselines here: the best of many, chosen when the result is known, flatters itself.
    """
    ours, paper = judged[OURS], judged.get(PAPER)
    others = [judged[name] for name in (*BASELINES, PAPER) if name in judged and judged[name]["value"] is not None]
    if ours["value"] is None or not others:
        return "all samples are alike in that, so there is nothing to judge"
    leader = max(others, key=lambda row: row["value"])
    text = f"{ours['statistic']} of V {ours['value']:.3f} ({ours['low']:.3f} to {ours['high']:.3f})"
    text += f", {_standing(leader, 'the best rival, ')}"
    if paper is not None and paper is not leader and paper["value"] is not None:
        text += f", and {_standing(paper, '')}"
    draws = _range_text(judged, RANDOM)
    return f"{text}; V on random neurons {draws}" if draws else text


def _standing(other: Record, title: str) -> str:
    clear = "clearly" if other["lead_low"] > 0 or other["lead_high"] < 0 else "within chance"
    side = "ahead of" if other["lead"] >= 0 else "behind"
    return f"{clear} {side} {title}{other['predictor']} ({other['value']:.3f})"


def _mean_and_median(logs: Tensor) -> tuple[float | None, float | None]:
    if not len(logs):
        return None, None
    return float((logs.logsumexp(0) - np.log(len(logs))).exp()), float(np.median(logs.exp().numpy()))


def _value_text(row: Record) -> str:
    return "not defined" if row["value"] is None else f"{row['value']:.3f} ({row['low']:.2f} to {row['high']:.2f})"


def _range_text(judged: Mapping[str, Record], start: str) -> str:
    values = [row["value"] for name, row in judged.items() if name.startswith(start) and row["value"] is not None]
    return f"{min(values):.3f} to {max(values):.3f}" if values else ""


def _figure(study: HardnessStudy, title: str) -> Figure:
    """One column for each attack, and one for the smallest eps where that was searched, below a line of title."""
    targets = study.targets
    figure = new_figure(max(6.4, 3.1 * len(targets) + 1.2), 6.2)
    panels = figure.subplots(2, len(targets), squeeze=False, height_ratios=(1.15, 1))
    for column, target in enumerate(targets):
        if target in study.fooled:
            _draw_bins(panels[0, column], study, target)
        else:
            _draw_eps(panels[0, column], study)
        _draw_baselines(panels[1, column], study.judged(target), study.baselines, named=column == 0)
    panels[0, 0].set_ylabel("samples", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_bins(axes: Axes, study: HardnessStudy, attack: str) -> None:
    bins = study.bins(attack)
    places = range(1, len(bins) + 1)
    axes.bar(places, [tenth.samples for tenth in bins], color=_PALE, width=0.86, label="correctly classified")
    axes.bar(places, [tenth.fooled for tenth in bins], color=ROUTE_COLOUR, width=0.86, label="of these fooled")
    for place, tenth in zip(places, bins, strict=True):
        axes.text(place, tenth.fooled, str(tenth.fooled), ha="center", va="bottom", fontsize=7)
    axes.set_title(textwrap.fill(attack.replace(",", ", "), _TITLE), fontsize=9)
    _name_bins(axes, len(bins), max(tenth.samples for tenth in bins))
    axes.legend(fontsize=7, loc="upper left", frameon=False, ncols=2, handlelength=1.2, columnspacing=1.0)


def _draw_eps(axes: Axes, study: HardnessStudy) -> None:
    """The smallest eps in each bin: median, and the range of the middle half."""
    assert study.smallest_eps is not None and study.search is not None
    tenths = study.tenths(np.minimum(study.smallest_eps, study.search.largest) * 255)
    places = range(1, len(tenths) + 1)
    low, middle, high = zip(*(np.percentile(tenth, (25, 50, 75)) for tenth in tenths), strict=True)
    axes.vlines(places, low, high, color=ROUTE_COLOUR, linewidth=2.5, alpha=0.5, label="middle half")
    axes.plot(places, middle, "o", color=ROUTE_COLOUR, markersize=4.5, label="median")
    axes.set_title(f"smallest eps that fools (PGD, {study.search.steps} steps)", fontsize=9)
    axes.set_ylabel("eps x 255", fontsize=9)
    _name_bins(axes, len(tenths), max(high))
    axes.legend(fontsize=7, loc="upper right", frameon=False)


def _name_bins(axes: Axes, bins: int, highest: float) -> None:
    tidy(axes)
    axes.set_xticks(range(1, bins + 1))
    axes.set_xlim(0.4, bins + 0.6)
    axes.set_ylim(0, 1.22 * highest)
    axes.set_xlabel("tenths by V: hardest (1) to weakest", fontsize=8.5)


def _draw_baselines(axes: Axes, judged: Mapping[str, Record], baselines: Sequence[str], *, named: bool) -> None:
    """A row for each predictor with its interval; random neurons and single layers as dots in one row each."""
    statistic = judged[OURS]["statistic"]
    defined = {name: row for name, row in judged.items() if row["value"] is not None}
    groups: Mapping[str, list[Record]] = {
        **{name: [defined[name]] if name in defined else [] for name in (OURS, *baselines)},
        RANDOM: [row for name, row in defined.items() if name.startswith(RANDOM)],
        "votes of single layers": [row for name, row in defined.items() if name.startswith(f"{LAYER} ")],
    }
    for place, (name, rows) in enumerate(groups.items()):
        colour = ROUTE_COLOUR if name == OURS else _BASELINE if name in baselines else _GREY
        for row in rows:
            if len(rows) == 1:
                axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2, alpha=0.5)
            axes.plot([row["value"]], [place], "o", color=colour, markersize=5 if len(rows) == 1 else 3)
    tidy(axes, "x")
    axes.set_yticks(range(len(groups)), list(groups) if named else [])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    low, high = axes.get_xlim()
    within = low < _CHANCE[statistic] < high  # elsewhere the line would squeeze what differs
    if within:
        axes.axvline(_CHANCE[statistic], color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel(_AXIS[statistic] + (" (dotted: chance)" if within else ""), fontsize=8.5)
    if not defined:
        axes.text(0.5, 0.5, "all alike: nothing to judge", transform=axes.transAxes, ha="center", fontsize=8)
