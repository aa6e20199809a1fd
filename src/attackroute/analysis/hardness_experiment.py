"""Does the hardness metric tell who is fooled? Success by V (Fig. 6), gradients of both sides (Table 4), baselines.

The claim is that of section 5.2 of Li et al. (2021); the baselines are ours: what any reader would try first, and the
same metric on other neurons. Only samples that the model classifies correctly count, since only they can be fooled.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attackroute.analysis.channel_statistics import labelled, worked_on
from attackroute.analysis.controls import require_right
from attackroute.analysis.experiment import ExperimentResult
from attackroute.analysis.figures.style import ROUTE_COLOUR, Figure, new_figure, shared_legend, tidy
from attackroute.analysis.hardness import GradientReader, Hardness, SampleGradients
from attackroute.core.batches import BatchStream, Data
from attackroute.core.journal import Journal, samples_digest
from attackroute.core.model_state import frozen
from attackroute.core.statistics import AUROC, LEVEL, Floats, associations
from attackroute.core.table import Record, Table
from attackroute.robustness.attack import Attack, attacked
from attackroute.robustness.gradient_attacks import predicted
from attackroute.robustness.registry import named_attacks
from attackroute.routes.route import Route
from attackroute.tracing.deviations import Deviations
from attackroute.tracing.trace import Progress

OURS = "hardness V"
LOSS, MARGIN, INPUT_GRADIENT, ALL = "loss", "margin", "input gradient", "V on all neurons"
BASELINES = (LOSS, MARGIN, INPUT_GRADIENT, ALL)
RANDOM = "V on random neurons"
PAPER = "V on the paper's route"

V_IS = "V, an image's votes from all layers, is larger the smaller the loss gradients on the route: harder to fool"
_TITLE = 36  # letters in a line over a panel
_PALE = "#E3E3E3"
_ROUTE = "route"
_BINS = 10


@dataclass(frozen=True, eq=False, kw_only=True)
class HardnessStudy(ExperimentResult):
    """Hardness of samples, and what attacks did to the C samples that the model classifies correctly.

    The table says how well each predictor ranks each target, which is an attack's success, as
    :func:`attackroute.core.statistics.associations` has it; a lead is that of V.
    """

    kind = "hardness"
    hardness: Hardness  # of all samples, ranked among themselves
    predictors: Mapping[str, Floats]  # V's first; (C,) numbers, larger for samples that should be easier to fool
    fooled: Mapping[str, NDArray[np.bool_]]  # for each attack, whether it fools the model, (C,)

    def judged(self, attack: str) -> dict[str, Record]:
        """Each predictor's AUROC for an attack's success, as a row."""
        return {row["predictor"]: row for row in self.table.select(target=attack)}

    @property
    def correct(self) -> int:
        """How many samples the model classifies correctly."""
        return int(self.hardness.correct.sum())

    def bins(self, attack: str) -> list[tuple[int, int]]:
        """Fig. 6: sizes of the tenths of the correctly classified samples by falling V, and how many are fooled."""
        order = np.argsort(self.predictors[OURS], kind="stable")  # of -V
        tenths = np.array_split(self.fooled[attack][order], min(_BINS, self.correct))
        return [(len(tenth), int(tenth.sum())) for tenth in tenths]

    def gradients(self, attack: str) -> Table:
        """Table 4: loss gradients on each layer's route neurons (Eq. (16)), of hard and of weak samples.

        Hard samples are those on which the attack fails, weak ones those on which it succeeds. A mean is that of the
        numbers, which the few largest decide; None where there is no such sample.
        """
        logs = self.hardness.log_gradients[self.hardness.correct]
        weak = torch.from_numpy(self.fooled[attack])
        rows = []
        for layer, of_layer in zip(self.hardness.route.layers, logs.T, strict=True):
            means, medians = zip(_mean_and_median(of_layer[~weak]), _mean_and_median(of_layer[weak]), strict=True)
            rows.append((layer, *means, *medians))
        return Table(("layer", "hard_mean", "weak_mean", "hard_median", "weak_median"), tuple(rows))

    def reading(self) -> str:
        """What V is, and for each attack who is fooled at both ends of V, and how V does."""
        sentences = [V_IS]
        for attack in self.fooled:
            (hardest, few), (weakest, many) = (self.bins(attack)[end] for end in (0, -1))
            sentences.append(
                f"{attack} fools the model on {few} of the {hardest} hardest and {many} of the {weakest} weakest of "
                f"{self.correct} correctly classified samples; {_verdict(self.judged(attack))}"
            )
        return f"{'. '.join(sentences)}."

    def about(self) -> dict[str, Any]:
        """Everything but the associations and the samples, as plain values."""
        return {
            "samples": len(self.hardness),
            "correctly_classified": self.correct,
            "counted": "only samples that the model classifies correctly",
            "attacks": {
                attack: {
                    "fooled": int(fooled.sum()),
                    "bins_hardest_first": [list(each) for each in self.bins(attack)],
                    "gradients": self.gradients(attack).to_json(),
                }
                for attack, fooled in self.fooled.items()
            },
        }

    def figures(self) -> dict[str, Figure]:
        """``hardness`` (Fig. 6): for each attack how many are fooled of each tenth of the samples by V."""
        figure = new_figure(max(6.4, 3.1 * len(self.fooled) + 1.2), 3.9)
        panels = figure.subplots(1, len(self.fooled), squeeze=False)[0]
        for axes, attack in zip(panels, self.fooled, strict=True):
            samples, fooled = zip(*self.bins(attack), strict=True)
            places = range(1, len(samples) + 1)
            handles = {
                "correctly classified": axes.bar(places, samples, color=_PALE, width=0.86),
                "of these fooled": axes.bar(places, fooled, color=ROUTE_COLOUR, width=0.86),
            }
            for place, number in zip(places, fooled, strict=True):
                axes.text(place, number, str(number), ha="center", va="bottom", fontsize=7)
            axes.set_title(textwrap.fill(attack.replace(",", ", "), _TITLE), fontsize=9)
            tidy(axes)
            axes.set_xticks(places)
            axes.set_xlabel("tenths by V: hardest (1) to weakest", fontsize=8.5)
        panels[0].set_ylabel("samples", fontsize=9)
        title = f"How hard the model is to fool on each of {len(self.hardness)} images"
        figure.suptitle(f"{title}\n{textwrap.fill(V_IS, 80)}", fontsize=9)
        shared_legend(figure, handles)
        return {"hardness": figure}


def study_hardness(
    model: nn.Module,
    route: Route,
    data: Data,
    attacks: Mapping[str, Attack | str] | Sequence[Attack | str] | Attack | str,
    *,
    paper: Route | None = None,
    deviations: Deviations | None = None,
    draws: int = 5,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 128,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> HardnessStudy:
    """Measure the samples' hardness, attack them, and see whether V tells who is fooled; the data are read once.

    Beside V stand the loss, the logit margin, the L1 norm of the loss gradient at the image, and the metric on all
    neurons of the route's layers and on random ones off the route. The AUROC is the probability that a sample on which
    the attack succeeds comes before one on which it fails.

    Gradients are per one of the ``deviations``, if there are any.

    ``paper`` is the paper's route, where ``route`` is another, to compare with. Of ``draws`` sets of random neurons
    there is none where the route takes more than half of a layer. Intervals come from bootstrap ``resamples``. Whom an
    attack fools is kept in the ``journal``, and taken from there where it is known.

    Raises:
        UserError: As :func:`attackroute.hardness`; there is no attack; images are not in [0, 1]; or no sample is
            classified correctly.
    """
    named = named_attacks(attacks)
    journal = Journal(None, {}) if journal is None else journal
    routes = _routes(route, paper, draws, seed)
    with frozen(model), torch.inference_mode(False):
        reader = GradientReader(model, routes, deviations)

        def judge(images: Tensor, labels: Tensor | None) -> tuple[SampleGradients, dict[str, list[bool]], str]:
            gradients, digest = reader.read(images, labels), samples_digest(images, labels)
            right = (gradients.labels == gradients.predictions).to(images.device)
            clean, answers, fooled = images[right], labelled(labels)[right], dict[str, list[bool]]()
            for name, attack in named.items():
                kept = journal.recall((name, digest), digest)
                fooled[name] = kept["fooled"] if kept else _fooled(model, attack, clean, answers).tolist()
            return gradients, fooled, digest

        batches = []
        for _, (gradients, fooled, digest) in worked_on(BatchStream(model, data, batch_size), judge, progress):
            batches.append((gradients, fooled))
            for name, events in fooled.items():
                if journal.recall((name, digest), digest) is None:
                    journal.keep((name, digest), digest, fooled=events)
    samples = SampleGradients.concatenate(gradients for gradients, _ in batches)
    hardness = Hardness.from_gradients(samples, route)
    require_right(int(hardness.correct.sum()), len(samples))
    predictors = _predictors(samples, routes, hardness)
    success = {name: np.array([event for _, fooled in batches for event in fooled[name]], dtype=bool) for name in named}
    table = Table.of(
        {"target": name, **row}
        for name, events in success.items()
        for row in associations(predictors, events, resamples=resamples, seed=seed)
    )
    return HardnessStudy(table=table, hardness=hardness, predictors=predictors, fooled=success)


def _routes(route: Route, paper: Route | None, draws: int, seed: int) -> dict[str, Route]:
    """The route, and the other sets of neurons on which V is tried."""
    routes = {_ROUTE: route, ALL: route | route.complement()} | ({} if paper is None else {PAPER: paper})
    narrow = [layer for layer in route if 2 * len(route.indices[layer]) <= route.channels[layer]]
    if len(narrow) == len(route):
        routes |= {f"{RANDOM} {draw}": route.random_like(seed + draw) for draw in range(draws)}
    return routes


def _fooled(model: nn.Module, attack: Attack, images: Tensor, labels: Tensor) -> Tensor:
    if not len(images):
        return torch.zeros(0, dtype=torch.bool)
    changed, _ = attacked(model, attack, images, labels)
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
    return {name: numbers[hardness.correct].numpy() for name, numbers in values.items()}


def _verdict(judged: Mapping[str, Record]) -> str:
    """How V does on one target, from the predictors' rows."""
    ours = judged[OURS]
    rivals = [judged[name] for name in (*BASELINES, PAPER) if name in judged and judged[name]["value"] is not None]
    if ours["value"] is None or not rivals:
        return "all samples are alike in that, so there is nothing to judge"
    rival = max(rivals, key=lambda row: row["value"])
    if abs(rival["lead"]) < LEVEL:
        standing = "level with"
    else:
        clear = "clearly" if rival["lead_low"] > 0 or rival["lead_high"] < 0 else "within chance"
        standing = f"{clear} {'ahead of' if rival['lead'] >= 0 else 'behind'}"
    text = f"{AUROC} of V {ours['value']:.3f} ({ours['low']:.3f} to {ours['high']:.3f})"
    text += f", {standing} the best rival, {rival['predictor']} ({rival['value']:.3f})"
    draws = [row["value"] for name, row in judged.items() if name.startswith(RANDOM) and row["value"] is not None]
    return f"{text}; {RANDOM} {min(draws):.3f} to {max(draws):.3f}" if draws else text


def _mean_and_median(logs: Tensor) -> tuple[float | None, float | None]:
    """Of numbers whose logarithms are given; None without any."""
    if not len(logs):
        return None, None
    return float((logs.logsumexp(0) - np.log(len(logs))).exp()), float(np.median(logs.exp().numpy()))
