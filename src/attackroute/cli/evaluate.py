"""``attackroute evaluate``: accuracy under attacks and corruptions, and whether it can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attackroute.cli.arguments import option, parse_number, parse_path, shared, switch
from attackroute.cli.console import Output, print_error
from attackroute.cli.options import (
    EXPECTED_MODELS,
    FILES,
    RUN,
    ImageOptions,
    NetworkOptions,
    RunOptions,
    classes_option,
    count,
    model_width_option,
    out_option,
    resolve_device,
    results_in,
)
from attackroute.core.errors import UserError
from attackroute.core.table import Table, plural

if TYPE_CHECKING:
    from attackroute.robustness.attack import Perturbation
    from attackroute.robustness.evaluation import Evaluation
    from attackroute.robustness.masking import Check
    from attackroute.zoo.data import ImageData

_FILES = ("evaluation.json", "evaluation.csv", "measurements.jsonl")


@dataclass(frozen=True, kw_only=True)
class EvaluatedNetworks:
    """The networks that are evaluated side by side."""

    title: ClassVar[str] = "The network"
    models: tuple[str, ...] = option(
        "--model", EXPECTED_MODELS + " Repeat it for several networks side by side.", str, "MODEL", repeat=True
    )
    weights: tuple[Path, ...] = option(
        "--weights", "A state dict as .safetensors or .pt, one for each --model or none. A train folder brings its "
        "own.", parse_path, "FILE", default=None, repeat=True,
    )  # fmt: skip
    model_width: float | None = model_width_option()
    classes: int | None = classes_option()

    def each(self) -> dict[str, NetworkOptions]:
        """The networks by the names that the table gives them: as they were given, with a number where that repeats."""
        if self.weights and len(self.weights) != len(self.models):
            raise UserError(
                f"there are {len(self.models)} --model and {len(self.weights)} --weights; give one for each, in that "
                "order, or none"
            )
        networks: dict[str, NetworkOptions] = {}
        for place, (model, file) in enumerate(zip(self.models, self.weights or [None] * len(self.models), strict=True)):
            repeated = self.models[:place].count(model)
            networks[f"{model}#{repeated + 1}" if repeated else model] = self.one(model, file)
        return networks

    def one(self, model: str, weights: Path | None = None) -> NetworkOptions:
        """A network by its own."""
        return NetworkOptions(model=model, weights=weights, model_width=self.model_width, classes=self.classes)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure accuracy under attacks and corruptions, with signs of masked gradients.

    Clean accuracy comes first, every accuracy has its 95 % interval, and several networks see the same images. Ctrl-C
    keeps what is done; --resume goes on.
    """

    title: ClassVar[str] = "The attacks"
    out: Path | None = out_option("Where the results go; without it they are only shown.", default=None)
    save_examples: Path | None = option(
        "--save-examples", "Where adversarial examples go; else none are kept.", parse_path, "FOLDER", default=None,
        group=FILES,
    )  # fmt: skip
    verify: Path | None = option(
        "--verify", "Check saved adversarial examples again, a file or a folder of them, and evaluate nothing; exit "
        "code 1 if they are not what they were.", parse_path, "PATH", default=None, group=FILES,
    )  # fmt: skip
    networks: EvaluatedNetworks
    images: ImageOptions = shared(data="")
    attacks: tuple[str, ...] = option(
        "--attack", "An attack or corruption: fgsm, pgd, pgd:eps=4/255,steps=20, autoattack, fog, ... Repeat it for "
        "several.", str, "NAME", default=None, repeat=True, unset="fgsm, mi-fgsm, pgd and gaussian-noise",
    )  # fmt: skip
    eps: float | None = option(
        "--eps", "Radius of those L-infinity attacks that do not state their own, as 8/255 or 0.1.", parse_number,
        "RADIUS", default=None,
    )  # fmt: skip
    severity: int | None = count("--severity", "Level, 1 to 5, of those corruptions that do not state their own.")
    checks: bool = switch("--checks", "Look for masked gradients, or do not.", off="--no-checks", default=True)
    check_samples: int = count("--check-samples", "On how many images to do that.", 256)
    twin: str | None = option(
        "--twin", "A network of the same task that was not defended, for the check by transfer.", str, "MODEL",
        default=None,
    )  # fmt: skip
    resume: bool = switch("--resume", "Go on with the evaluation in --out: what is done is not done again.", group=RUN)
    run: RunOptions


