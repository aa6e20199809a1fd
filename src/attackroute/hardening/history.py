"""What the epochs of a training run did, and how that is written down: in a log, and for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attackroute.core.errors import UserError
from attackroute.core.statistics import Accuracy

EVENTS = "tensorboard"
"""Where TensorBoard's events are in the folder of a run."""


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
        if self.test is not None:
            line |= {"test_accuracy": self.test.value, "test_interval": self.test.interval}
        if self.robust is not None:
            line |= {"robust_accuracy": self.robust.value, "robust_interval": self.robust.interval}
        line |= {f"{name}_penalty": value for name, value in self.penalties.items()}
        return json.dumps({**line, "lr": self.lr, "seconds": round(self.seconds, 3)})

    def scalars(self) -> dict[str, float]:
        """The record's numbers by the names that TensorBoard groups by."""
        accuracies = {"train": self.train, "test": self.test, "robust": self.robust}
        return {
            "loss/task": self.loss,
            **{f"loss/{name} penalty": value for name, value in self.penalties.items()},
            **{f"accuracy/{name}": accuracy.value for name, accuracy in accuracies.items() if accuracy is not None},
            "learning rate": self.lr,
        }


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
    values = [(accuracy.value, -record.epoch, record) for accuracy, record in tested if accuracy is not None]
    return max(values)[2] if values else None


@contextmanager
def event_log(folder: str | os.PathLike[str]) -> Iterator[Callable[[EpochRecord], None]]:
    """Context that gives an ``on_epoch`` which shows each epoch's numbers in TensorBoard.

    Epochs that a resumed run repeats are replaced.

    Args:
        folder: The folder of the run; events go into ``tensorboard`` in it.

    Raises:
        UserError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError('TensorBoard is not installed; pip install "attackroute[tensorboard]"') from error
    writer: Any = None

    def write(record: EpochRecord) -> None:
        nonlocal writer
        if writer is None:
            writer = SummaryWriter(str(Path(folder) / EVENTS), purge_step=record.epoch)  # type: ignore[no-untyped-call]
        for name, value in record.scalars().items():
            writer.add_scalar(name, value, record.epoch)
        writer.flush()

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()
