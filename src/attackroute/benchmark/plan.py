"""What to measure, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from attackroute.benchmark.cases import SPEED_CASES, Case
from attackroute.core.errors import UserError, did_you_mean

NAIVE = "naive"
MEMORY = "memory"
ATTACK = "pgd"
HARDENING = "hardening"
ARCHITECTURES = "architectures"
PROCESSES = "processes"
CASE_NAMES = (*(case.name for case in SPEED_CASES), NAIVE, MEMORY, ATTACK, HARDENING, ARCHITECTURES, PROCESSES)

# architectures takes as long as all the others, and processes wants two cores that do nothing else
_USUAL_CASES = tuple(name for name in CASE_NAMES if name not in (ARCHITECTURES, PROCESSES))
_QUICK_CASES = (SPEED_CASES[0].name, NAIVE, MEMORY)


@dataclass(frozen=True)
class Plan:
    """The settings of a benchmark.

    Attributes:
        cases: What to measure, of :data:`CASE_NAMES`; none means all but architectures and processes, or vgg16, naive
            and memory if quick.
        repeats: Turns of interleaved runs; None is 7, or 2 if quick.
        batch_size: Images at a time; None is each case's own.
        threads: Number of PyTorch's threads; None leaves it as it is.
        channels_last: Measure the speed cases in this memory format too.
        quick: Less of everything, for a look within a minute.
        seed: For weights, images and the choice of products.
        device: Where the networks run.

    Raises:
        UserError: An unknown case, or a number that is not positive.
    """

    cases: Sequence[str] = ()
    repeats: int | None = None
    batch_size: int | None = None
    threads: int | None = None
    channels_last: bool = False
    quick: bool = False
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        for name in self.cases:
            if name not in CASE_NAMES:
                raise UserError(
                    f"no benchmark case {name!r}{did_you_mean(name, CASE_NAMES)} (there are {', '.join(CASE_NAMES)})"
                )
        for name, number in (("repeats", self.repeats), ("batch size", self.batch_size), ("threads", self.threads)):
            if number is not None and number < 1:
                raise UserError(f"{name} must be at least 1, not {number}")

    @property
    def speed_cases(self) -> tuple[Case, ...]:
        """The networks whose trace is timed."""
        return tuple(case for case in SPEED_CASES if self.includes(case.name))

    @property
    def turns(self) -> int:
        """How often everything is measured."""
        return self.repeats or (2 if self.quick else 7)

    @property
    def batches(self) -> int:
        """Batches that one run of a speed case consists of."""
        return 2 if self.quick else 4

    def includes(self, name: str) -> bool:
        """Whether a case is to be measured."""
        return name in (self.cases or (_QUICK_CASES if self.quick else _USUAL_CASES))
