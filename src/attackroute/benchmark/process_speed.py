"""Traces shared by two processes against those of one, each on one thread; run as a module, the part of one process.

Both processes are there all the time. In every turn the first one traces all batches alone while the other waits, and
then both trace them together. At last they measure what an image costs (:mod:`attackroute.benchmark.image_costs`).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import torch

from attackroute.benchmark.cases import SPEED_CASES, workload
from attackroute.benchmark.image_costs import CASES, ImageCosts, measure_costs
from attackroute.benchmark.plan import Plan
from attackroute.benchmark.timing import Runs, Spread, Stopclock
from attackroute.core.distributed import apart, joined
from attackroute.core.errors import UserError
from attackroute.tracing.trace import trace_routes

COUNT = 2
AIM = 1.8
"""Throughput of two processes over that of one which is to be reached on two free cores."""

_CASE = SPEED_CASES[0]
_TIMES_BATCHES = 4  # as many batches as another case has, so that the processes exchange results several times
_COST_REPEATS = 3


@dataclass(frozen=True)
class ProcessSpeed:
    """Traces of the same images.

    Attributes:
        images: How many.
        alone: By one process.
        shared: By two.
        costs: What an image costs, for each of :data:`attackroute.benchmark.image_costs.CASES`.
    """

    images: int
    alone: Runs
    shared: Runs
    costs: tuple[ImageCosts, ...]

    @property
    def gain(self) -> Spread:
        """Throughput of two processes / of one, in the same turn."""
        return Spread.of_ratios(self.alone.totals, self.shared.totals)

    def to_json(self) -> dict[str, Any]:
        """Numbers and every repeat."""
        return {
            "processes": COUNT,
            "images": self.images,
            "throughput_ratio": self.gain.to_json(),
            "seconds_alone": list(self.alone.totals),
            "seconds_shared": list(self.shared.totals),
            "aim": AIM,
            "costs": [costs.to_json() for costs in self.costs],
        }


def measure_processes(plan: Plan) -> ProcessSpeed:
    """Start the processes and let them measure.

    Args:
        plan: Repeats, sizes, seed; on the CPU, with one thread each.

    Raises:
        UserError: A process failed.
    """
    batch_size = plan.batch_size or _CASE.batch_size
    images = batch_size * plan.batches * _TIMES_BATCHES
    job = {"turns": plan.turns, "batch_size": plan.batch_size, "batches": plan.batches, "seed": plan.seed}
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryFile("w+") as words:
        running = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps(job)],
                env={**shared, "WORLD_SIZE": str(COUNT), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
            )
            for rank in range(COUNT)
        ]
        printed = [process.communicate()[0] for process in running]
        if any(process.returncode for process in running):
            words.seek(0)
            reason = (words.read().strip().splitlines() or ["no reason is given"])[-1]
            raise UserError(f"the processes to be measured failed ({reason}); leave out the case processes")
    found = json.loads(printed[0])
    alone, together = (Runs(tuple({"all": seconds} for seconds in found[name])) for name in ("alone", "shared"))
    return ProcessSpeed(images, alone, together, tuple(ImageCosts(**costs) for costs in found["costs"]))


def run(turns: int, batch_size: int | None, batches: int, seed: int) -> dict[str, Any] | None:
    """The part of one process; the first one gives the seconds of every turn but one for warming up, and the costs."""
    torch.set_num_threads(1)
    own_size = batch_size or _CASE.batch_size
    load = workload(_CASE, own_size, batches * _TIMES_BATCHES, seed=seed)
    images = torch.cat([images for images, _ in load.batches])
    labels = torch.cat([labels for _, labels in load.batches])
    clock = Stopclock()
    times: dict[str, list[float]] = {"alone": [], "shared": []}

    def trace() -> None:
        trace_routes(load.model, (images, labels), batch_size=own_size)

    with joined() as team:
        for _ in range(turns + 1):
            team.all(None)
            if team.leads:
                with apart():
                    times["alone"].append(clock.seconds(trace))
            team.all(None)
            times["shared"].append(clock.seconds(trace))
        costs = [
            measure_costs(
                team, case, batch_size or case.batch_size, batches, repeats=min(turns, _COST_REPEATS), seed=seed
            )
            for case in CASES
        ]
    if not team.leads:
        return None
    kept = {name: values[1:] for name, values in times.items()}
    return {**kept, "costs": [item.to_json() for item in costs if item is not None]}


if __name__ == "__main__":
    found = run(**json.loads(sys.argv[1]))
    if found is not None:
        print(json.dumps(found))
