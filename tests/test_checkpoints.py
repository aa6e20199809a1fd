"""Checkpoints that survive a kill between any two file operations, and notice damage."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attackroute.core.errors import UserError
from attackroute.hardening import checkpoint as checkpoints
from attackroute.hardening.checkpoint import BEST, LAST, SETTINGS, STATE, Checkpoint, RunFolder


class Killed(BaseException):
    """Stands for the end of the process."""


class Faults:
    """Counts the file operations of the module and breaks off at one of them, in the middle of a write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arm(-1)
        for name in ("replace", "fsync"):
            monkeypatch.setattr(checkpoints.os, name, self._counted(getattr(os, name)))
        monkeypatch.setattr(checkpoints, "open", self._open, raising=False)

    def arm(self, fatal: int, error: Callable[[], BaseException] = Killed) -> None:
        self.done, self.fatal, self.error = 0, fatal, error

    def _tick(self) -> None:
        self.done += 1
        if self.done == self.fatal:
            raise self.error()

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self._tick()
            return operation(*args)

        return counted

    def _open(self, path: Path, mode: str) -> io.BufferedWriter:
        self._tick()
        file = open(path, mode)  # noqa: SIM115 (the caller closes it)
        write = file.write

        def half_then_rest(content: bytes) -> None:
            write(content[: len(content) // 2])
            try:
                self._tick()
            except BaseException:
                file.close()
                raise
            write(content[len(content) // 2 :])

        return _Writer(file, half_then_rest)  # type: ignore[return-value]


class _Writer:
    def __init__(self, file: Any, write: Callable[[bytes], None]) -> None:
        self.file, self.write, self.flush, self.fileno = file, write, file.flush, file.fileno

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def checkpoint(number: int) -> Checkpoint:
    weights = {"w": torch.full((3, 2), float(number)), "count": torch.tensor(number)}
    return Checkpoint(weights, {"epoch": number, "optimiser": {"state": {0: {"m": torch.full((3, 2), 1.0 * number)}}}})


def same(found: Checkpoint | None, number: int) -> bool:
    wanted = checkpoint(number)
    return (
        found is not None
        and found.state["epoch"] == number
        and torch.equal(found.state["optimiser"]["state"][0]["m"], wanted.state["optimiser"]["state"][0]["m"])
        and found.weights.keys() == wanted.weights.keys()
        and all(torch.equal(found.weights[name], wanted.weights[name]) for name in wanted.weights)
    )


def started(path: Path) -> RunFolder:
    """A run whose best epoch is 1 and whose last is 2."""
    folder = RunFolder(path)
    assert folder.open(resume=False, space=0) is None
    folder.save(checkpoint(1), best=True)
    folder.save(checkpoint(2), best=False)
    return folder


def reopened(path: Path) -> Checkpoint | None:
    return RunFolder(path).open(resume=True, space=0)


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
    state = {"n": 3, "x": 0.1, "none": None, "flag": True, "list": [1, "two"], "deep": {"t": torch.rand(2, 2)}}
    folder = RunFolder(tmp_path / "a" / "b")
    folder.open(resume=False, space=0)
    folder.save(Checkpoint(weights, state), best=False)
    found = reopened(tmp_path / "a" / "b")
    assert found is not None
    assert found.weights.keys() == weights.keys()
    for name, value in weights.items():
        assert found.weights[name].dtype == value.dtype
        assert torch.equal(found.weights[name], value)
    deep = state.pop("deep")
    found_deep = dict(found.state).pop("deep")
    assert {name: value for name, value in found.state.items() if name != "deep"} == state
    assert torch.equal(found_deep["t"], deep["t"])


def test_best_stays_while_last_goes_on(tmp_path: Path) -> None:
    started(tmp_path)
    assert same(reopened(tmp_path), 2)
    assert (number_in(tmp_path / LAST), number_in(tmp_path / BEST)) == (2, 1)
    again = RunFolder(tmp_path)
    again.open(resume=True, space=0)
    again.save(checkpoint(3), best=False)
    assert same(reopened(tmp_path), 3)
    assert (number_in(tmp_path / LAST), number_in(tmp_path / BEST)) == (3, 1)
    assert not list(tmp_path.glob("*.new"))


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
            folder.save(checkpoint(3), best=best)
            break
        except Killed:
            faults.arm(-1)
        found = reopened(path)
        assert found is not None
        seen.add(number := found.state["epoch"])
        assert number in (2, 3)
        assert same(found, number)
        assert number_in(path / LAST) == number
        assert number_in(path / BEST) == (3 if best and number == 3 else 1)
        assert not list(path.glob("*.new"))
    assert fatal > 10
    assert seen == {2, 3}


def test_a_kill_during_recovery_is_recovered_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(monkeypatch)
    folder = started(tmp_path)
    faults.arm(12)  # three files staged by three operations each, the state published by two: next is the rename
    with pytest.raises(Killed):
        folder.save(checkpoint(3), best=True)
    assert (number_in(tmp_path / LAST), number_in(tmp_path / BEST)) == (2, 1)
    for fatal in (1, 2, 1, 2):  # before and after the rename of each file
        faults.arm(fatal)
        with pytest.raises(Killed):
            reopened(tmp_path)
    faults.arm(-1)
    assert same(reopened(tmp_path), 3)
    assert number_in(tmp_path / BEST) == 3


def test_a_kill_before_the_first_checkpoint_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(monkeypatch)
    for fatal in range(1, 1000):
        folder = RunFolder(tmp_path / str(fatal))
        folder.open(resume=True, space=0)
        faults.arm(fatal)
        try:
            folder.save(checkpoint(1), best=False)
            break
        except Killed:
            faults.arm(-1)
        found = reopened(tmp_path / str(fatal))
        assert found is None or same(found, 1)
    assert fatal > 8


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_failing_disk_is_reported_and_the_old_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    faults = Faults(monkeypatch)
    folder = started(tmp_path)
    for fatal in (1, 2, 3, 5):  # opening, in the middle of a write, fsync, the state's write
        faults.arm(fatal, lambda: OSError(code, os.strerror(code)))
        with pytest.raises(UserError, match=os.strerror(code)) as caught:
            folder.save(checkpoint(3), best=False)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
    faults.arm(-1)
    folder.save(checkpoint(4), best=False)
    assert same(reopened(tmp_path), 4)


def test_text_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(monkeypatch)
    folder = RunFolder(tmp_path)
    folder.open(resume=False, space=0)
    folder.write_text(SETTINGS, "old and long")
    for fatal in range(1, 10):
        faults.arm(fatal)
        try:
            folder.write_text(SETTINGS, "new")
            break
        except Killed:
            assert (tmp_path / SETTINGS).read_text() in ("old and long", "new")
    assert (tmp_path / SETTINGS).read_text() == "new"


@pytest.mark.parametrize("name", [LAST, BEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "other run"])
def test_damaged_weights_are_noticed(tmp_path: Path, name: str, damage: str) -> None:
    started(tmp_path / "run")
    path = tmp_path / "run" / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
    elif damage == "cut":
        content = content[:-1]
    if damage == "missing":
        path.unlink()
    elif damage == "other run":
        other = started(tmp_path / "other")
        other.save(checkpoint(9), best=True)
        path.write_bytes((tmp_path / "other" / name).read_bytes())
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=name):
        reopened(tmp_path / "run")


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
        torch.save({"format": 1, "sums": {}, "run": trap}, tmp_path / STATE)
    else:
        (tmp_path / STATE).write_bytes(pickle.dumps(trap))
    with pytest.raises(UserError, match=STATE):
        reopened(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("stored", "message"),
    [({"format": 1, "sums": {}, "run": {}}, "format 1"), ({"model": 1}, STATE), ([1, 2], STATE)],
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
        RunFolder(tmp_path).open(resume=False, space=0)


def test_a_folder_with_other_files_is_used_and_they_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    started(tmp_path)
    assert same(reopened(tmp_path), 2)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="another folder"):
            RunFolder(path).open(resume=False, space=0)


def test_too_little_space_is_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MiB"):
        RunFolder(tmp_path).open(resume=False, space=2**62)
    assert not list(tmp_path.iterdir())
