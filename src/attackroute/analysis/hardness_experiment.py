"""Does the hardness metric tell who is fooled? Success by V (Fig. 6), gradients of both sides (Table 4), baselines.

The claim is that of section 5.2 of Li et al. (2021); the baselines are ours: what any reader would try first, and the
same metric on other neurons. Only samples that the model classifies correctly count, since only they can be fooled.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from attackroute.analysis.channel_statistics import labelled, worked_on
from attackroute.analysis.controls import require_right
from attackroute.analysis.experiment import ExperimentResult
from attackroute.analysis.figures.style import ROUTE_COLOUR, new_figure, tidy
from attackroute.analysis.hardness import GradientReader, Hardness, SampleGradients
from attackroute.core.batches import BatchStream, Data
from attackroute.core.model_state import frozen
from attackroute.core.statistics import AUROC, LEVEL, SPEARMAN, Floats, associations
from attackroute.core.table import Record, Table
from attackroute.robustness.attack import Attack, attacked
from attackroute.robustness.gradient_attacks import predicted
from attackroute.robustness.registry import named_attacks
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

V_IS = "V, an image's votes from all layers, is larger the smaller the loss gradients on the route: harder to fool"
_TITLE = 36  # letters in a line over a panel
_PALE, _GREY, _BASELINE = "#E3E3E3", "#8A8A8A", "#0072B2"
_CHANCE = 0.5  # AUROC of what says nothing
_ROUTE = "route"
_WRONG = "#B00020"
_LONGEST = 12  # letters of a class's name
_BINS = 10
_LISTED = 10


class Bin(NamedTuple):
    """How many correctly classified samples are next to each other in the order of V, and how many of them fooled."""

    samples: int
    fooled: int


@dataclass(frozen=True, eq=False, kw_only=True)
class HardnessStudy(ExperimentResult):
    """Hardness of samples, and what attacks did to the C samples that the model classifies correctly.

    The table says how well each predictor ranks each target, which is an attack's success, as
    :func:`attackroute.core.statistics.associations` has it; a lead is that of V.
    """

    kind = "hardness"
    table: Table
    hardness: Hardness  # of all samples, ranked among themselves
    predictors: Mapping[str, Floats]  # V's first; (C,) numbers, larger for samples that should be easier to fool
    fooled: Mapping[str, NDArray[np.bool_]]  # for each attack, whether it fools the model, (C,)

    def judged(self, attack: str) -> dict[str, Record]:
        """Each predictor's AUROC for an attack's success, as a row."""
        return {row["predictor"]: row for row in self.table.select(target=attack, statistic=AUROC)}

    def grouped(self, attack: str) -> dict[str, list[Record]]:
        """These rows by predictor; random neurons share one group, and so do single layers."""
        judged = self.judged(attack)
        groups = {name: [judged[name]] for name in (OURS, *self.baselines)}
        for title, start in ((f"{RANDOM}, draws", RANDOM), ("votes of single layers", f"{LAYER} ")):
            rows = [row for name, row in judged.items() if name.startswith(start)]
            groups |= {title: rows} if rows else {}
        return groups

    @property
    def baselines(self) -> tuple[str, ...]:
        """What V is compared with, apart from random neurons and single layers."""
        return (*BASELINES, PAPER) if PAPER in self.predictors else BASELINES

    @property
    def correct(self) -> int:
        """How many samples the model classifies correctly."""
        return int(self.hardness.correct.sum())

    def bins(self, attack: str) -> list[Bin]:
        """Fig. 6: how many are fooled of each tenth of the correctly classified samples, by falling V."""
        order = np.argsort(self.predictors[OURS], kind="stable")  # of -V
        tenths = np.array_split(self.fooled[attack][order], min(_BINS, self.correct))
        return [Bin(len(tenth), int(tenth.sum())) for tenth in tenths]

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

    def sentences(self) -> list[str]:
        """For each attack: who is fooled at both ends of V, and how V does."""
        sentences = []
        for attack in self.fooled:
            first, last = (self.bins(attack)[end] for end in (0, -1))
            sentences.append(
                f"{attack} fools the model on {first.fooled} of the {first.samples} hardest and {last.fooled} of "
                f"the {last.samples} weakest of {self.correct} correctly classified samples; "
                + _verdict(self.judged(attack))
            )
        return sentences

    def reading(self) -> str:
        """One line with all the sentences, and what V is."""
        return f"{V_IS}. {'. '.join(self.sentences())}."

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
            "hardest": self.hardness.hardest(count).tolist(),
            "weakest": self.hardness.weakest(count).tolist(),
            "weakest_correct": self.hardness.weakest(correct, self.hardness.correct).tolist(),
        }

    def summary(self) -> Table:
        """What tells best who is fooled, by attack."""
        groups = [self.grouped(attack) for attack in self.fooled]
        rows = tuple((name, *(_text(each[name]) for each in groups)) for name in groups[0])
        return Table(("predictor", *(f"{attack}, {AUROC}" for attack in self.fooled)), rows)

    def figures(self) -> dict[str, Figure]:
        """``hardness``: Fig. 6, and V beside its baselines."""
        return {"hardness": _figure(self)}


def study_hardness(
    model: nn.Module,
    route: Route,
    data: Data,
    attacks: Mapping[str, Attack | str] | Sequence[Attack | str] | Attack | str,
    *,
    paper: Route | None = None,
    draws: int = 5,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> HardnessStudy:
    """Measure the samples' hardness, attack them, and see whether V tells who is fooled; the data are read once.

    Beside V stand the loss, the logit margin, the L1 norm of the loss gradient at the image, the metric on all neurons
    of the route's layers, on random ones off the route, and each layer's votes alone. The AUROC is the probability
    that a sample on which the attack succeeds comes before one on which it fails, Spearman's correlation is with the
    success: positive is good throughout.

    ``paper`` is the paper's route, where ``route`` is another, to compare with. Of ``draws`` sets of random neurons
    there is none where the route takes more than half of a layer. Intervals come from bootstrap ``resamples``.

    Raises:
        UserError: As :func:`attackroute.hardness`; there is no attack; images are not in [0, 1]; or no sample is
            classified correctly.
    """
    named = named_attacks(attacks)
    routes = _routes(route, paper, draws, seed)
    with frozen(model), torch.inference_mode(False):
        reader = GradientReader(model, routes)

        def judge(images: Tensor, labels: Tensor | None) -> tuple[SampleGradients, dict[str, Tensor]]:
            gradients = reader.read(images, labels)
            right = (gradients.labels == gradients.predictions).to(images.device)
            clean, answers = images[right], labelled(labels)[right]
            return gradients, {name: _fooled(model, attack, clean, answers) for name, attack in named.items()}

        stream = BatchStream(model, data, batch_size)
        batches = [batch for _, batch in worked_on(stream, judge, progress)]
    samples = SampleGradients.concatenate(gradients for gradients, _ in batches)
    hardness = Hardness.from_gradients(samples, route)
    require_right(int(hardness.correct.sum()), len(samples))
    predictors = _predictors(samples, routes, hardness)
    success = {name: torch.cat([events[name] for _, events in batches]).numpy() for name in named}
    table = Table.of(
        {"target": name, **row}
        for name, events in success.items()
        for statistic in (AUROC, SPEARMAN)
        for row in associations(predictors, events, statistic, resamples=resamples, seed=seed)
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
    values |= {f"{LAYER} {layer}": -hardness.votes[:, at] for at, layer in enumerate(hardness.route.layers)}
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
    draws = [row for name, row in judged.items() if name.startswith(RANDOM) and row["value"] is not None]
    return f"{text}; V on random neurons {_text(draws)}" if draws else text


def _standing(other: Record, title: str) -> str:
    if abs(other["lead"]) < LEVEL:
        return f"level with {title}{other['predictor']} ({other['value']:.3f})"
    clear = "clearly" if other["lead_low"] > 0 or other["lead_high"] < 0 else "within chance"
    side = "ahead of" if other["lead"] >= 0 else "behind"
    return f"{clear} {side} {title}{other['predictor']} ({other['value']:.3f})"


def _mean_and_median(logs: Tensor) -> tuple[float | None, float | None]:
    if not len(logs):
        return None, None
    return float((logs.logsumexp(0) - np.log(len(logs))).exp()), float(np.median(logs.exp().numpy()))


def _text(rows: Sequence[Record]) -> str:
    """A predictor's value with its interval, or the range of several."""
    defined = [row for row in rows if row["value"] is not None]
    if not defined:
        return "not defined"
    if len(rows) == 1:
        return f"{rows[0]['value']:.3f} ({rows[0]['low']:.2f} to {rows[0]['high']:.2f})"
    values = [row["value"] for row in defined]
    return f"{min(values):.3f} to {max(values):.3f}"


