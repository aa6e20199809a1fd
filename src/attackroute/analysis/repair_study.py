"""Criteria compared by what they repair, a variant picked by rule, and how ranks transfer: see docs/beyond.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from attackroute.analysis.repair import BUDGETS, CRITERIA, SHARES, Repair, Repaired, chosen_variant
from attackroute.analysis.repair_criteria import (
    FIRST_LAYERS,
    INFLUENCE,
    NOISE_ROUTE,
    NOISE_SIGNED,
    RANDOM,
    VARIANTS,
    Layers,
    Pairs,
    criterion_scores,
    first_layers,
)
from attackroute.analysis.repair_oracle import GREEDY, OWN_EFFECT, Effects, greedy_scores, tries
from attackroute.analysis.repair_results import NetworkRepair, RepairStudy
from attackroute.core.batches import count_samples, derived_generator
from attackroute.core.errors import UserError
from attackroute.core.journal import Journal
from attackroute.core.model_state import frozen, placement
from attackroute.robustness.application import Attack, attacked
from attackroute.routes.masks import top_k

JOURNAL = "repair.jsonl"


_WIDTH = 0.3  # of a route, the paper's


_BATCH = 128


_GREEDY_SHARE = 0.5  # of a layer's channels; beyond, own effects rank


def study_repair(
    models: Mapping[str, nn.Module],
    data: Dataset[Any],
    attacks: Mapping[str, Attack],
    folder: Path,
    *,
    samples: int,
    seed: int = 0,
    oracle: bool = False,
    resume: bool = False,
    origin: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> RepairStudy:
    """Carry out a study.

    Args:
        models: Networks of one architecture by name, such as those of several seeds. Each takes images of its own.
        data: Pairs of an image and a label, at least three times as many as ``samples`` for each
            network.
        attacks: By name; under the first one the variant is picked.
        folder: Where the measurements are kept; it exists.
        samples: Images that rank, that pick, and that judge, for each network.
        seed: Which images these are.
        oracle: Whether channels are also chosen by their true effect, alone and greedily, under the first attack.
        resume: Go on with the study in the folder.
        origin: What else must be the same to go on, as JSON values.
        progress: Called with the steps that are done, most of which are passes over a network's images, and how many
            there are at most.

    Raises:
        UserError: The folder holds a study although ``resume`` is false, or one on other terms; or the networks do not
            have the same layers.
    """
    terms = {
        **(origin or {}), "networks": list(models), "samples": samples, "seed": seed, "attacks": list(attacks),
        "oracle": oracle,
    }  # fmt: skip
    journal = Journal(folder / JOURNAL, terms)
    count = _Count(progress)
    runs = {
        name: _Network(name, model, data, attacks, journal, count, samples, seed, oracle, index)
        for index, (name, model) in enumerate(models.items())
    }
    first, *others = runs
    for name in others:
        if runs[name].channels != runs[first].channels:
            raise UserError(f"networks {first!r} and {name!r} do not have the same layers: compare them one by one")
        if runs[name].criteria != runs[first].criteria:
            raise UserError(
                f"only one of networks {first!r} and {name!r} is a chain of layers: compare them one by one"
            )
    journal.begin(folder, resume=resume)  # only now, since what cannot be compared should not take the folder
    count.total = sum(run.passes for run in runs.values())
    for run in runs.values():
        run.rank()
    selections = {name: run.selection() for name, run in runs.items()}
    picked = chosen_variant(list(selections.values()))
    return RepairStudy(picked, {name: run.judged(selections[name], picked) for name, run in runs.items()})


@dataclass
class _Count:
    """Counts steps."""

    report: Callable[[int, int], None]
    done: int = 0
    total: int = 0

    def advance(self) -> None:
        self.done += 1
        self.report(self.done, max(self.total, self.done))


@dataclass
class _Network:
    """The study of one network."""

    name: str
    model: nn.Module
    data: Dataset[Any]
    attacks: Mapping[str, Attack]
    journal: Journal
    count: _Count
    samples: int
    seed: int
    oracle: bool
    index: int
    channels: dict[str, int] = field(init=False)
    criteria: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._sets = _sets(self.model, self.data, self.samples, self.seed, self.index)
        self._first = next(iter(self.attacks))
        some = self._pairs(self._first, *(part[:2] for part in self._sets[0]))
        self.channels = {layer: len(values) for layer, values in criterion_scores(self.model, some, INFLUENCE).items()}
        self.criteria = _defined(self.model, some)

    def rank(self) -> None:
        """Score the channels by every criterion under every attack."""
        self._ranked: dict[str, Pairs] = {}
        self._scores: dict[str, dict[str, Layers]] = {}
        for name in self.attacks:
            self._ranked[name] = pairs = self._pairs(name, *self._sets[0])
            self._scores[name] = {by: self._scored(pairs, by) for by in self.criteria}

    def _scored(self, pairs: Pairs, by: str) -> Layers:
        scores = criterion_scores(self.model, pairs, by, seed=self.seed)
        self.count.advance()
        return scores

    def _pairs(self, attack: str, images: Tensor, labels: Tensor) -> Pairs:
        return _attacked(self.model, self.attacks[attack], images, labels)

    @property
    def passes(self) -> int:
        """Steps of the progress, at most: scores by a criterion, and passes over a set of images."""
        layers, variants = len(self.channels), [by for by in VARIANTS if by in self.criteria]
        judged = len(self.criteria) * len(self.attacks) + (2 if self.oracle else 0)
        selection = 1 + layers * (1 + len(SHARES) * len(variants))
        final = len(self.attacks) * (1 + layers + len(BUDGETS)) + judged * (layers * len(SHARES) + 2 * len(BUDGETS))
        moved = 2 * len(self.attacks) ** 2 * (1 + 2 * len(BUDGETS))
        tried = tries(self.channels, _GREEDY_SHARE, BUDGETS[-1]) if self.oracle else 0
        scored = len(self.attacks) * len(self.criteria) + 2  # and two criteria on other images
        return scored + selection + final + moved + tried

    def _repair(self, pairs: Pairs, *key: str) -> Repair:
        return Repair(self.model, pairs, self.journal, (self.name, *key), self.count.advance)

    def selection(self) -> Repaired:
        """The variants of the noise route on the images that pick one."""
        scores = self._scores[self._first]
        repair = self._repair(self._pairs(self._first, *self._sets[1]), "selection", self._first)
        return repair.measure({by: scores[by] for by in VARIANTS if by in scores}, together=False)

    def judged(self, selection: Repaired, picked: str) -> NetworkRepair:
        """All criteria on the images that judge."""
        found: dict[str, Repaired] = {}
        moved: dict[tuple[str, str, str], tuple[float, Repaired]] = {}
        for name in self.attacks:
            repair = self._repair(self._pairs(name, *self._sets[2]), "final", name)
            scores = self._scores[name]
            pooled: dict[str, Layers] = {FIRST_LAYERS: first_layers(scores[RANDOM])}
            if self.oracle and name == self._first:
                alone, within, pooled[GREEDY] = self._true_effects()
                scores = {**scores, OWN_EFFECT: alone, GREEDY: within}
            found[name] = repair.measure(scores, pooled=pooled)
            for by in dict.fromkeys((picked, NOISE_ROUTE)):
                for there, theirs in self._elsewhere(name, by).items():
                    again = repair.under((self.name, "moved", name, there))
                    kept = _kept(theirs, scores[by])
                    moved[name, by, there] = kept, again.measure({by: theirs}, alone=False)
        return NetworkRepair(selection, found, moved)

    def _elsewhere(self, attack: str, by: str) -> dict[str, Layers]:
        """Scores under the other attacks, and under the first one on other images."""
        scores = {there: self._scores[there][by] for there in self.attacks if there != attack}
        if attack == self._first:
            scores["other images"] = self._scored(self._pairs(attack, *self._sets[1]), by)
        return scores

    def _true_effects(self) -> tuple[Layers, Layers, Layers]:
        """Own effects, and greedy ranks within layers and in the whole network."""
        key = (self.name, "oracle", self._first)
        known = self.journal.recall(key, "")
        if known is None:
            pairs = self._ranked[self._first]
            effects = Effects(self.model, pairs, self.channels, self.journal, key, self.count.advance)
            alone = effects.alone()
            scores = (alone, *greedy_scores(effects, alone, _GREEDY_SHARE, BUDGETS[-1]))
            plain = [{layer: values.tolist() for layer, values in each.items()} for each in scores]
            known = self.journal.keep(key, "", scores=plain)
        alone, within, pooled = (
            {layer: torch.tensor(values, dtype=torch.float64) for layer, values in each.items()}
            for each in known["scores"]
        )
        return alone, within, pooled


def _sets(model: nn.Module, data: Dataset[Any], samples: int, seed: int, index: int) -> list[tuple[Tensor, Tensor]]:
    """Three sets of images and labels for one of several networks, on its device."""
    total, wanted = count_samples(data, "data"), 3 * samples * (index + 1)
    if total < wanted:
        raise UserError(f"there are {total} images, but three sets of {samples} for each network: take fewer samples")
    shuffled = torch.randperm(total, generator=derived_generator(seed, "repair", 0)).tolist()
    order = shuffled[wanted - 3 * samples : wanted]
    device, dtype = placement(model)
    drawn = [data[at] for at in order]
    images = torch.stack([image for image, _ in drawn]).to(device, dtype)
    labels = torch.tensor([label for _, label in drawn], device=device)
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
