"""A training run's epochs as TensorBoard shows them; needs the extra ``tensorboard``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attackroute.core.errors import UserError
from attackroute.hardening.history import EpochRecord

EVENTS = "tensorboard"


class EventLog:
    """Writes each epoch's numbers as scalars, for ``on_epoch``; epochs that a resumed run repeats are replaced.

    Args:
        folder: The folder of the run; events go into ``tensorboard`` in it.

    Raises:
        UserError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError('TensorBoard is not installed; pip install "attackroute[tensorboard]"') from error
        self._make: Any = SummaryWriter
        self._folder = Path(folder) / EVENTS
        self._writer: Any = None

    def __call__(self, record: EpochRecord) -> None:
        """Write one epoch."""
        if self._writer is None:
            self._writer = self._make(str(self._folder), purge_step=record.epoch)
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.epoch)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def event_log(folder: str | os.PathLike[str]) -> Iterator[EventLog]:
    """An :class:`EventLog` that is closed at the end, also after an error."""
    log = EventLog(folder)
    try:
        yield log
    finally:
        log.close()


def scalars(record: EpochRecord) -> dict[str, float]:
    """An epoch's numbers by the names that TensorBoard groups by."""
    accuracies = {"train": record.train, "test": record.test, "robust": record.robust}
    return {
        "loss/task": record.loss,
        **{f"loss/{name} penalty": value for name, value in record.penalties.items()},
        **{f"accuracy/{name}": found.value for name, found in accuracies.items() if found is not None},
        "learning rate": record.lr,
    }
