"""All that a benchmark measured, and on what."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torchvision

from attackroute.benchmark.architectures import ArchitectureResult, available, measure_architecture
from attackroute.benchmark.attack_speed import AttackSpeed, measure_attack
from attackroute.benchmark.extrapolation import NaiveResult, measure_naive
from attackroute.benchmark.hardening_speed import HardeningSpeed, measure_hardening, step_processes
from attackroute.benchmark.memory import MemoryResult, measure_memory, memory_processes
from attackroute.benchmark.plan import ARCHITECTURES, ATTACK, HARDENING, MEMORY, NAIVE, PROCESSES, Plan
from attackroute.benchmark.process_speed import ProcessSpeed, measure_processes
from attackroute.benchmark.speed import SpeedResult, measure_speed
from attackroute.benchmark.timing import in_threads
from attackroute.core.errors import UserError
from attackroute.core.version import __version__


class Steps:
    """Counts steps for a callback ``(done, total, message)``."""

    def __init__(self, report: Callable[[int, int, str], None], total: int) -> None:
        self._report = report
        self._total = total
        self._done = 0
        self._message = ""

    def begin(self, message: str) -> None:
        """Say what is measured next."""
        self._message = message
        self._report(self._done, self._total, message)

    def advance(self) -> None:
        """One step is done."""
        self._done += 1
        self._report(self._done, self._total, self._message)


@dataclass(frozen=True)
class Environment:
    """What the numbers depend on.

    Attributes:
        versions: Of the package and what it stands on.
        device: The device's name.
        threads: PyTorch's threads.
        dtype: The numbers' format.
    """

    versions: dict[str, str]
    device: str
    threads: int
    dtype: str

    @classmethod
    def of(cls, device: torch.device) -> Environment:
        """The environment of this process."""
        if device.type == "cuda":
            name = f"{device} ({torch.cuda.get_device_name(device)})"
        else:
            name = f"{device} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
        versions = {
            "attackroute": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        }
        return cls(versions, name, torch.get_num_threads(), "float32")


@dataclass(frozen=True)
class BenchmarkReport:
    """The result of a benchmark.

    Attributes:
        environment: What it ran on.
        plan: What was asked for.
        speed: Time against a plain forward pass and a training step.
        naive: Time against the naive way; None where it was not asked for.
        memory: Peak memory; None where it was not asked for.
        attack: Time of an attack against other libraries; None where it was not asked for.
        hardening: Time of penalised training steps against plain ones; None where it was not asked for.
        architectures: Well-known architectures; none where they were not asked for.
        processes: Traces by two processes against those of one; None where it was not asked for.
    """

    environment: Environment
    plan: Plan
    speed: tuple[SpeedResult, ...]
    naive: NaiveResult | None
    memory: MemoryResult | None
    attack: AttackSpeed | None
    hardening: HardeningSpeed | None
    architectures: tuple[ArchitectureResult, ...] = ()
    processes: ProcessSpeed | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything, each repeat included, as JSON values."""
        return {
            **asdict(self.environment),
            "repeats": self.plan.turns,
            "quick": self.plan.quick,
            "seed": self.plan.seed,
            "speed": [result.to_json() for result in self.speed],
            "naive": None if self.naive is None else self.naive.to_json(),
            "memory": None if self.memory is None else self.memory.to_json(),
            "attack": None if self.attack is None else self.attack.to_json(),
            "hardening": None if self.hardening is None else self.hardening.to_json(),
            "architectures": [result.to_json() for result in self.architectures],
            "processes": None if self.processes is None else self.processes.to_json(),
        }


def run_benchmark(plan: Plan, progress: Callable[[int, int, str], None] = lambda *_: None) -> BenchmarkReport:
    """Measure all that the plan asks for.

    Args:
        plan: The settings.
        progress: Called with (steps done, steps in all, what is measured).

    Raises:
        UserError: The memory does not suffice, or cannot be measured here.
    """
    formats = (False, True) if plan.channels_last else (False,)
    loads = [(case, form) for case in plan.speed_cases for form in formats]
    turns = plan.turns + 1
    architectures = available(plan) if plan.includes(ARCHITECTURES) else ()
    timed = len(loads) + len(architectures) + plan.includes(NAIVE) + plan.includes(ATTACK) + plan.includes(HARDENING)
    total = turns * timed + memory_processes(plan) * plan.includes(MEMORY)
    total += step_processes(plan) * plan.includes(HARDENING) + plan.includes(PROCESSES)
    steps = Steps(progress, total)
    try:
        with in_threads(plan.threads):
            environment = Environment.of(plan.device)
            speed = []
            for case, channels_last in loads:
                steps.begin(f"{case.name}{', channels_last' if channels_last else ''}")
                speed.append(measure_speed(case, plan, channels_last=channels_last, advance=steps.advance))
            naive = memory = attack = hardening = None
            if plan.includes(NAIVE):
                steps.begin("the naive way, in part")
                naive = measure_naive(plan, steps.advance)
            if plan.includes(MEMORY):
                steps.begin("memory, in processes of their own")
                memory = measure_memory(plan, steps.advance)
            if plan.includes(ATTACK):
                steps.begin("an attack, by several libraries")
                attack = measure_attack(plan, steps.advance)
            if plan.includes(HARDENING):
                steps.begin("penalised training steps")
                hardening = measure_hardening(plan, steps.advance)
            measured = []
            for architecture in architectures:
                steps.begin(architecture.name)
                measured.append(measure_architecture(architecture, plan, steps.advance))
            shared = None
            if plan.includes(PROCESSES):
                steps.begin("two processes, and one")
                shared = measure_processes(plan)
                steps.advance()
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"the device's memory does not suffice ({reason}); give a smaller --batch-size") from error
    return BenchmarkReport(environment, plan, tuple(speed), naive, memory, attack, hardening, tuple(measured), shared)
