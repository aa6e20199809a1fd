"""What a training run leaves: records of its epochs, and a folder in which a kill at any moment leaves one checkpoint.

Files:
    ``state.pt``: the checkpoint of an epoch's end; weights, optimiser, history and settings in one file, which is
        replaced as a whole.
    ``last.safetensors``, ``best.safetensors``: weights alone, for other commands.
    ``log.jsonl``, ``settings.json``: for readers.

The weights, log and settings are written after the checkpoint and from it, and written again when a run goes on, so
that a kill between two of them does no harm.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attackroute.core.errors import UserError
from attackroute.core.files import made_folder, read_weights, replace_file, sealed_weights, write_json
from attackroute.core.journal import require_same_settings
from attackroute.core.statistics import Accuracy
from attackroute.zoo.weights import BEST, LAST

STATE = "state.pt"
LOG = "log.jsonl"
SETTINGS = "settings.json"

_FORMAT = 4
_LEFT_OVER = "." + "[0-9a-f]" * 16 + ".tmp"  # what a kill leaves of a file that was to be replaced


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did.

    Attributes:
        epoch: Counts from 1.
        loss: Mean cross entropy over the epoch's samples, as met during training, penalties left out.
        train: Accuracy on the epoch's samples, as met during training: augmented, and attacked where the training is
            against an attack.
        test: Accuracy on the test data after the epoch; None without test data.
        lr: Learning rate of the last step.
        seconds: Time that the epoch took, its test included.
        robust: Accuracy on some test images after the attack that the training is against; None without an attack or
            test data.
        penalties: By name, the mean of each penalty over the epoch's samples, without its factor.
    """

    epoch: int
    loss: float
    train: Accuracy
    test: Accuracy | None
    lr: float
    seconds: float
    robust: Accuracy | None = None
    penalties: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, stored: Mapping[str, Any]) -> EpochRecord:
        """The record that :func:`dataclasses.asdict` took apart."""
        counts = {name: stored[name] and Accuracy(**stored[name]) for name in ("train", "test", "robust")}
        return cls(**{**stored, **counts})

    def log_line(self) -> str:
        """The record as one line of JSON for readers."""
        line: dict[str, Any] = {"epoch": self.epoch, "loss": self.loss, "train_accuracy": self.train.value}
        for name, accuracy in (("test", self.test), ("robust", self.robust)):
            if accuracy is not None:
                line |= {f"{name}_accuracy": accuracy.value, f"{name}_interval": accuracy.interval}
        line |= {f"{name}_penalty": value for name, value in self.penalties.items()}
        return json.dumps({**line, "lr": self.lr, "seconds": round(self.seconds, 3)})


def best_epoch(history: Sequence[EpochRecord]) -> EpochRecord | None:
    """The first epoch of the highest robust accuracy, where that was measured, or else of the highest test accuracy.

    The choice is made on test data, so the chosen epoch's accuracy there is a little too good.
    """
    tested = [(record.robust or record.test, record) for record in history]
    values = [(accuracy.value, -record.epoch, record) for accuracy, record in tested if accuracy is not None]
    return max(values)[2] if values else None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run needs in order to go on: on disk, what ``torch.load(weights_only=True)`` reads."""

    settings: Mapping[str, Any]  # all that must be the same for the run to go on, as plain values
    weights: Mapping[str, Tensor]  # the model's state dict, tensors only
    optimiser: Mapping[str, Any]  # its state dict
    history: Sequence[EpochRecord]  # the epochs so far
    objective: Mapping[str, Any]  # what the objective holds, as plain values

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a file, and require that it is whole."""
        damaged = UserError(
            f"{path} is damaged or no checkpoint; put the right file back or start again in another folder"
        )
        try:
            stored = read_weights(path)
        except Exception as error:  # damaged bytes make both readers raise nearly anything
            raise damaged from error
        if not (isinstance(stored, dict) and "format" in stored):
            raise damaged
        version = stored.pop("format")
        if version != _FORMAT:
            raise UserError(f"{path} has format {version}, not {_FORMAT}; use the version that wrote it")
        kinds = {item.name: list if item.name == "history" else dict for item in fields(cls)}
        if stored.keys() != kinds.keys() or not all(isinstance(stored[name], kind) for name, kind in kinds.items()):
            raise damaged
        try:
            history = [EpochRecord.from_plain(record) for record in stored["history"]]
        except (TypeError, KeyError, AttributeError):
            raise damaged from None
        return cls(**{**stored, "history": history})

    def save(self, folder: Path) -> None:
        """Replace the checkpoint in a folder, and then what is made from it.

        Raises:
            UserError: A file cannot be written. If it is the first one, the previous checkpoint is intact.
        """
        buffer = io.BytesIO()
        history = [asdict(record) for record in self.history]
        torch.save({"format": _FORMAT, **vars(self), "history": history}, buffer)
        replace_file(folder / STATE, buffer.getvalue())
        weights = sealed_weights(self.weights)
        replace_file(folder / LAST, weights)
        if self.history and best_epoch(self.history) is self.history[-1]:
            replace_file(folder / BEST, weights)
        replace_file(folder / LOG, "".join(record.log_line() + "\n" for record in self.history).encode())
        write_json(folder / SETTINGS, self.settings)

    def require_fit(self, settings: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> None:
        """Require that a run with these settings, of a model with such weights, is the one in the folder ``path``."""
        if self.settings.get("trainable") != settings.get("trainable"):
            raise UserError(f"the run in {path} trains other parameters of the model; choose another folder")
        require_same_settings(f"the run in {path}", self.settings, settings)
        for name in [*weights, *self.weights]:
            there, here = (
                f"{tuple(side[name].shape)} {side[name].dtype}" if name in side else "missing"
                for side in (self.weights, weights)
            )
            if there != here:
                raise UserError(
                    f"the run in {path} is of another model: {name} is {there} there and {here} here; "
                    "give the same model or choose another folder"
                )


def open_run(path: Path, *, resume: bool) -> Checkpoint | None:
    """Make a run's folder ready, and read the checkpoint from which to go on; None where the run begins."""
    made_folder(path)
    present = [name for name in (STATE, LAST, BEST, LOG, SETTINGS) if (path / name).exists()]
    if present and not resume:
        raise UserError(
            f"{path} already holds a run ({present[0]}); pass --resume to go on with it, or choose another folder"
        )
    if STATE not in present and (LAST in present or BEST in present):
        raise UserError(f"{path / STATE} is missing, so the run cannot go on; choose another folder")
    for left_over in path.glob(_LEFT_OVER):
        left_over.unlink(missing_ok=True)
    return Checkpoint.load(path / STATE) if STATE in present else None
