"""What a trace costs on a GPU: against plain inference, in memory, launches and waits; and attacks beside a rival's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch.profiler import ProfilerActivity, profile

from attackroute.core.errors import UserError
from attackroute.robustness.gradient_attacks import PGD
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.trace import trace_routes
from benchmarks.attacks import EPS, PEERS, STEP_SIZE, STEPS
from benchmarks.cases import GPU, Case, Plan, Workload, workload
from benchmarks.timing import BYTES, Measurement, Spread, Stopclock

_BATCHES = 4  # at most, that differ


@dataclass(frozen=True)
class GpuCase:
    """A network, and how its trace is to be run.

    Attributes:
        case: The network and its images.
        linear: Whether linear maps are among the route layers.
        batches: How many are traced in a row: passes are recorded once, which many batches repay.
    """

    case: Case
    linear: bool = False
    batches: int = 32


GPU_CASES = (
    GpuCase(Case("vgg16", "vgg16", limit=1.3, image_size=32, classes=10, batch_size=1024)),
    GpuCase(Case("resnet50", "torchvision:resnet50", limit=1.3, batch_size=128)),
    GpuCase(Case("mobilenet_v2", "torchvision:mobilenet_v2", limit=1.3, batch_size=128)),
    GpuCase(Case("vit_b_16", "torchvision:vit_b_16", limit=6, batch_size=128), linear=True, batches=2),
)
PRECISIONS: dict[str, torch.dtype | None] = {"TF32": None, "bfloat16": torch.bfloat16}
"""By what is multiplied: float32 with TensorFloat-32 products, or autocast."""


def measure_gpu(each: GpuCase, plan: Plan, advance: Callable[[], None] = lambda: None) -> list[Measurement]:
    """Measure one network in channels_last, in both precisions.

    Args:
        each: The network.
        plan: Repeats, batch size, device, seed.
        advance: Called after every turn.

    Raises:
        UserError: The plan's device is not a GPU.
    """
    if plan.device.type != "cuda":
        raise UserError("the case gpu needs a CUDA device; choose one by --device cuda")
    batch_size = plan.batch_size or each.case.batch_size
    different = min(_BATCHES, each.batches)
    load = workload(each.case, batch_size, different, seed=plan.seed, device=plan.device, channels_last=True)
    load = Workload(load.model, load.batches * (each.batches // different))
    measurements = []
    with _tf32():
        for precision, dtype in PRECISIONS.items():
            name = f"{GPU}, {each.case.name}, {precision}, {len(load.batches)} x {batch_size}"
            measurements += _measured(name, each, load, dtype, plan, advance)
    return measurements


def _measured(
    name: str, each: GpuCase, load: Workload, dtype: torch.dtype | None, plan: Plan, advance: Callable[[], None]
) -> list[Measurement]:
    def forward() -> None:
        with _autocast(dtype):
            load.forward()

    def trace(batches: int | None = None) -> None:
        trace_routes(load.model, load.batches[:batches], config=TraceConfig(linear=each.linear), autocast=dtype)

    clock = Stopclock.of(plan.device)
    runs = clock.interleaved({"forward": forward, "trace": trace}, plan.turns, advance)
    per_second = {run: Spread(tuple(load.images / seconds for seconds in runs[run].values)) for run in runs}
    memory = {run: _peak(action, plan.device) for run, action in (("forward", forward), ("trace", trace))}
    half = min(4, len(load.batches) // 2)
    launches, waits = (
        (count(lambda: trace(2 * half)) - count(lambda: trace(half))) / half for count in (_launches, _waits)
    )
    bound = f"at most {each.case.limit:g}"
    return [
        Measurement(name, "trace / forward", runs["trace"] / runs["forward"], bound=bound),
        *(Measurement(name, f"{run}, images per second", spread) for run, spread in per_second.items()),
        *(Measurement(name, f"{run}, peak memory", Spread((size,)), BYTES) for run, size in memory.items()),
        Measurement(name, "launches per batch of a trace", Spread((launches,))),
        Measurement(name, "launches per batch of a forward pass", Spread((_launches(forward) / len(load.batches),))),
        Measurement(name, "waits per batch of a trace", Spread((waits,))),
    ]


def measure_gpu_attack(plan: Plan, advance: Callable[[], None] = lambda: None) -> list[Measurement]:
    """Measure PGD on VGG-16 at full width in TF32, beside the other libraries that are installed."""
    case = GPU_CASES[0].case
    load = workload(case, plan.batch_size or case.batch_size, 1, seed=plan.seed, device=plan.device, channels_last=True)
    (images, labels), ours = load.batches[0], PGD(EPS, steps=STEPS, step_size=STEP_SIZE)
    attacks: dict[str, Callable[[], object]] = {"ours": lambda: ours(load.model, images, labels)}
    attacks |= {name: peer(load.model, images, labels) for name, peer in PEERS.items() if find_spec(name) is not None}
    with _tf32():
        runs = Stopclock.of(plan.device).interleaved(attacks, plan.turns, advance)
    name = f"{GPU}, pgd, {STEPS} steps, {case.name}, {len(images)} images"
    speeds = {attack: Spread(tuple(len(images) / each for each in run.values)) for attack, run in runs.items()}
    return [
        *(
            Measurement(name, f"{attack} / ours", run / runs["ours"])
            for attack, run in runs.items()
            if attack != "ours"
        ),
        *(Measurement(name, f"{attack}, images per second", speed) for attack, speed in speeds.items()),
    ]


@contextmanager
def _tf32() -> Iterator[None]:
    """Context in which float32 products use TensorFloat-32."""
    backends = torch.backends
    before = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
    backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = before


def _autocast(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return nullcontext() if dtype is None else torch.autocast("cuda", dtype)


def _peak(action: Callable[[], object], device: torch.device) -> float:
    """Bytes at the peak of an action, the network and its images included."""
    torch.cuda.reset_peak_memory_stats(device)
    action()
    return float(torch.cuda.max_memory_allocated(device))


def _launches(action: Callable[[], object]) -> float:
    """How many kernels, copies and fills an action starts."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        action()
        torch.cuda.synchronize()
    return float(sum(event.device_type.name == "CUDA" for event in record.events()))


def _waits(action: Callable[[], object]) -> float:
    """How often an action waits for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return float(sum("synchronizing" in str(warning.message) for warning in caught))
