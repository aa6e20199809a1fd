"""``attackroute evaluate``: accuracy under attacks, and whether it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attackroute.cli.arguments import option, parse_number, parse_path, shared, switch
from attackroute.cli.console import Output
from attackroute.cli.options import (
    EXPECTED_MODELS,
    NETWORK,
    RUN,
    ImageOptions,
    NetworkOptions,
    RunOptions,
    count,
    out_option,
    resolve_device,
    results_in,
)
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from attackroute.robustness.attack import Perturbation
    from attackroute.robustness.evaluation import Evaluation

_FILES = ("evaluation.json", "evaluation.csv", "measurements.jsonl")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure accuracy under attacks, with signs of masked gradients.

    Clean accuracy comes first, every accuracy has its 95 % interval, and several networks see the same images. Ctrl-C
    keeps what is done; --resume goes on.
    """

    title: ClassVar[str] = "The attacks"
    out: Path | None = out_option("Where the results go; without it they are only shown.", default=None)
    models: tuple[str, ...] = option(
        "--model", EXPECTED_MODELS + " Repeat it for several networks side by side.", str, "MODEL", repeat=True,
        group=NETWORK,
    )  # fmt: skip
    weights: tuple[Path, ...] = option(
        "--weights", "A state dict as .safetensors or .pt, one for each --model or none. A train folder brings its "
        "own.", parse_path, "FILE", default=None, repeat=True, group=NETWORK,
    )  # fmt: skip
    network: NetworkOptions = shared(model="", hide=("model", "weights"))
    images: ImageOptions
    attacks: tuple[str, ...] = option(
        "--attack", "An attack: fgsm, pgd, pgd:eps=4/255,steps=20, autoattack, gaussian-noise:std=0.1, ... Repeat it "
        "for several.", str, "NAME", default=None, repeat=True, unset="fgsm, mi-fgsm, pgd and gaussian-noise",
    )  # fmt: skip
    eps: float | None = option(
        "--eps", "Radius of those attacks that do not state their own, as 8/255 or 0.1.", parse_number,
        "RADIUS", default=None,
    )  # fmt: skip
    check_samples: int = count(
        "--check-samples", "On how many images to look for masked gradients; 0 for no checks.", 256, least=0
    )
    resume: bool = switch("--resume", "Go on with the evaluation in --out: what is done is not done again.", group=RUN)
    run: RunOptions

    def networks(self) -> dict[str, NetworkOptions]:
        """The networks by the names that the table gives them: of their weights, where these were given."""
        if self.weights and len(self.weights) != len(self.models):
            raise UserError(
                f"there are {len(self.models)} --model and {len(self.weights)} --weights; give one for each, in that "
                "order, or none"
            )
        files = self.weights or [None] * len(self.models)
        return {
            model if file is None else str(file): replace(self.network, model=model, weights=file)
            for model, file in zip(self.models, files, strict=True)
        }


def evaluate(options: EvaluateOptions) -> None:
    """Evaluate networks side by side."""
    from attackroute.robustness.evaluate import DEFAULT_ATTACKS
    from attackroute.robustness.evaluate import evaluate as evaluate_networks
    from attackroute.robustness.evaluation import CLEAN
    from attackroute.zoo.data import ImageBatches

    output = options.run.output
    device = resolve_device(options.run.device)
    named = options.networks()
    given = [text for text in options.attacks or DEFAULT_ATTACKS if text != CLEAN]
    attacks = parse_attacks(given, options.eps, options.run.seed)
    images = options.images.open(options.run, options.models)
    networks = {name: network.open(images).to(device) for name, network in named.items()}
    origin: dict[str, Any] = {"model_names": {name: network.model for name, network in named.items()}}
    origin |= {"data": options.images.data, "split": images.split, "samples": options.images.samples}
    origin["images"] = [len(images), *images.shape]
    batches = ImageBatches(images, options.run.batch_size, workers=options.run.workers)
    kept = "nothing is kept without --out" if options.out is None else "what is done is kept; go on with --resume"
    out = options.out
    results = nullcontext() if out is None else results_in(out, _FILES, options.run, resume=options.resume)
    with results as folder, output.progress("images", kept) as progress:
        evaluation = evaluate_networks(
            networks, batches, attacks, batch_size=options.run.batch_size, seed=options.run.seed,
            checks=options.check_samples, folder=folder, resume=options.resume, origin=origin,
            progress=progress,
        )  # fmt: skip
    output.result({**evaluation.document().to_json(), "folder": options.out and str(options.out)})
    show_evaluation(output, evaluation)
    if options.out is not None:
        output.line(f"{', '.join(_FILES)} are in {options.out}")


def parse_attacks(names: Sequence[str], eps: float | None, seed: int) -> list[Perturbation]:
    """Attacks, with a radius and a seed for those that have such and do not state their own."""
    from attackroute.robustness.registry import parse_attack

    return [parse_attack(text, seed=seed, **({} if eps is None else {"eps": eps})) for text in names]


def show_evaluation(output: Output, evaluation: Evaluation) -> None:
    """Say what came of an evaluation."""
    from attackroute.robustness.evaluation import COLUMNS

    output.table(COLUMNS, evaluation.cells())
    for check in evaluation.checks:
        output.line(f"masked gradients, {check.model}, {check.name}: {check.verdict}. {check.sentence}")
    output.line(evaluation.reading())
