"""The peak memory of one job, in a process of its own: ``python -m attackroute.benchmark.memory_probe JSON``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attackroute.tracing.trace import trace_routes
from attackroute.zoo.registry import build_model

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Job:
    """What the process does.

    Attributes:
        trace: Trace the images; else run the network on them.
        model: As :func:`attackroute.models.build_model` takes it.
        image_size: Height and width of the images.
        classes: Number of logits.
        batch_size: Images at a time.
        batches: Number of batches; each is made when it is needed.
        threads: Number of PyTorch's threads.
        device: Where the network runs.
        seed: For weights and images.
    """

    trace: bool
    model: str
    image_size: int
    classes: int
    batch_size: int
    batches: int
    threads: int
    device: str
    seed: int


def run(job: Job) -> tuple[int, int]:
    """Do the job: bytes in use before it began, and at the highest while it ran."""
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    device = torch.device(job.device)
    model = build_model(job.model, num_classes=job.classes, image_size=job.image_size).to(device).eval()
    before = start(device)
    if job.trace:
        trace_routes(model, _images(job))
    else:
        with torch.no_grad():
            for images in _images(job):
                model(images.to(device))
    return before, peak(device)


def _images(job: Job) -> Iterator[Tensor]:
    for _ in range(job.batches):
        yield torch.rand(job.batch_size, 3, job.image_size, job.image_size)


def start(device: torch.device) -> int:
    """Bytes in use; a peak so far is forgotten, where the system can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        _RESET.write_text("5")
    return _status("VmRSS") if _STATUS.exists() else peak(device)


def peak(device: torch.device) -> int:
    """Bytes in use at the highest since :func:`start`."""
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
