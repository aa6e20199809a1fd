"""Table 4 and Fig. 6: do weak images have larger gradients on the route, and does V tell who is fooled?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from attackroute.analysis.hardness_study import OURS, RANDOM, RIVALS
from attackroute.core.statistics import AUROC
from attackroute.paper.claims import Claim, by_count, markdown, verdict
from attackroute.paper.published import GRADIENTS
from attackroute.paper.results import Content, NetworkResults, Results, having, matching
from attackroute.robustness.attack_labels import short
from attackroute.robustness.registry import parse_attack

_FIRST_BIN, _LAST_BIN = 0, -1


def gradients_table(results: Results) -> str:
    """Table 4: mean and median gradients of images on which the first attack fails, and succeeds."""
    lines = []
    for network, found in having(results, "hardness"):
        attack = _attacks(found)[0]
        for row in _shown(network, found, attack):
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


def bins_table(results: Results) -> str:
    """Fig. 6: how many images are fooled in each tenth by V, the hardest tenth first."""
    lines = []
    for network, found in having(results, "hardness"):
        for attack in _attacks(found):
            bins = found["attacks"][attack]["bins_hardest_first"]
            lines.append([network.name, _short(attack), str(bins[0][0]), *(str(fooled) for _, fooled in bins)])
    return markdown(["network", "attack", "images in a tenth", *map(str, range(1, 11))], lines)


def predictors_table(results: Results) -> str:
    """AUROC of V and its rivals."""
    lines = []
    for network, found in having(results, "hardness"):
        for attack in _attacks(found):
            cells = [_shown_estimate(found, attack, name) for name in (OURS, *RIVALS)]
            draws = _random(found, attack)
            chance = f"{min(draws):.3f} to {max(draws):.3f}" if draws else ""
            lines.append([network.name, _short(attack), *cells, chance])
    return markdown(["network", "attack", OURS, *RIVALS, RANDOM], lines)


def gradient_claims(results: Results) -> Iterator[Claim]:
    """Of Table 4."""
    for network, found in having(results, "hardness"):
        layers = [row for row in found["attacks"][_attacks(found)[0]]["gradients"] if row["weak_mean"] is not None]
        layers = [row for row in layers if row["hard_mean"]]
        if not layers:
            continue
        good = sum(row["weak_mean"] > row["hard_mean"] for row in layers)
        ratio = statistics.median(row["weak_mean"] / row["hard_mean"] for row in layers)
        yield Claim(
            f"images that {_short(_attacks(found)[0])} fools have larger gradients on the route",
            "990 to 4,338 times",
            network.name,
            f"in {good} of {len(layers)} layers, {ratio:.3g} times in the median",
            by_count(good, len(layers)),
        )


def prediction_claims(results: Results) -> Iterator[Claim]:
    """Of Fig. 6."""
    for network, found in having(results, "hardness"):
        for attack in _attacks(found):
            ours = _estimate(found, attack, OURS)
            if ours is None:
                continue
            bins = found["attacks"][attack]["bins_hardest_first"]
            clear = ours["interval_95"][0] > 0.5
            yield Claim(
                f"V predicts whom {_short(attack)} fools",
                "yes",
                network.name,
                f"AUROC {_shown_estimate(found, attack, OURS)}; fooled {bins[_FIRST_BIN][1]} of {bins[_FIRST_BIN][0]} "
                f"hardest, {bins[_LAST_BIN][1]} of {bins[_LAST_BIN][0]} weakest",
                verdict(clear, ours["value"] > 0.5),
                tuple(_not_behind(found, attack)),
            )


def _short(attack: str) -> str:
    return short(parse_attack(attack))


def _attacks(found: Content) -> list[str]:
    return list(found["attacks"])


def _shown(network: NetworkResults, found: Content, attack: str) -> list[Content]:
    """The paper's layers where the network has them, else five spread ones."""
    rows: list[Content] = found["attacks"][attack]["gradients"]
    named = [row for row in rows if network.title(row["layer"]) in GRADIENTS] if network.family == "vgg16" else []
    return named or rows[:: max(1, len(rows) // 4)]


def _estimate(found: Content, attack: str, predictor: str) -> Content | None:
    own = matching(found["judgements"], target=attack, predictor=predictor, statistic=AUROC)
    return own[0] if own and own[0]["value"] is not None else None


def _shown_estimate(found: Content, attack: str, predictor: str) -> str:
    row = _estimate(found, attack, predictor)
    if row is None:
        return ""
    low, high = row["interval_95"]
    return f"{row['value']:.3f} ({low:.3f} to {high:.3f})"


def _random(found: Content, attack: str) -> list[float]:
    judged = matching(found["judgements"], target=attack, statistic=AUROC)
    return [row["value"] for row in judged if row["predictor"].startswith(RANDOM) and row["value"] is not None]


def _not_behind(found: Content, attack: str) -> Iterator[str]:
    """Rivals that V is not clearly ahead of, by the bootstrap interval of its lead."""
    for name in RIVALS:
        row = _estimate(found, attack, name)
        if row is not None and not row["lead_of_hardness_V"]["interval_95"][0] > 0:
            yield name


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
