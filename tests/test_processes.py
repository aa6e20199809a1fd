"""Several processes give what one gives, byte for byte, and the loss of one ends the job.

Several processes, and one, run every command (:mod:`shared_commands`).
"""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attackroute as ar
from attackroute.analysis.experiment import all_experiments
from attackroute.cli import app
from attackroute.core import distributed
from attackroute.core.distributed import LostProcessError, Processes
from attackroute.core.errors import UserError
from attackroute.routes import folder as route_folder
from command_line import done, run
from shared_commands import COMMANDS, prepare

MOST = 3
NONE = -1  # no process is killed
SOURCES = str(Path(ar.__file__).parents[1])
_CLOCKED = {"seconds", "folder"}  # and where the results are; nothing else may differ


def environment(**more: object) -> dict[str, str]:
    paths = os.pathsep.join([SOURCES, str(Path(__file__).parent)])
    told = {name: str(value) for name, value in more.items()}
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **told}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize(
    ("count", "experiments"), [(2, "sensitivity"), pytest.param(3, ",".join(all_experiments()), marks=pytest.mark.slow)]
)
def test_any_number_of_processes_gives_what_one_gives(tmp_path: Path, count: int, experiments: str) -> None:
    """One test, since starting the processes takes most of its time."""
    prepare(tmp_path)
    ports = [free_port(), free_port()]
    told = {"LOCAL_RANK": 0, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]}
    running = [
        subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).parent / "shared_commands.py"),
                str(tmp_path),
                *map(str, ports),
                experiments,
            ],
            env=environment(RANK=rank, **told),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=500)[1] for process in running]
    assert [process.returncode for process in running] == [0] * count, "\n".join(said)
    for folder in COMMANDS:
        compare_folders(tmp_path / "1" / folder, tmp_path / str(count) / folder)
    for command, text in printed(tmp_path, 1, 0).items():
        assert untimed(json.loads(printed(tmp_path, count, 0)[command])) == untimed(json.loads(text)), command
    for rank in range(1, count):  # the first process speaks, and no other
        assert set(printed(tmp_path, count, rank).values()) == {""}


def printed(root: Path, count: int, rank: int) -> dict[str, str]:
    found: dict[str, str] = json.loads((root / str(count) / f"process-{rank}.json").read_text())["printed"]
    return found


