"""The peak memory of training steps, in a process of its own: ``python -m attackroute.benchmark.step_probe JSON``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import torch

from attackroute.benchmark.hardening_speed import network_and_batch, training_steps
from attackroute.benchmark.memory_probe import peak, start

_STEPS = 2  # the first one makes the momentum and other things that stay


@dataclass(frozen=True)
class Job:
    """What the process does.

    Attributes:
        step: Name of the step, as :mod:`attackroute.benchmark.hardening_speed` has it.
        batch_size: Images in it.
        threads: Number of PyTorch's threads.
        device: Where the network runs.
        seed: For weights, images and route.
    """

    step: str
    batch_size: int
    threads: int
    device: str
    seed: int


def run(job: Job) -> tuple[int, int]:
    """Do the job: bytes in use before the first step, and at the highest."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    model, images, labels, route = network_and_batch(job.batch_size, device, job.seed)
    step = training_steps(model.train(), images, labels, route)[job.step]
    before = start(device)
    for _ in range(_STEPS):
        step()
    return before, peak(device)


if __name__ == "__main__":
    print(json.dumps(run(Job(**json.loads(sys.argv[1])))))
