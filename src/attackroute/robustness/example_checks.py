"""Saved adversarial examples, checked again: whole files, images in their ball and range, and the same answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.core import files as routefile
from attackroute.core.accuracy import Accuracy
from attackroute.core.checks import checked_logits
from attackroute.core.errors import UserError
from attackroute.core.files import shown
from attackroute.core.model_state import frozen, placement, seeded, weights_digest
from attackroute.robustness.balls import out_of_range
from attackroute.robustness.examples import INDEX, INDEX_KIND, Examples

_ROUNDING = 1e-4  # of the largest logit: another device may swap classes that are as near as that


_NAMED = 3


_IMAGE_DIMS = 4


@dataclass(frozen=True)
class FileCheck:
    """What was found in one file of examples.

    Attributes:
        path: The file.
        model: Name of the attacked model; None where the file cannot be read.
        attack: The attack's specification; None where the file cannot be read.
        label: The attack in short.
        recorded: Accuracy that the file states.
        found: Accuracy now; None where images are not finite.
        distance: Largest distance of an image from its clean one, in the attack's norm; None without a ball.
        faults: What is wrong, in one line each; none if all is well.
    """

    path: Path
    model: str | None
    attack: str | None
    label: str
    recorded: Accuracy | None
    found: Accuracy | None
    distance: float | None
    faults: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return {
            "file": str(self.path),
            "model": self.model,
            "attack": self.attack,
            "samples": None if self.recorded is None else self.recorded.total,
            "recorded_accuracy": None if self.recorded is None else self.recorded.value,
            "accuracy": None if self.found is None else self.found.value,
            "largest_distance": self.distance,
            "faults": list(self.faults),
        }


def example_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of examples at a path: itself, or all below it.

    Raises:
        UserError: There is none.
    """
    home = Path(path)
    if home.is_file():
        return [home]
    files = sorted(home.rglob("*.safetensors")) if home.is_dir() else []
    if not files:
        what = "holds no examples" if home.is_dir() else "does not exist"
        raise UserError(f"{shown(home)} {what}; name a folder that --save-examples wrote, or a file in it")
    return files


def example_shape(path: str | os.PathLike[str]) -> tuple[tuple[int, int, int], int]:
    """The images' (C, H, W), and how many logits there were, from the first file that can be read.

    Raises:
        UserError: There is no file, or none can be read.
    """
    faults = []
    for file in example_files(path):
        try:
            examples = Examples.load(file)
        except UserError as error:
            faults.append(error)
            continue
        if examples.clean.ndim != _IMAGE_DIMS:
            raise UserError(f"{shown(file)} has images of shape {tuple(examples.clean.shape[1:])}, not (C, H, W)")
        channels, height, width = examples.clean.shape[1:]
        return (channels, height, width), examples.classes
    raise faults[0]


def verify_examples(path: str | os.PathLike[str], models: Sequence[nn.Module]) -> tuple[FileCheck, ...]:
    """Check saved examples with the models that were attacked.

    Args:
        path: A file, or a folder with all that lies below it. Beside ``examples.json``, files that it lists must exist.
        models: The attacked models, in any order; each is recognised by its weights.

    Returns:
        One result for each file, missing ones included.

    Raises:
        UserError: There is no file, or one was made with none of these models.
    """
    known = {weights_digest(model): model for model in models}
    files = example_files(path)
    return (*(_checked(file, known) for file in files), *_missing(Path(path), files))


def _missing(home: Path, files: Sequence[Path]) -> list[FileCheck]:
    if not (home / INDEX).is_file():
        return []
    try:
        listed = routefile.expect_mapping(routefile.read_json(home / INDEX, INDEX_KIND), "files")
    except UserError as error:
        return [_unreadable(home / INDEX, str(error))]
    there = {file.relative_to(home).as_posix() for file in files}
    return [_unreadable(home / name, f"{shown(home / name)}: is missing") for name in listed if name not in there]


def _unreadable(path: Path, fault: str) -> FileCheck:
    return FileCheck(path, None, None, "", None, None, None, (fault,))


def _checked(path: Path, known: Mapping[str, nn.Module]) -> FileCheck:
    try:
        examples = Examples.load(path)
    except UserError as error:
        return _unreadable(path, str(error))
    model = known.get(examples.weights)
    if model is None:
        raise UserError(
            f"{shown(path)} was made with the model {examples.model!r}, and no model that was given has its weights; "
            "name it with --model"
        )
    faults = _image_faults(examples)
    recorded, found = Accuracy(examples.correct, len(examples)), None
    if examples.adversarial.isfinite().all():  # a model has no answer to others
        logits = _logits(model, examples.adversarial)
        faults += _answer_faults(examples, logits)
        found = Accuracy(int((logits.argmax(1) == examples.labels).sum()), len(examples))
        if found != recorded:
            faults.append(f"accuracy is {found.correct} of {found.total}, and {recorded.correct} was recorded")
    distance = None
    if examples.ball is not None:
        distance = float(examples.ball.distances(examples.adversarial, examples.clean).max())
    named = tuple(f"{shown(path)}: {fault}" for fault in faults)
    return FileCheck(path, examples.model, examples.attack, examples.label, recorded, found, distance, named)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    device, dtype = placement(model)
    with frozen(model), torch.no_grad(), seeded(0):
        return checked_logits(model(images.to(device, dtype, copy=True)), len(images)).cpu()


def _image_faults(examples: Examples) -> list[str]:
    faults = []
    astray = out_of_range(examples.adversarial)
    if astray.any():
        faults.append(f"{_rows(astray)} has values outside [0, 1]")
    if examples.ball is not None:
        outside = examples.ball.outside(examples.adversarial, examples.clean)
        if outside.any():
            distance = float(examples.ball.distances(examples.adversarial, examples.clean)[outside].max())
            faults.append(f"{_rows(outside)} is outside the ball {examples.ball} (distance up to {distance:.6g})")
    return faults


def _answer_faults(examples: Examples, logits: Tensor) -> list[str]:
    """Recorded predictions that are not the model's largest logit, nor as large within rounding."""
    wide = logits.double()
    inside = (examples.predictions >= 0) & (examples.predictions < wide.shape[1])
    recorded = wide.gather(1, examples.predictions.where(inside, 0)[:, None]).flatten()
    differs = ~inside | (recorded < wide.amax(1) - _ROUNDING * wide.abs().amax(1))
    return [f"{_rows(differs)} is classified otherwise than was recorded"] if differs.any() else []


def _rows(flags: Tensor) -> str:
    rows = flags.nonzero().flatten().tolist()
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"sample {', '.join(map(str, rows[:_NAMED]))}{more}"
