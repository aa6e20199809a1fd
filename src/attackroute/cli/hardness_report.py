"""What ``attackroute hardness`` found: two tables, a line for each attack, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attackroute.analysis.hardness_study import LAYER, OURS, RANDOM, HardnessStudy
from attackroute.cli.console import Output
from attackroute.core.statistics import Association

_LISTED = 10


def summarise(study: HardnessStudy, origin: Mapping[str, Any]) -> dict[str, Any]:
    """What the tables show and more, as JSON values."""
    count = min(_LISTED, len(study.hardness))
    return {
        **origin,
        **study.to_json(),
        "hardest": study.hardness.hardest(count).tolist(),
        "weakest": study.hardness.weakest(count).tolist(),
        "weakest_correct": study.hardness.weakest(min(count, study.correct), study.hardness.correct).tolist(),
    }


def report(output: Output, study: HardnessStudy, folder: Path, origin: Mapping[str, Any]) -> None:
    """Say what was found."""
    output.result({**summarise(study, origin), "folder": str(folder)})
    attacks = list(study.fooled)
    output.line(
        f"Images by V, hardest first, and how many are fooled, of the {study.correct} of {len(study.hardness)} "
        "that the model classifies correctly:"
    )
    bins = [study.bins(attack) for attack in attacks]
    output.table(
        ["tenth", "images", *attacks],
        [
            [str(number), str(parts[0].samples), *(str(part.fooled) for part in parts)]
            for number, parts in enumerate(zip(*bins, strict=True), start=1)
        ],
    )
    output.line("What tells best who is fooled? (1: always, 0.5 or Spearman's 0: chance)")
    rows = _rows(study)
    targets = [f"{target}, {found[0].statistic}" for target, found in study.judgements.items()]
    output.table(["predictor", *targets], rows)
    for sentence in study.sentences():
        output.line(f"{sentence}.")
    output.line(f"tables and figures are in {folder}; open {folder / 'hardness.png'} and {folder / 'images.png'}")


def _rows(study: HardnessStudy) -> list[list[str]]:
    """One row for each predictor; random neurons share one, and so do single layers."""
    judged = [[item for item in found if item.statistic == found[0].statistic] for found in study.judgements.values()]
    rows = [[name, *(_one(found, name) for found in judged)] for name in (OURS, *study.rivals)]
    for title, start in ((f"{RANDOM}, draws", RANDOM), ("votes of single layers", f"{LAYER} ")):
        cells = [_range(found, start) for found in judged]
        if any(cells):
            rows.append([title, *cells])
    return rows


def _one(found: Sequence[Association], name: str) -> str:
    estimate = next(item.estimate for item in found if item.predictor == name)
    if estimate.value is None or estimate.interval is None:
        return str(estimate)
    return f"{estimate.value:.3f} ({estimate.interval[0]:.2f} to {estimate.interval[1]:.2f})"


def _range(found: Sequence[Association], start: str) -> str:
    values = [item.estimate.value for item in found if item.predictor.startswith(start)]
    known = [value for value in values if value is not None]
    return f"{min(known):.3f} to {max(known):.3f}" if known else ""
