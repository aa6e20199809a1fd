"""Table 4 and Fig. 6: do weak images have larger gradients on the route, and does V tell who is fooled?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from attackroute.analysis.hardness_experiment import BASELINES, OURS, RANDOM
from attackroute.core.statistics import AUROC
from attackroute.paper.claims import Claim, Findings, NetworkResults, Results, by_count, having, markdown, verdict
from attackroute.paper.published import GRADIENTS
from attackroute.robustness.registry import parse_attack


def gradients_table(results: Results) -> str:
    """Table 4: mean and median gradients of images on which the first attack fails, and succeeds."""
    lines = []
    for network, findings in having(results, "hardness"):
        for row in _table4_layers(network, findings):
            paper = GRADIENTS.get(network.title(row["layer"])) if network.family == "vgg16" else None
            lines.append(
                [
                    network.name, network.title(row["layer"]),
                    "" if paper is None else f"{paper[0]:g} / {paper[1]:g}",
                    f"{_number(row['hard_mean'])} / {_number(row['weak_mean'])}",
                    f"{_number(row['hard_median'])} / {_number(row['weak_median'])}",
                ]
            )  # fmt: skip
    return markdown(["network", "layer", "paper: hard / weak", "mean: hard / weak", "median: hard / weak"], lines)


def gradient_claims(results: Results) -> Iterator[Claim]:
    """What the paper reads from Table 4."""
    for network, findings in having(results, "hardness"):
        first = next(iter(findings["attacks"]))
        layers = [
            row for row in findings["attacks"][first]["gradients"] if row["weak_mean"] is not None and row["hard_mean"]
        ]
        if layers:
            good = sum(row["weak_mean"] > row["hard_mean"] for row in layers)
            ratio = statistics.median(row["weak_mean"] / row["hard_mean"] for row in layers)
            yield Claim(
                text=f"images that {attack_title(first)} fools have larger gradients on the route",
                paper="990 to 4,338 times",
                network=network.name,
                found=f"in {good} of {len(layers)} layers, {ratio:.3g} times in the median",
                verdict=by_count(good, len(layers)),
            )


def bins_table(results: Results) -> str:
    """Fig. 6: how many images are fooled in each tenth by V, the hardest tenth first."""
    lines = []
    for network, findings in having(results, "hardness"):
        for attack, about in findings["attacks"].items():
            bins = about["bins_hardest_first"]
            lines.append([network.name, attack_title(attack), str(bins[0][0]), *(str(fooled) for _, fooled in bins)])
    return markdown(["network", "attack", "images in a tenth", *map(str, range(1, 11))], lines)


def predictors_table(results: Results) -> str:
    """AUROC of V and its rivals."""
    lines = []
    for network, findings in having(results, "hardness"):
        for attack in findings["attacks"]:
            cells = [_auroc_cell(findings, attack, name) for name in (OURS, *BASELINES)]
            judged = findings.table.select(target=attack, statistic=AUROC)
            draws = [
                each["value"] for each in judged if each["predictor"].startswith(RANDOM) and each["value"] is not None
            ]
            chance = f"{min(draws):.3f} to {max(draws):.3f}" if draws else ""
            lines.append([network.name, attack_title(attack), *cells, chance])
    return markdown(["network", "attack", OURS, *BASELINES, RANDOM], lines)


def prediction_claims(results: Results) -> Iterator[Claim]:
    """What the paper reads from Fig. 6."""
    for network, findings in having(results, "hardness"):
        for attack, about in findings["attacks"].items():
            ours = _auroc(findings, attack, OURS)
            if ours is None:
                continue
            hardest, weakest = about["bins_hardest_first"][0], about["bins_hardest_first"][-1]
            rivals = {name: _auroc(findings, attack, name) for name in BASELINES}
            yield Claim(
                text=f"V predicts whom {attack_title(attack)} fools",
                paper="yes",
                network=network.name,
                found=f"AUROC {_auroc_cell(findings, attack, OURS)}; fooled {hardest[1]} of {hardest[0]} hardest, "
                f"{weakest[1]} of {weakest[0]} weakest",
                verdict=verdict(ours["low"] > 0.5, ours["value"] > 0.5),
                equals=tuple(  # those that V is not clearly ahead of, by the bootstrap interval of its lead
                    name for name, rival in rivals.items() if rival is not None and not rival["lead_low"] > 0
                ),
            )


def attack_title(attack: str) -> str:
    """An attack's specification without its defaults."""
    return parse_attack(attack).short()


def _table4_layers(network: NetworkResults, findings: Findings) -> list[dict[str, Any]]:
    """The paper's layers where the network has them, else five spread ones."""
    rows: list[dict[str, Any]] = next(iter(findings["attacks"].values()))["gradients"]
    named = [row for row in rows if network.title(row["layer"]) in GRADIENTS] if network.family == "vgg16" else []
    return named or rows[:: max(1, len(rows) // 4)]


def _auroc(findings: Findings, attack: str, predictor: str) -> dict[str, Any] | None:
    judged = findings.table.select(target=attack, predictor=predictor, statistic=AUROC)
    return judged[0] if len(judged) and judged[0]["value"] is not None else None


def _auroc_cell(findings: Findings, attack: str, predictor: str) -> str:
    estimate = _auroc(findings, attack, predictor)
    if estimate is None:
        return ""
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