def _figure(study: HardnessStudy) -> Figure:
    """One column for each attack, below a line of title."""
    figure = new_figure(max(6.4, 3.1 * len(study.fooled) + 1.2), 6.2)
    panels = figure.subplots(2, len(study.fooled), squeeze=False, height_ratios=(1.15, 1))
    for column, attack in enumerate(study.fooled):
        _draw_bins(panels[0, column], study, attack)
        _draw_baselines(panels[1, column], study.grouped(attack), named=column == 0)
    panels[0, 0].set_ylabel("samples", fontsize=9)
    title = f"How hard the model is to fool on each of {len(study.hardness)} images"
    figure.suptitle(f"{title}\n{textwrap.fill(V_IS, 80)}", fontsize=9)
    return figure


def _draw_bins(axes: Axes, study: HardnessStudy, attack: str) -> None:
    bins = study.bins(attack)
    places = range(1, len(bins) + 1)
    axes.bar(places, [tenth.samples for tenth in bins], color=_PALE, width=0.86, label="correctly classified")
    axes.bar(places, [tenth.fooled for tenth in bins], color=ROUTE_COLOUR, width=0.86, label="of these fooled")
    for place, tenth in zip(places, bins, strict=True):
        axes.text(place, tenth.fooled, str(tenth.fooled), ha="center", va="bottom", fontsize=7)
    axes.set_title(textwrap.fill(attack.replace(",", ", "), _TITLE), fontsize=9)
    tidy(axes)
    axes.set_xticks(places)
    axes.set_xlim(0.4, len(bins) + 0.6)
    axes.set_ylim(0, 1.22 * max(tenth.samples for tenth in bins))
    axes.set_xlabel("tenths by V: hardest (1) to weakest", fontsize=8.5)
    axes.legend(fontsize=7, loc="upper left", frameon=False, ncols=2, handlelength=1.2, columnspacing=1.0)


