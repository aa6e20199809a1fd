"""What the epochs of a training run did, and how that is written down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attackroute.core.accuracy import Accuracy


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
        """The first epoch of the highest accuracy, see :func:`best_epoch`; None without test data."""
        return best_epoch(self.history)


def best_epoch(history: Sequence[EpochRecord]) -> EpochRecord | None:
    """The first epoch of the highest robust accuracy, where that was measured, or else of the highest test accuracy.

    The choice is made on test data, so the chosen epoch's accuracy there is a little too good.
    """
    tested = [(record.robust or record.test, record) for record in history]
    values = [(found.value, -record.epoch, record) for found, record in tested if found is not None]
    return max(values)[2] if values else None


def to_plain(record: EpochRecord) -> dict[str, Any]:
    """The record as numbers in nested dicts, for :func:`from_plain`."""
    return asdict(record)


def from_plain(stored: dict[str, Any]) -> EpochRecord:
    """The record that :func:`to_plain` took apart."""
    counts = {
        name: None if stored.get(name) is None else Accuracy(**stored[name]) for name in ("train", "test", "robust")
    }
    return EpochRecord(**{**stored, **counts})


def log_line(record: EpochRecord) -> str:
    """The record as one line of JSON for readers."""
    line: dict[str, Any] = {"epoch": record.epoch, "loss": record.loss, "train_accuracy": record.train.value}
    if record.test is not None:
        line |= {"test_accuracy": record.test.value, "test_interval": record.test.interval}
    if record.robust is not None:
        line |= {"robust_accuracy": record.robust.value, "robust_interval": record.robust.interval}
    line |= {f"{name}_penalty": value for name, value in record.penalties.items()}
    return json.dumps({**line, "lr": record.lr, "seconds": round(record.seconds, 3)})
