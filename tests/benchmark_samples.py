"""Results of a benchmark with numbers that are easy to reckon with."""

from __future__ import annotations

from attackroute.benchmark import breakdown, hardening_speed
from attackroute.benchmark.attack_speed import AttackSpeed
from attackroute.benchmark.cases import Case
from attackroute.benchmark.extrapolation import LayerWork, NaiveResult
from attackroute.benchmark.hardening_speed import Deviation, HardeningSpeed
from attackroute.benchmark.memory import MemoryResult, Peaks
from attackroute.benchmark.speed import SpeedResult
from attackroute.benchmark.timing import Runs

TINY = Case("tiny", "vgg_small", 32, 10, 3, 1.25)


class Hands:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


def runs(*totals: float) -> Runs:
    return Runs(tuple({"all": total} for total in totals))


def naive_result() -> NaiveResult:
    layers = (LayerWork("a", "b", 1000, 4, 64), LayerWork("b", "c", 100, 4, 50))
    return NaiveResult(
        128,
        layers,
        trace=runs(0.01, 0.02),
        autograd=Runs(({"b": 15.0, "c": 5.0}, {"b": 50.0, "c": 10.0})),
        jacrev=Runs(({"b": 7.0, "c": 3.0}, {"b": 8.0, "c": 2.0})),
    )


def speed_result(**changes: object) -> SpeedResult:
    first = dict.fromkeys((*breakdown.PHASES, breakdown.REST), 0.0) | {"top-k": 1.0, breakdown.REST: 3.0}
    values = {
        "case": TINY,
        "memory_format": "contiguous",
        "batch_size": 3,
        "batches": 2,
        "forward": runs(2.0, 4.0, 5.0),
        "trace": runs(3.0, 5.0, 5.0),
        "training": runs(3.0, 5.0, 1.0),
        "noise": runs(6.0, 8.0, 20.0),
        "watched": Runs((first, first, first | {"top-k": 4.0})),
    }
    return SpeedResult(**{**values, **changes})


def attack_result(left_out: tuple[str, ...] = ("foolbox",)) -> AttackSpeed:
    return AttackSpeed(
        128,
        ours=runs(2.0, 4.0, 5.0),
        passes=runs(2.0, 2.0, 4.0),
        others={"torchattack": runs(3.0, 5.0, 5.0), "torchattacks": runs(2.0, 5.0, 5.0)},
        versions={"torchattack": "1.7.2", "torchattacks": "3.5.1"},
        left_out=left_out,
    )


def memory_result(before: int = 100) -> MemoryResult:
    return MemoryResult(
        16,
        forward=Peaks((before, before), (300, 500)),
        trace=Peaks((100, 100), (360, 500)),
        few=Peaks((10, 10), (50, 60)),
        many=Peaks((10, 10), (60, 60)),
        few_samples=64,
        many_samples=84,
    )


def hardening_result() -> HardeningSpeed:
    times = {
        hardening_speed.PLAIN: runs(2.0, 2.0, 4.0),
        hardening_speed.GRADIENT: runs(4.0, 5.0, 12.0),
        hardening_speed.PAT: runs(10.0, 10.0, 10.0),
        hardening_speed.PAT_GRADIENT: runs(20.0, 15.0, 11.0),
    }
    deviations = {"float32": {3e-4: Deviation(0.99, 1.01, 0.0125)}, "bfloat16": {3e-4: Deviation(0.5, 2.0, 1.5)}}
    peaks = {
        hardening_speed.PAT: Peaks((100, 100), (200, 400)),
        hardening_speed.PAT_GRADIENT: Peaks((100, 100), (500, 600)),
    }
    return HardeningSpeed(128, times, deviations, peaks)
