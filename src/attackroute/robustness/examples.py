"""Adversarial examples as files, and their verification: what was attacked, what came out, and whether it still holds.

A folder holds one safetensors file for each model and attack, ``MODEL/ATTACK.safetensors``, and ``examples.json``,
which lists them once all are written; until then the batches lie in ``MODEL/ATTACK.parts/``. A file holds the images
exactly as the model saw them, in the model's number format, and the clean ones too, so that it can be checked without
the data; clean images that are 8-bit values are stored as such. A checksum says whether a file is damaged.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.core.checks import checked_logits
from attackroute.core.errors import UserError
from attackroute.core.files import (
    expect_mapping,
    file_errors,
    made_folder,
    printable,
    read_sealed_json,
    read_tensors,
    write_sealed_json,
    write_tensors,
)
from attackroute.core.model_state import frozen, placement, weights_digest
from attackroute.core.random import seeded
from attackroute.core.statistics import Accuracy
from attackroute.core.table import Record, Table
from attackroute.robustness.attack import Ball, out_of_range

INDEX = "examples.json"

_KIND, _INDEX_KIND = "attackroute adversarial examples", "attackroute example index"
_SUFFIX = ".safetensors"
_UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]+")
_LEVELS = 255
_STATED = ("model", "weights", "attack", "classes")
_TENSORS = ("clean", "adversarial", "labels", "predictions")
_ROUNDING = 1e-4  # of the largest logit: another device may swap classes that are as near as that
_NAMED = 3
_COLUMNS = ("file", "model", "attack", "samples", "recorded_accuracy", "accuracy", "largest_distance", "faults")


@dataclass(frozen=True, eq=False)
class Examples:
    """The adversarial examples of one model under one attack."""

    model: str
    weights: str  # their digest
    attack: str
    ball: Ball | None  # that the attack kept to; None for a corruption
    classes: int  # number of logits
    clean: Tensor  # (N, ...), in the data's order
    adversarial: Tensor  # of the same shape and dtype
    labels: Tensor  # int64 (N,)
    predictions: Tensor  # the model's classes for the adversarial images, int64 (N,)

    @classmethod
    def concatenate(cls, batches: Sequence[Examples]) -> Examples:
        """The examples of several batches of the same model and attack."""
        joined: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in _TENSORS}
        return replace(batches[0], **joined)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def accuracy(self) -> Accuracy:
        """Of the model on the adversarial images."""
        return Accuracy(int((self.labels == self.predictions).sum()), len(self))

    def save(self, path: Path) -> None:
        """Write the file in one step, and the folder that it belongs in; a `UserError` if that cannot be."""
        body = {name: getattr(self, name) for name in _STATED}
        body["ball"] = None if self.ball is None else asdict(self.ball)
        tensors = {name: getattr(self, name) for name in _TENSORS} | {"clean": _packed(self.clean)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, _KIND, body, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Examples:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: The file is missing, damaged or something else.
        """
        body, tensors = read_tensors(path, _KIND)
        with file_errors(path):
            try:
                images: dict[str, Any] = {name: tensors[name] for name in _TENSORS}
                images["clean"] = _unpacked(images["clean"], images["adversarial"].dtype)
                ball = None if body["ball"] is None else Ball(**body["ball"])
                examples = cls(**{name: body[name] for name in _STATED}, ball=ball, **images)
            except (KeyError, AttributeError) as error:
                raise UserError(f"lacks {error}: write it anew") from None
            counts = {len(tensor) for tensor in images.values()}
            if len(counts) > 1 or examples.clean.shape != examples.adversarial.shape or not len(examples):
                raise UserError("numbers or shapes of images, labels and predictions differ: write it anew")
            return examples


