"""``python -m benchmarks``: what a trace costs on this machine, as ratios."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torchvision

from attackroute.cli.options import resolve_device
from attackroute.core import __version__
from attackroute.core.document import Document
from attackroute.core.errors import UserError
from attackroute.core.files import replace_file
from attackroute.core.table import Table, plural
from benchmarks.architectures import (
    BATCH_SIZE,
    HEADER,
    NOTE,
    ArchitectureResult,
    available,
    markdown_table,
    measure_architecture,
)
from benchmarks.attacks import measure_attack
from benchmarks.cases import (
    ARCHITECTURES,
    ATTACK,
    GPU,
    HARDENING,
    HARDNESS,
    MEMORY,
    NAIVE,
    PROCESSES,
    SPEED_CASES,
    Plan,
)
from benchmarks.gpu import GPU_CASES, measure_gpu, measure_gpu_attack
from benchmarks.hardening import STEP_NAMES, measure_hardening
from benchmarks.memory import measure_memory
from benchmarks.naive import measure_naive
from benchmarks.processes import measure_processes
from benchmarks.timing import Measurement, in_threads
from benchmarks.trace import measure_hardness, measure_speed
from studies.command import Parser, at_least, output_of, run_command

_EXAMPLES = """
examples:

  Everything, in about ten minutes on two processor cores
  $ python -m benchmarks

  A look within a minute: VGG-16, the naive way, memory
  $ python -m benchmarks --quick

  One network on one thread
  $ python -m benchmarks resnet50 --threads 1

  Well-known architectures, and their table as Markdown
  $ python -m benchmarks architectures --repeats 3 --threads 1 --table architectures.md

  Every repeat, for another program
  $ python -m benchmarks vgg16 --json | jq '.rows[] | select(.quantity == "trace, channels_last / forward").values'

the cases:

  vgg16          32x32, 128 images at a time: time of a trace, contiguous and in channels_last, / of plain inference in
                 the faster format; / of a training step; of a trace that follows noise / of two plain inferences
  resnet18, resnet50, mobilenet_v2, efficientnet_b0, densenet121
                 the same at 224x224, 16 images at a time
  hardness       the hardness metric / a forward and a backward pass, of VGG-16
  naive          the same scores by torch.autograd.grad, channel by channel and position by position, and by
                 torch.func.jacrev; both extrapolated from random parts, since they take minutes for one image
  memory         peaks of a trace and of plain inference, and of traces of few and of many images, each in its own
                 process
  pgd            projected gradient descent, 10 steps on a quarter-width VGG-16, against torchattack, torchattacks and
                 foolbox, where they are installed
  hardening      training steps with penalties against plain ones, on a quarter-width VGG-16: time, and peak memory
                 (each in its own process)
  architectures  EfficientNet, MobileNetV3, RegNet, DenseNet, GoogLeNet, Inception, ResNet with group norm, ConvNeXt,
                 Swin, ViT, and DeiT where timm is installed, 2 images at a time: layers, edges, time of a trace with
                 32 sketches and of an exact one (extrapolated), and distance from the oracle at reduced size. Only
                 where it is asked for; --quick leaves EfficientNet-B0 and ViT-B/16
  processes      traces of VGG-16 at 32x32 by two processes of one thread against those of one, and what an image
                 costs where several processes trace many, in processor time and bytes, for VGG-16 and ResNet-18. Only
                 where it is asked for, on two processor cores that do nothing else
  gpu            on one GPU, in channels_last, with TensorFloat-32 and with bfloat16 autocast: traces of VGG-16 (32x32,
                 1,024 images at a time), ResNet-50, MobileNetV2 and ViT-B/16 (224x224, 128), their memory, launches
                 and waits; PGD beside torchattacks. Only where it is asked for, with --device cuda

the numbers:

  Runs take turns in one process. A ratio is of two runs in the same turn; the median is shown, lowest and highest.
  Times by themselves say little on a machine that does other work too, where --threads 1 is the steadiest.
  Weights and images are random.
"""

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is measured)."""


@dataclass(frozen=True)
class Step:
    """One of the things to measure.

    Attributes:
        name: In a few words.
        count: How often its work reports that it goes on.
        work: Measures; it is given what to call when it goes on.
    """

    name: str
    count: int
    work: Callable[[Callable[[], None]], Sequence[Measurement] | ArchitectureResult]


