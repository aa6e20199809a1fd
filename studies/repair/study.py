"""Criteria compared by what they repair, a variant picked by rule, and how ranks transfer: see docs/beyond.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from attackroute.analysis.channel_statistics import PATH_POINTS
from attackroute.core.batches import count_samples
from attackroute.core.errors import UserError
from attackroute.core.journal import Journal
from attackroute.core.model_state import frozen, placement
from attackroute.core.random import derived_generator
from attackroute.robustness.attack import Attack, Perturbation, attacked
from attackroute.routes.masks import top_k
from studies.command import begin
from studies.repair.criteria import (
    EQUAL_COMPUTE,
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
from studies.repair.oracle import GREEDY, OWN_EFFECT, Effects, greedy_scores
from studies.repair.repair import BUDGETS, CRITERIA, Repair, Repaired, chosen_variant
from studies.repair.results import NetworkRepair, RepairStudy

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
    criteria: Sequence[str] = CRITERIA,
    oracle: bool = False,
    resume: bool = False,
    origin: Mapping[str, Any] | None = None,
    progress: Callable[[int, None], None] = lambda *_: None,
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
        criteria: What is judged, beside the noise route and random channels, which always are.
        oracle: Whether channels are also chosen by their true effect, alone and greedily, under the first attack.
        resume: Go on with the study in the folder.
        origin: What else must be the same to go on, as JSON values.
        progress: Called with the steps that are done, most of which are passes over a network's images, and None, since
            nobody knows how many there are.

    Raises:
        UserError: The folder holds a study although ``resume`` is false, or one on other terms; or the networks do not
            have the same layers.
    """
    criteria = [by for by in CRITERIA if by in (*criteria, NOISE_ROUTE, RANDOM)]
    terms = {
        **(origin or {}), "networks": list(models), "samples": samples, "seed": seed, "attacks": list(attacks),
        "criteria": criteria, "oracle": oracle,
    }  # fmt: skip
    journal = Journal(folder / JOURNAL, terms)
    done = count(1)
    runs = {
        name: _Network(
            name=name,
            model=model,
            data=data,
            attacks=attacks,
            journal=journal,
            samples=samples,
            seed=seed,
            criteria=criteria,
            oracle=oracle,
            index=index,
            advance=lambda: progress(next(done), None),
        )
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
    begin(
        journal, folder / JOURNAL, resume=resume
    )  # only now, since what cannot be compared should not take the folder
    for run in runs.values():
        run.rank()
    selections = {name: run.selection() for name, run in runs.items()}
    picked = chosen_variant(list(selections.values()))
    networks = {name: run.judged(selections[name], picked) for name, run in runs.items()}
    return RepairStudy(picked, networks, terms)


@dataclass
class _Network:
    """The study of one network."""

    name: str
    model: nn.Module
    data: Dataset[Any]
    attacks: Mapping[str, Attack]
    journal: Journal
    samples: int
    seed: int
    criteria: list[str]
    oracle: bool
    index: int
    advance: Callable[[], None]
    channels: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self._sets = _sets(self.model, self.data, self.samples, self.seed, self.index)
        self._first = next(iter(self.attacks))
        some = self._pairs(self._first, *(part[:2] for part in self._sets[0]))
        self.channels = {layer: len(values) for layer, values in criterion_scores(self.model, some, INFLUENCE).items()}
        self.criteria = _defined(self.model, some, self.criteria)

    def rank(self) -> None:
        """Score the channels by every criterion under every attack."""
        self._ranked: dict[str, Pairs] = {}
        self._scores: dict[str, dict[str, Layers]] = {}
        for name in self.attacks:
            self._ranked[name] = pairs = self._restarted(name, *self._sets[0])
            self._scores[name] = {by: self._scored(pairs, by) for by in self.criteria}

    def _scored(self, pairs: Pairs, by: str) -> Layers:
        scores = criterion_scores(self.model, pairs, by, seed=self.seed)
        self.advance()
        return scores

    def _pairs(self, attack: str, images: Tensor, labels: Tensor) -> Pairs:
        return _attacked(self.model, self.attacks[attack], images, labels)

    def _restarted(self, attack: str, images: Tensor, labels: Tensor) -> Pairs:
        """Images with as many attacks, where these are random, as a path has points."""
        pairs, first = self._pairs(attack, images, labels), self.attacks[attack]
        if EQUAL_COMPUTE not in self.criteria or not isinstance(first, Perturbation) or not hasattr(first, "seed"):
            return pairs
        others = [replace(first, seed=first.seed + start) for start in range(1, len(PATH_POINTS))]  # type: ignore[call-arg]
        return replace(pairs, restarts=[_attacked(self.model, other, images, labels).attacked for other in others])

    def _repair(self, pairs: Pairs, *key: str) -> Repair:
        return Repair(self.model, pairs, self.journal, (self.name, *key), self.advance)

    def selection(self) -> Repaired:
        """The variants of the noise route on the images that pick one."""
        scores = self._scores[self._first]
        repair = self._repair(self._pairs(self._first, *self._sets[1]), "selection", self._first)
        return repair.measure({by: scores[by] for by in VARIANTS if by in scores}, together=False)

    def judged(self, selection: Repaired, picked: str) -> NetworkRepair:
        """All criteria on the images that judge."""
        repaired: dict[str, Repaired] = {}
        moved: dict[tuple[str, str, str], tuple[float, Repaired]] = {}
        for name in self.attacks:
            repair = self._repair(self._pairs(name, *self._sets[2]), "final", name)
            scores = self._scores[name]
            pooled: dict[str, Layers] = {FIRST_LAYERS: first_layers(scores[RANDOM])}
            if self.oracle and name == self._first:
                alone, within, pooled[GREEDY] = self._true_effects()
                scores = {**scores, OWN_EFFECT: alone, GREEDY: within}
            repaired[name] = repair.measure(scores, pooled=pooled)
            for by in dict.fromkeys((picked, NOISE_ROUTE)):
                for there, theirs in self._elsewhere(name, by).items():
                    again = repair.under((self.name, "moved", name, there))
                    kept = _kept(theirs, scores[by])
                    moved[name, by, there] = kept, again.measure({by: theirs}, alone=False)
        return NetworkRepair(selection, repaired, moved)

    def _elsewhere(self, attack: str, by: str) -> dict[str, Layers]:
        """Scores under the other attacks, and under the first one on other images."""
        scores = {there: self._scores[there][by] for there in self.attacks if there != attack}
        if attack == self._first:
            scores["other images"] = self._scored(self._pairs(attack, *self._sets[1]), by)
        return scores

    def _true_effects(self) -> tuple[Layers, Layers, Layers]:
        """Own effects, and greedy ranks within layers and in the whole network."""
        key = (self.name, "oracle", self._first)
        record = self.journal.recall(key, "")
        if record is None:
            pairs = self._ranked[self._first]
            effects = Effects(self.model, pairs, self.channels, self.journal, key, self.advance)
            alone = effects.alone()
            scores = (alone, *greedy_scores(effects, alone, _GREEDY_SHARE, BUDGETS[-1]))
            plain = [{layer: values.tolist() for layer, values in each.items()} for each in scores]
            record = self.journal.keep(key, "", scores=plain)
        alone, within, pooled = (
            {layer: torch.tensor(values, dtype=torch.float64) for layer, values in each.items()}
            for each in record["scores"]
        )
        return alone, within, pooled


def _sets(model: nn.Module, data: Dataset[Any], samples: int, seed: int, index: int) -> list[tuple[Tensor, Tensor]]:
    """Three sets of images and labels for one of several networks, on its device."""
    total, stop = count_samples(data, "data"), 3 * samples * (index + 1)
    if total < stop:
        raise UserError(f"there are {total} images, but three sets of {samples} for each network: take fewer samples")
    shuffled = torch.randperm(total, generator=derived_generator(seed, "repair", 0)).tolist()
    order = shuffled[stop - 3 * samples : stop]
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


def _defined(model: nn.Module, some: Pairs, criteria: list[str]) -> list[str]:
    """The criteria, without the signed noise where the network is no chain."""
    try:
        criterion_scores(model, some, NOISE_SIGNED)
    except UserError:
        return [by for by in criteria if by != NOISE_SIGNED]
    return criteria


def _kept(one: Layers, other: Layers) -> float:
    """The share of one route's channels that the other has too, at the paper's width."""
    shared = sum(int((top_k(one[layer], _WIDTH) & top_k(other[layer], _WIDTH)).sum()) for layer in one)
    return shared / sum(int(top_k(values, _WIDTH).sum()) for values in one.values())