@dataclass(frozen=True)
class ExampleFolder:
    """A folder that fills with adversarial examples, and the names of models and attacks as they can name files."""

    path: Path
    names: Mapping[str, str]

    @classmethod
    def open(cls, path: str | os.PathLike[str], names: Sequence[str], *, resume: bool) -> ExampleFolder:
        """Make the folder ready; it may hold examples only if their evaluation is resumed."""
        folder = made_folder(path)
        if not resume and next(folder.rglob(f"*{_SUFFIX}"), None) is not None:
            raise UserError(
                f"{printable(folder)} holds examples already; choose another folder, or resume their evaluation"
            )
        (folder / INDEX).unlink(missing_ok=True)
        return cls(folder, _file_names(names))

    def file(self, model: str, attack: str) -> Path:
        """Where the examples of a model under an attack belong."""
        return self.path / self.names[model] / f"{self.names[attack]}{_SUFFIX}"

    def save(self, batch: int, examples: Examples) -> None:
        """Write the examples of a batch."""
        examples.save(self._batches(examples.model, examples.attack) / f"{batch:06d}{_SUFFIX}")

    def finish(self, accuracies: Mapping[tuple[str, str], Accuracy]) -> None:
        """Put batches together, one file a model and attack, and list the files with what was measured on each."""
        for model, attack in accuracies:
            file, folder = self.file(model, attack), self._batches(model, attack)
            batches = sorted(folder.glob(f"*{_SUFFIX}"))
            if batches and not file.exists():
                Examples.concatenate([Examples.load(batch) for batch in batches]).save(file)
            shutil.rmtree(folder, ignore_errors=True)
        files = {
            self.file(*names).relative_to(self.path).as_posix(): [accuracy.total, accuracy.correct]
            for names, accuracy in accuracies.items()
        }
        write_sealed_json(self.path / INDEX, _INDEX_KIND, {"files": files})

    def _batches(self, model: str, attack: str) -> Path:
        return self.file(model, attack).with_suffix(".parts")


def example_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files of examples at a path: itself, or all below it; at least one, or a `UserError`."""
    folder = Path(path)
    if folder.is_file():
        return [folder]
    files = sorted(folder.rglob(f"*{_SUFFIX}")) if folder.is_dir() else []
    if not files:
        what = "holds no examples" if folder.is_dir() else "does not exist"
        raise UserError(f"{printable(folder)} {what}; name a folder that --save-examples wrote, or a file in it")
    return files


def example_shape(path: str | os.PathLike[str]) -> tuple[tuple[int, int, int], int]:
    """The images' (C, H, W), and how many logits there were, from the first file that can be read; one must be."""
    faults = []
    for file in example_files(path):
        try:
            examples = Examples.load(file)
        except UserError as error:
            faults.append(error)
            continue
        if examples.clean.ndim != 4:
            raise UserError(f"{printable(file)} has images of shape {tuple(examples.clean.shape[1:])}, not (C, H, W)")
        channels, height, width = examples.clean.shape[1:]
        return (channels, height, width), examples.classes
    raise faults[0]


def verify_examples(path: str | os.PathLike[str], models: Sequence[nn.Module]) -> Table:
    """Check saved examples with the models that were attacked: whole files, images in ball and range, same answers.

    The path is a file, or a folder with all that lies below it; files that an ``examples.json`` lists must exist. Each
    of the attacked models is recognised by its weights.

    There is a row for each file, missing ones included: the attacked ``model`` and ``attack`` (None where the file
    cannot be read), ``samples``, the ``recorded_accuracy``, the ``accuracy`` now (None where images are not finite),
    the ``largest_distance`` of an image from its clean one in the attack's norm (None without a ball), and ``faults``,
    in one line each.

    Raises:
        UserError: There is no file, or one was made with none of these models.
    """
    by_weights = {weights_digest(model): model for model in models}
    files = example_files(path)
    return Table.of([*(_checked(file, by_weights) for file in files), *_missing(Path(path), files)])


def _missing(folder: Path, files: Sequence[Path]) -> list[Record]:
    if not (folder / INDEX).is_file():
        return []
    try:
        listed = expect_mapping(read_sealed_json(folder / INDEX, _INDEX_KIND), "files")
    except UserError as error:
        return [_row(folder / INDEX, [str(error)])]
    absent = [folder / name for name in listed if folder / name not in files]
    return [_row(path, [f"{printable(path)}: is missing"]) for path in absent]