def steps_of(plan: Plan) -> list[Step]:
    """All that a plan asks for."""
    turns, repeats = plan.turns + 1, plan.memory_repeats
    steps = [Step(case.name, turns, partial(measure_speed, case, plan)) for case in plan.speed_cases]
    others = [
        (HARDNESS, Step("hardness", turns, partial(measure_hardness, SPEED_CASES[0], plan))),
        (NAIVE, Step("the naive way, in part", turns, partial(measure_naive, plan))),
        (MEMORY, Step("memory, in processes of their own", 4 * repeats, partial(measure_memory, plan))),
        (ATTACK, Step("an attack, by several libraries", turns, partial(measure_attack, plan))),
        (
            HARDENING,
            Step("penalised training steps", turns + len(STEP_NAMES) * repeats, partial(measure_hardening, plan)),
        ),
        *(
            (ARCHITECTURES, Step(each.name, turns, partial(measure_architecture, each, plan)))
            for each in available(plan)
        ),
        (PROCESSES, Step("two processes, and one", 0, lambda _: measure_processes(plan))),
        *((GPU, Step(each.case.name, 2 * turns, partial(measure_gpu, each, plan))) for each in GPU_CASES),
        (GPU, Step("an attack on the GPU", turns, partial(measure_gpu_attack, plan))),
    ]  # fmt: skip
    return [*steps, *(step for name, step in others if plan.includes(name))]


def run_benchmark(
    plan: Plan, progress: Progress = lambda *_: None
) -> tuple[list[Measurement], list[ArchitectureResult]]:
    """Measure all that the plan asks for.

    Args:
        plan: The settings.
        progress: Called after every step.

    Returns:
        All measurements, those of the architectures among them, and the architectures.

    Raises:
        UserError: The memory does not suffice, or cannot be measured here.
    """
    steps = steps_of(plan)
    total, done = sum(step.count for step in steps), 0
    measurements: list[Measurement] = []
    architectures: list[ArchitectureResult] = []
    try:
        with in_threads(plan.threads):
            for step in steps:

                def advance(name: str = step.name) -> None:
                    nonlocal done
                    done += 1
                    progress(done, total, name)

                progress(done, total, step.name)
                result = step.work(advance)
                if isinstance(result, ArchitectureResult):
                    architectures.append(result)
                    measurements += result.measurements()
                else:
                    measurements += result
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"the device's memory does not suffice ({reason}); give a smaller --batch-size") from error
    return measurements, architectures


def environment(plan: Plan) -> dict[str, object]:
    """What the numbers depend on."""
    if plan.device.type == "cuda":
        device = f"{plan.device} ({torch.cuda.get_device_name(plan.device)})"
    else:
        device = f"{plan.device} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    return {
        "attackroute": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__,
        "python": platform.python_version(), "device": device, "threads": plan.threads or torch.get_num_threads(),
        "dtype": "float32", "repeats": plan.turns, "quick": plan.quick, "seed": plan.seed,
    }  # fmt: skip


def _parser() -> Parser:
    about = "Measure what a trace costs: against plain inference, a training step and the naive way, and its memory."
    parser = Parser("python -m benchmarks", about, _EXAMPLES)
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help="What to measure. [all but architectures, processes and gpu]")
    add("--repeats", type=at_least(1), metavar="N", help="Turns of interleaved runs. [7, 2 with --quick; of memory 3]")
    add(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help="Images at a time; the limits to be kept are for each case's own. [each case's own]",
    )
    add("--quick", action="store_true", help="Less of everything; without a case only vgg16, naive and memory.")
    add("--table", type=Path, metavar="FILE", help="Write the table of the architectures here, as Markdown.")
    add("--threads", type=at_least(1), metavar="N", help="PyTorch's threads. [its own choice]")
    add("--seed", type=at_least(0), default=0, metavar="N", help="For weights, images and the parts drawn. [0]")
    return parser  # fmt: skip


def benchmark(arguments: Sequence[str] | None) -> None:
    """Measure, and show or print what was measured."""
    options: argparse.Namespace = _parser().parse_args(arguments)
    output = output_of(options)
    if options.table is not None and ARCHITECTURES not in options.cases:
        raise UserError("--table holds the architectures: name that case")
    plan = Plan(
        cases=tuple(options.cases),
        repeats=options.repeats,
        batch_size=options.batch_size,
        threads=options.threads,
        quick=options.quick,
        seed=options.seed,
        device=resolve_device(options.device),
    )
    with output.progress("steps") as progress:
        measurements, architectures = run_benchmark(plan, progress)
    on = environment(plan)
    output.result(Document("benchmark", on, table=Table.of(each.record() for each in measurements)).to_json())
    measured_on = (
        f"{on['device']}, {plural(plan.threads or torch.get_num_threads(), 'thread')}, {on['dtype']}, "
        f"torch {on['torch']}"
    )
    output.line(f"{measured_on}; medians of {plan.turns} interleaved repeats")
    others = [each for each in measurements if not each.case.startswith(ARCHITECTURES)]
    if others:
        output.table(
            ["case", "quantity", "median", "lowest to highest", "to be kept"], [each.cells() for each in others]
        )
    if architectures:
        output.table(HEADER, [each.cells() for each in architectures])
        output.line(NOTE)
    if options.table is not None:
        images = f"{plan.batch_size or BATCH_SIZE} images a batch"
        repeats = f"{plan.turns} repeats (lowest-highest), seed {plan.seed}."
        replace_file(options.table, markdown_table(architectures, f"{measured_on}, {images}, {repeats}").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(benchmark, arguments)
