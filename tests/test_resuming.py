"""Runs that were killed, interrupted or damaged, and how they go on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from attackroute.core.errors import UserError
from attackroute.core.statistics import Accuracy, count_correct
from attackroute.hardening.checkpoint import LOG, SETTINGS, STATE
from attackroute.hardening.training import train
from attackroute.zoo.weights import BEST, LAST
from model_checks import one_line
from toy_training import (
    SETTINGS_USED,
    Killed,
    identical,
    killed_at,
    raises,
    toy_data,
    toy_model,
    trained,
    weights_of,
    without_time,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_files_of_a_run(tmp_path: Path) -> None:
    weights, result = trained(folder=tmp_path / "run")
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == sorted([BEST, LAST, LOG, SETTINGS, STATE])
    assert identical(load_file(folder / LAST), weights)
    settings = json.loads((folder / SETTINGS).read_text())
    assert {name: settings[name] for name in asdict(SETTINGS_USED)} == asdict(SETTINGS_USED)
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["test_accuracy"] for line in lines] == [record.test.value for record in result.history if record.test]
    best = toy_model()
    best.load_state_dict(load_file(folder / BEST))
    assert result.best is not None
    assert result.best.test is not None
    assert (
        count_correct(best, toy_data(12, seed=1)).value
        == result.best.test.value
        == max(x["test_accuracy"] for x in lines)
    )
    assert result.folder == folder
    state = torch.load(folder / STATE, weights_only=True)
    assert [record["epoch"] for record in state["history"]] == [1, 2, 3]
    assert identical(state["weights"], weights)


def test_the_first_of_the_best_epochs_counts(tmp_path: Path) -> None:
    one_of_four = TensorDataset(toy_data(1).tensors[0].expand(4, -1, -1, -1), torch.arange(4))
    kept: list[bytes] = []
    result = train(
        toy_model(), toy_data(), one_of_four, SETTINGS_USED,
        folder=tmp_path, on_epoch=lambda _: kept.append((tmp_path / LAST).read_bytes()),
    )  # fmt: skip
    assert [record.test for record in result.history] == [Accuracy(1, 4)] * 3
    assert result.best == result.history[0]
    assert (tmp_path / BEST).read_bytes() == kept[0]


VARIANTS = [{}, {"weight_decay": 0.0, "augment": "none"}, {"channels_last": True}, {"amp": True, "momentum": 0.0}]


@pytest.mark.parametrize("change", VARIANTS)
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_resuming_after_every_epoch(tmp_path: Path, change: dict[str, Any], epoch: int) -> None:
    settings = replace(SETTINGS_USED, **change)
    whole, reference = trained(settings)
    with pytest.raises(Killed):
        trained(settings, folder=tmp_path, on_epoch=raises(Killed(), epoch))
    model = toy_model(seed=99)  # the weights come from the folder
    seen: list[int] = []
    result = train(
        model, toy_data(), toy_data(12, seed=1), settings,
        folder=tmp_path, resume=True, on_epoch=lambda record: seen.append(record.epoch),
    )  # fmt: skip
    assert identical(weights_of(model), whole)
    assert identical(load_file(tmp_path / LAST), whole)
    assert without_time(result.history) == without_time(reference.history)
    assert result.resumed_from == epoch
    assert seen == list(range(epoch + 1, 4))
    assert len((tmp_path / LOG).read_text().splitlines()) == 3


def test_resuming_with_workers_and_random_data(tmp_path: Path) -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        model = toy_model()
        train(model, Jittered(*toy_data().tensors), None, replace(SETTINGS_USED, workers=2), **options)
        return weights_of(model)

    with pytest.raises(Killed):
        run(folder=tmp_path, on_epoch=raises(Killed(), 1))
    assert identical(run(folder=tmp_path, resume=True), run())


class Jittered(TensorDataset):
    """Draws from the global generator, as common image transforms do."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, label = super().__getitem__(index)
        return image * torch.rand(()), label


def test_resuming_after_a_kill_at_any_file_operation(tmp_path: Path) -> None:
    settings = replace(SETTINGS_USED, epochs=2)
    whole, reference = trained(settings, folder=tmp_path / "whole")
    best = load_file(tmp_path / "whole" / BEST)
    for operations in range(200):
        folder = tmp_path / str(operations)
        if not killed_at(operations, ("replace", "fsync"), lambda folder=folder: trained(settings, folder=folder)):
            break
        weights, result = trained(settings, folder=folder, resume=True)
        assert identical(weights, whole)
        assert identical(load_file(folder / LAST), whole)
        assert without_time(result.history) == without_time(reference.history)
        assert identical(load_file(folder / BEST), best)
        assert len((folder / LOG).read_text().splitlines()) == 2
    assert operations > 20


