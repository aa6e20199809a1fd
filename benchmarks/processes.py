"""Traces shared by two processes against those of one, and what an image costs where several processes trace many.

Both processes are there all the time: ``python -m benchmarks.processes JSON`` is the part of one. In every turn the
first one traces all batches alone while the other waits, and then both trace them together. At last they measure what
an image costs, in processor time and bytes: not time on the clock, since these are added up to say what a job of
another size costs.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torchvision.transforms.functional import resize, to_pil_image

from attackroute.core.distributed import Processes, apart, joined
from attackroute.core.errors import UserError
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.data import ImageBatches, load_data
from benchmarks.cases import PROCESSES, SPEED_CASES, Case, Plan, Workload, seeded, workload
from benchmarks.timing import BYTES, SECONDS, Measurement, Spread, Stopclock, interleaved

AIM = 1.8
"""Throughput of two processes over that of one which is to be reached on two free cores."""

COST_CASES = SPEED_CASES[:2]
"""Small images, and images of ImageNet's size."""

FORWARD, TRACE, READING = "plain inference", "trace", "reading a JPEG"
PACKING, EXCHANGING, UNPACKING = "packing its routes", "sending and receiving them", "unpacking them"
WRITING, LOADING = "joining and writing them", "reading them back"
IN_FILE, SENT, JPEG = "routes in a file", "routes as they are sent", "JPEG"

FILE_SAMPLES = 8192  # as ``attackroute trace`` writes them

_ROOT = Path(__file__).parent.parent
_COUNT = 2
_TIMES_BATCHES = 4  # as many batches as another case has, so that the processes exchange results several times
_COST_REPEATS = 3
_JPEG_SIZE = (375, 500)
_LARGE = 224  # images of this size come from JPEGs


@dataclass(frozen=True)
class Job:
    """The part of a process.

    Attributes:
        turns: How often everything is measured.
        batch_size: Images at a time; None is each case's own.
        batches: Batches of another case.
        seed: For weights and images.
    """

    turns: int
    batch_size: int | None
    batches: int
    seed: int


def measure_processes(plan: Plan) -> list[Measurement]:
    """Start the processes and let them measure.

    Args:
        plan: Repeats, sizes, seed; on the CPU, with one thread each.

    Raises:
        UserError: A process failed.
    """
    job = Job(plan.turns, plan.batch_size, plan.batches, plan.seed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryFile("w+") as words:
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.processes", json.dumps(asdict(job))],
                env={**shared, "WORLD_SIZE": str(_COUNT), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
                cwd=_ROOT,
            )
            for rank in range(_COUNT)
        ]
        printed = [process.communicate()[0] for process in running]
        if any(process.returncode for process in running):
            words.seek(0)
            reason = (words.read().strip().splitlines() or ["no reason is given"])[-1]
            raise UserError(f"the processes to be measured failed ({reason}); leave out the case {PROCESSES}")
    return [
        Measurement(case=case, quantity=quantity, spread=Spread(tuple(values)), unit=unit, bound=bound)
        for case, quantity, values, unit, bound in json.loads(printed[0])
    ]


def run(job: Job) -> list[Measurement]:
    """The part of one process; the first one gives the measurements, another none."""
    torch.set_num_threads(1)
    case = SPEED_CASES[0]
    batch_size = job.batch_size or case.batch_size
    load = workload(case, batch_size, job.batches * _TIMES_BATCHES, seed=job.seed)
    data = tuple(torch.cat(parts) for parts in zip(*load.batches, strict=True))
    clock = Stopclock()
    costs: list[Measurement] = []
    with joined() as team:

        def alone() -> float:
            team.all(None)
            if not team.leads:
                return 0.0
            with apart():
                return clock.seconds(lambda: trace_routes(load.model, data, batch_size=batch_size))

        def together() -> float:
            team.all(None)
            return clock.seconds(lambda: trace_routes(load.model, data, batch_size=batch_size))

        runs = interleaved({"alone": alone, "together": together}, job.turns)
        for each in COST_CASES:
            costs += measure_costs(
                team, each, workload(each, job.batch_size or each.batch_size, job.batches, seed=job.seed),
                repeats=min(job.turns, _COST_REPEATS), seed=job.seed,
            )  # fmt: skip
        return [*throughput_measurements(runs, load.images), *costs] if team.leads else []