def evaluate(options: EvaluateOptions) -> int:
    """Evaluate networks, or verify saved examples; the exit code is 1 if these are not what they were."""
    from attackroute.robustness.evaluate import DEFAULT_ATTACKS
    from attackroute.robustness.evaluate import evaluate as evaluate_networks
    from attackroute.robustness.evaluation import CLEAN
    from attackroute.zoo.data import ImageBatches

    output = options.run.output
    device = resolve_device(options.run.device)
    named = options.networks.each()
    if options.verify is not None:
        return _verify(options, options.verify, list(named.values()))
    if not options.images.data:
        raise UserError("there is nothing to evaluate on; name the images with --data")
    if options.resume and options.out is None:
        raise UserError("--resume goes on with the evaluation in a folder; name it with --out")
    defaults = {"seed": options.run.seed, **({} if options.severity is None else {"severity": options.severity})}
    given = [text for text in options.attacks or DEFAULT_ATTACKS if text != CLEAN]
    attacks = parse_attacks(given, options.eps, **defaults)
    images = options.images.open(options.run, options.networks.models)
    networks = {name: network.open(images).to(device) for name, network in named.items()}
    twin = None if options.twin is None else options.networks.one(options.twin).open(images).to(device)
    origin: dict[str, Any] = {"model_names": dict(zip(networks, options.networks.models, strict=True))}
    origin |= {"data": options.images.data, "split": images.split, "samples": options.images.samples}
    origin["images"] = [len(images), *images.shape]
    batches = ImageBatches(images, options.run.batch_size, workers=options.run.workers)
    kept = "nothing is kept without --out" if options.out is None else "what is done is kept; go on with --resume"
    with ExitStack() as stack:
        places = {options.save_examples: ("examples.json", "*/*.safetensors"), options.out: _FILES}
        folders: dict[Path | None, Path] = {
            path: stack.enter_context(results_in(path, files, options.run, resume=options.resume))
            for path, files in places.items()
            if path is not None
        }
        progress = stack.enter_context(output.progress("images", kept))
        evaluation = evaluate_networks(
            networks, batches, attacks, batch_size=options.run.batch_size, seed=options.run.seed,
            checks=options.check_samples if options.checks else 0, twin=twin, folder=folders.get(options.out),
            save_examples=folders.get(options.save_examples),
            resume=options.resume, origin=origin,
            progress=progress,
        )  # fmt: skip
    _show(output, evaluation, options.out, options.save_examples)
    return 0


def parse_attacks(names: Sequence[str], eps: float | None, **defaults: Any) -> list[Perturbation]:
    """Attacks, with defaults for what is left open; ``eps`` is for L-infinity attacks alone."""
    from attackroute.robustness.registry import parse_attack

    attacks = []
    for text in names:
        attack = parse_attack(text, **defaults)
        if eps is not None and attack.ball is not None and attack.ball.norm == "linf":
            attack = parse_attack(text, eps=eps, **defaults)
        attacks.append(attack)
    return attacks


def _show(output: Output, evaluation: Evaluation, out: Path | None, examples: Path | None) -> None:
    from attackroute.core.journal import MEASUREMENTS
    from attackroute.robustness.evaluation import COLUMNS, EVALUATION
    from attackroute.robustness.masking import SKIPPED

    places = {name: path and str(path) for name, path in (("folder", out), ("examples", examples))}
    output.result({**evaluation.document().to_json(), **places})
    output.table(COLUMNS, evaluation.cells())
    for model in dict.fromkeys(check.model for check in evaluation.checks):
        output.line(f"checks for masked gradients, {model}:")
        for check in evaluation.checks:
            if check.model == model:
                numbers = "" if check.verdict == SKIPPED else _numbers(check)
                output.line(f"  {check.verdict:<10}  {check.name}: {numbers}{check.sentence}")
    if evaluation.checks:
        output.line("")
    output.line(evaluation.reading())
    if out is not None:
        output.line(f"{EVALUATION}.json, {EVALUATION}.csv and {MEASUREMENTS} are in {out}")
    if examples is not None:
        output.line(f"adversarial examples are in {examples}; check them with --verify {examples}")


def _numbers(check: Check) -> str:
    listed = ", ".join(
        f"{value} {name}" if isinstance(value, int) else f"{name} {value:.1%}" for name, value in check.numbers.items()
    )
    p = "" if check.p is None else f", p = {check.p:.2g}"
    return f"{listed} ({plural(check.samples, 'image')}{p}). "


# Saved adversarial examples


def _verify(options: EvaluateOptions, path: Path, networks: Sequence[NetworkOptions]) -> int:
    """Check saved examples with the networks; the exit code is 1 if they are not what they were."""
    from attackroute.core.distributed import current
    from attackroute.robustness.examples import verify_examples

    evaluated = (options.images.data, options.attacks, options.out, options.save_examples, options.resume)
    if any(evaluated):
        raise UserError(
            "--verify evaluates nothing: leave out --data, --attack, --out, --save-examples and --resume, or --verify"
        )
    device = resolve_device(options.run.device)

    def verified() -> Table:
        opened = [network.open(_images_of(path, network.model)).to(device) for network in networks]
        return verify_examples(path, opened)

    table = current().first(verified)
    faults = [fault for row in table for fault in row["faults"]]
    output = options.run.output
    output.result({"files": table.to_json(), "faults": len(faults), "passed": not faults})
    output.table(
        ["model", "attack", "samples", "recorded", "now", "largest distance"],
        [
            [
                row["model"],
                row["attack"],
                row["samples"],
                f"{row['recorded_accuracy']:.2%}",
                "-" if row["accuracy"] is None else f"{row['accuracy']:.2%}",
                "none kept" if row["largest_distance"] is None else f"{row['largest_distance']:.6g}",
            ]
            for row in table
            if row["model"] is not None
        ],
    )
    for fault in faults:
        print_error(fault)
    verdict = plural(len(faults), "fault") if faults else "all is as it was recorded"
    output.line(f"{plural(len(table), 'file')} checked: {verdict}")
    return 1 if faults else 0


def _images_of(path: Path, model: str) -> ImageData:
    """No images, of the shape and the classes that the examples have."""
    import torch
    from torch.utils.data import TensorDataset

    from attackroute.robustness.examples import example_shape
    from attackroute.zoo.data import ImageData
    from attackroute.zoo.weights import find_card

    shape, logits = example_shape(path)
    card = find_card(model)
    classes = tuple(map(str, range(logits))) if card is None else card[1].classes
    images: Any = TensorDataset(torch.empty(0, *shape))
    return ImageData(images, classes, shape, name="examples", split="test")
