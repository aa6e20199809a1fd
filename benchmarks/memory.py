"""The peak memory of a trace: against plain inference, and over the number of samples.

Each job runs in a process of its own: ``python -m benchmarks.memory JSON``.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from attackroute.core.errors import UserError
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.networks import build_model
from benchmarks.cases import MEMORY, Plan
from benchmarks.timing import BYTES, Measurement, Spread

LIMIT = 1.5
"""Peak memory of a trace / of plain inference that is to be kept, VGG-16 at 224x224."""

_ROOT = Path(__file__).parent.parent
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Job:
    """What a process does.

    Attributes:
        trace: Trace the images; else run the network on them.
        image_size: Height and width of the images.
        batch_size: Images at a time.
        batches: Number of batches; each is made when it is needed.
        threads: Number of PyTorch's threads.
        device: Where the network runs.
        seed: For weights and images.
        model: As :func:`attackroute.build_model` takes it.
    """

    trace: bool
    image_size: int
    batch_size: int
    batches: int
    threads: int
    device: str
    seed: int
    model: str = "vgg16"


@dataclass(frozen=True)
class Peaks:
    """Bytes of one job over its repeats.

    Attributes:
        before: In use when the network was built, and the job had not begun.
        peak: At the highest; on a CPU of the whole process, on a GPU of all tensors.
    """

    before: Spread
    peak: Spread

    @classmethod
    def of(cls, pairs: list[tuple[int, int]]) -> Peaks:
        """From the two numbers of each repeat."""
        before, peak = zip(*pairs, strict=True)
        return cls(Spread(before), Spread(peak))

    @property
    def own(self) -> Spread:
        """What the job itself added to what was in use before: interpreter, libraries and weights."""
        return self.peak - self.before


def measure_memory(plan: Plan, advance: Callable[[], None] = lambda: None) -> list[Measurement]:
    """Measure peaks of VGG-16, each in a fresh process, the jobs in turn.

    Args:
        plan: Repeats (at most 3), sizes, threads, device, seed.
        advance: Called after every process.

    Raises:
        UserError: A process failed, for want of memory or since the system does not tell a process's peak.
    """
    batch_size = plan.batch_size or (4 if plan.quick else 16)
    few, many = (2, 8) if plan.quick else (2, 32)

    def job(size: int, samples: int, batches: int, *, trace: bool = True) -> Job:
        threads = torch.get_num_threads()
        return Job(
            trace=trace, image_size=size, batch_size=samples, batches=batches, threads=threads,
            device=str(plan.device), seed=plan.seed,
        )  # fmt: skip

    jobs = {
        "forward": job(224, batch_size, 2, trace=False), "trace": job(224, batch_size, 2),
        "few": job(32, 32, few), "many": job(32, 32, many),
    }  # fmt: skip
    memory: dict[str, list[tuple[int, int]]] = {name: [] for name in jobs}
    for _ in range(plan.memory_repeats):
        for name, each in jobs.items():
            memory[name].append(measured("benchmarks.memory", asdict(each), MEMORY))
            advance()
    peaks = {name: Peaks.of(pairs) for name, pairs in memory.items()}
    return memory_measurements(peaks, batch_size, 32 * few, 32 * many)


def memory_measurements(peaks: Mapping[str, Peaks], batch_size: int, few: int, many: int) -> list[Measurement]:
    """Ratios and bytes.

    Args:
        peaks: Of ``"forward"`` and ``"trace"`` of images of 224x224, and of traces of ``"few"`` and ``"many"`` small
            ones.
        batch_size: Of the large images.
        few: How many images are few.
        many: How many are many.
    """
    large, small = f"{MEMORY}, {batch_size} x 224x224", f"{MEMORY}, {many:,} / {few} x 32x32"
    forward, trace = peaks["forward"], peaks["trace"]
    ratio = Measurement(large, "trace / inference", trace.peak / forward.peak, bound=f"at most {LIMIT:.2f}")
    seen = forward.own.low > 0  # else what was in use before hides it all
    beyond = [trace.own / forward.own] if seen else []
    growth = peaks["many"].peak / peaks["few"].peak
    return [
        ratio,
        *(Measurement(large, "the same beyond libraries and weights", spread) for spread in beyond),
        Measurement(large, "inference", forward.peak, BYTES),
        Measurement(large, "trace", trace.peak, BYTES),
        Measurement(small, "trace of many / of few", growth, bound="1: flat in the number of images"),
        Measurement(small, "trace of few", peaks["few"].peak, BYTES),
        Measurement(small, "trace of many", peaks["many"].peak, BYTES),
    ]


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
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_ROOT)
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"it ended with code {process.returncode}"
        raise UserError(
            f"the process whose memory was to be measured failed ({reason}); "
            f"give a smaller --batch-size, or leave out the case {case}"
        )
    before, peak = json.loads(process.stdout)
    return before, peak


def run(job: Job) -> tuple[int, int]:
    """Do the job: bytes in use before it began, and at the highest while it ran."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    device = torch.device(job.device)
    model = build_model(job.model, num_classes=1000 if job.image_size > 32 else 10, image_size=job.image_size)
    model.to(device).eval()
    before = memory_now(device)
    if job.trace:
        trace_routes(model, _images(job))
    else:
        with torch.no_grad():
            for images in _images(job):
                model(images.to(device))
    return before, memory_peak(device)


def _images(job: Job) -> Iterator[Tensor]:
    for _ in range(job.batches):
        yield torch.rand(job.batch_size, 3, job.image_size, job.image_size)


def memory_now(device: torch.device) -> int:
    """Bytes in use; a peak so far is forgotten, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        _RESET.write_text("5")
    return _status("VmRSS") if _STATUS.exists() else memory_peak(device)


def memory_peak(device: torch.device) -> int:
    """Bytes in use at the highest since :func:`memory_now`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():  # elsewhere getrusage, which on Linux would begin with the parent's peak
        return _status("VmHWM")
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


if __name__ == "__main__":
    print(json.dumps(run(Job(**json.loads(sys.argv[1])))))
