"""A hardening study on a command line: networks by name, and its files; for ``harden-study`` and ``reproduce``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from attackroute.analysis.hardening_plan import StudyPlan
from attackroute.analysis.hardening_results import HardeningStudy
from attackroute.analysis.hardening_study import study_hardening
from attackroute.analysis.tables import save_result
from attackroute.cli import options
from attackroute.cli.console import Output
from attackroute.core.errors import UserError
from attackroute.zoo.card import ModelCard
from attackroute.zoo.images import ImageData
from attackroute.zoo.networks import spec_for, with_own_normalisation
from attackroute.zoo.registry import build
from attackroute.zoo.weights import LAST

STUDY = "study"
"""What the files are called."""


def run_study(
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
    output: Output,
) -> HardeningStudy:
    """Carry out a study and write its table; each network's folder can be opened by other commands.

    Args:
        plan: What is decided beforehand.
        model: Name of the network.
        width: Factor on its channels.
        data: Value of ``--data``.
        train: The training images.
        test: The test images.
        folder: Where everything goes; made where it is missing.
        resume: Go on with the study in the folder.
        device: Where networks are trained.
        output: Where progress is shown.

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

    home = options.open_folder(folder)
    origin = {"model": model, "width": width, "data": data, "image_size": spec.image_size}
    with output.progress("networks") as progress:
        study = study_hardening(
            made, train.dataset, test.dataset, plan, home,
            resume=resume, origin=origin, progress=progress,
        )  # fmt: skip
    card = ModelCard(with_own_normalisation(spec, made(plan.tuning_seed)), train.classes)
    for network in home.glob(f"seed-*/*/{LAST}"):
        card.save(network.parent)
    save_result(study, {}, home, STUDY)
    return study
