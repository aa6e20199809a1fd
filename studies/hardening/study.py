"""Do penalties on the route harden a network, and more than on other neurons? Section 5.1 with its controls.

A network is trained without and with PGD; each is fine-tuned without a penalty and with each penalty, on the route's
neurons, on as many random ones off it, and on all. Every penalised variant gets the lambda that a fixed rule chooses on
validation images, on a network of another seed. Only then are the test images looked at.

In the folder every variant has a folder of its own, with its weights and its evaluation; ``tuning.jsonl`` holds what
the lambdas were chosen from. A study that was broken off goes on where it was.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from attackroute.core.batches import count_samples, drawn_over_classes
from attackroute.core.errors import UserError
from attackroute.core.journal import Journal
from attackroute.core.statistics import Accuracy
from attackroute.hardening.harden import HardenResult, RouteObjective, harden
from attackroute.hardening.settings import GRADIENT, HardenSettings
from attackroute.hardening.training import train
from attackroute.paper.hardening_tables import STUDY
from attackroute.paper.published import BASES, PAT
from attackroute.robustness.evaluate import evaluate
from attackroute.robustness.registry import parse_attack
from attackroute.tracing.config import TraceConfig
from attackroute.zoo.data import ImageData, held_out
from attackroute.zoo.networks import build
from attackroute.zoo.weights import LAST, ModelCard, spec_for, with_own_normalisation
from studies.command import begin
from studies.hardening.plan import StudyPlan, Trial, Variant, judged, punished
from studies.hardening.results import HardeningStudy, Outcome, Tuning

Progress = Callable[[int, int, str], None]
Build = Callable[[int], nn.Module]
"""Makes a network with initial weights that a seed decides."""

TUNING = "tuning.jsonl"
_SCRATCH = "tuning"
_BATCH = 128


def study_hardening(
    build: Build,
    train_data: Dataset[Any],
    test_data: Dataset[Any],
    plan: StudyPlan,
    folder: Path,
    *,
    resume: bool = False,
    origin: Mapping[str, Any] | None = None,
    progress: Progress = lambda *_: None,
) -> HardeningStudy:
    """Carry out a study.

    Args:
        build: Makes the networks.
        train_data: Pairs of an image and a label; a part of it chooses the lambdas.
        test_data: The same, for the final numbers alone.
        plan: What is decided beforehand.
        folder: Where everything is kept; it exists.
        resume: Go on with the study in the folder.
        origin: What else must be the same to go on, such as names of network and data, as JSON values.
        progress: Called with the networks that are done, how many there are, and what is under way.

    Raises:
        UserError: The folder holds a study although ``resume`` is false, or one on other terms; or what training,
            hardening and evaluation raise.
    """
    sizes = {
        "train_samples": count_samples(train_data, "training data"),
        "test_samples": count_samples(test_data, "test data"),
    }
    terms = {**(origin or {}), **plan.terms(), **sizes}
    journal = Journal(folder / TUNING, terms)
    begin(journal, folder / TUNING, resume=resume)
    learnt, validation = held_out(train_data, plan.validation, plan.tuning_seed)
    run = _Study(
        build=build,
        learnt=learnt,
        validation=validation,
        test=test_data,
        plan=plan,
        folder=folder,
        journal=journal,
        count=_Count(progress, plan),
    )
    tuning = tuple(run.tuned())
    shutil.rmtree(folder / _SCRATCH, ignore_errors=True)
    chosen = {each.variant: each.chosen.lam for each in tuning}
    outcomes = tuple(run.outcomes(chosen))
    return HardeningStudy(plan, tuning, outcomes, terms)


def study_networks(
    plan: StudyPlan,
    model: str,
    width: float,
    data: str,
    train: ImageData,
    test: ImageData,
    folder: Path,
    *,
    resume: bool,
    device: torch.device,
    progress: Progress = lambda *_: None,
) -> HardeningStudy:
    """Carry out a study of networks by name, and write its table; each network's folder is one that ``train`` writes.

    Args:
        plan: What is decided beforehand.
        model: Name of the network.
        width: Factor on its channels.
        data: As :func:`attackroute.load_data` takes it.
        train: The training images.
        test: The test images.
        folder: Where everything goes; it exists.
        resume: Go on with the study in the folder.
        device: Where networks are trained.
        progress: As for :func:`study_hardening`.

    Raises:
        UserError: There are no training images apart from the test images, or what the study raises.
    """
    if train.split == "all":
        raise UserError("the folder has no train/ and test/ (or val/), so there is nothing to judge on; divide it")
    spec = spec_for(model, train, width=width)

    def made(seed: int) -> nn.Module:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return build(spec).to(device)

    origin = {"model": model, "width": width, "data": data, "image_size": spec.image_size}
    study = study_hardening(
        made, train.dataset, test.dataset, plan, folder, resume=resume, origin=origin, progress=progress
    )
    card = ModelCard(with_own_normalisation(spec, made(plan.tuning_seed)), train.classes)
    for network in folder.glob(f"seed-*/*/{LAST}"):
        card.save(network.parent)
    study.document().save(folder, STUDY)
    return study


class _Count:
    """Counts networks."""

    def __init__(self, report: Progress, plan: StudyPlan) -> None:
        variants = len(list(judged(plan)))
        trials = len(plan.bases) + len(list(punished(plan))) * len(plan.shares)
        self._report, self._done = report, 0
        self._total = len(plan.bases) + trials + len(plan.seeds) * variants

    def expect(self) -> None:
        """One network more than was planned."""
        self._total += 1

    def begin(self, message: str) -> None:
        self._report(self._done, self._total, message)

    def advance(self) -> None:
        self._done += 1


@dataclass(frozen=True)
class _Study:
    build: Build
    learnt: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    plan: StudyPlan
    folder: Path
    journal: Journal
    count: _Count

    def tuned(self) -> Iterator[Tuning]:
        """The lambda of every penalised variant."""
        seed = self.plan.tuning_seed
        for base in self.plan.bases:
            network = self._trained(base, seed)
            reference = self._trial(network, Variant(base), 0.0)
            for penalty in self.plan.penalties:
                grid = self._grid(network, base, penalty)
                for variant in punished(self.plan):
                    if (variant.base, variant.penalty) == (base, penalty):
                        trials = [self._trial(network, variant, lam) for lam in grid]
                        while (lam := self.plan.larger(trials, reference)) is not None:
                            self.count.expect()
                            trials.append(self._trial(network, variant, lam))
                        yield Tuning(variant, reference, tuple(trials), self.plan.choose(trials, reference))

    def outcomes(self, chosen: Mapping[Variant, float]) -> Iterator[Outcome]:
        """Every variant of every seed, on the test images."""
        for seed in self.plan.seeds:
            networks = {base: self._trained(base, seed) for base in BASES}
            for variant in judged(self.plan):
                lam = chosen.get(replace(variant, every_image=False), 0.0) if variant.penalty else None
                yield self._judged(networks, variant, seed, lam)

    def _trained(self, base: str, seed: int) -> nn.Module:
        title = f"{base}, seed {seed}"
        self.count.begin(title)
        network = self.build(seed)
        train(
            network, self.learnt, None, replace(self.plan.training, seed=seed),
            attack=self._attack(base), folder=self._folder_of(seed, base), resume=True, progress=self._steps(title),
        )  # fmt: skip
        if seed == self.plan.tuning_seed:
            self.count.advance()
        return network.eval()

    def _attack(self, base: str) -> str | None:
        return self.plan.training_attack if base == PAT else None

    def _steps(self, title: str) -> Callable[[int, int, str], None]:
        return lambda done, total, _: self.count.begin(f"{title}: step {done} of {total}")

    def _folder_of(self, seed: int, name: str) -> Path:
        return self.folder / f"seed-{seed}" / _words(name)

    def _grid(self, network: nn.Module, base: str, penalty: str) -> list[float]:
        """The lambdas to try, from the strength of the penalty on the route."""
        settings = HardenSettings(compare_full=False, trace=TraceConfig(carrier=self.plan.carrier))
        objective = RouteObjective({penalty: 0.0}, self._attack(base), settings)
        objective.start(copy.deepcopy(network), self.learnt, self.plan.tuning_seed)
        return [float(f"{share / objective.strengths[penalty]:.2g}") for share in sorted(self.plan.shares)]

    def _trial(self, network: nn.Module, variant: Variant, lam: float) -> Trial:
        title = f"{variant.name}, lambda {lam:g}"
        self.count.begin(f"choose lambda: {title}")
        key = ("tuning", variant.name, repr(lam))
        record = self.journal.recall(key, "")
        if record is None:
            scratch = self.folder / _SCRATCH / _words(f"{variant.name} {lam:g}")
            model = copy.deepcopy(network)
            self._fine_tune(model, variant, self.plan.tuning_seed, lam, scratch, f"choose lambda: {title}")
            judge = self.plan.judge_of(variant.base)
            evaluation = evaluate(model, DataLoader(self.validation, _BATCH), [judge], checks=0)
            clean, attacked = (evaluation.accuracy(attack) for attack in evaluation.table.distinct("attack"))
            record = self.journal.keep(key, "", clean=vars(clean), attacked=vars(attacked))
            shutil.rmtree(scratch, ignore_errors=True)
        self.count.advance()
        return Trial(lam, Accuracy(**record["clean"]), Accuracy(**record["attacked"]))

    def _fine_tune(
        self, model: nn.Module, variant: Variant, seed: int, lam: float | None, folder: Path, title: str
    ) -> HardenResult:
        """Fine-tune in place."""
        paper = Variant(variant.base, True, GRADIENT, carrier=self.plan.carrier)
        return harden(
            model,
            self.learnt,
            penalty=variant.penalty,
            lam=lam or 0.0,
            attack=self._attack(variant.base),
            settings=HardenSettings(
                target=variant.target,
                route_samples=1.0 if variant.every_image else 0.1,
                compare_full=folder.parent.name != _SCRATCH and variant == paper,
                trace=TraceConfig(carrier=variant.carrier),
            ),
            train=replace(self.plan.fine_tuning, seed=seed),
            folder=folder,
            resume=True,
            progress=self._steps(title),
        )

    def _judged(self, networks: Mapping[str, nn.Module], variant: Variant, seed: int, lam: float | None) -> Outcome:
        title, folder = f"{variant.name}, seed {seed}", self._folder_of(seed, variant.name)
        self.count.begin(title)
        model = copy.deepcopy(networks[variant.base])
        result = self._fine_tune(model, variant, seed, lam, folder, title) if variant.tuned else None
        first = seed == self.plan.seeds[0]
        evaluations = [
            evaluate(
                model, DataLoader(self.test, _BATCH), self.plan.attacks,
                checks=self.plan.check_samples if first else 0, folder=folder / "evaluation", resume=True,
            )
        ]  # fmt: skip
        if self.plan.autoattack_samples:
            # the same for every seed and variant, which are compared image by image
            drawn = drawn_over_classes(self.test, self.plan.autoattack_samples, self.plan.tuning_seed)
            some = Subset(self.test, drawn)
            attack = parse_attack("autoattack", eps=self.plan.eps, seed=seed)
            evaluations.append(
                evaluate(model, DataLoader(some, _BATCH), [attack], checks=0, folder=folder / "autoattack", resume=True)
            )
        self.count.advance()
        right = {
            attack.partition(":")[0]: answers
            for evaluation in reversed(evaluations)
            for (_, attack), answers in evaluation.right.items()
        }
        order = dict.fromkeys(attack.partition(":")[0] for evaluation in evaluations for _, attack in evaluation.right)
        return Outcome(
            variant=variant,
            seed=seed,
            lam=lam,
            right={name: right[name] for name in order},
            checks=evaluations[0].checks,
            overlap=None if result is None else result.overlap,
        )


def _words(name: str) -> str:
    """A variant's name as a folder's."""
    return "-".join("".join(letter for letter in name if letter not in ",()").split())
