"""``attackroute harden``: fine-tune a network with penalties on its critical attacking route."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attackroute.cli.arguments import (
    given,
    one_of,
    option,
    parse_number,
    parse_path,
    parse_share,
    settings_of,
    shared,
    switch,
)
from attackroute.cli.console import Output
from attackroute.cli.evaluate import parse_attacks
from attackroute.cli.options import (
    ROUTE,
    ImageOptions,
    NetworkOptions,
    RunOptions,
    TracingOptions,
    TrainingOptions,
    count,
    out_option,
    resolve_device,
    results_in,
)
from attackroute.cli.train import RUN_FILES, best_line, divided, epoch_lines, open_test_images
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from attackroute.core.document import Document
    from attackroute.hardening.harden import Factor, HardenResult
    from attackroute.robustness.attack import Perturbation
    from attackroute.robustness.evaluation import Evaluation
    from attackroute.zoo.data import ImageData
    from attackroute.zoo.weights import ModelCard


HARDENING = "hardening"  # kind of the result, and name of its file
BEFORE, AFTER = "before", "after"

_GRADIENT, _WEIGHT, _STABILISATION, _BOTH, _NONE = "gradient", "weight", "stabilisation", "both", "none"
_EVALUATION = "evaluation"  # folder of what --resume goes on from
_ATTACKS = ("fgsm", "mi-fgsm", "pgd", "gaussian-noise")


def parse_lambda(text: str) -> float | dict[str, float]:
    """Read lambda: one number for all penalties, or one for each as ``gradient=0.03,weight=0.001``."""
    if "=" not in text:
        return parse_number(text)
    named = [pair.partition("=")[::2] for pair in text.split(",")]
    factors = {name.strip(): parse_number(factor) for name, factor in named}
    if len(factors) < len(named):
        raise argparse.ArgumentTypeError(f"{text} names a penalty twice; write gradient=0.01,weight=0.01")
    return factors


def parse_sweep(text: str) -> tuple[float, ...]:
    """Read the lambdas of a sweep, separated by commas."""
    factors = tuple(map(parse_number, text.split(",")))
    if len({f"{factor:g}" for factor in factors}) < len(factors):
        raise argparse.ArgumentTypeError(f"{text} has a factor twice; give each once")
    return factors


@dataclass(frozen=True, kw_only=True)
class PenaltyOptions:
    """What is punished, and how much."""

    title: ClassVar[str] = "The penalty"
    penalty: str = option(
        "--penalty", "The route's loss gradients (Eq. (10)), the weights between its neurons (Eq. (13)), both, or "
        "stabilisation, what --attack changes in its neurons (not the paper's). Kernels behind attention or "
        "normalisation over channels join no two neurons, and have no weight penalty.",
        one_of(_GRADIENT, _WEIGHT, _STABILISATION, _BOTH, _NONE), default=_GRADIENT,
    )  # fmt: skip
    lam: float | dict[str, float] | None = option(
        "--lam", "Lambda, the penalty's factor; with both penalties also as gradient=0.03,weight=0.001.", parse_lambda,
        "FACTOR", default=None,
    )  # fmt: skip
    sweep: tuple[float, ...] | None = option(
        "--sweep", "Try these lambdas and write nothing.", parse_sweep, "F,F,...", default=None
    )
    target: str = option(
        "--target", "The route's neurons, or for controls as many random ones off it, or all.",
        one_of("route", "random", "all"), default="route",
    )  # fmt: skip
    folded: bool = switch(
        "--folded", "Weight penalty on kernels with batch norm folded in, or on kernels as they are.", off="--raw",
        default=True,
    )  # fmt: skip

    @property
    def names(self) -> tuple[str, ...]:
        return {_BOTH: (_GRADIENT, _WEIGHT), _NONE: ()}.get(self.penalty, (self.penalty,))

    def check(self) -> None:
        """Raise a `UserError` unless each penalty has its factor, or several to try."""
        if not self.names and (self.lam is not None or self.sweep is not None):
            raise UserError("--penalty none has no lambda; leave out --lam and --sweep")
        if self.names and (self.lam is None) == (self.sweep is None):
            raise UserError("give the penalty's factor with --lam, or several to try with --sweep 0.01,0.1,1")
        if isinstance(self.lam, dict) and sorted(self.lam) != sorted(self.names):
            example = ",".join(f"{name}=0.01" for name in self.names)
            raise UserError(f"--lam does not name each penalty once; write {example}, or one number for all")


@dataclass(frozen=True, kw_only=True)
class RouteSourceOptions:
    """Where the route comes from."""

    title: ClassVar[str] = ROUTE
    route: Path | None = option(
        "--route", "A route of attackroute trace; else one is traced.", parse_path, "FILE", default=None
    )
    route_samples: float = option(
        "--route-samples", "Share of the training images to trace.", parse_share, "SHARE", default=0.1
    )
    tracing: TracingOptions
    compare_full: bool = switch(
        "--compare-full", "Trace all training images too, and say how much of the route they agree "
        "on.", off="--no-compare-full", default=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """How the network before and after is compared."""

    title: ClassVar[str] = "Before and after"
    attacks: tuple[str, ...] = option(
        "--evaluate", "An attack or corruption to compare under, as in attackroute evaluate; repeat it for several.",
        str, "NAME", default=None, repeat=True,
        unset="fgsm, mi-fgsm, pgd, gaussian-noise",
    )  # fmt: skip
    eps: float | None = option(
        "--eps", "Radius of those that do not state their own.", parse_number, "RADIUS", default=None,
        unset="that of --attack, or 8/255",
    )  # fmt: skip
    evaluate_samples: int | None = count("--evaluate-samples", "Only so many test images.", unset="all")
    check_samples: int = count(
        "--check-samples", "On how many of them to look for masked gradients; 0 for no checks.", 128, least=0
    )


@dataclass(frozen=True, kw_only=True)
class HardenOptions:
    """Fine-tune a network with a penalty on its critical attacking route, and compare it with what it was.

    Runs repeat bit for bit and go on with --resume, as those of attackroute train.
    """

    out: Path | None = out_option("Where checkpoints, log and route go; not needed with --sweep.", default=None)
    network: NetworkOptions = shared(hide=("classes",))
    images: ImageOptions = shared(hide=("split", "samples"))
    penalty: PenaltyOptions
    source: RouteSourceOptions
    training: TrainingOptions = shared(epochs=10, lr=0.01)
    comparison: ComparisonOptions
    run: RunOptions


def harden(options: HardenOptions) -> None:
    """Harden a network into a folder, or try several lambdas."""
    penalty, training = options.penalty, options.training
    penalty.check()
    if penalty.sweep is None and options.out is None:
        raise UserError("name the folder of the hardened network with --out, or try lambdas with --sweep")
    if penalty.sweep is not None and (options.out is not None or training.resume):
        raise UserError("--sweep writes nothing; leave out --out and --resume")
    hardening = _Hardening.open(options)
    if penalty.sweep is not None:
        hardening.sweep(penalty.sweep)
    elif options.out is not None:
        hardening.harden(options.out, 0.0 if penalty.lam is None else penalty.lam)


@dataclass(frozen=True, eq=False)
class _Hardening:
    """What networks are hardened and compared with."""

    options: HardenOptions
    output: Output
    network: nn.Module  # as it was, on its device
    card: ModelCard
    learnt: ImageData  # the training images, less those that are held out
    chosen_by: ImageData | None  # choose the best epoch, and lambda in a sweep
    judged_on: ImageData | None  # before and after are compared on them
    attack: Perturbation | None  # is trained against
    attacks: Sequence[Perturbation]  # are compared under

    @classmethod
    def open(cls, options: HardenOptions) -> _Hardening:
        """Load what the options name."""
        from attackroute.robustness.registry import parse_attack
        from attackroute.zoo.weights import ModelCard, find_card, spec_for, with_own_normalisation

        run, model, seed = options.run, options.network.model, options.run.seed
        options.training.settings(run)  # before anything is loaded
        attack = None if options.training.attack is None else parse_attack(options.training.attack)
        eps = options.comparison.eps
        if eps is None and attack is not None:
            eps = attack.radius
        attacks = parse_attacks(options.comparison.attacks or _ATTACKS, eps, seed=seed)
        device = resolve_device(run.device)
        train_images = options.images.open(run, [model], split="train")
        test_images = open_test_images(options.images, run, train_images, model)
        network = options.network.open(train_images).to(device)
        trained = find_card(model)
        spec = spec_for(model, train_images, width=options.network.model_width) if trained is None else trained[1].spec
        learnt, chosen_by = divided(train_images, test_images, options.training.holdout, seed)
        judged_on = chosen_by if test_images is None else test_images
        return cls(
            options=options, output=run.output, network=network, learnt=learnt, chosen_by=chosen_by, attack=attack,
            attacks=attacks,
            card=ModelCard(with_own_normalisation(spec, network), train_images.classes),
            judged_on=None if judged_on is None else _some(judged_on, options.comparison.evaluate_samples, seed),
        )  # fmt: skip

    def harden(self, out: Path, lam: Factor) -> None:
        """Harden into a folder, and compare."""
        from attackroute.hardening.harden import ROUTE_FILE
        from attackroute.zoo.weights import BEST, load_weights

        files = (*RUN_FILES, ROUTE_FILE, f"{HARDENING}.*", f"{_EVALUATION}/*")
        with results_in(out, files, self.options.run, resume=self.options.training.resume) as folder:
            self.card.save(folder)  # so that a run that is killed can be opened too
            hardened = copy.deepcopy(self.network)
            result = self._train(hardened, lam, folder)
            best = result.training.best
            if best is not None:  # what other commands load
                load_weights(hardened, folder / BEST)
            evaluation = None
            if self.judged_on is not None:  # what is done of it is kept for --resume
                evaluation = self._evaluate(
                    {BEFORE: self.network, AFTER: hardened}, self.judged_on,
                    checks=self.options.comparison.check_samples, folder=folder / _EVALUATION,
                )  # fmt: skip
            document = self._document(result, lam, evaluation)
            document.save(folder)
        self.output.result({**document.to_json(), "folder": str(out)})
        self._show_route(result, lam)
        if best is not None:
            self.output.line(best_line(best, len(result.training.history), self.options.training.chosen_on))
        if evaluation is not None:
            from attackroute.robustness.evaluation import COLUMNS

            self.output.table(COLUMNS, evaluation.cells())
            self.output.line(evaluation.reading())
        names = f"{HARDENING}.json{f', {ROUTE_FILE}' if result.route else ''}"
        self.output.line(f"weights, log, {names} are in {out}")

    def sweep(self, factors: Sequence[float]) -> None:
        """Harden a copy with each lambda, and compare all of them on the images that choose."""
        models: dict[str, nn.Module] = {BEFORE: self.network}
        results = []
        for lam in factors:
            models[f"lambda {lam:g}"] = copy.deepcopy(self.network)
            results.append(self._train(models[f"lambda {lam:g}"], lam, None))
        evaluation = None
        if self.chosen_by is not None:
            images = _some(self.chosen_by, self.options.comparison.evaluate_samples, self.options.run.seed)
            evaluation = self._evaluate(models, images)
        compared = None if evaluation is None else evaluation.document().to_json()
        outcomes = [{"lambda": lam, **_outcome(result)} for lam, result in zip(factors, results, strict=True)]
        self.output.result({"sweep": outcomes, "evaluation": compared})
        self._show_route(results[0], None)
        if evaluation is None:
            return
        attacks = evaluation.table.distinct("attack")
        self.output.line(f"on {evaluation.table[0]['samples']} {self.options.training.chosen_on} images:")
        self.output.table(
            ["lambda", *(attack.partition(":")[0] for attack in attacks)],
            [[name.removeprefix("lambda "), *(f"{evaluation.accuracy(attack, name).value:.1%}" for attack in attacks)]
             for name in models],
        )  # fmt: skip

    def _train(self, network: nn.Module, lam: Factor, folder: Path | None) -> HardenResult:
        from attackroute.hardening.harden import harden as harden_network
        from attackroute.hardening.settings import HardenSettings

        options = self.options
        settings = HardenSettings(
            trace=options.source.tracing.config(0), **settings_of(HardenSettings, options.penalty, options.source)
        )
        lines = epoch_lines(options.training, self.output, kept=folder is not None)
        with self.output.progress("steps") as progress, lines as on_epoch:
            return harden_network(
                network, self.learnt, self.chosen_by, penalty=options.penalty.names, lam=lam, attack=self.attack,
                route=options.source.route, settings=settings, train=options.training.settings(options.run),
                folder=folder, resume=options.training.resume, on_epoch=on_epoch, progress=progress,
                note=self.output.note,
            )  # fmt: skip

    def _evaluate(
        self, models: Mapping[str, nn.Module], images: ImageData, *, checks: int = 0, folder: Path | None = None,
    ) -> Evaluation:  # fmt: skip
        """Networks on the same images."""
        from attackroute.robustness.evaluate import evaluate
        from attackroute.zoo.data import ImageBatches

        with self.output.progress("images attacked") as progress:
            return evaluate(
                models, ImageBatches(images), self.attacks, checks=checks,
                seed=self.options.run.seed, folder=folder, resume=self.options.training.resume, progress=progress,
            )  # fmt: skip

    def _document(self, result: HardenResult, lam: Factor, evaluation: Evaluation | None) -> Document:
        from attackroute.core.document import Document

        options, best = self.options, result.training.best
        settings = given(options, "network", "images", "penalty", "source", "training")
        settings |= {"lambda": lam, "batch_size": options.run.batch_size, "seed": options.run.seed}
        compared = Document(HARDENING, {}) if evaluation is None else evaluation.document()
        about = {
            **_outcome(result),
            "best_epoch": None if best is None else best.epoch,
            "best_epoch_by": f"{self.options.training.chosen_on} images",
            "evaluation": compared.about or None,
        }
        return replace(compared, kind=HARDENING, settings=settings, about=about)

    def _show_route(self, result: HardenResult, lam: Factor | None) -> None:
        from attackroute.hardening.harden import factor_of

        if result.route is None:
            return
        self.output.line(f"route: {result.route.size} of {sum(result.route.channels.values())} neurons")
        if result.overlap is not None:
            self.output.line(f"  the route of all training images shares {result.overlap}; the paper reports 94.6 %")
        for name, strength in result.strengths.items():
            factor = None if lam is None else factor_of(name, lam)
            first = "" if factor is None else f", {factor * strength:.3g} of it at lambda {factor:g}"
            self.output.line(f"{name} penalty: its gradient is {strength:.3g} times the task's at first{first}")


def _outcome(result: HardenResult) -> dict[str, Any]:
    last = result.training.last
    return {
        "epochs": last.epoch,
        "resumed_from": result.training.resumed_from,
        "penalties": dict(last.penalties),
        "strengths": {name: value if math.isfinite(value) else None for name, value in result.strengths.items()},
        "overlap_with_full_route": None if result.overlap is None else result.overlap.to_json(),
        "accuracy": None if last.test is None else last.test.value,
        "robust_accuracy": None if last.robust is None else last.robust.value,
    }


def _some(images: ImageData, count: int | None, seed: int) -> ImageData:
    from attackroute.zoo.data import drawn

    return images if count is None else replace(images, dataset=drawn(images.dataset, count, seed))
