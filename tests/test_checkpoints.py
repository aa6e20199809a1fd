"""Checkpoints that survive a kill between any two file operations, and notice damage."""

from __future__ import annotations

import errno
import os
import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attackroute.core.errors import UserError
from attackroute.core.statistics import Accuracy
from attackroute.hardening.checkpoint import LOG, SETTINGS, STATE, Checkpoint, EpochRecord, open_run
from attackroute.zoo.weights import BEST, LAST
from model_checks import Trap


def checkpoint(number: int, best: int = 1) -> Checkpoint:
    """One of the end of an epoch, with the best of the epochs so far."""
    return Checkpoint(
        settings={"epochs": 9},
        weights={"w": torch.full((3, 2), float(number)), "count": torch.tensor(number)},
        optimiser={"state": {0: {"m": torch.full((3, 2), 1.0 * number)}}},
        history=[record(epoch, correct=2 if epoch == best else 1) for epoch in range(1, number + 1)],
        objective={"n": 3, "x": 0.1, "none": None, "flag": True, "list": [1, "two"]},
    )


def record(epoch: int, correct: int) -> EpochRecord:
    robust = Accuracy(correct, 3) if epoch % 2 else None
    return EpochRecord(
        epoch=epoch, loss=0.1 * epoch, train=Accuracy(1, 3), test=Accuracy(correct, 3), lr=0.1, seconds=1.0,
        robust=robust, penalties={"weight": 0.3},
    )  # fmt: skip


def same(read: Checkpoint | None, number: int, best: int = 1) -> bool:
    written = checkpoint(number, best)
    return (
        read is not None
        and read.history == written.history
        and read.objective == written.objective
        and torch.equal(read.optimiser["state"][0]["m"], written.optimiser["state"][0]["m"])
        and read.weights.keys() == written.weights.keys()
        and all(torch.equal(read.weights[name], written.weights[name]) for name in written.weights)
    )


def started(path: Path) -> None:
    """A run whose best epoch is 1 and whose last is 2."""
    assert open_run(path, resume=False) is None
    checkpoint(1).save(path)
    checkpoint(2).save(path)


def reopened(path: Path) -> Checkpoint | None:
    return open_run(path, resume=True)


def number_in(path: Path) -> int:
    return int(load_file(path)["count"])


def test_round_trip_of_all_kinds_of_tensors(tmp_path: Path) -> None:
    shared = torch.rand(4, 3)
    weights = {
        "a": shared,
        "tied": shared,
        "transposed": shared.t(),
        "bf16": torch.rand(2).bfloat16(),
        "scalar": torch.tensor(7),
        "channels_last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "empty": torch.empty(0, 3),
    }
    folder = tmp_path / "a" / "b"
    open_run(folder, resume=False)
    state = checkpoint(1)
    replace(state, weights=weights).save(folder)
    reread = reopened(folder)
    assert reread is not None
    for read in (reread.weights, load_file(folder / LAST)):
        assert read.keys() == weights.keys()
        for name, value in weights.items():
            assert read[name].dtype == value.dtype
            assert torch.equal(read[name], value)
    assert (reread.settings, reread.history, reread.objective) == (state.settings, state.history, state.objective)


def test_best_stays_while_last_goes_on(tmp_path: Path) -> None:
    started(tmp_path)
    assert same(reopened(tmp_path), 2)
    assert (number_in(tmp_path / LAST), number_in(tmp_path / BEST)) == (2, 1)
    checkpoint(3).save(tmp_path)
    assert same(reopened(tmp_path), 3)
    assert (number_in(tmp_path / LAST), number_in(tmp_path / BEST)) == (3, 1)
    assert (tmp_path / LOG).read_text() == "".join(epoch.log_line() + "\n" for epoch in checkpoint(3).history)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([STATE, LAST, BEST, LOG, SETTINGS])


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("notes.txt", ".notes.tmp"):
        (tmp_path / name).write_text("mine")
    started(tmp_path)
    (tmp_path / ".0123456789abcdef.tmp").write_text("half a file")
    assert same(reopened(tmp_path), 2)
    assert [path.name for path in tmp_path.glob(".*")] == [".notes.tmp"]
    assert all((tmp_path / name).read_text() == "mine" for name in ("notes.txt", ".notes.tmp"))


@pytest.mark.parametrize("operation", ["fsync", "replace"])  # writing the checkpoint, and putting it in its place
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_failing_disk_is_reported_and_the_old_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, operation: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    started(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, operation, fail)
        with pytest.raises(UserError, match=os.strerror(code)) as caught:
            checkpoint(3).save(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same(reopened(tmp_path), 2)
    checkpoint(4).save(tmp_path)
    assert same(reopened(tmp_path), 4)


def test_a_damaged_state_is_noticed_wherever_the_damage_is(tmp_path: Path) -> None:
    started(tmp_path)
    whole = (tmp_path / STATE).read_bytes()
    draw = random.Random(0)
    noticed = 0
    positions = draw.sample(range(len(whole)), 300)
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(8)
        (tmp_path / STATE).write_bytes(damaged)
        try:
            assert same(reopened(tmp_path), 2)  # padding of the archive carries nothing
        except UserError as error:
            assert STATE in str(error)
            noticed += 1
    assert noticed > len(positions) / 4
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / STATE).write_bytes(whole[:length])
        with pytest.raises(UserError, match=STATE):
            reopened(tmp_path)


@pytest.mark.parametrize("archive", [True, False])
def test_a_hostile_state_is_not_run(tmp_path: Path, archive: bool) -> None:
    started(tmp_path)
    if archive:
        torch.save({"format": 3, "objective": Trap(tmp_path / "sprung")}, tmp_path / STATE)
    else:
        (tmp_path / STATE).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(UserError, match=STATE):
        reopened(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("stored", "message"),
    [({"format": 2, "run": {}}, "format 2"), ({"format": 3, "run": {}}, STATE), ({"model": 1}, STATE), ([1, 2], STATE)],
)
def test_a_foreign_state_is_refused(tmp_path: Path, stored: object, message: str) -> None:
    torch.save(stored, tmp_path / STATE)
    with pytest.raises(UserError, match=message):
        reopened(tmp_path)


@pytest.mark.parametrize("name", [LAST, BEST])
def test_weights_without_a_state_are_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(UserError, match=STATE):
        reopened(tmp_path)
    assert (tmp_path / name).read_bytes() == b"precious"


@pytest.mark.parametrize("name", [LAST, BEST, STATE, "log.jsonl", SETTINGS])
def test_a_folder_with_a_run_is_refused_without_resume(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"--resume.*another folder"):
        open_run(tmp_path, resume=False)