def throughput_measurements(runs: Mapping[str, Spread], images: int) -> list[Measurement]:
    """The gain by a second process.

    Args:
        runs: Seconds of all images, ``"alone"`` by one process and ``"together"`` by two.
        images: How many.
    """
    name = f"{PROCESSES}, one thread each"
    gain = runs["alone"] / runs["together"]
    return [
        Measurement(name, "throughput of two / of one", gain, bound=f"at least {AIM} is the aim, on two free cores"),
        Measurement(name, "one process, an image", runs["alone"].times(1 / images), SECONDS),
        Measurement(name, "two processes, an image", runs["together"].times(1 / images), SECONDS),
    ]


def measure_costs(team: Processes, case: Case, load: Workload, *, repeats: int, seed: int) -> list[Measurement]:
    """Measure what an image of one case costs, on the CPU in the first process; the others only send and receive.

    Packing is done by the process that traced the image, writing by the first one, sending, receiving and unpacking by
    all.

    Args:
        team: The processes; each must ask at the same point.
        case: The network.
        load: The same with batches of one size.
        repeats: How often each part is run.
        seed: For pictures.
    """
    batch_size, batches = len(load.batches[0][0]), len(load.batches)
    with apart():
        part = trace_routes(load.model, load.batches[0], batch_size=batch_size)
    packed = pickle.dumps(part)
    share = (packed,) * batches
    clock = Stopclock(time.process_time)
    exchange: dict[str, Callable[[], object]] = {EXCHANGING: lambda: team.all(share)}
    if not team.leads:
        clock.interleaved(exchange, repeats)
        return []
    file_batches = -(-FILE_SAMPLES // batch_size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "routes.safetensors"
        actions: dict[str, Callable[[], object]] = {
            FORWARD: load.forward,
            TRACE: lambda: _trace_alone(load),
            PACKING: lambda: [pickle.dumps(part) for _ in range(batches)],
            UNPACKING: lambda: [pickle.loads(packed) for _ in range(batches)],
            WRITING: lambda: InstanceRoutes.concatenate([part] * file_batches).save(file),
            LOADING: lambda: InstanceRoutes.load(file),
        }
        images = dict.fromkeys(actions, load.images) | {EXCHANGING: load.images * team.count, READING: load.images}
        images |= dict.fromkeys((WRITING, LOADING), batch_size * file_batches)
        sizes = {SENT: len(packed) / batch_size}
        if case.image_size == _LARGE:
            sizes[JPEG] = _write_jpegs(Path(folder) / "pictures", load.images, seed)
            pictures = load_data(f"folder:{folder}/pictures", image_size=_LARGE)
            actions[READING] = lambda: sum(len(labels) for _, labels in ImageBatches(pictures, batch_size))
        runs = clock.interleaved({**actions, **exchange}, repeats)
        sizes[IN_FILE] = file.stat().st_size / images[WRITING]
    name = f"an image, {case.name}, batches of {batch_size}"
    return [
        Measurement(name, "channels of route layers", Spread((sum(part.channels.values()),))),
        *(Measurement(name, what, seconds.times(1 / images[what]), SECONDS) for what, seconds in runs.items()),
        *(Measurement(name, what, Spread((size,)), BYTES) for what, size in sizes.items()),
    ]


def _trace_alone(load: Workload) -> None:
    with apart():
        trace_routes(load.model, load.batches)


def _write_jpegs(folder: Path, count: int, seed: int) -> float:
    """Write pictures about as rough as photographs; returns the mean size in bytes."""
    (folder / "one").mkdir(parents=True)
    with seeded(seed):
        for number in range(count):
            height, width = _JPEG_SIZE
            rough = resize(torch.rand(3, height // 16, width // 16), list(_JPEG_SIZE), antialias=True)
            fine = resize(torch.rand(3, height // 2, width // 2), list(_JPEG_SIZE), antialias=True)
            picture = to_pil_image(0.75 * rough + 0.25 * fine)
            picture.save(folder / "one" / f"{number:05}.jpg", quality=90)
    return sum(path.stat().st_size for path in folder.rglob("*.jpg")) / count


if __name__ == "__main__":
    measurements = run(Job(**json.loads(sys.argv[1])))
    if measurements:
        print(
            json.dumps([[each.case, each.quantity, each.spread.values, each.unit, each.bound] for each in measurements])
        )
