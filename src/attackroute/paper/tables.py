"""Tables 1 and 4, and Figs. 2 to 6: for each, a table in Markdown and the claims that the paper reads from it."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Iterator
from typing import Any

from attackroute.analysis.controls import OFF_ROUTE, RANDOM, ROUTE
from attackroute.analysis.experiments.gradcam import CLEAN, INSIDE, SHIFT
from attackroute.analysis.experiments.occurrence import OCCURRENCE, RANDOM_ROUTES
from attackroute.analysis.hardness_experiment import BASELINES, OURS
from attackroute.analysis.hardness_experiment import RANDOM as RANDOM_NEURONS
from attackroute.analysis.intervention_table import UNTOUCHED
from attackroute.core.statistics import AUROC
from attackroute.core.table import Record
from attackroute.paper.claims import (
    FAILS,
    Claim,
    Findings,
    NetworkResults,
    Row,
    by_count,
    judge,
    kind,
    percent,
    table,
    verdict,
)
from attackroute.paper.published import (
    GRADIENTS,
    LEAST_RATIO,
    OCCURRENCES,
    SHARE_OF_THREE,
    TRANSPLANTED_FIRST,
    TRANSPLANTED_RANDOM,
)

# --- Table 1: occurrence of the most frequent neurons


@table("table1", "occurrence")
def occurrence_table(network: NetworkResults, findings: Findings) -> Iterator[Row]:
    """Occurrence in percent: mean frequency of the most frequent fifth of a layer's channels."""
    paper = OCCURRENCES.get(network.family, {})
    for layer, *values in zip(findings.distinct("layer"), *_occurrences(findings).values(), strict=True):
        name = network.title(layer)
        cells = dict(zip(("route", "by activation", "by gradient", RANDOM_ROUTES), map(percent, values), strict=True))
        yield {"layer": name, "paper": f"{paper[name]:.0f}" if name in paper else "", **cells}


@judge("table1", "occurrence")
def occurrence_claims(network: NetworkResults, findings: Findings) -> Iterator[Claim]:
    occurrences = _occurrences(findings)
    ours, chance = occurrences.pop("clean"), occurrences.pop(RANDOM_ROUTES)
    falls, above = ours[0] > ours[-1], all(map(operator.gt, ours, chance))
    paper = list(OCCURRENCES.get(network.family, {}).values())
    yield Claim(
        text="images' routes share neurons, more so at the bottom than at the top",
        paper=f"{paper[0]:.0f} to {paper[-1]:.0f} %" if paper else "",
        found=f"{percent(ours[0])} to {percent(ours[-1])} %, lowest {percent(min(ours))} % "
        f"(random routes {percent(statistics.fmean(chance))} %)",
        verdict=verdict(falls and above and (not paper or 100 * ours[0] >= paper[0]), falls or above),
        equals=tuple(of for of, values in occurrences.items() if all(map(operator.ge, values, ours))),
    )


def _occurrences(findings: Findings) -> dict[str, list[float]]:
    """By whose routes they are, the occurrence in each layer."""
    layers = findings.distinct("layer")
    return {
        of: [findings.mean("value", layer=layer, measure=OCCURRENCE, of=of) or 0.0 for layer in layers]
        for of in ("clean", "activation", "gradient", RANDOM_ROUTES)
    }


# --- Fig. 2: are the route's neurons more sensitive, and do they have larger gradients, than the others?

_RESPONSE_CLAIMS = {
    "sensitivity": ("route neurons are more sensitive than the others", "significantly, above all at the bottom"),
    "gradient": ("route neurons have larger gradients than the others", "yes"),
}