def _draw_baselines(axes: Axes, groups: Mapping[str, list[Record]], *, named: bool) -> None:
    """A row for each predictor with its interval; random neurons and single layers as dots in one row each."""
    defined = [(place, row) for place, rows in enumerate(groups.values()) for row in rows if row["value"] is not None]
    for place, row in defined:
        name = row["predictor"]
        colour = ROUTE_COLOUR if name == OURS else _BASELINE if name in groups else _GREY
        if name in groups:
            axes.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=2, alpha=0.5)
        axes.plot([row["value"]], [place], "o", color=colour, markersize=5 if name in groups else 3)
    tidy(axes, "x")
    axes.set_yticks(range(len(groups)), list(groups) if named else [])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    low, high = axes.get_xlim()
    within = low < _CHANCE < high  # elsewhere the line would squeeze what differs
    if within:
        axes.axvline(_CHANCE, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("AUROC for being fooled" + (" (dotted: chance)" if within else ""), fontsize=8.5)
    if not defined:
        axes.text(0.5, 0.5, "all alike: nothing to judge", transform=axes.transAxes, ha="center", fontsize=8)


def images_figure(
    hardness: Hardness, rows: Mapping[str, Tensor], pairs: Dataset[Any], classes: Sequence[str]
) -> Figure:
    """Rows of images, each with its place in the data, its V, its class, and the model's class where that is another.

    By each row's title come indices ``(k,)`` among the data's pairs of an image in [0, 1] and its label.
    """
    columns = max(map(len, rows.values()))
    figure = new_figure(max(5.0, 1.15 * columns), 1.9 * len(rows))
    figure.supxlabel(V_IS, fontsize=7)
    halves = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for half, (title, indices) in zip(halves, rows.items(), strict=True):
        half.suptitle(title, fontsize=10)
        panels = half.subplots(1, columns, squeeze=False)[0]
        for panel in panels:
            panel.set_axis_off()
        for panel, index in zip(panels, indices.tolist(), strict=False):
            image = pairs[index][0].float().clamp(0, 1)
            pixels = image[0] if len(image) == 1 else image[:3].movedim(0, -1)
            panel.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            label, prediction = (_name(int(each[index]), classes) for each in (hardness.labels, hardness.predictions))
            mistaken = "" if hardness.correct[index] else f"\nseen as {prediction}"
            caption = f"#{index}: V {float(hardness.values[index]):.0f}\n{label}{mistaken}"
            panel.set_title(caption, fontsize=6.5, color=_WRONG if mistaken else "black")
    return figure


def _name(label: int, classes: Sequence[str]) -> str:
    name = classes[label] if label < len(classes) else str(label)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