def launched(count: int, *arguments: object, script: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run torchrun, on ``-m attackroute`` or a script."""
    what = ["-m", "attackroute"] if script is None else [str(Path(__file__).parent / script)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    command += ["--master-port", str(free_port()), *what, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)


def assert_killed(result: subprocess.CompletedProcess[str], rank: int) -> None:
    """Require that the job ended as a process was killed, that torchrun says which, and the others at most one line."""
    assert result.returncode == 1, result.stderr
    assert "Signal 9 (SIGKILL)" in result.stderr
    assert re.search(rf"rank\s*: {rank} ", result.stderr), result.stderr
    assert "lost another one" in result.stderr or "interrupted: " in result.stderr or rank == 0
    said = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "interrupted: "))]
    assert len(said) <= 1, said
    assert all(line.endswith("--resume to go on") or line.startswith("interrupted: ") for line in said), said


def broken_off(count: int, rank: int, where: str, calls: int, *command: object) -> Callable[..., str]:
    """Run a command in processes one of which is killed; returns what goes on with it, and gives what that says."""
    assert_killed(launched(count, rank, where, calls, *command, script="killed_command.py"), rank)

    def go_on(count: int) -> str:
        result = launched(count, NONE, where, 0, *command, "--resume", script="killed_command.py")
        assert result.returncode == 0, result.stderr
        return result.stderr

    return go_on


def written_to(folder: Path) -> list[str]:
    """Names of its files, without the lock that a process leaves when it is killed."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def of_pictures(command: str, root: Path, *options: object) -> tuple[object, ...]:
    return command, "--model", root / "net", "--data", f"folder:{root / 'pictures'}", *options


def require_as_alone(folder: Path, *command: object) -> None:
    """Require what one process gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(route_folder, "_SHARD_SAMPLES", 3)
        done(*command, "--out", folder.with_name("alone"))
    compare_folders(folder.with_name("alone"), folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("killed")
    prepare(found)
    return found


@pytest.mark.slow
def test_finished_files_are_kept_when_a_process_is_killed(root: Path, tmp_path: Path) -> None:
    """Three processes trace four batches, each a file; one is killed at its second, and two are told by torchrun.

    Then a file is damaged, and two processes trace it again, with the batch that is missing, and no other.
    """
    broken, command = tmp_path / "broken", of_pictures("trace", root, "--batch-size", 4)
    go_on = broken_off(3, 0, "attackroute.tracing.trace:Tracer.trace", 1, *command, "--out", broken)
    names = [f"routes-0000{number}-of-00004.safetensors" for number in range(4)]
    files = [broken / name for name in names]
    assert written_to(broken) == [*names[:3], "summary.json"]
    files[1].write_bytes(files[1].read_bytes()[:-1] + b"?")
    written = [path.stat().st_mtime_ns for path in files[:3]]
    said = go_on(2)
    assert said.count("its samples are traced again") == 1 and names[1] in said
    assert "8 of 16 samples are done already" in said
    assert [path.stat().st_mtime_ns == before for path, before in zip(files, written, strict=False)] == [
        *(True, False, True)
    ]
    require_as_alone(broken, *command)


@pytest.mark.slow
def test_the_first_process_keeps_what_it_has_when_another_is_killed(root: Path, tmp_path: Path) -> None:
    """Three processes trace eight batches, two a file; what they exchanged in one round is a file and a half."""
    broken, command = tmp_path / "broken", of_pictures("trace", root, "--batch-size", 2)
    go_on = broken_off(3, 1, "attackroute.tracing.trace:Tracer.trace", 1, *command, "--out", broken)
    assert written_to(broken) == [
        "routes-00000-of-00004.safetensors",
        "routes-00001-of-00004.safetensors",
        "summary.json",
    ]
    assert "6 of 16 samples are done already" in go_on(2)
    require_as_alone(broken, *command)


@pytest.mark.slow
def test_machines_share_a_trace(root: Path, tmp_path: Path) -> None:
    """Two launchers stand in for two machines, which meet as the page on scaling says; they have no disk in common."""
    common = of_pictures("trace", root, "--batch-size", 3)
    where = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    where += ("--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    command = [sys.executable, "-m", "torch.distributed.run", *where, "-m", "attackroute", *map(str, common)]
    launchers = [
        subprocess.Popen(
            [*command, "--out", str(tmp_path / name)], env=environment(), stderr=subprocess.PIPE, text=True
        )
        for name in ("one", "other")
    ]
    said = [launcher.communicate(timeout=300)[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], "\n".join(said)
    done(*common, "--out", tmp_path / "alone")
    (written,) = (path for path in (tmp_path / "one", tmp_path / "other") if path.exists())  # rank 0 may be either
    compare_folders(tmp_path / "alone", written)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_an_evaluation_goes_on_with_another_number(root: Path, tmp_path: Path, victim: int) -> None:
    options = ("--batch-size", 2, "--attack", "pgd:eps=0.1,steps=2", "--check-samples", 0, "--json")
    broken, command = tmp_path / "broken", of_pictures("evaluate", root, *options)
    where = "attackroute.robustness.evaluate:_Run._predictions"
    go_on = broken_off(2, victim, where, 3, *command, "--out", broken)
    measured = (broken / "measurements.jsonl").read_bytes()
    assert len(measured.splitlines()) == 1 + 2 * 2  # the terms, and what was exchanged: a batch of each, both ways
    go_on(3)
    assert (broken / "measurements.jsonl").read_bytes().startswith(measured)
    require_as_alone(broken, *command)


@pytest.mark.slow
def test_what_is_wrong_is_said_once(root: Path) -> None:
    result = launched(2, "trace", "--model", root / "net", "--data", "folder:nowhere")
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        "error: data folder nowhere does not exist; expected CLASS/IMAGE below it, or train/CLASS/IMAGE and "
        "test/CLASS/IMAGE (or val/)"
    ]


def test_what_one_process_does_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "started_by_torchrun", lambda: True)
    for command in ("report", "train", "harden"):
        options = () if command == "report" else ("--model", "vgg_small", "--data", "mnist-sample", "--out", tmp_path)
        result = run(command, *options, *((tmp_path,) if command == "report" else ()))
        assert f"error: {command} runs in one process; start it without torchrun" in result.stderr
    monkeypatch.setattr(distributed, "_current", Processes(0, MOST))
    with pytest.raises(UserError, match="train and harden run in one process; start them without torchrun"):
        ar.train(torch.nn.Linear(3, 2), (torch.rand(4, 3), torch.arange(4) % 2))


class Together(Processes):
    """Stands for one of several processes; what the others bring to each exchange is given."""

    def __init__(self, rank: int, brought: list[list[Any]]) -> None:
        super().__init__(rank, len(brought[0]))
        object.__setattr__(self, "brought", iter(brought))

    def all(self, value: Any) -> list[Any]:
        values = next(self.brought)  # type: ignore[attr-defined]
        assert values[self.rank] == value
        return values


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_turns_come_in_order_and_end_with_the_data(rank: int) -> None:
    """Seven batches of three processes, the fifth of which holds nothing."""
    rounds = [[(0,), (1,), (2,)], [(3,), (), (5,)], [(6,), None, None]]
    own = iter([values[rank] for values in rounds])
    assert list(Together(rank, rounds).in_turns(lambda: next(own))) == [0, 1, 2, 3, 5, 6]


class Store:
    """Stands for what a job has in common."""

    def __init__(self, failures: int | None) -> None:
        self.failures = failures

    def add(self, _name: str, amount: int) -> int:
        if self.failures is None:
            raise RuntimeError("Connection reset by peer")
        self.failures += amount
        return self.failures


@pytest.mark.parametrize(
    ("before", "error", "kind", "says"),
    [
        (0, UserError("wrong data"), UserError, "wrong data"),
        (0, LostProcessError("closed"), LostProcessError, "closed"),
        (None, LostProcessError("closed"), LostProcessError, "closed"),  # with the store
        (0, KeyboardInterrupt("told to"), KeyboardInterrupt, "told to"),
        (1, LostProcessError("closed"), SystemExit, "1"),  # another one has said why
        (1, UserError("wrong data"), SystemExit, "1"),
        (2, KeyboardInterrupt(), SystemExit, "1"),
    ],
)
def test_the_first_process_to_fail_says_why(
    before: int | None, error: BaseException, kind: type, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "started_by_torchrun", lambda: True)
    monkeypatch.setattr(distributed, "_in_main_thread", lambda: False)  # signals are left alone
    monkeypatch.setattr(distributed, "_connect", lambda *_: Processes(1, MOST, store=Store(before)))
    with pytest.raises(kind, match=says), distributed.joined():
        assert not distributed.leading()
        raise error
    assert distributed.leading()


def compare_folders(one: Path, other: Path) -> None:
    """Require the same files; byte for byte, save for clocks in tables of numbers."""
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert names
    assert names == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for name in names:
        left, right = one / name, other / name
        if left.read_bytes() == right.read_bytes():
            continue
        assert name.suffix in (".json", ".csv", ".jsonl") and name.name not in ("route.json", "summary.json"), name
        assert comparable(left) == comparable(right), name


def comparable(path: Path) -> Any:
    if path.suffix == ".json":
        return untimed(json.loads(path.read_text()))
    if path.suffix == ".csv":
        return [untimed(row) for row in csv.DictReader(path.read_text().splitlines())]
    lines = [json.loads(line) for line in path.read_text().splitlines()]  # measurements, in the order of their making
    return sorted(json.dumps({**untimed(line), "checksum": None}) for line in lines)


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: untimed(item) for name, item in value.items() if name not in _CLOCKED}
    return [untimed(item) for item in value] if isinstance(value, list) else value
