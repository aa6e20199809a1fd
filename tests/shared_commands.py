"""Commands whose results must not depend on how many processes share them; run as a script, the part of one process.

``python shared_commands.py FOLDER PORT PORT EXPERIMENT,...`` expects the environment that torchrun makes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

import attackroute as ar
from attackroute.core.batches import BatchStream
from attackroute.core.distributed import Processes, joined
from attackroute.routes import folder
from attackroute.zoo.data import ImageBatches, ImageData, load_data
from command_line import run
from report_runs import make_network, make_pictures

COMMANDS: dict[str, tuple[object, ...]] = {
    "trace": ("trace", "--batch-size", 4, "--samples", 11, "--keep-scores"),
    "attacked": ("trace", "--batch-size", 5, "--samples", 11, "--attack", "pgd:eps=0.1,steps=2,restarts=2"),
    "one-batch": ("trace", "--batch-size", 20),
    "mixed": ("trace", "--batch-size", 3, "--dtype", "bfloat16", "--workers", 1),
    "evaluate": (
        "evaluate", "--batch-size", 3, "--check-samples", 2, "--attack", "fgsm:eps=0.1", "--attack",
        "pgd:eps=0.1,steps=2", "--attack", "gaussian-noise:std=0.2",
    ),
    "hardness": ("hardness", "--batch-size", 3, "--attack", "fgsm:eps=16/255"),
    "analyze": (
        "analyze", "--batch-size", 3, "--draws", 1, "--attack", "pgd:eps=0.2,steps=2", "--layers",
        "features.3,features.7",
    ),
}  # fmt: skip
SHARD = 3  # samples in a file of routes, rounded up to whole batches


def prepare(root: Path) -> None:
    """The network and the pictures that the commands take."""
    make_pictures(root / "pictures")
    make_network(root / "net")


def run_commands(root: Path, out: Path, experiments: str) -> dict[str, Any]:
    """Run all commands, the experiments of analyze among them, and return what each printed."""
    folder._SHARD_SAMPLES = SHARD
    printed: dict[str, Any] = {}
    for name, (command, *options) in COMMANDS.items():
        common = ("--model", root / "net", "--data", f"folder:{root / 'pictures'}", "--out", out / name, "--json")
        only = ("--only", experiments) if command == "analyze" else ()
        started = time.perf_counter()
        result = run(command, *common, *options, *only)
        assert result.exit_code == 0, (name, result.output)
        printed[name] = result.stdout
        print(name, round(time.perf_counter() - started, 1), file=sys.stderr)
    return printed


def check_streams(root: Path, team: Processes) -> None:
    """Every batch is worked on once, by the process whose turn it is, and all get the results in order."""
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    images = torch.rand(11, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(11)
    data = TensorDataset(images, labels)
    parts = [(images[:4], labels[:4]), (images[4:4], labels[4:4]), (images[4:], labels[4:])]
    kinds: dict[str, Any] = {
        "tensors": (images, labels),
        "loader": DataLoader(data, 4),
        "workers": DataLoader(data, 4, num_workers=1),
        "iterable": parts,
        "generator": iter(parts),
        "one": (images[:1], labels[:1]),
        "shuffled": DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(team.rank)),
        "many": (torch.rand(83, 1, 2, 2), torch.arange(83)),  # 21 batches: several rounds
    }
    for name, kind in kinds.items():
        stream = BatchStream(model, kind, 4)
        if name not in ("shuffled", "generator"):
            assert torch.equal(stream.first[1], labels[: min(4, len(labels) if name != "one" else 1)]), name
        seen = list(stream.map(lambda _, answers, stream=stream: (team.rank, stream.number, answers.tolist())))
        assert all(number % team.count == rank for rank, number, _ in seen), name
        read = [label for _, _, found in seen for label in found]
        expected = list(range({"one": 1, "many": 83}.get(name, 11)))
        assert (sorted(read) if name == "shuffled" else read) == expected, (name, read)
        assert len(set(map(str, team.all(read)))) == 1, name


def check_reading(root: Path, team: Processes) -> None:
    """Processes read their own batches alone."""
    data = load_data(f"folder:{root / 'pictures'}")
    read: list[int] = []

    class Noted(torch.utils.data.Dataset):
        def __getitem__(self, index: int) -> Any:
            read.append(index)
            return data.dataset[index]

        def __len__(self) -> int:
            return len(data)

    noted = ImageData(Noted(), data.classes, data.shape, data.name, data.split)
    model = ar.build_model("vgg_small", width=0.1, num_classes=2).eval()
    list(BatchStream(model, ImageBatches(noted, 3), 3).map(lambda _, labels: len(labels)))
    everyone = [index for part in team.all(read) for index in part]
    assert sorted(everyone) == list(range(len(data))), everyone


CHECKS: tuple[Callable[[Path, Processes], None], ...] = (check_streams, check_reading)


def main() -> None:
    """The part of one process: with all of them, then the first one alone; what came of it is written down."""
    root, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    ports = [int(port) for port in sys.argv[2:4]]
    torch.set_num_threads(1)
    for count, port in zip((int(os.environ["WORLD_SIZE"]), 1), ports, strict=True):
        if rank < count:
            os.environ |= {"WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
            found: dict[str, Any] = {}
            out = root / str(count)
            out.mkdir(exist_ok=True)
            with joined(timeout=timedelta(seconds=120)) as team:
                assert (team.rank, team.count) == (rank, count)
                for check in CHECKS:
                    check(root, team)
                own = out if team.leads else root / f"{count}-of-process-{rank}"
                found["printed"] = run_commands(root, own, sys.argv[4])
                assert team.leads or not own.exists(), f"process {rank} wrote {sorted(own.rglob('*'))}"
            (out / f"process-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
