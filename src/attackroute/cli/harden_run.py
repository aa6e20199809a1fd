"""What ``attackroute harden`` does and shows: one hardening with its comparison, or a sweep over lambda."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attackroute.cli import options, train_report
from attackroute.cli.console import Output
from attackroute.cli.evaluate_report import flat
from attackroute.cli.harden_comparison import AFTER, BEFORE, Comparison, show
from attackroute.core.distributed import current, leading, take_from_first
from attackroute.core.files import write_json
from attackroute.hardening.harden import ROUTE_FILE, Factor, HardenResult, factor_of, harden
from attackroute.robustness.attack import Perturbation
from attackroute.zoo.data import ImageData, drawn
from attackroute.zoo.sources import load_data
from attackroute.zoo.weights import (
    BEST,
    ModelCard,
    find_card,
    load_weights,
    open_network,
    spec_for,
    with_own_normalisation,
)

SUMMARY = "hardening.json"


@dataclass(frozen=True, eq=False)
class HardenRun:
    """The network, the images and how to train.

    Attributes:
        network: As it was, on its device.
        card: How to build it again.
        learnt: The training images, less those that are held out.
        chosen_by: The images that choose the best epoch, and lambda in a sweep; None without any.
        chosen_on: What images these are, in a word.
        final: How before and after are compared; None without images for it.
        trials: How the networks of a sweep are compared; None without images for it.
        options: For :func:`attackroute.hardening.harden`.
        output: Where to talk.
    """

    network: nn.Module
    card: ModelCard
    learnt: ImageData
    chosen_by: ImageData | None
    chosen_on: str
    final: Comparison | None
    trials: Comparison | None
    options: Mapping[str, Any]
    output: Output

    @classmethod
    def open(
        cls,
        model: str,
        data: str,
        *,
        weights: Path | None,
        width: float | None,
        image_size: int | None,
        skip_unreadable: bool,
        holdout: float,
        evaluate_samples: int | None,
        autoattack: tuple[int, Perturbation | None],
        checks: int,
        device: torch.device,
        attacks: Sequence[Perturbation],
        options: Mapping[str, Any],
        output: Output,
    ) -> HardenRun:
        """Load the images and the network; arguments as on the command line."""
        found = find_card(model)
        size = image_size if image_size is not None or found is None else found[1].spec.image_size
        seed = options["train"].seed
        train = load_data(data, split="train", image_size=size, skip_unreadable=skip_unreadable)
        test = train_report.test_data(data, train, output, size, skip_unreadable)
        _report_skipped(train, test, output)
        network = open_network(model, train, weights=weights, width=width).to(device)
        spec = (
            found[1].spec if found is not None else with_own_normalisation(spec_for(model, train, width=width), network)
        )
        learnt, chosen_by = train_report.divided(train, test, holdout, seed)
        final, trials = None, None
        judged_on = test if test is not None else chosen_by
        if judged_on is not None and chosen_by is not None:
            count, attack = autoattack
            shown = _some(judged_on, evaluate_samples, seed)
            final = Comparison(
                shown, attacks, _some(shown, count, seed) if count else None, attack, checks, seed, output
            )
            trials = Comparison(_some(chosen_by, evaluate_samples, seed), attacks, None, None, 0, seed, output)
        card = ModelCard(spec, train.classes)
        chosen_on = train_report.HELD_OUT if holdout else train_report.TEST
        return cls(network, card, learnt, chosen_by, chosen_on, final, trials, options, output)

    def harden(self, folder: Path, lam: Factor, *, resume: bool, tensorboard: bool) -> None:
        """Harden into a folder, and compare."""
        team = current()
        team.first(lambda: train_report.prepare(folder, self.card, resume=resume))
        hardened = copy.deepcopy(self.network)
        result = self._train(hardened, lam, folder, resume=resume, tensorboard=tensorboard)
        best = result.training.best
        if best is not None:  # what other commands load
            team.first(lambda: load_weights(hardened, folder / BEST))
            take_from_first(hardened, team)
        evaluation = None
        if self.final is not None:
            models = {BEFORE: self.network, AFTER: hardened}
            evaluation = self.final.of(models, folder, resume=resume)
        summary = {
            "folder": str(folder),
            **_summary(result, lam),
            "best_epoch": None if best is None else best.epoch,
            "best_epoch_by": f"{self.chosen_on} images",
            "evaluation": None if evaluation is None else evaluation.to_json(),
        }
        if team.leads:
            write_json(folder / SUMMARY, summary)
        self.output.result(summary)
        self._show_route(result, lam)
        if best is not None:
            self.output.line(train_report.best_line(best, len(result.training.history), self.chosen_on))
        if evaluation is not None:
            show(self.output, evaluation)
        self.output.line(f"weights, log, {SUMMARY}{f', {ROUTE_FILE}' if result.route else ''} are in {folder}")

    def sweep(self, factors: Sequence[float]) -> None:
        """Harden a copy with each lambda, and compare all of them."""
        models: dict[str, nn.Module] = {BEFORE: self.network}
        results = {}
        for lam in factors:
            name = f"lambda {lam:g}"
            models[name] = copy.deepcopy(self.network)
            results[name] = self._train(models[name], lam, None, resume=False, tensorboard=False)
        evaluation = None if self.trials is None else self.trials.of(models, None, resume=False)
        rows = {name: _summary(result, lam) for (name, result), lam in zip(results.items(), factors, strict=True)}
        self.output.result({"sweep": rows, "evaluation": None if evaluation is None else flat(evaluation)})
        first = next(iter(results.values()))
        self._show_route(first, None)
        if evaluation is None:
            return
        attacks = evaluation.table.distinct("attack")
        self.output.line(f"on {evaluation.table[0]['samples']} {self.chosen_on} images:")
        self.output.table(
            ["lambda", *(attack.partition(":")[0] for attack in attacks)],
            [
                [
                    name.removeprefix("lambda "),
                    *(f"{evaluation.accuracy(attack, name).value:.1%}" for attack in attacks),
                ]
                for name in models
            ],
        )

    def _train(
        self, network: nn.Module, lam: Factor, folder: Path | None, *, resume: bool, tensorboard: bool
    ) -> HardenResult:
        epochs = self.options["train"].epochs
        with (
            self.output.progress("steps") as progress,
            train_report.on_epoch(
                self.output, epochs, folder if tensorboard and leading() else None, self.chosen_on
            ) as on_epoch,
        ):
            return harden(
                network,
                self.learnt,
                self.chosen_by,
                lam=lam,
                folder=folder,
                resume=resume,
                on_epoch=on_epoch,
                progress=progress,
                **self.options,
            )

    def _show_route(self, result: HardenResult, lam: Factor | None) -> None:
        if result.route is None:
            return
        self.output.line(f"route: {result.route.size} of {sum(result.route.channels.values())} neurons")
        if result.overlap is not None:
            self.output.line(f"  the route of all training images shares {result.overlap}; the paper reports 94.6 %")
        for change in result.changes:
            self.output.line(f"  before epoch {change.epoch}: {change.changed} of {change.size} neurons are new")
        for name, strength in result.strengths.items():
            factor = None if lam is None else factor_of(name, lam)
            first = "" if factor is None else f", {factor * strength:.3g} of it at lambda {factor:g}"
            self.output.line(f"{name} penalty: its gradient is {strength:.3g} times the task's at first{first}")


def _summary(result: HardenResult, lam: Factor) -> dict[str, Any]:
    last = result.training.last
    return {
        "lambda": lam if isinstance(lam, float) else dict(lam),
        "epochs": last.epoch,
        "resumed_from": result.training.resumed_from,
        "penalties": dict(last.penalties),
        "strengths": {name: value if math.isfinite(value) else None for name, value in result.strengths.items()},
        "route_changes": [asdict(change) for change in result.changes],
        "overlap_with_full_route": None if result.overlap is None else result.overlap.to_json(),
        "accuracy": None if last.test is None else last.test.value,
        "robust_accuracy": None if last.robust is None else last.robust.value,
    }


def _some(images: ImageData, count: int | None, seed: int) -> ImageData:
    return images if count is None else replace(images, dataset=drawn(images.dataset, count, seed))


def _report_skipped(train: ImageData, test: ImageData | None, output: Output) -> None:
    for part in (train, test):
        options.report_skipped(part, output)