def _responses(findings: Findings) -> Iterator[tuple[str, str | None, list[float], dict[str, int]]]:
    """Sensitivities and gradients, each with its attack, if there is one.

    The factors are by layer, the mean over the route / over all other neurons; then, by control, in how many layers the
    route's mean is above that of every set of it.
    """
    for quantity, attack in dict.fromkeys((row["quantity"], row["attack"]) for row in findings.table):
        factors = []
        for layer in findings.distinct("layer"):
            ours, theirs = (
                findings.mean("mean", layer=layer, quantity=quantity, attack=attack, criterion=criterion) or 0.0
                for criterion in (ROUTE, OFF_ROUTE)
            )
            factors.append(ours / theirs if theirs else float("inf"))
        verdicts = findings.entries("verdicts", quantity=quantity, attack=attack)
        higher = {
            control: sum(each["beats"] for each in verdicts if each["control"] == control)
            for control in (OFF_ROUTE, RANDOM, *findings.rivals)
        }
        yield quantity, attack, factors, higher


@table("fig2", "sensitivity")
def responses_table(network: NetworkResults, findings: Findings) -> Iterator[Row]:
    """Layers in which the mean over the route's neurons is above that of the other sets:"""
    for quantity, attack, factors, higher in _responses(findings):
        yield {
            "quantity": f"{quantity} to {kind(attack)}" if attack else quantity,
            "route / others, first layer": f"{factors[0]:.2f}",
            "median of layers": f"{statistics.median(factors):.2f}",
            **{control: f"{count} of {len(factors)}" for control, count in higher.items()},
        }


@judge("fig2", "sensitivity")
def response_claims(network: NetworkResults, findings: Findings) -> Iterator[Claim]:
    for quantity, attack, factors, higher in _responses(findings):
        if attack not in (None, findings.distinct("attack", quantity=quantity)[0]):
            continue  # the claim is about the first attack
        good = higher[OFF_ROUTE]
        text, paper = _RESPONSE_CLAIMS[quantity]
        yield Claim(
            text=text,
            paper=paper,
            found=f"in {good} of {len(factors)} layers, {factors[0]:.2f} times in the first, "
            f"{statistics.median(factors):.2f} in the median",
            verdict=by_count(good, len(factors)),
            equals=tuple(name for name, count in higher.items() if name != OFF_ROUTE and 2 * count <= len(factors)),
        )


# --- Fig. 3: do clean values in the route's channels bring attacked images back? Accuracies are on images that the
# network gets right when they are clean.


@table("fig3", "transplant-shares")
def transplant_shares_table(network: NetworkResults, findings: Findings) -> Iterator[Row]:
    """Fig. 3a, accuracy in percent under PGD over the share of one layer's channels:"""
    attack, layer = findings.distinct("attack")[0], _singles(findings)[0]
    for share in sorted(findings.distinct("share", layers=layer)):
        accuracies = findings.accuracies(layers=layer, share=share, attack=attack)
        yield {"layer": network.title(layer), "share": f"{share:.0%}", **accuracies}


@table("fig3", "transplant-layers", "transplant-attacks")
def transplant_layers_table(network: NetworkResults, findings: Findings) -> Iterator[Row]:
    """Fig. 3b, 30 % of the channels of single layers, and of several together:"""
    for attack in findings.distinct("attack"):
        untouched = percent(findings.mean("accuracy", criterion=UNTOUCHED, attack=attack) or 0.0)
        for group in findings.distinct("layers", criterion=ROUTE, attack=attack):
            head = {"attack": kind(attack), "untouched": untouched, "layers": network.group_title(group)}
            yield {**head, **findings.accuracies(layers=group, attack=attack)}


class _Repair:
    """Accuracies under one attack: untouched, and with clean values in a group of layers, in the route's channels or
    in random ones.
    """

    def __init__(self, findings: Findings, attack: str, group: str) -> None:
        def accuracy(**cells: Any) -> float:
            return findings.mean("accuracy", attack=attack, **cells) or 0.0

        self.before = accuracy(criterion=UNTOUCHED)
        self.ours, self.random = (accuracy(criterion=criterion, layers=group) for criterion in (ROUTE, RANDOM))
        self.size = findings.mean("share_of_network", criterion=ROUTE, layers=group, attack=attack)
        self.equals = findings.unbeaten(layers=group, attack=attack)
        self.clear = RANDOM not in self.equals

    def __str__(self) -> str:
        return f"{percent(self.before)} to {percent(self.ours)} %; random {percent(self.random)} %"


