"""Several processes give what one gives, byte for byte, and a process that is lost is named.

Three processes, two and one run every command (:mod:`shared_commands`).
"""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import attackroute
from shared_commands import COMMANDS, prepare
from shared_training import RUNS, TOLERANCE

MOST = 3
SOURCES = str(Path(attackroute.__file__).parents[1])
_CLOCKED = {"seconds", "folder", "examples"}  # and where the results are; nothing else may differ


def environment(**more: object) -> dict[str, str]:
    paths = os.pathsep.join([SOURCES, str(Path(__file__).parent)])
    return {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in more.items()},
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_any_number_of_processes_gives_what_one_gives(tmp_path: Path) -> None:
    """One test, since starting the processes takes most of its time."""
    prepare(tmp_path)
    ports = [free_port() for _ in range(MOST)]
    running = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "shared_commands.py"), str(tmp_path), *map(str, ports)],
            env=environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=MOST, MASTER_ADDR="127.0.0.1", MASTER_PORT=ports[0]),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(MOST)
    ]
    said = [process.communicate(timeout=500)[1] for process in running]
    assert [process.returncode for process in running] == [0] * MOST, "\n".join(said)
    alone = printed(tmp_path, 1, 0)
    for count in range(2, MOST + 1):
        for folder in (*COMMANDS, "examples"):
            compare_folders(tmp_path / "1" / folder, tmp_path / str(count) / folder)
        for run in RUNS:
            one, many = (load_file(tmp_path / str(own) / f"weights-{run}.safetensors") for own in (1, count))
            for name, value in one.items():
                assert torch.allclose(value, many[name], rtol=0, atol=TOLERANCE), (run, name)
        for command, text in alone.items():
            assert untimed(json.loads(printed(tmp_path, count, 0)[command])) == untimed(json.loads(text)), command
        for rank in range(1, count):  # the first process speaks, and no other
            assert set(printed(tmp_path, count, rank).values()) == {""}


def printed(root: Path, count: int, rank: int) -> dict[str, str]:
    found: dict[str, str] = json.loads((root / str(count) / f"process-{rank}.json").read_text())["printed"]
    return found


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
