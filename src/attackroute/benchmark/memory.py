"""The peak memory of a trace: against plain inference, and over the number of samples."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from attackroute.benchmark.plan import MEMORY, Plan
from attackroute.benchmark.timing import Spread
from attackroute.core.errors import UserError

LIMIT = 1.5
"""Peak memory of a trace / of plain inference that is to be kept, VGG-16 at 224x224."""

_PROBE = "attackroute.benchmark.memory_probe"
_REPEATS = 3
_LARGE = {"model": "vgg16", "image_size": 224, "classes": 1000}
_SMALL = {"model": "vgg16", "image_size": 32, "classes": 10}
_LARGE_BATCH = 16
_QUICK_LARGE_BATCH = 4
_LARGE_BATCHES = 2
_SMALL_BATCH = 32


@dataclass(frozen=True)
class Peaks:
    """Bytes of one job, one entry a repeat, each in a fresh process.

    Attributes:
        before: In use when the network was built, and the job had not begun.
        peak: At the highest; on a CPU of the whole process, on a GPU of all tensors.
    """

    before: tuple[int, ...]
    peak: tuple[int, ...]

    @property
    def own(self) -> tuple[int, ...]:
        """What the job itself added to what was in use before."""
        return tuple(peak - before for peak, before in zip(self.peak, self.before, strict=True))


@dataclass(frozen=True)
class MemoryResult:
    """VGG-16's memory.

    Attributes:
        batch_size: Images at a time, of 224x224.
        forward: Plain inference of these.
        trace: A trace of these.
        few: A trace of few images of 32x32.
        many: A trace of many of them.
        few_samples: How many are few.
        many_samples: How many are many.
    """

    batch_size: int
    forward: Peaks
    trace: Peaks
    few: Peaks
    many: Peaks
    few_samples: int
    many_samples: int

    @property
    def ratio(self) -> Spread:
        """Peak of a trace / of plain inference."""
        return Spread.of_ratios(self.trace.peak, self.forward.peak)

    @property
    def own_ratio(self) -> Spread | None:
        """The same without what was in use before: interpreter, libraries and weights. None where that hides it all."""
        if min(self.forward.own) <= 0:
            return None
        return Spread.of_ratios(self.trace.own, self.forward.own)

    @property
    def growth(self) -> Spread:
        """Peak of a trace of many samples / of few."""
        return Spread.of_ratios(self.many.peak, self.few.peak)

    @property
    def growth_per_sample(self) -> Spread:
        """Bytes by which the peak grows with each sample."""
        samples = self.many_samples - self.few_samples
        return Spread(tuple((many - few) / samples for many, few in zip(self.many.peak, self.few.peak, strict=True)))

    def to_json(self) -> dict[str, Any]:
        """All that was measured."""
        return {
            "model": "vgg16",
            "inference": {
                "image_size": _LARGE["image_size"],
                "batch_size": self.batch_size,
                "batches": _LARGE_BATCHES,
                "limit": LIMIT,
                "trace_to_forward": self.ratio.to_json(),
                "trace_to_forward_own": None if self.own_ratio is None else self.own_ratio.to_json(),
                "bytes": {"forward": asdict(self.forward), "trace": asdict(self.trace)},
            },
            "growth": {
                "image_size": _SMALL["image_size"],
                "batch_size": _SMALL_BATCH,
                "samples": [self.few_samples, self.many_samples],
                "many_to_few": self.growth.to_json(),
                "bytes_per_sample": self.growth_per_sample.to_json(),
                "bytes": {"few": asdict(self.few), "many": asdict(self.many)},
            },
        }


def measure_memory(plan: Plan, advance: Callable[[], None]) -> MemoryResult:
    """Measure peaks, each in a fresh process, the jobs in turn.

    Args:
        plan: Repeats (at most 3, since peaks hardly vary), sizes, threads, device, seed.
        advance: Called after every process.

    Raises:
        UserError: A process failed, for want of memory or since the system does not tell a process's peak.
    """
    batch_size = plan.batch_size or (_QUICK_LARGE_BATCH if plan.quick else _LARGE_BATCH)
    few, many = (2, 8) if plan.quick else (2, 32)
    common = {"threads": torch.get_num_threads(), "device": str(plan.device), "seed": plan.seed}
    large = {**_LARGE, **common, "batch_size": batch_size, "batches": _LARGE_BATCHES}
    small = {**_SMALL, **common, "batch_size": _SMALL_BATCH, "trace": True}
    jobs: dict[str, Mapping[str, object]] = {
        "forward": {**large, "trace": False},
        "trace": {**large, "trace": True},
        "few": {**small, "batches": few},
        "many": {**small, "batches": many},
    }
    found: dict[str, list[tuple[int, int]]] = {name: [] for name in jobs}
    for _ in range(memory_repeats(plan)):
        for name, job in jobs.items():
            found[name].append(measured(_PROBE, job, MEMORY))
            advance()
    peaks = {name: Peaks(*(tuple(column) for column in zip(*rows, strict=True))) for name, rows in found.items()}
    return MemoryResult(batch_size, **peaks, few_samples=few * _SMALL_BATCH, many_samples=many * _SMALL_BATCH)


def memory_repeats(plan: Plan) -> int:
    """How often each job runs."""
    return 1 if plan.quick else min(_REPEATS, plan.turns)


def memory_processes(plan: Plan) -> int:
    """How many processes :func:`measure_memory` starts."""
    return 4 * memory_repeats(plan)


def measured(module: str, job: Mapping[str, object], case: str) -> tuple[int, int]:
    """Run a module in a process of its own: bytes in use before its job began, and at the highest.

    Args:
        module: Prints these two, as JSON, for a job that it is given as JSON.
        job: The job.
        case: Name of the benchmark's case.

    Raises:
        UserError: The process failed.
    """
    command = [sys.executable, "-m", module, json.dumps(job)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"it ended with code {process.returncode}"
        raise UserError(
            f"the process whose memory was to be measured failed ({reason}); "
            f"give a smaller --batch-size, or leave out the case {case}"
        )
    before, peak = json.loads(process.stdout)
    return before, peak
