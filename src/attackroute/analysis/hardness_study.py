"""Does the hardness metric tell who is fooled? Success by V (Fig. 6), gradients of both sides (Table 4), rivals.

The claim is that of section 5.2 of Li et al. (2021); the rivals are ours: what any reader would try first, and the same
metric on other neurons. Only samples that the model classifies correctly count, since only they can be fooled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attackroute.analysis.hardness import Hardness
from attackroute.analysis.hardness_radius import EpsSearch
from attackroute.analysis.sample_readings import SampleReader, SampleReadings
from attackroute.core.batches import BatchStream, Data
from attackroute.core.errors import UserError
from attackroute.core.model_state import frozen
from attackroute.core.statistics import AUROC, SPEARMAN, Association, Floats, associations, best
from attackroute.robustness.attack import Perturbation
from attackroute.robustness.gradient_attacks import predicted
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress

OURS = "hardness V"


LOSS, MARGIN, INPUT_GRADIENT, ALL = "loss", "margin", "input gradient", "V on all neurons"


RIVALS = (LOSS, MARGIN, INPUT_GRADIENT, ALL)


RANDOM = "V on random neurons"


PAPER = "V on the paper's route"


LAYER = "layer"


SMALLEST_EPS = "smallest eps"


_ROUTE = "route"


_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Correctly classified samples that are next to each other in the order of V.

    Attributes:
        samples: How many there are.
        fooled: How many of them the attack fools the model on.
    """

    samples: int
    fooled: int


@dataclass(frozen=True)
class LayerGradients:
    """Loss gradients on one layer's route neurons (Eq. (16)), of hard and of weak samples (Table 4).

    Hard samples are those on which the attack fails, weak ones those on which it fools the model. A mean is that of the
    numbers, which the few largest decide; None where there is no such sample.
    """

    layer: str
    hard_mean: float | None
    weak_mean: float | None
    hard_median: float | None
    weak_median: float | None


