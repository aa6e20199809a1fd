"""Adversarial examples as files: what was attacked, what came out, and all that is needed to check it again.

A folder holds one safetensors file for each model, attack and batch, ``MODEL/ATTACK/000000.safetensors``, and
``examples.json``, which lists them once all are written. A file holds the images exactly as the model saw them, in the
model's number format, and the clean ones too, so that it can be checked without the data; clean images that are 8-bit
values are stored as such. A SHA-256 of each image says which one is damaged.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attackroute.core import files
from attackroute.core.errors import UserError
from attackroute.core.files import shown
from attackroute.robustness.attack_labels import short
from attackroute.robustness.balls import Ball, ball_of
from attackroute.robustness.contract import Perturbation

INDEX = "examples.json"


SHARD_KIND, INDEX_KIND = "attackroute adversarial examples", "attackroute example index"


_SUFFIX = ".safetensors"


_UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]+")


_LONGEST_NAME = 100


_LEVELS = 255


_IMAGES = ("adversarial", "clean")


@dataclass(frozen=True, eq=False)
class Examples:
    """The adversarial examples of one batch.

    Attributes:
        model: Name of the attacked model.
        weights: Digest of its weights.
        attack: The attack's specification.
        label: The same without what is the attack's own default.
        settings: The attack's settings as plain values.
        ball: The ball that it kept to; None for a corruption.
        start: Index of the first image in the data.
        classes: Number of logits.
        clean: Clean images ``(N, ...)``.
        adversarial: What the attack made of them, of the same shape and dtype.
        labels: int64 ``(N,)``.
        predictions: The model's classes for the adversarial images, int64 ``(N,)``.
    """

    model: str
    weights: str
    attack: str
    label: str
    settings: Mapping[str, Any]
    ball: Ball | None
    start: int
    classes: int
    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    predictions: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> int:
        """How many of the adversarial images the model got right."""
        return int((self.labels == self.predictions).sum())

    def save(self, path: Path) -> None:
        """Write the file in one step.

        Raises:
            UserError: It cannot be written.
        """
        ball = None if self.ball is None else {"norm": self.ball.norm, "eps": self.ball.eps}
        body = {
            name: getattr(self, name) for name in ("model", "weights", "attack", "label", "start", "classes", "correct")
        }
        body |= {"settings": dict(self.settings), "ball": ball}
        body |= {"digests": {name: image_digests(getattr(self, name)) for name in _IMAGES}}
        tensors = {
            "adversarial": self.adversarial,
            "clean": _packed(self.clean),
            "labels": self.labels,
            "predictions": self.predictions,
        }
        files.write_tensors(path, SHARD_KIND, body, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Examples:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: The file is missing, damaged or something else; where that can be told, the message names the
                damaged image.
        """
        try:
            body, tensors = files.read_tensors(path, SHARD_KIND)
        except UserError as error:
            raise UserError(f"{error}{_damaged_images(path)}") from None
        with files.reading(path):
            try:
                return cls._parse(body, tensors)
            except (KeyError, AttributeError) as error:
                raise UserError(f"lacks {error}: write it anew") from None

    @classmethod
    def _parse(cls, body: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Examples:
        adversarial = tensors["adversarial"]
        examples = cls(
            **{name: body[name] for name in ("model", "weights", "attack", "label", "settings", "start", "classes")},
            ball=None if body["ball"] is None else Ball(**body["ball"]),
            adversarial=adversarial,
            clean=_unpacked(tensors["clean"], adversarial.dtype),
            labels=tensors["labels"],
            predictions=tensors["predictions"],
        )
        counts = {len(examples.clean), len(adversarial), len(examples.labels), len(examples.predictions)}
        if counts != {len(examples)} or examples.clean.shape != adversarial.shape or not len(examples):
            raise UserError("numbers or shapes of images, labels and predictions differ: write it anew")
        if examples.correct != body["correct"]:
            raise UserError(f"states {body['correct']} correct predictions and holds {examples.correct}: write it anew")
        return examples


@dataclass(frozen=True)
class ExampleFolder:
    """A folder that fills with adversarial examples.

    Attributes:
        path: The folder, made when it is missing.
        names: Names of the models and of the attacks, in folders of their own.
    """

    path: Path
    names: Mapping[str, str]
    listed: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str], names: list[str], *, resume: bool) -> ExampleFolder:
        """Make the folder ready.

        Raises:
            UserError: It cannot be made, or holds examples although ``resume`` is false.
        """
        home = Path(path)
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{shown(home)} cannot be a folder ({error.strerror}); name another") from None
        if not resume and next(home.rglob(f"*{_SUFFIX}"), None) is not None:
            raise UserError(f"{shown(home)} holds examples already; choose another folder, or resume their evaluation")
        (home / INDEX).unlink(missing_ok=True)
        return cls(home, _folder_names(names))

    def file(self, model: str, attack: str, batch: int) -> Path:
        """Where a batch of examples belongs."""
        return self.path / self.names[model] / self.names[attack] / f"{batch:06d}{_SUFFIX}"

    def save(self, batch: int, examples: Examples) -> None:
        """Write a batch of examples.

        Raises:
            UserError: The file cannot be written.
        """
        path = self.file(examples.model, examples.attack, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        examples.save(path)

    def note(self, model: str, attack: str, batch: int, start: int, samples: int, correct: int) -> None:
        """Remember a batch for the list, whether it was written now or before an interruption."""
        self.listed[self.file(model, attack, batch).relative_to(self.path).as_posix()] = [start, samples, correct]

    def finish(self) -> None:
        """Write the list of all files, with the first image, number of images and right answers of each."""
        files.write_json(self.path / INDEX, INDEX_KIND, {"files": self.listed})


def examples_of(
    attack: Perturbation,
    model: str,
    weights: str,
    start: int,
    logits: Tensor,
    clean: Tensor,
    adversarial: Tensor,
    labels: Tensor,
) -> Examples:
    """The examples of one batch, with the predictions that the logits make."""
    return Examples(
        model,
        weights,
        str(attack),
        short(attack),
        attack.to_json(),
        ball_of(attack),
        start,
        logits.shape[1],
        clean.cpu(),
        adversarial.cpu(),
        labels.cpu().long(),
        logits.argmax(1).cpu(),
    )


def image_digests(images: Tensor) -> list[str]:
    """SHA-256 of each image's bytes."""
    rows = images.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
    return [hashlib.sha256(row.data).hexdigest() for row in rows]


def _packed(images: Tensor) -> Tensor:
    """The images as bytes, if that loses nothing."""
    levels = (images.float() * _LEVELS).round().clamp(0, _LEVELS).to(torch.uint8)
    return levels if torch.equal(_unpacked(levels, images.dtype), images) else images


def _unpacked(stored: Tensor, dtype: torch.dtype) -> Tensor:
    return (stored.float() / _LEVELS).to(dtype) if stored.dtype == torch.uint8 else stored


def _damaged_images(path: str | os.PathLike[str]) -> str:
    """Which images of a damaged file differ from their digests, as the end of a sentence."""
    import json

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            digests = json.loads((file.metadata() or {})["attackroute"])["digests"]
            adversarial, clean = (file.get_tensor(name) for name in _IMAGES)
        held = {"adversarial": adversarial, "clean": _unpacked(clean, adversarial.dtype)}
        faults = [
            f"{name} image {row}"
            for name in _IMAGES
            for row, (stated, found) in enumerate(zip(digests[name], image_digests(held[name]), strict=True))
            if stated != found
        ]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
        return ""
    return f" ({', '.join(faults)} of the file differ)" if faults else ""


def _folder_names(names: list[str]) -> dict[str, str]:
    """A folder name for each name: readable, safe, and unlike the others."""
    taken: dict[str, str] = {}
    for name in names:
        plain = _UNSAFE.sub("-", name).strip("-.")[:_LONGEST_NAME] or "model"
        if plain.lower() in {other.lower() for other in taken.values()}:
            plain = f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        taken[name] = plain
    return taken