@judge("fig3", "transplant-layers")
def transplant_claims(network: NetworkResults, findings: Findings) -> Iterator[Claim]:
    (attack,) = findings.distinct("attack")
    first = _Repair(findings, attack, _singles(findings)[0])
    yield Claim(
        text="30 % of the first layer's route neurons, transplanted, repair most PGD examples; random ones do not",
        paper=f"0 to {percent(TRANSPLANTED_FIRST)} %; random at most {percent(TRANSPLANTED_RANDOM)} %",
        found=str(first),
        verdict=verdict(first.ours >= 0.5 and first.random - first.before <= TRANSPLANTED_RANDOM, first.clear),
        equals=first.equals,
    )
    groups = findings.distinct("layers", criterion=ROUTE, attack=attack)
    for group in [group for group in groups if len(group.split("+")) == 3][:1]:
        three = _Repair(findings, attack, group)
        yield Claim(
            text="30 % of the first three layers' route neurons repair nearly all",
            paper=f"basically all, with {percent(SHARE_OF_THREE)} % of the network's neurons",
            found=f"{percent(three.ours)} %, with {percent(three.size)} %; random {percent(three.random)} %",
            verdict=verdict(three.ours >= 0.9 and three.clear, three.clear),
            equals=three.equals,
        )


@judge("fig3", "transplant-attacks")
def transplant_attack_claims(network: NetworkResults, findings: Findings) -> Iterator[Claim]:
    for attack in findings.distinct("attack"):
        repair = _Repair(findings, attack, _singles(findings)[0])
        yield Claim(
            text=f"the same under {kind(attack)}: the first layer's route repairs more than random neurons",
            paper="yes",
            found=str(repair),
            verdict=verdict(repair.clear and repair.ours > repair.before, repair.clear or repair.ours > repair.random),
            equals=repair.equals,
        )


def _singles(findings: Findings) -> list[str]:
    return [group for group in findings.distinct("layers", criterion=ROUTE) if "+" not in group]


# --- Fig. 4: what is left with the route's channels silenced, or the connections between them weakened?


@table("fig4", "deactivate")
def deactivation_table(network: NetworkResults, findings: Findings) -> Iterator[Row]:
    """Fig. 4a, accuracy in percent on clean images over the share set to zero:"""
    for group in findings.distinct("layers", criterion=ROUTE):
        for share in sorted(findings.distinct("share", layers=group)):
            accuracies = findings.accuracies(layers=group, share=share)
            yield {"layers": network.group_title(group), "share": f"{share:.0%}", **accuracies}


@table("fig4", "weaken")
def weakening_table(network: NetworkResults, findings: Findings) -> Iterator[Row]:
    """Fig. 4b, accuracy in percent with connections multiplied by beta:"""
    for beta in findings.distinct("beta", criterion=ROUTE):
        yield {"beta": f"{beta:g}", **findings.accuracies(beta=beta)}


@judge("fig4", "deactivate")
def deactivation_claims(network: NetworkResults, findings: Findings) -> Iterator[Claim]:
    for group in findings.distinct("layers", criterion=ROUTE):
        name = network.group_title(group)
        text = f"30 % of the route of {name}, set to zero, destroy accuracy; random neurons hardly"
        yield _silence_claim(text, findings, layers=group, share=findings["main_share"])


@judge("fig4", "weaken")
def weakening_claims(network: NetworkResults, findings: Findings) -> Iterator[Claim]:
    beta = findings["main_beta"]
    text = f"connections of the route weakened to {beta:g} destroy accuracy; of random neurons, hardly"
    yield _silence_claim(text, findings, beta=beta)


