"""What TensorBoard reads of a run, also of one that was broken off."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from attackroute.core.errors import UserError
from attackroute.hardening.event_log import EVENTS, event_log, scalars
from toy_training import SETTINGS_USED, Killed, trained


def test_events_are_the_epochs_even_after_a_kill(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = replace(SETTINGS_USED, robust_samples=4)
    with pytest.raises(Killed), event_log(tmp_path) as log:

        def die(record: object) -> None:
            log(record)  # type: ignore[arg-type]
            raise Killed

        trained(settings, attack="fgsm:eps=0.1", folder=tmp_path, on_epoch=die)
    with event_log(tmp_path) as log:
        _, result = trained(settings, attack="fgsm:eps=0.1", folder=tmp_path, resume=True, on_epoch=log)
    reader = events.EventAccumulator(str(tmp_path / EVENTS))
    reader.Reload()
    names = {"loss/task", "accuracy/train", "accuracy/test", "accuracy/robust", "learning rate"}
    assert set(reader.Tags()["scalars"]) == names
    for name in names:
        found = {event.step: event.value for event in reader.Scalars(name)}
        assert found == pytest.approx({record.epoch: scalars(record)[name] for record in result.history}, rel=1e-6)


def test_without_tensorboard_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install"), event_log(tmp_path):
        pass
