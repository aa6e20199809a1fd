"""``attackroute harden``: fine-tune a network with penalties on its critical attacking route."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
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
from attackroute.cli.evaluate import parse_attacks, show_evaluation
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
from attackroute.cli.train import KEPT, RUN_FILES, best_line, divided, epoch_notes, open_test_images
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from attackroute.hardening.harden import HardenResult
    from attackroute.robustness.attack import Perturbation

HARDENING = "hardening"  # kind of the result, and name of its file
BEFORE, AFTER = "before", "after"

_NONE = "none"
_EVALUATION = ".evaluation"  # folder of what --resume goes on from
_ATTACKS = ("fgsm", "mi-fgsm", "pgd", "gaussian-noise")


@dataclass(frozen=True, kw_only=True)
class PenaltyOptions:
    """What is punished, and how much."""

    title: ClassVar[str] = "The penalty"
    penalty: str = option(
        "--penalty", "The route's loss gradients (Eq. (10)), the weights between its neurons (Eq. (13)), or "
        "stabilisation, what --attack changes in its neurons (not the paper's). Kernels behind attention or "
        "normalisation over channels join no two neurons, and have no weight penalty.",
        one_of("gradient", "weight", "stabilisation", _NONE), default="gradient",
    )  # fmt: skip
    lam: float | None = option("--lam", "Lambda, the penalty's factor.", parse_number, "FACTOR", default=None)
    target: str = option(
        "--target", "The route's neurons, or for controls as many random ones off it, or all.",
        one_of("route", "random", "all"), default="route",
    )  # fmt: skip
    folded: bool = switch("--raw", "Weight penalty on kernels as they are, without batch norm folded in.", default=True)

    def checked(self) -> tuple[str | None, float]:
        """The penalty, if there is one, and lambda; a `UserError` unless they go together."""
        if self.penalty == _NONE and self.lam is not None:
            raise UserError("--penalty none has no lambda; leave out --lam")
        if self.penalty != _NONE and self.lam is None:
            raise UserError("give the penalty's factor with --lam")
        return None if self.penalty == _NONE else self.penalty, self.lam or 0.0


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
        "--no-compare-full", "Do not trace all training images too, to say how much of the route they agree on.",
        default=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """How the network before and after is compared."""

    title: ClassVar[str] = "Before and after"
    attacks: tuple[str, ...] = option(
        "--evaluate", "An attack to compare under, as in attackroute evaluate; repeat it for several.",
        str, "NAME", default=None, repeat=True, unset=", ".join(_ATTACKS),
    )  # fmt: skip
    eps: float | None = option(
        "--eps", "Radius of those that do not state their own.", parse_number, "RADIUS", default=None,
        unset="that of --attack, or 8/255",
    )  # fmt: skip
    evaluate_samples: int | None = count("--evaluate-samples", "Only so many test images.", unset="all")
    check_samples: int = count(
        "--check-samples", "On how many of them to look for masked gradients; 0 for no checks.", 128, least=0
    )

    def parsed(self, trained_against: Perturbation | None, seed: int) -> list[Perturbation]:
        """The attacks, with the radius of the one that is trained against where none is given."""
        eps = getattr(trained_against, "eps", None) if self.eps is None else self.eps
        return parse_attacks(self.attacks or _ATTACKS, eps, seed)


@dataclass(frozen=True, kw_only=True)
class HardenOptions:
    """Fine-tune a network with a penalty on its critical attacking route, and compare it with what it was.

    Runs repeat bit for bit and go on with --resume, as those of attackroute train.
    """

    out: Path = out_option("Where checkpoints, log and route go.")
    network: NetworkOptions = shared(hide=("classes",))
    images: ImageOptions = shared(hide=("split", "samples"))
    penalty: PenaltyOptions
    source: RouteSourceOptions
    training: TrainingOptions = shared(epochs=10, lr=0.01)
    comparison: ComparisonOptions
    run: RunOptions


def harden(options: HardenOptions) -> None:
    """Harden a network into a folder, and compare it with what it was."""
    from attackroute.core.document import Document
    from attackroute.hardening.harden import ROUTE_FILE
    from attackroute.hardening.harden import harden as harden_network
    from attackroute.hardening.settings import HardenSettings
    from attackroute.robustness.evaluate import evaluate
    from attackroute.zoo.data import ImageBatches, drawn
    from attackroute.zoo.weights import BEST, ModelCard, find_card, load_weights, spec_for, with_own_normalisation

    penalty, source, comparison, training = options.penalty, options.source, options.comparison, options.training
    run, output, model, seed = options.run, options.run.output, options.network.model, options.run.seed
    name, lam = penalty.checked()
    train_settings = training.settings(run)  # before anything is loaded
    settings = HardenSettings(trace=source.tracing.config(0), **settings_of(HardenSettings, penalty, source))
    attack = training.parsed_attack
    attacks = comparison.parsed(attack, seed)
    device = resolve_device(run.device)
    train_images = options.images.open(run, [model], split="train")
    test_images = open_test_images(options.images, run, train_images, model)
    network = options.network.open(train_images).to(device)
    hardened, trained = copy.deepcopy(network), find_card(model)
    spec = spec_for(model, train_images, width=options.network.model_width) if trained is None else trained[1].spec
    card = ModelCard(with_own_normalisation(spec, network), train_images.classes)
    learnt, chosen_by = divided(train_images, test_images, training.holdout, seed)
    judged_on = chosen_by if test_images is None else test_images
    files = (*RUN_FILES, ROUTE_FILE, f"{HARDENING}.*", f"{_EVALUATION}/*")
    with results_in(options.out, files, run, resume=training.resume) as folder:
        card.save(folder)  # so that a run that is killed can be opened too
        with output.progress("steps", KEPT) as progress:
            result = harden_network(
                hardened, learnt, chosen_by, penalty=name, lam=lam, attack=attack, route=source.route,
                settings=settings, train=train_settings, folder=folder, resume=training.resume,
                on_epoch=epoch_notes(output, training), progress=progress, note=output.note,
            )  # fmt: skip
        best = result.training.best
        if best is not None:  # what other commands load
            load_weights(hardened, folder / BEST)
        evaluation = None
        if judged_on is not None:  # what is done of it is kept for --resume
            if comparison.evaluate_samples is not None:
                judged_on = replace(judged_on, dataset=drawn(judged_on.dataset, comparison.evaluate_samples, seed))
            with output.progress("images attacked") as progress:
                evaluation = evaluate(
                    {BEFORE: network, AFTER: hardened}, ImageBatches(judged_on), attacks, seed=seed,
                    checks=comparison.check_samples, folder=folder / _EVALUATION, resume=training.resume,
                    progress=progress,
                )  # fmt: skip
        compared = Document(HARDENING, {}) if evaluation is None else evaluation.document()
        document = replace(
            compared, kind=HARDENING,
            settings=given(options, "network", "images", "penalty", "source", "training")
            | {"lambda": lam, "batch_size": run.batch_size, "seed": seed},
            about={
                **_outcome(result),
                "best_epoch": None if best is None else best.epoch,
                "best_epoch_by": f"{training.chosen_on} images",
                "evaluation": compared.about or None,
            },
        )  # fmt: skip
        document.save(folder)
    output.result({**document.to_json(), "folder": str(options.out)})
    for line in _told(result, lam):
        output.line(line)
    if best is not None:
        output.line(best_line(best, len(result.training.history), training.chosen_on))
    if evaluation is not None:
        show_evaluation(output, evaluation)
    output.line(f"weights, log, {HARDENING}.json{f', {ROUTE_FILE}' if result.route else ''} are in {options.out}")


def _told(result: HardenResult, lam: float) -> Iterator[str]:
    """What is said of the route and the penalty."""
    if result.route is not None:
        yield f"route: {result.route.size} of {sum(result.route.channels.values())} neurons"
    if result.overlap is not None:
        yield f"  the route of all training images shares {result.overlap}; the paper reports 94.6 %"
    for name, strength in result.strengths.items():
        first = f"{lam * strength:.3g} of it at lambda {lam:g}"
        yield f"{name} penalty: its gradient is {strength:.3g} times the task's at first, {first}"


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