@dataclass(frozen=True, eq=False)
class HardnessStudy:
    """Hardness of samples, and what attacks did to those that the model classifies correctly.

    Attributes:
        hardness: Of all samples, ranked among themselves.
        predictors: For each name, ``(C,)`` numbers of the C correctly classified samples, larger for samples that
            should be easier to fool; :data:`OURS` is the first.
        fooled: For each attack, whether it fools the model, bool ``(C,)``.
        smallest_eps: The smallest eps that fools the model, ``(C,)``, infinity beyond the largest one searched; None
            without a search.
        search: How that was searched.
        judgements: For each attack, and for the smallest eps, every predictor's associations.
    """

    hardness: Hardness
    predictors: Mapping[str, Floats]
    fooled: Mapping[str, NDArray[np.bool_]]
    smallest_eps: Floats | None
    search: EpsSearch | None
    judgements: Mapping[str, Sequence[Association]]

    @property
    def rivals(self) -> tuple[str, ...]:
        """What V is compared with, apart from random neurons and single layers."""
        return (*RIVALS, PAPER) if PAPER in self.predictors else RIVALS

    @property
    def correct(self) -> int:
        """How many samples the model classifies correctly."""
        return int(self.hardness.correct.sum())

    def bins(self, attack: str) -> list[Bin]:
        """Fig. 6: the correctly classified samples by falling V, in ten bins of equal size, give or take one."""
        order = np.argsort(self.predictors[OURS], kind="stable")  # of -V
        parts = np.array_split(self.fooled[attack][order], min(_BINS, self.correct))
        return [Bin(len(part), int(part.sum())) for part in parts]

    def gradients(self, attack: str) -> list[LayerGradients]:
        """Table 4: gradients of the samples on which the attack fails, and of those on which it succeeds."""
        logs = self.hardness.log_gradients[self.hardness.correct]
        weak = torch.from_numpy(self.fooled[attack])
        rows = []
        for at, layer in enumerate(self.hardness.layers):
            sides = logs[~weak, at], logs[weak, at]
            rows.append(LayerGradients(layer, *map(_mean, sides), *map(_median, sides)))
        return rows

    def sentences(self) -> list[str]:
        """For each attack, and the smallest eps: who is fooled at both ends of V, and how V does beside its rivals."""
        texts = []
        for attack, found in self.judgements.items():
            if attack in self.fooled:
                first, last = (self.bins(attack)[end] for end in (0, -1))
                texts.append(
                    f"{attack} fools the model on {first.fooled} of the {first.samples} hardest and {last.fooled} of "
                    f"the {last.samples} weakest of {self.correct} correctly classified samples; {_verdict(found)}"
                )
            else:
                texts.append(f"Smallest eps: {_verdict(found)}")
        return texts

    def reading(self) -> str:
        """One line with all the sentences."""
        return f"{'. '.join(self.sentences())}."

    def to_json(self) -> dict[str, Any]:
        """Everything but the samples, as plain values."""
        return {
            "samples": len(self.hardness),
            "correctly_classified": self.correct,
            "counted": "only samples that the model classifies correctly",
            "classes": self.hardness.by_class(),
            "attacks": {
                attack: {
                    "fooled": int(fooled.sum()),
                    "bins_hardest_first": [[part.samples, part.fooled] for part in self.bins(attack)],
                    "gradients": [vars(row) for row in self.gradients(attack)],
                }
                for attack, fooled in self.fooled.items()
            },
            "smallest_eps": None if self.search is None else self._searched(self.search),
            "judgements": [
                {
                    "target": target,
                    "predictor": item.predictor,
                    "statistic": item.statistic,
                    **item.estimate.to_json(),
                    "lead_of_hardness_V": item.lead.to_json(),
                }
                for target, found in self.judgements.items()
                for item in found
            ],
            "reading": self.reading(),
        }

    def _searched(self, search: EpsSearch) -> dict[str, Any]:
        assert self.smallest_eps is not None
        known = np.isfinite(self.smallest_eps)
        return {
            "largest": search.largest,
            "tolerance": search.tolerance,
            "pgd_steps": search.steps,
            "beyond_the_largest": int((~known).sum()),
            "median": float(np.median(self.smallest_eps)) if known.sum() * 2 > len(known) else None,
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

    Args:
        model: Any network of images in [0, 1] to logits.
        route: A route of the model.
        data: Images with labels, at least two.
        attacks: What to attack with.
        paper: The paper's route, where ``route`` is another, to compare with.
        search: How to search each sample's smallest eps; None leaves that out.
        draws: Number of random sets of neurons; a layer with more than half of its channels on the route has none.
        resamples: Bootstrap resamples behind each interval.
        seed: Of the resamples and the random neurons.
        batch_size: Rows per pass when ``data`` is tensors.
        progress: Called with (samples done, samples in all or None) after every batch.

    Raises:
        UserError: As :func:`attackroute.hardness`; there is no attack and no search; images are not in [0, 1]; or no
            sample is classified correctly.
    """
    if not attacks and search is None:
        raise UserError("nothing to judge hardness by: give an attack, or search the smallest eps")
    routes = _routes(route, paper, draws, seed)
    parts: list[SampleReadings] = []
    named = {str(attack): attack for attack in attacks}
    fooled: dict[str, list[Tensor]] = {name: [] for name in named}
    eps: list[Tensor] = []
    done = 0
    with frozen(model), torch.inference_mode(False):
        reader = SampleReader(model, routes)

        def once(images: Tensor, labels: Tensor | None) -> tuple[SampleReadings, dict[str, Tensor], list[Tensor]]:
            readings = reader.read(images, labels)
            assert labels is not None  # or the reader would have refused
            right = (readings.labels == readings.predictions).to(images.device)
            clean, answers = images[right], labels[right]
            found = {name: _fooled(model, attack, clean, answers) for name, attack in named.items()}
            return readings, found, [] if search is None else [search.smallest_eps(model, clean, answers)]

        stream = BatchStream(model, data, batch_size)
        for readings, found, radii in stream.map(once):
            parts.append(readings)
            for name, events in found.items():
                fooled[name].append(events)
            eps += radii
            done += len(readings)
            if progress is not None:
                progress(done, stream.total)
    readings = SampleReadings.concatenate(parts)
    hardness = Hardness.of_readings(readings, route)
    if not hardness.correct.any():
        raise UserError(
            f"the model classifies none of the {len(readings)} samples correctly, so none can be attacked: "
            "check its weights and the labels"
        )
    predictors = _predictors(readings, routes, hardness)
    success = {attack: torch.cat(found).numpy() for attack, found in fooled.items()}
    smallest = torch.cat(eps).numpy() if eps else None
    judgements = {
        attack: [
            item
            for statistic in (AUROC, SPEARMAN)
            for item in associations(predictors, events, statistic, resamples=resamples, seed=seed)
        ]
        for attack, events in success.items()
    }
    if smallest is not None:
        judgements[SMALLEST_EPS] = associations(predictors, -smallest, SPEARMAN, resamples=resamples, seed=seed)
    return HardnessStudy(hardness, predictors, success, smallest, search, judgements)


def _routes(route: Route, paper: Route | None, draws: int, seed: int) -> dict[str, Route]:
    """The route, and the other sets of neurons on which V is tried."""
    routes = {_ROUTE: route, ALL: route | route.complement()}
    if paper is not None:
        routes[PAPER] = paper
    narrow = [layer for layer in route if 2 * len(route.indices[layer]) <= route.channels[layer]]
    if len(narrow) == len(route):
        routes |= {f"{RANDOM} {draw}": route.random_like(seed + draw) for draw in range(draws)}
    return routes


def _fooled(model: nn.Module, attack: Perturbation, images: Tensor, labels: Tensor) -> Tensor:
    if not len(images):
        return torch.zeros(0, dtype=torch.bool)
    attacked = attack(model, images, labels)
    with torch.no_grad():
        return (predicted(model, attacked) != labels).cpu()


def _predictors(readings: SampleReadings, routes: Mapping[str, Route], hardness: Hardness) -> dict[str, Floats]:
    """Numbers of the correctly classified samples, larger for those that should be easier to fool."""
    values = {OURS: -hardness.values}
    values |= {
        LOSS: readings.log_losses,
        MARGIN: -readings.margins,
        INPUT_GRADIENT: readings.log_input_gradients,
    }
    for index, (name, route) in enumerate(routes.items()):
        if name != _ROUTE:
            values[name] = -Hardness.of_readings(readings, route, index).values
    values |= {f"{LAYER} {layer}": -hardness.votes[:, at] for at, layer in enumerate(hardness.layers)}
    return {name: numbers[hardness.correct].numpy() for name, numbers in values.items()}


def _verdict(found: Sequence[Association]) -> str:
    """How V does on one target, by the first statistic in the list.

    Single layers are no rivals here: the best of many, chosen when the result is known, flatters itself.
    """
    judged = {item.predictor: item for item in found if item.statistic == found[0].statistic}
    ours, leader = judged[OURS], best([judged[name] for name in (*RIVALS, PAPER) if name in judged])
    if ours.estimate.value is None or leader is None:
        return "all samples are alike in that, so there is nothing to judge"
    text = f"{ours.statistic} of V {ours.estimate}, {_standing(leader, 'the best rival, ')}"
    if PAPER in judged and leader.predictor != PAPER and judged[PAPER].estimate.value is not None:
        text += f", and {_standing(judged[PAPER], '')}"
    draws = [item.estimate.value for name, item in judged.items() if name.startswith(RANDOM)]
    known = [value for value in draws if value is not None]
    return f"{text}; V on random neurons {min(known):.3f} to {max(known):.3f}" if known else text


def _standing(rival: Association, title: str) -> str:
    lead, interval = rival.lead.value, rival.lead.interval
    assert lead is not None and interval is not None and rival.estimate.value is not None
    clear = "clearly" if interval[0] > 0 or interval[1] < 0 else "within chance"
    side = "ahead of" if lead >= 0 else "behind"
    return f"{clear} {side} {title}{rival.predictor} ({rival.estimate.value:.3f})"


def _mean(logs: Tensor) -> float | None:
    return float((logs.logsumexp(0) - np.log(len(logs))).exp()) if len(logs) else None


def _median(logs: Tensor) -> float | None:
    return float(np.median(logs.exp().numpy())) if len(logs) else None