@pytest.mark.parametrize("steps", [1, 3, 5, 9])
def test_an_interruption_keeps_the_finished_epochs(tmp_path: Path, steps: int) -> None:
    whole, reference = trained()
    under_way = (steps + 2) // 3
    with pytest.raises(KeyboardInterrupt, match=f"epoch {under_way} of 3 is lost; .* keeps epoch {under_way - 1}"):
        trained(folder=tmp_path, progress=at_step(steps, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert len(torch.load(tmp_path / STATE, weights_only=True)["history"]) == under_way - 1
    taken: list[int] = []
    weights, result = trained(folder=tmp_path, resume=True, progress=lambda done, *_: taken.append(done))
    assert taken == list(range(3 * (under_way - 1) + 1, 10))
    assert identical(weights, whole)
    assert without_time(result.history) == without_time(reference.history)


def at_step(step: int, action: Callable[[], object]) -> Callable[[int, int, str], None]:
    return lambda done, *_: action() if done == step else None  # type: ignore[func-returns-value]


def test_progress_counts_every_step(tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    with pytest.raises(Killed):
        trained(folder=tmp_path, on_epoch=raises(Killed(), 1), progress=lambda *call: calls.append(call))
    trained(folder=tmp_path, resume=True, progress=lambda *call: calls.append(call))
    assert [(done, total) for done, total, _ in calls] == [(step, 9) for step in range(1, 10)]
    assert calls[4][2].startswith("epoch 2/3, loss ")


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 4}, {"batch_size": 4}, {"lr": 0.06}, {"momentum": 0.8}, {"weight_decay": 0.0}, {"seed": 12},
        {"augment": "none"}, {"amp": True}, {"channels_last": True}, {"workers": 1},
    ],
)  # fmt: skip
def test_resuming_with_other_settings_names_the_setting(tmp_path: Path, change: dict[str, Any]) -> None:
    train(toy_model(), toy_data(), None, replace(SETTINGS_USED, epochs=1), folder=tmp_path)
    model = toy_model(seed=5)
    before = weights_of(model)
    with pytest.raises(UserError, match=next(iter(change))):
        train(model, toy_data(), None, replace(SETTINGS_USED, **{"epochs": 1, **change}), folder=tmp_path, resume=True)
    assert identical(weights_of(model), before)


def test_a_run_without_test_data_is_resumed_with_neither_other_data_nor_another_model(tmp_path: Path) -> None:
    result = train(toy_model(), toy_data(), None, SETTINGS_USED, folder=tmp_path)
    assert result.best is None and not (tmp_path / BEST).exists()  # without test data
    frozen = toy_model()
    frozen[0].requires_grad_(False)
    smaller = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    for model, data, test, message in [
        (toy_model(), toy_data(28), None, "train_samples 24, not 28"),
        (toy_model(), toy_data(), toy_data(), "test_samples None, not 24"),
        (frozen, toy_data(), None, "other parameters"),
        (smaller, toy_data(), None, "other parameters"),
        (toy_model().double(), toy_data(), None, r"0.weight is .*float32 there and .*float64 here"),
    ]:
        with pytest.raises(UserError, match=message):
            train(model, data, test, SETTINGS_USED, folder=tmp_path, resume=True)


def test_an_existing_run_needs_resume_and_resume_needs_a_folder(tmp_path: Path) -> None:
    trained(folder=tmp_path)
    with pytest.raises(UserError, match="--resume"):
        trained(folder=tmp_path)
    with pytest.raises(UserError, match="folder"):
        trained(resume=True)


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    whole, first = trained(folder=tmp_path)
    again, result = trained(folder=tmp_path, resume=True, progress=lambda *_: pytest.fail("a step was taken"))
    assert identical(again, whole)
    assert result.history == first.history
    assert result.resumed_from == 3


def test_a_damaged_checkpoint_is_refused_and_weights_are_written_again_from_a_good_one(tmp_path: Path) -> None:
    whole, _ = trained(folder=tmp_path)
    for name in (LAST, STATE):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        if name == LAST:
            trained(folder=tmp_path, resume=True)
            assert identical(load_file(tmp_path / LAST), whole)
    with pytest.raises(UserError, match=STATE):
        trained(folder=tmp_path, resume=True)


def test_two_runs_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    """The second is refused while the first is under way, and goes on once that is gone, however it ended."""
    waiting, holding = os.pipe()
    child = os.fork()
    if child == 0:
        trained(folder=tmp_path, progress=at_step(2, lambda: (os.write(holding, b"."), time.sleep(600))))
        os._exit(0)
    try:
        os.read(waiting, 1)
        kept = (tmp_path / STATE).read_bytes()
        for resume in (False, True):
            with one_line(match=r"another process is at work in .*: wait"):
                trained(folder=tmp_path, resume=resume)
        assert (tmp_path / STATE).read_bytes() == kept
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    weights, result = trained(folder=tmp_path, resume=True)
    assert identical(weights, trained()[0]) and result.last.epoch == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([BEST, LAST, LOG, SETTINGS, STATE])