def _checked(path: Path, by_weights: Mapping[str, nn.Module]) -> Record:
    try:
        examples = Examples.load(path)
    except UserError as error:
        return _row(path, [str(error)])
    model = by_weights.get(examples.weights)
    if model is None:
        raise UserError(
            f"{printable(path)} was made with the model {examples.model!r}, and no model that was given has its "
            "weights; name it with --model"
        )
    faults, distance = _image_faults(examples)
    recorded, accuracy = examples.accuracy, None
    if examples.adversarial.isfinite().all():  # a model has no answer to others
        logits = _logits(model, examples.adversarial)
        faults += _answer_faults(examples, logits)
        accuracy = Accuracy(int((logits.argmax(1) == examples.labels).sum()), len(examples))
        if accuracy != recorded:
            faults.append(f"accuracy is {accuracy.correct} of {accuracy.total}, and {recorded.correct} was recorded")
    return {
        **_row(path, [f"{printable(path)}: {fault}" for fault in faults]),
        "model": examples.model,
        "attack": examples.attack,
        "samples": len(examples),
        "recorded_accuracy": recorded.value,
        "accuracy": None if accuracy is None else accuracy.value,
        "largest_distance": distance,
    }


def _row(path: Path, faults: Sequence[str]) -> Record:
    return {**dict.fromkeys(_COLUMNS), "file": str(path), "faults": tuple(faults)}


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    device, dtype = placement(model)
    with frozen(model), torch.no_grad(), seeded(0):
        batches = (batch.to(device, dtype, copy=True) for batch in images.split(128))
        return torch.cat([checked_logits(model(batch), len(batch)).cpu() for batch in batches])


def _image_faults(examples: Examples) -> tuple[list[str], float | None]:
    """What is wrong with the images, and the largest distance from a clean one."""
    faults = []
    astray = out_of_range(examples.adversarial)
    if astray.any():
        faults.append(f"{_samples(astray)} has values outside [0, 1]")
    if examples.ball is None:
        return faults, None
    distances = examples.ball.distances(examples.adversarial, examples.clean)
    outside = examples.ball.outside(examples.adversarial, examples.clean)
    if outside.any():
        furthest = float(distances[outside].max())
        faults.append(f"{_samples(outside)} is outside the ball {examples.ball} (distance up to {furthest:.6g})")
    return faults, float(distances.max())


def _answer_faults(examples: Examples, logits: Tensor) -> list[str]:
    """Recorded predictions that are not the model's largest logit, nor as large within rounding."""
    wide = logits.double()
    inside = (examples.predictions >= 0) & (examples.predictions < wide.shape[1])
    recorded = wide.gather(1, examples.predictions.where(inside, 0)[:, None]).flatten()
    differs = ~inside | (recorded < wide.amax(1) - _ROUNDING * wide.abs().amax(1))
    return [f"{_samples(differs)} is classified otherwise than was recorded"] if differs.any() else []


def _samples(flags: Tensor) -> str:
    indices = flags.nonzero().flatten().tolist()
    more = f" and {len(indices) - _NAMED} more" if len(indices) > _NAMED else ""
    return f"sample {', '.join(map(str, indices[:_NAMED]))}{more}"


def _packed(images: Tensor) -> Tensor:
    """The images as bytes, if that loses nothing."""
    levels = (images.float() * _LEVELS).round().clamp(0, _LEVELS).to(torch.uint8)
    return levels if torch.equal(_unpacked(levels, images.dtype), images) else images


def _unpacked(stored: Tensor, dtype: torch.dtype) -> Tensor:
    return (stored.float() / _LEVELS).to(dtype) if stored.dtype == torch.uint8 else stored


def _file_names(names: Sequence[str]) -> dict[str, str]:
    """A file name for each name: readable, safe, and unlike the others."""
    taken: dict[str, str] = {}
    for name in names:
        plain = _UNSAFE.sub("-", name).strip("-.")[:100] or "model"
        if plain.lower() in {other.lower() for other in taken.values()}:
            plain = f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        taken[name] = plain
    return taken
