"""Checkpoints that survive a kill between any two file operations, and notice damage."""

from __future__ import annotations

import errno
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attackroute.core.errors import UserError
from attackroute.hardening.checkpoint import LOG, SETTINGS, STATE, Checkpoint, RunFolder
from attackroute.zoo.weights import BEST, LAST


class Killed(BaseException):
    """Stands for the end of the process."""


class Faults:
    """Counts replaced and synchronised files, and breaks off at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arm(-1)
        for name in ("replace", "fsync"):
            monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def arm(self, fatal: int, error: Callable[[], BaseException] = Killed) -> None:
        self.done, self.fatal, self.error = 0, fatal, error

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.done += 1
            if self.done == self.fatal:
                raise self.error()
            return operation(*args)

        return counted


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint(
        settings={"epochs": 9},
        weights={"w": torch.full((3, 2), float(number)), "count": torch.tensor(number)},
        optimiser={"state": {0: {"m": torch.full((3, 2), 1.0 * number)}}},
        scaler={},
        history=[{"epoch": epoch} for epoch in range(1, number + 1)],
        objective={"n": 3, "x": 0.1, "none": None, "flag": True, "list": [1, "two"]},
    )


def same(found: Checkpoint | None, number: int) -> bool:
    wanted = checkpoint(number)
    return (
        found is not None
        and found.history == wanted.history
        and found.objective == wanted.objective
        and torch.equal(found.optimiser["state"][0]["m"], wanted.optimiser["state"][0]["m"])
        and found.weights.keys() == wanted.weights.keys()
        and all(torch.equal(found.weights[name], wanted.weights[name]) for name in wanted.weights)
    )


def save(folder: RunFolder, number: int, *, best: bool) -> None:
    folder.save(checkpoint(number), best=best, log=f"{number}\n")


def started(path: Path) -> RunFolder:
    """A run whose best epoch is 1 and whose last is 2."""
    folder = RunFolder(path)
    assert folder.open(resume=False) is None
    save(folder, 1, best=True)
    save(folder, 2, best=False)
    return folder


def reopened(path: Path) -> Checkpoint | None:
    return RunFolder(path).open(resume=True)


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
    folder = RunFolder(tmp_path / "a" / "b")
    folder.open(resume=False)
    state = checkpoint(1)
    folder.save(replace(state, weights=weights), best=False, log="")
    found = reopened(tmp_path / "a" / "b")
    assert found is not None
    for read in (found.weights, load_file(tmp_path / "a" / "b" / LAST)):
        assert read.keys() == weights.keys()
        for name, value in weights.items():
            assert read[name].dtype == value.dtype
            assert torch.equal(read[name], value)
    assert (found.settings, found.history, found.objective) == (state.settings, state.history, state.objective)


def test_best_stays_while_last_goes_on(tmp_path: Path) -> None:
    started(tmp_path)
    assert same(reopened(tmp_path), 2)
    assert (number_in(tmp_path / LAST), number_in(tmp_path / BEST)) == (2, 1)
    again = RunFolder(tmp_path)
    again.open(resume=True)
    save(again, 3, best=False)
    assert same(reopened(tmp_path), 3)
    assert (number_in(tmp_path / LAST), number_in(tmp_path / BEST)) == (3, 1)
    assert (tmp_path / LOG).read_text() == "3\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([STATE, LAST, BEST, LOG, SETTINGS])


@pytest.mark.parametrize("best", [True, False])
def test_a_kill_at_any_operation_leaves_one_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: bool
) -> None:
    faults = Faults(monkeypatch)
    seen = set()
    for fatal in range(1, 1000):
        path = tmp_path / str(fatal)
        folder = started(path)
        faults.arm(fatal)
        try:
            save(folder, 3, best=best)
            break
        except Killed:
            faults.arm(-1)
        found = reopened(path)
        assert found is not None
        seen.add(number := len(found.history))
        assert number in (2, 3)
        assert same(found, number)
        RunFolder(path).publish(found, best=best and number == 3, log="again")
        assert number_in(path / LAST) == number
        assert number_in(path / BEST) == (3 if best and number == 3 else 1)
    assert fatal > 10
    assert seen == {2, 3}


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    started(tmp_path)
    (tmp_path / ".0123456789abcdef.tmp").write_text("half a file")
    (tmp_path / ".notes.tmp").write_text("mine")
    reopened(tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [".notes.tmp"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_failing_disk_is_reported_and_the_old_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    faults = Faults(monkeypatch)
    folder = started(tmp_path)
    for fatal in (1, 2):  # writing the checkpoint, and putting it in its place
        faults.arm(fatal, lambda: OSError(code, os.strerror(code)))
        with pytest.raises(UserError, match=os.strerror(code)) as caught:
            save(folder, 3, best=False)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
        faults.arm(-1)
        assert same(reopened(tmp_path), 2)
    save(folder, 4, best=False)
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


class Trap:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("archive", [True, False])
def test_a_hostile_state_is_not_run(tmp_path: Path, archive: bool) -> None:
    started(tmp_path)
    trap = Trap(tmp_path / "sprung")
    if archive:
        torch.save({"format": 3, "objective": trap}, tmp_path / STATE)
    else:
        (tmp_path / STATE).write_bytes(pickle.dumps(trap))
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
        RunFolder(tmp_path).open(resume=False)


def test_a_folder_with_other_files_is_used_and_they_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    started(tmp_path)
    assert same(reopened(tmp_path), 2)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="another folder"):
            RunFolder(path).open(resume=False)
