"""What the epochs of a training run did, and how that is written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attackroute.accuracy import Accuracy


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch did.

    Attributes:
        epoch: Counts from 1.
        loss: Mean cross entropy over the epoch's samples, as met during training.
        train: Accuracy on the epoch's (augmented) samples, as met during training.
        test: Accuracy on the test data after the epoch; None without test data.
        lr: Learning rate of the last step.
        seconds: Time that the epoch took, its test included.
    """

    epoch: int
    loss: float
    train: Accuracy
    test: Accuracy | None
    lr: float
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        history: One record an epoch, those before a resumption included.
        resumed_from: Epochs that were taken from the folder; 0 for a fresh run.
        folder: Where the checkpoints are; None if none were asked for.
    """

    history: tuple[EpochRecord, ...]
    resumed_from: int
    folder: Path | None

    @property
    def last(self) -> EpochRecord:
        """The last epoch."""
        return self.history[-1]

    @property
    def best(self) -> EpochRecord | None:
        """The first epoch of the highest test accuracy; None without test data."""
        return best_epoch(self.history)


def best_epoch(history: Sequence[EpochRecord]) -> EpochRecord | None:
    """The first epoch of the highest test accuracy; None if nothing was tested."""
    tested = [(record.test.value, -record.epoch, record) for record in history if record.test is not None]
    return max(tested)[2] if tested else None


def to_plain(record: EpochRecord) -> dict[str, Any]:
    """The record as numbers in nested dicts, for :func:`from_plain`."""
    return asdict(record)


def from_plain(stored: dict[str, Any]) -> EpochRecord:
    """The record that :func:`to_plain` took apart."""
    test = stored["test"]
    return EpochRecord(
        **{**stored, "train": Accuracy(**stored["train"]), "test": None if test is None else Accuracy(**test)}
    )


def log_line(record: EpochRecord) -> str:
    """The record as one line of JSON for readers."""
    line: dict[str, Any] = {"epoch": record.epoch, "loss": record.loss, "train_accuracy": record.train.value}
    if record.test is not None:
        line |= {"test_accuracy": record.test.value, "test_interval": record.test.interval}
    return json.dumps({**line, "lr": record.lr, "seconds": round(record.seconds, 3)})
