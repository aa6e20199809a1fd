"""What TensorBoard reads of a run, also of one that was broken off."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from attackroute.core.errors import UserError
from attackroute.hardening.checkpoint import EVENTS, EpochRecord, event_log
from toy_training import SETTINGS_USED, Killed, trained


class Writer:
    """Stands in for TensorBoard's, as far as it is used."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, folder: str, *, purge_step: int) -> None:
        self.folder, self.first, self.closed = folder, purge_step, False
        self.scalars: dict[tuple[str, int], float] = {}
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_events_are_the_epochs_even_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "made", [])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    settings = replace(SETTINGS_USED, robust_samples=4)
    with pytest.raises(Killed), event_log(tmp_path) as log:

        def die(record: EpochRecord) -> None:
            log(record)
            raise Killed

        trained(settings, attack="fgsm:eps=0.1", folder=tmp_path, on_epoch=die)
    with event_log(tmp_path) as log:
        _, result = trained(settings, attack="fgsm:eps=0.1", folder=tmp_path, resume=True, on_epoch=log)
    first, second = Writer.made
    assert (first.folder, first.first, first.closed) == (str(tmp_path / EVENTS), 1, True)
    assert (second.folder, second.first, second.closed) == (str(tmp_path / EVENTS), 2, True)
    written = first.scalars | second.scalars
    names = {"loss/task", "accuracy/train", "accuracy/test", "accuracy/robust", "learning rate"}
    assert written.keys() == {(name, epoch) for name in names for epoch in (1, 2, 3)}
    for record in result.history:
        assert written["loss/task", record.epoch] == record.loss
        assert written["accuracy/robust", record.epoch] == record.robust.value
    assert EpochRecord.scalars(replace(result.last, penalties={"weight": 2.0}))["loss/weight penalty"] == 2.0


def test_without_tensorboard_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install"), event_log(tmp_path):
        pass