def _silence_claim(text: str, findings: Findings, **cells: Any) -> Claim:
    ours = findings.mean("accuracy", criterion=ROUTE, **cells) or 0.0
    random = findings.mean("accuracy", criterion=RANDOM, **cells)
    equals = findings.unbeaten(**cells)
    return Claim(
        text=text,
        paper="yes",
        found=f"100 to {percent(ours)} %; random {percent(random)} %",
        verdict=verdict(
            ours <= 0.5 and random is not None and random >= 0.9, random is not None and RANDOM not in equals
        ),
        equals=equals,
    )


# --- Fig. 5: does the Grad-CAM of the route's channels sit on the object, and does an attack move it more than others'?
# CIFAR-10 has no boxes of objects; its objects fill the middle of the image, so the middle half stands for them.

_MIDDLE = 0.25  # of the area


@table("fig5", "gradcam")
def attention_table(network: NetworkResults, findings: Findings) -> Iterator[Row]:
    """Grad-CAM's energy in the middle half of the image, and how much of it PGD moves, in percent:"""
    pgd = _attack(findings)
    columns = {
        "inside, clean": {"images": CLEAN, "measure": INSIDE},
        "inside, PGD": {"images": pgd, "measure": INSIDE},
        "shift under PGD": {"images": pgd, "measure": SHIFT},
    }
    for criterion in (ROUTE, OFF_ROUTE, RANDOM, *findings.rivals):
        yield {
            "layer": network.title(findings["layer"]),
            "channels": criterion,
            **{title: percent(findings.mean("mean", criterion=criterion, **cells)) for title, cells in columns.items()},
        }


@judge("fig5", "gradcam")
def attention_claims(network: NetworkResults, findings: Findings) -> Iterator[Claim]:
    texts = {
        (CLEAN, INSIDE): "on clean images the route's Grad-CAM is on the object, more than the other channels'",
        (_attack(findings), SHIFT): "an attack moves the route's Grad-CAM more than that of the other channels",
    }
    for (images, measure), text in texts.items():
        ours, theirs = (
            findings.mean("mean", images=images, criterion=criterion, measure=measure) or 0.0
            for criterion in (ROUTE, OFF_ROUTE)
        )
        sets = findings.table.select(images=images, measure=measure)
        more = {  # clearly more than every set of a control, by the paired 95 % interval
            control: all(low > 0 for low in sets.select(criterion=control).column("route_minus_this_low"))
            for control in (OFF_ROUTE, RANDOM, *findings.rivals)
        }
        area = f" ({percent(_MIDDLE)} % of the area)" if measure == INSIDE else ""
        yield Claim(
            text=text,
            paper="yes",
            found=f"{percent(ours)} %; others {percent(theirs)} %{area}",
            # where random channels do as well, it is not the route
            verdict=verdict(more[OFF_ROUTE] and (measure != INSIDE or ours > _MIDDLE), ours > theirs)
            if more[RANDOM]
            else FAILS,
            equals=tuple(control for control, clear in more.items() if control != OFF_ROUTE and not clear),
        )


def _attack(findings: Findings) -> str:
    return str(next(name for name in findings.distinct("images") if name != CLEAN))


# --- Table 4 and Fig. 6: do weak images have larger gradients on the route, and does V tell who is fooled?

_LAYERS = 5  # of a network that has not the paper's


