"""What ``attackroute harden`` does and shows: one hardening with its comparison, or a sweep over lambda."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attackroute.attacks import Perturbation, parse_attack
from attackroute.balls import ball_of
from attackroute.checkpoints import BEST
from attackroute.cli import options, train_report
from attackroute.cli.console import Output
from attackroute.cli.networks import ModelCard, find_card, open_network, spec_for, with_own_normalisation
from attackroute.cli.unfinished import write_json
from attackroute.data import ImageData, load_data, loader
from attackroute.evaluation import evaluate
from attackroute.evaluation_table import COLUMNS, Evaluation
from attackroute.hardening import ROUTE_FILE, HardenResult, harden
from attackroute.models import load_weights

SUMMARY = "hardening.json"


@dataclass(frozen=True, eq=False)
class HardenRun:
    """The network, the images and how to train.

    Attributes:
        network: As it was, on its device.
        card: How to build it again.
        train: The training images.
        test: The test images that are tested after every epoch; None without any.
        compared: Those on which before and after are compared.
        attacks: Under what they are compared.
        options: For :func:`attackroute.hardening.harden`.
        output: Where to talk.
    """

    network: nn.Module
    card: ModelCard
    train: ImageData
    test: ImageData | None
    compared: ImageData | None
    attacks: Sequence[Perturbation]
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
        evaluate_samples: int | None,
        device: torch.device,
        attacks: Sequence[Perturbation],
        options: Mapping[str, Any],
        output: Output,
    ) -> HardenRun:
        """Load the images and the network; arguments as on the command line."""
        found = find_card(model)
        size = image_size if image_size is not None or found is None else found[1].spec.image_size
        train = load_data(data, split="train", image_size=size, skip_unreadable=skip_unreadable)
        test = train_report.test_data(data, train, output, size, skip_unreadable)
        _report_skipped(train, test, output)
        network = open_network(model, train, weights=weights, width=width).to(device)
        spec = (
            found[1].spec if found is not None else with_own_normalisation(spec_for(model, train, width=width), network)
        )
        compared = test
        if test is not None and evaluate_samples is not None:
            seed = options["settings"].seed
            compared = load_data(
                data, split="test", image_size=size, samples=evaluate_samples, seed=seed,
                skip_unreadable=skip_unreadable,
            )  # fmt: skip
        return cls(network, ModelCard(spec, train.classes), train, test, compared, attacks, options, output)

    def harden(self, folder: Path, lam: float, *, resume: bool, tensorboard: bool) -> None:
        """Harden into a folder, and compare."""
        train_report.prepare(folder, self.card, resume=resume)
        hardened = copy.deepcopy(self.network)
        result = self._train(hardened, lam, folder, resume=resume, tensorboard=tensorboard)
        best = result.training.best
        if best is not None:  # what other commands load
            load_weights(hardened, folder / BEST)
        evaluation = self._compare({"before": self.network, "after": hardened})
        summary = {
            "folder": str(folder),
            **_summary(result, lam),
            "best_epoch": None if best is None else best.epoch,
            "evaluation": None if evaluation is None else evaluation.to_json(),
        }
        write_json(folder / SUMMARY, summary)
        self.output.result(summary)
        self._show_route(result, lam)
        if best is not None:
            self.output.line(train_report.best_line(best, len(result.training.history)))
        if evaluation is not None:
            self.output.table(COLUMNS, [row.cells() for row in evaluation.rows])
        self.output.line(f"weights, log, {SUMMARY}{f', {ROUTE_FILE}' if result.route else ''} are in {folder}")

    def sweep(self, factors: Sequence[float]) -> None:
        """Harden a copy with each lambda, and compare all of them."""
        models: dict[str, nn.Module] = {"before": self.network}
        results = {}
        for lam in factors:
            name = f"lambda {lam:g}"
            models[name] = copy.deepcopy(self.network)
            results[name] = self._train(models[name], lam, None, resume=False, tensorboard=False)
        evaluation = self._compare(models)
        rows = {name: _summary(result, lam) for (name, result), lam in zip(results.items(), factors, strict=True)}
        self.output.result({"sweep": rows, "evaluation": None if evaluation is None else evaluation.to_json()})
        first = next(iter(results.values()))
        self._show_route(first, None)
        if evaluation is None:
            return
        attacks = dict.fromkeys(row.attack for row in evaluation.rows)
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
        self, network: nn.Module, lam: float, folder: Path | None, *, resume: bool, tensorboard: bool
    ) -> HardenResult:
        epochs = self.options["settings"].epochs
        with (
            self.output.progress("steps") as progress,
            train_report.on_epoch(self.output, epochs, folder if tensorboard else None) as on_epoch,
        ):
            return harden(
                network,
                self.train,
                self.test,
                lam=lam,
                folder=folder,
                resume=resume,
                on_epoch=on_epoch,
                progress=progress,
                **self.options,
            )

    def _compare(self, models: Mapping[str, nn.Module]) -> Evaluation | None:
        if self.compared is None:
            return None
        with self.output.progress("images attacked") as progress:
            return evaluate(models, loader(self.compared), self.attacks, checks=0, progress=progress)

    def _show_route(self, result: HardenResult, lam: float | None) -> None:
        if result.route is None:
            return
        share = "" if result.overlap is None else f"; all training images agree on {result.overlap:.0%} or more a layer"
        self.output.line(f"route: {result.route.size} of {sum(result.route.channels.values())} neurons{share}")
        for change in result.changes:
            self.output.line(f"  before epoch {change.epoch}: {change.changed} of {change.size} neurons are new")
        for name, strength in result.strengths.items():
            first = "" if lam is None else f", {lam * strength:.3g} of it at lambda {lam:g}"
            self.output.line(f"{name} penalty: its gradient is {strength:.3g} times the task's at first{first}")


def compared_by(
    names: Sequence[str], eps: float | None, against: Perturbation | None, seed: int
) -> tuple[Perturbation, ...]:
    """The attacks of the comparison; ``eps``, or the radius trained against, is for those that do not state theirs."""
    own = None if against is None else ball_of(against)
    if eps is None and own is not None and own.norm == "linf":
        eps = own.eps
    attacks = []
    for text in names:
        attack = parse_attack(text, seed=seed)
        ball = ball_of(attack)
        if eps is not None and ball is not None and ball.norm == "linf":  # a radius in another norm is another thing
            attack = parse_attack(text, eps=eps, seed=seed)
        attacks.append(attack)
    return tuple(attacks)


def _summary(result: HardenResult, lam: float) -> dict[str, Any]:
    last = result.training.last
    return {
        "lambda": lam,
        "epochs": last.epoch,
        "resumed_from": result.training.resumed_from,
        "penalties": dict(last.penalties),
        "strengths": {name: value if math.isfinite(value) else None for name, value in result.strengths.items()},
        "route_changes": [asdict(change) for change in result.changes],
        "overlap_with_full_route": result.overlap,
        "test_accuracy": None if last.test is None else last.test.value,
        "robust_accuracy": None if last.robust is None else last.robust.value,
    }


def _report_skipped(train: ImageData, test: ImageData | None, output: Output) -> None:
    for part in (train, test):
        options.report_skipped(part, output)
