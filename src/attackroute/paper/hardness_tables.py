"""Table 4 and Fig. 6: do weak images have larger gradients on the route, and does V tell who is fooled?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from attackroute.analysis.hardness_experiment import BASELINES, OURS, RANDOM
from attackroute.core.statistics import AUROC
from attackroute.core.table import Record
from attackroute.paper.claims import Claim, Findings, NetworkResults, Row, by_count, judge, table, verdict
from attackroute.paper.published import GRADIENTS
from attackroute.robustness.registry import short_name

_LAYERS = 5  # of a network that has not the paper's


@table("table4", "hardness")
def gradients_table(network: NetworkResults, findings: Findings) -> Iterator[Row]:
    """Gradients towards the loss, summed over the layer's route neurons; hard images withstand `fgsm:eps=1/255`, weak
    ones do not.
    """
    for row in _table4_layers(network, findings):
        paper = GRADIENTS.get(network.title(row["layer"])) if network.family == "vgg16" else None
        yield {
            "layer": network.title(row["layer"]),
            "paper: hard / weak": "" if paper is None else f"{paper[0]:g} / {paper[1]:g}",
            "mean: hard / weak": f"{_number(row['hard_mean'])} / {_number(row['weak_mean'])}",
            "median: hard / weak": f"{_number(row['hard_median'])} / {_number(row['weak_median'])}",
        }


@judge("table4", "hardness")
def gradient_claims(network: NetworkResults, findings: Findings) -> Iterator[Claim]:
    """What the paper reads from Table 4."""
    first, about = next(iter(findings["attacks"].items()))
    layers = [row for row in about["gradients"] if row["weak_mean"] is not None and row["hard_mean"]]
    if layers:
        good = sum(row["weak_mean"] > row["hard_mean"] for row in layers)
        ratio = statistics.median(row["weak_mean"] / row["hard_mean"] for row in layers)
        yield Claim(
            text=f"images that {short_name(first)} fools have larger gradients on the route",
            paper="990 to 4,338 times",
            found=f"in {good} of {len(layers)} layers, {ratio:.3g} times in the median",
            verdict=by_count(good, len(layers)),
        )


@table("fig6", "hardness")
def bins_table(network: NetworkResults, findings: Findings) -> Iterator[Row]:
    """Images fooled in each tenth by V, hardest first:"""
    for attack, about in findings["attacks"].items():
        bins = about["bins_hardest_first"]
        tenths = {str(place): str(fooled) for place, (_, fooled) in enumerate(bins, start=1)}
        yield {"attack": short_name(attack), "images in a tenth": str(bins[0][0]), **tenths}


@table("fig6", "hardness")
def predictors_table(network: NetworkResults, findings: Findings) -> Iterator[Row]:
    """AUROC for being fooled (0.5: chance), with 95 % bootstrap intervals:"""
    for attack in findings["attacks"]:
        cells = {name: _auroc_cell(findings, attack, name) for name in (OURS, *BASELINES)}
        draws = [
            row["value"]
            for row in findings.table.select(target=attack, statistic=AUROC)
            if row["predictor"].startswith(RANDOM) and row["value"] is not None
        ]
        chance = f"{min(draws):.3f} to {max(draws):.3f}" if draws else ""
        yield {"attack": short_name(attack), **cells, RANDOM: chance}


@judge("fig6", "hardness")
def prediction_claims(network: NetworkResults, findings: Findings) -> Iterator[Claim]:
    """What the paper reads from Fig. 6."""
    for attack, about in findings["attacks"].items():
        ours = _auroc(findings, attack, OURS)
        if ours is None:
            continue
        hardest, weakest = about["bins_hardest_first"][0], about["bins_hardest_first"][-1]
        rivals = {name: _auroc(findings, attack, name) for name in BASELINES}
        yield Claim(
            text=f"V predicts whom {short_name(attack)} fools",
            paper="yes",
            found=f"AUROC {_auroc_cell(findings, attack, OURS)}; fooled {hardest[1]} of {hardest[0]} hardest, "
            f"{weakest[1]} of {weakest[0]} weakest",
            verdict=verdict(ours["low"] > 0.5, ours["value"] > 0.5),
            equals=tuple(  # those that V is not clearly ahead of, by the bootstrap interval of its lead
                name for name, rival in rivals.items() if rival is not None and not rival["lead_low"] > 0
            ),
        )


def _table4_layers(network: NetworkResults, findings: Findings) -> list[Record]:
    """The paper's layers where the network has them, else spread ones."""
    rows: list[Record] = next(iter(findings["attacks"].values()))["gradients"]
    named = [row for row in rows if network.title(row["layer"]) in GRADIENTS] if network.family == "vgg16" else []
    return named or rows[:: max(1, len(rows) // (_LAYERS - 1))]


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
