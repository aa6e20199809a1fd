"""The chapters of ``attackroute demo`` after the trace: each measures, writes its folder and says what was found."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Subset

from attackroute.analysis.hardness_study import study_hardness
from attackroute.analysis.study import Study
from attackroute.analysis.tables import to_json
from attackroute.cli.console import Output
from attackroute.cli.evaluate_report import flat
from attackroute.cli.hardness_files import write_study
from attackroute.cli.options import open_folder
from attackroute.core.journal import MEASUREMENTS
from attackroute.hardening.harden import harden
from attackroute.hardening.settings import FINE_TUNING, HardenSettings
from attackroute.robustness.corruptions import GaussianNoise
from attackroute.robustness.evaluate import evaluate
from attackroute.robustness.evaluation_table import EVALUATION, Evaluation
from attackroute.robustness.registry import parse_attack
from attackroute.routes.route import Route
from attackroute.zoo.data import ImageBatches, ImageData

EPS = "0.1"  # of what fools a network on digits; the paper's 8/255 is for natural images
RADII = ("8/255", "16/255", EPS)  # those of the report
_ATTACKS = (f"fgsm:eps={EPS}", f"pgd:eps={EPS}")
_NOISE = GaussianNoise(std=0.1)
_EXPERIMENTS = ("transplant", "gradcam", "detect")
_ANALYSED = 400
_DRAWS = 3
_EVALUATED = 500
_CHECKED = 64
_ON_ROUTE = "penalty on the route"
_HARDENED = (  # name, penalty, on which neurons
    ("trained on", None, "route"),
    (_ON_ROUTE, "gradient", "route"),
    ("penalty on random neurons", "gradient", "random"),
)
_UNTUNED = (
    "One network, and one lambda for both penalties, chosen for neither: python -m studies.hardening compares\n"
    "them with a lambda chosen for each, on several networks, on all neurons too, and with adversarial training."
)
_HARDENING_EPOCHS = 2
_LAMBDA = 0.1
_HARDNESS_ATTACKS = ("fgsm:eps=16/255", "gaussian-noise:std=0.15")


def analysed(network: nn.Module, digits: ImageData, folder: Path, share: float, seed: int, output: Output) -> Any:
    """Section 4 of the paper on some of the digits."""
    attack = parse_attack(f"pgd:eps={EPS}")
    study = Study(
        network=network,
        images=first(digits, _ANALYSED),
        attacks={f"pgd:eps={EPS}": attack},
        chosen=None,
        share=share,
        at="output",
        draws=_DRAWS,
        batch_size=128,
        seed=seed,
        origin={},
        folder=open_folder(folder / "analysis"),
        output=output,
    )
    found = {}
    for name in _EXPERIMENTS:
        result, _ = study.run(name)
        found[name] = to_json(result)
        output.line(f"{name}: {result.reading()}")
    return found


def judged_hardness(
    network: nn.Module, digits: ImageData, route: Route, folder: Path, seed: int, output: Output
) -> Any:
    """Section 5.2: which digits are easy to attack."""
    attacks = [parse_attack(text) for text in _HARDNESS_ATTACKS]
    with output.progress("images") as progress:
        study = study_hardness(network, route, ImageBatches(digits), attacks, seed=seed, progress=progress)
    write_study(open_folder(folder / "hardness"), network, digits, study, {"seed": seed}, 128, output)
    for sentence in study.sentences():
        output.line(f"{sentence}.")
    return study.to_json()


def hardened(network: nn.Module, learnt: ImageData, shown: ImageData, folder: Path, seed: int, output: Output) -> Any:
    """Section 5.1: a penalty on the loss gradients of the route, beside the same on random neurons and none at all.

    The route that is punished comes from a tenth of the digits to learn from.
    """
    models = {"as trained": network}
    shares = {}
    for name, penalty, target in _HARDENED:
        model = copy.deepcopy(network)
        with output.progress("training steps") as progress:
            result = harden(
                model,
                learnt,
                penalty=penalty,
                lam=_LAMBDA,
                settings=HardenSettings(target=target, compare_full=False),
                train=replace(FINE_TUNING, epochs=_HARDENING_EPOCHS, augment="crop", seed=seed),
                progress=progress,
            )
        models[name] = model
        shares[name] = {by: _LAMBDA * strength for by, strength in result.strengths.items()}
    accuracies = evaluated(models, shown, folder, seed, output)
    checks = checked(models[_ON_ROUTE], shown, seed, output)
    output.line(_UNTUNED)
    return {
        **accuracies,
        "checks": checks,
        "penalty_shares": shares,
        "epochs": _HARDENING_EPOCHS,
        "lambda": _LAMBDA,
    }


def evaluated(models: Mapping[str, nn.Module], digits: ImageData, folder: Path, seed: int, output: Output) -> Any:
    """Accuracy under attack, of several networks side by side."""
    home = open_folder(folder / "evaluation")
    for stale in (MEASUREMENTS, f"{EVALUATION}.json", f"{EVALUATION}.csv"):
        (home / stale).unlink(missing_ok=True)
    shown = first(digits, _EVALUATED)
    with output.progress("predictions") as progress:
        found = evaluate(
            models,
            ImageBatches(shown),
            attacks=[*_ATTACKS, _NOISE],
            seed=seed,
            checks=0,
            folder=home,
            progress=progress,
        )
    output.table(["attack", *models], _side_by_side(found))
    return flat(found)


def checked(network: nn.Module, digits: ImageData, seed: int, output: Output) -> Any:
    """Whether the network's gradients are masked, so that its accuracies say nothing."""
    shown = first(digits, _CHECKED)
    with output.progress("predictions") as progress:
        found = evaluate(
            {_ON_ROUTE: network}, ImageBatches(shown), attacks=_ATTACKS, seed=seed, checks=_CHECKED, progress=progress
        )
    output.line(found.reading())
    return flat(found)["checks"]


def first(data: ImageData, samples: int) -> ImageData:
    """The first samples of a data set."""
    return replace(data, dataset=Subset(data.dataset, range(min(samples, len(data)))))


def _side_by_side(found: Evaluation) -> list[list[str]]:
    cells: dict[str, list[str]] = {}
    for row in found.table:
        interval = f"{100 * row['accuracy_low']:.0f} to {100 * row['accuracy_high']:.0f}"
        cells.setdefault(found.labels[row["attack"]], []).append(f"{row['accuracy']:.1%} ({interval})")
    return [[label, *values] for label, values in cells.items()]
