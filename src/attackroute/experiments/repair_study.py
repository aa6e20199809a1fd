"""Criteria compared by what they repair, a variant picked by rule, and how ranks transfer: see docs/beyond.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from attackroute.attacks.application import Attack, attacked
from attackroute.batches import derived_generator, placement
from attackroute.errors import UserError
from attackroute.experiments.paired import PairedDifference
from attackroute.experiments.repair import BUDGETS, CRITERIA, RULE, SHARES, Repair, Repaired, chosen_variant
from attackroute.experiments.repair_criteria import (
    ATTRIBUTION,
    INFLUENCE,
    NOISE_ROUTE,
    NOISE_SIGNED,
    RANDOM,
    SENSITIVITY,
    VARIANTS,
    Layers,
    Pairs,
    criterion_scores,
)
from attackroute.experiments.tables import Record
from attackroute.layers import frozen
from attackroute.measurements import Journal
from attackroute.selection import top_k

JOURNAL = "repair.jsonl"
_WIDTH = 0.3  # of a route, the paper's
_BATCH = 128
_PLACES = 2


@dataclass(frozen=True)
class RepairStudy:
    """A finished study.

    Attributes:
        picked: The variant of the noise route that the rule took.
        selection: What it was picked from.
        found: By attack, what every criterion repairs.
        moved: By attack, criterion and where the ranks come from: the share of the route's channels that ranks under
            the attack itself keep too, and what they repair.
    """

    picked: str
    selection: Repaired
    found: Mapping[str, Repaired]
    moved: Mapping[tuple[str, str, str], tuple[float, Repaired]]

    @property
    def rule(self) -> str:
        """How the variant is picked."""
        return RULE

    def records(self) -> list[Record]:
        """See :class:`attackroute.experiments.tables.Result`."""
        rows = [{"stage": "selection", **row} for row in self.selection.records(next(iter(self.found)))]
        rows += [{"stage": "final", **row} for attack, found in self.found.items() for row in found.records(attack)]
        for (attack, criterion, origin), (_, found) in self.moved.items():
            rows += [
                {
                    "stage": f"ranked by {origin}", "attack": attack, "criterion": criterion, "layer": "all",
                    "share": share, "measure": "accuracy", "value": float(right.mean()), "images": len(right),
                }
                for share, right in zip(BUDGETS, found.budgets[criterion], strict=True)
            ]  # fmt: skip
        return rows

    def about(self) -> dict[str, Any]:
        """See :class:`attackroute.experiments.tables.Result`."""
        return {
            "picked": self.picked,
            "rule": RULE,
            "shares": list(SHARES),
            "budgets": list(BUDGETS),
            "areas": {
                attack: {
                    criterion: {layer: float(found.area(criterion, layer).mean()) for layer in found.whole}
                    for criterion in found.curves
                }
                for attack, found in self.found.items()
            },
            "mean_areas": {
                attack: {criterion: float(found.areas(criterion).mean()) for criterion in found.curves}
                for attack, found in self.found.items()
            },
            "differences": [
                dict(zip(("attack", "first", "second", "what", "difference"), row, strict=True))
                for row in self.differences()
            ],
            "transfers": [
                {"attack": attack, "criterion": criterion, "ranked_by": origin, "kept": kept}
                for (attack, criterion, origin), (kept, _) in self.moved.items()
            ],
        }

    def reading(self) -> str:
        """See :class:`attackroute.experiments.tables.Result`."""
        first, found = next(iter(self.found.items()))
        best = max(found.curves, key=lambda name: float(found.areas(name).mean()))
        return f"Under {first}, {best} repairs most per channel of a single layer; of the noise routes, {self.picked}."

    def differences(self) -> list[list[str]]:
        """Paired differences of the picked variant and the plain noise route with others, as rows to show."""
        rows = []
        ours = list(dict.fromkeys([self.picked, NOISE_ROUTE]))
        for attack, found in self.found.items():
            pairs = [(one, other) for one in ours for other in (INFLUENCE, ATTRIBUTION, SENSITIVITY, RANDOM)]
            pairs += [(ATTRIBUTION, INFLUENCE), (SENSITIVITY, INFLUENCE), (INFLUENCE, RANDOM)]
            for one, other in pairs:
                rows.append([attack, one, other, "mean area", _shown(found.gain(one, other))])
                for index, share in enumerate(BUDGETS):
                    gain = found.budget_gain(one, other, index)
                    rows.append([attack, one, other, f"{share:.0%} of all", _shown(gain)])
        return rows

    def transfers(self) -> list[list[str]]:
        """What ranks from elsewhere repair, as rows to show."""
        return [
            [attack, criterion, origin, f"{kept:.0%}", *(f"{100 * row.mean():.1f}" for row in found.budgets[criterion])]
            for (attack, criterion, origin), (kept, found) in self.moved.items()
        ]


def study_repair(
    model: nn.Module,
    data: Dataset[Any],
    attacks: Mapping[str, Attack],
    folder: Path,
    *,
    samples: int,
    seed: int = 0,
    resume: bool = False,
    origin: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> RepairStudy:
    """Carry out a study.

    Args:
        model: The network.
        data: Pairs of an image and a label, three times as many as ``samples``.
        attacks: By name; under the first one the variant is picked.
        folder: Where the measurements are kept; it exists.
        samples: Images that rank, that pick, and that judge.
        seed: Which images these are.
        resume: Go on with the study in the folder.
        origin: What else must be the same to go on, as JSON values.
        progress: Called with the transplants that are done, and how many there are.

    Raises:
        UserError: The folder holds a study although ``resume`` is false, or one on other terms.
    """
    terms = {**(origin or {}), "samples": samples, "seed": seed, "attacks": list(attacks)}
    journal = Journal(folder / JOURNAL, terms)
    journal.begin(folder, resume=resume)
    ranking, picking, judging = _sets(model, data, samples, seed)
    first = next(iter(attacks))
    criteria = _defined(model, _attacked(model, attacks[first], *(part[:2] for part in ranking)))
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    pairs = {name: _attacked(model, attack, *ranking) for name, attack in attacks.items()}
    scores = {
        name: {by: criterion_scores(model, some, by, seed=seed) for by in criteria} for name, some in pairs.items()
    }
    layers = len(next(iter(scores[first].values())))
    variants = [by for by in VARIANTS if by in criteria]
    single = layers * (1 + len(SHARES) * len(criteria))
    total = 1 + layers * (1 + len(SHARES) * len(variants)) + len(attacks) * (1 + single + len(BUDGETS) * len(criteria))
    total += 2 * len(attacks) ** 2 * (1 + len(BUDGETS))  # at most
    other = _attacked(model, attacks[first], *picking)
    selection = Repair(model, other, journal, ("selection", first), advance).measure(
        {by: scores[first][by] for by in variants}, together=False
    )
    picked = chosen_variant(selection)
    found: dict[str, Repaired] = {}
    moved: dict[tuple[str, str, str], tuple[float, Repaired]] = {}
    for name, attack in attacks.items():
        repair = Repair(model, _attacked(model, attack, *judging), journal, ("final", name), advance)
        found[name] = repair.measure(scores[name])
        for by in dict.fromkeys((picked, NOISE_ROUTE)):
            elsewhere: dict[str, Layers] = {there: scores[there][by] for there in attacks if there != name}
            if name == first:
                elsewhere["other images"] = criterion_scores(model, other, by, seed=seed)
            for there, theirs in elsewhere.items():
                again = Repair(model, repair.pairs, journal, ("moved", name, there), advance)
                kept = _kept(theirs, scores[name][by])
                moved[name, by, there] = kept, again.measure({by: theirs}, alone=False)
    return RepairStudy(picked, selection, found, moved)


def _sets(model: nn.Module, data: Dataset[Any], samples: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Three sets of images and labels, on the model's device."""
    order = torch.randperm(3 * samples, generator=derived_generator(seed, "repair", 0)).tolist()
    device, dtype = placement(model)
    images = torch.stack([data[index][0] for index in order]).to(device, dtype)
    labels = torch.tensor([data[index][1] for index in order], device=device)
    return list(zip(images.split(samples), labels.split(samples), strict=True))


def _attacked(model: nn.Module, attack: Attack, images: Tensor, labels: Tensor) -> Pairs:
    with frozen(model):
        parts = [
            attacked(model, attack, some, answers)[0]
            for some, answers in zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
        ]
    return Pairs(images, torch.cat(parts), labels)


def _defined(model: nn.Module, some: Pairs) -> list[str]:
    """The criteria, without the signed noise where the network is no chain."""
    try:
        criterion_scores(model, some, NOISE_SIGNED)
    except UserError:
        return [by for by in CRITERIA if by != NOISE_SIGNED]
    return list(CRITERIA)


def _kept(one: Layers, other: Layers) -> float:
    """The share of one route's channels that the other has too, at the paper's width."""
    shared = sum(int((top_k(one[layer], _WIDTH) & top_k(other[layer], _WIDTH)).sum()) for layer in one)
    return shared / sum(int(top_k(values, _WIDTH).sum()) for values in one.values())


def _shown(found: PairedDifference) -> str:
    low, high = (100 * bound for bound in found.over_images)
    return f"{100 * found.value:+.{_PLACES}f} ({low:+.{_PLACES}f} to {high:+.{_PLACES}f})"