@table("table4", "hardness")
def gradients_table(network: NetworkResults, findings: Findings) -> Iterator[Row]:
    """Gradients towards the loss, summed over the layer's route neurons; hard images withstand `fgsm:eps=1/255`, weak
    ones do not.
    """
    rows: list[Record] = next(iter(findings["attacks"].values()))["gradients"]
    named = [row for row in rows if network.title(row["layer"]) in GRADIENTS] if network.family == "vgg16" else []
    for row in named or rows[:: max(1, len(rows) // (_LAYERS - 1))]:  # the paper's layers, else spread ones
        paper = GRADIENTS.get(network.title(row["layer"])) if network.family == "vgg16" else None
        yield {
            "layer": network.title(row["layer"]),
            "paper: hard / weak": "" if paper is None else f"{paper[0]:g} / {paper[1]:g}",
            "mean: hard / weak": f"{_number(row['hard_mean'])} / {_number(row['weak_mean'])}",
            "median: hard / weak": f"{_number(row['hard_median'])} / {_number(row['weak_median'])}",
        }


@judge("table4", "hardness")
def gradient_claims(network: NetworkResults, findings: Findings) -> Iterator[Claim]:
    first, about = next(iter(findings["attacks"].items()))
    layers = [row for row in about["gradients"] if row["weak_mean"] is not None and row["hard_mean"]]
    if layers:
        good = sum(row["weak_mean"] > row["hard_mean"] for row in layers)
        ratio = statistics.median(row["weak_mean"] / row["hard_mean"] for row in layers)
        yield Claim(
            text=f"images that {first} fools have larger gradients on the route",
            paper=f"{LEAST_RATIO} to 4,338 times",
            found=f"in {good} of {len(layers)} layers, {ratio:.3g} times in the median",
            verdict=verdict(good == len(layers) and ratio >= LEAST_RATIO, 2 * good > len(layers)),
        )


@table("fig6", "hardness")
def bins_table(network: NetworkResults, findings: Findings) -> Iterator[Row]:
    """Images fooled in each tenth by V, hardest first:"""
    for attack, about in findings["attacks"].items():
        bins = about["bins_hardest_first"]
        tenths = {str(place): str(fooled) for place, (_, fooled) in enumerate(bins, start=1)}
        yield {"attack": attack, "images in a tenth": str(bins[0][0]), **tenths}


@table("fig6", "hardness")
def predictors_table(network: NetworkResults, findings: Findings) -> Iterator[Row]:
    """AUROC for being fooled (0.5: chance), with 95 % bootstrap intervals:"""
    for attack in findings["attacks"]:
        cells = {name: _auroc_cell(findings, attack, name) for name in (OURS, *BASELINES)}
        draws = [
            row["value"]
            for row in findings.table.select(target=attack, statistic=AUROC)
            if row["predictor"].startswith(RANDOM_NEURONS) and row["value"] is not None
        ]
        chance = f"{min(draws):.3f} to {max(draws):.3f}" if draws else ""
        yield {"attack": attack, **cells, RANDOM_NEURONS: chance}


@judge("fig6", "hardness")
def prediction_claims(network: NetworkResults, findings: Findings) -> Iterator[Claim]:
    for attack, about in findings["attacks"].items():
        ours = _auroc(findings, attack, OURS)
        if ours is None:
            continue
        hardest, weakest = about["bins_hardest_first"][0], about["bins_hardest_first"][-1]
        predictors = findings.distinct("predictor", target=attack, statistic=AUROC)
        leads = [  # of V over each; random draws are one control
            (RANDOM_NEURONS if name.startswith(RANDOM_NEURONS) else name, row["lead_low"])
            for name in predictors
            if name.startswith((*BASELINES, RANDOM_NEURONS)) and (row := _auroc(findings, attack, name)) is not None
        ]
        yield Claim(
            text=f"V predicts whom {attack} fools",
            paper="yes",
            found=f"AUROC {_auroc_cell(findings, attack, OURS)}; fooled {hardest[1]} of {hardest[0]} hardest, "
            f"{weakest[1]} of {weakest[0]} weakest",
            verdict=verdict(ours["low"] > 0.5, ours["value"] > 0.5),
            # those that V is not clearly ahead of, by the bootstrap interval of its lead
            equals=tuple(dict.fromkeys(name for name, low in leads if not low > 0)),
        )


def _auroc(findings: Findings, attack: str, predictor: str) -> Record | None:
    rows = findings.table.select(target=attack, predictor=predictor, statistic=AUROC)
    return rows[0] if len(rows) and rows[0]["value"] is not None else None


def _auroc_cell(findings: Findings, attack: str, predictor: str) -> str:
    estimate = _auroc(findings, attack, predictor)
    if estimate is None:
        return ""
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
