"""``attackroute evaluate``: accuracy under attacks and corruptions, and whether it can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attackroute.cli import options
from attackroute.cli.console import Output
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from attackroute.robustness.attack import Perturbation

EXAMPLES = """
 Examples:

   FGSM, MI-FGSM, PGD and Gaussian noise on the test images of a network that was trained here
   $ attackroute evaluate --model runs/digits --data mnist-sample --eps 0.1 --out runs/digits/evaluation

   Two networks side by side, attacks with settings of their own
   $ attackroute evaluate --model runs/plain --model runs/hardened --data mnist-sample --samples 500 \\
       --attack fgsm:eps=0.1 --attack pgd:eps=0.1,steps=50,restarts=5 --attack pgd-l2:eps=1.5

   The standard of the field, and corruptions (needs the extras autoattack and corruptions)
   $ attackroute evaluate --model runs/vgg --data cifar10:~/data --samples 1000 \\
       --attack autoattack --attack fog --attack jpeg-compression:severity=5

   Go on after an interruption: the same command with --resume, for the same numbers
   $ attackroute evaluate --model runs/vgg --data cifar10:~/data --out runs/vgg/evaluation --resume

   Keep the adversarial examples, and check them again later
   $ attackroute evaluate --model runs/digits --data mnist-sample --save-examples runs/digits/examples
   $ attackroute evaluate --model runs/digits --verify runs/digits/examples

 The files:

   evaluation.json, evaluation.csv   the table; the JSON also has settings, versions and checks
   measurements.jsonl                each sample's prediction, batch by batch; what --resume goes on from

 The checks, on --check-samples of the images at the largest L-infinity eps among the attacks:

   Attacks also fail when gradients are masked, which is no robustness. Then one step beats many, a black box beats
   the white box, accuracy rises with more steps, or an attack with no limit does not reach everything. A check is
   suspicious if chance explains the paired counts with a probability below 1 %. Silence proves nothing.
"""

_ATTACKS = "The attacks"


def evaluate(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="MODEL",
            rich_help_panel="The network",
            help="A folder that [bold]attackroute train[/bold] wrote, or vgg16, alexnet, resnet18, vgg_small, "
            "torchvision:NAME, timm:NAME or package.module:factory. Repeat it for several networks side by side.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            rich_help_panel="The images",
            help="mnist-sample (digits, no download), cifar10:PATH, svhn:PATH, imagenet:PATH or folder:PATH.",
        ),
    ] = None,
    weights: Annotated[
        list[Path] | None,
        typer.Option(
            "--weights",
            metavar="FILE",
            rich_help_panel="The network",
            help="A state dict as .safetensors or .pt, one for each --model or none. A train folder brings its own.",
        ),
    ] = None,
    model_width: options.ModelWidth = None,
    classes: options.Classes = None,
    split: options.Split = options.Splits.TEST,
    samples: options.Samples = None,
    image_size: options.ImageSize = None,
    skip_unreadable: options.SkipUnreadable = False,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            metavar="NAME",
            rich_help_panel=_ATTACKS,
            help="An attack or corruption: fgsm, pgd, pgd:eps=4/255,steps=20, autoattack, fog, ... Repeat it for "
            "several; without it fgsm, mi-fgsm, pgd and gaussian-noise.",
        ),
    ] = None,
    eps: Annotated[
        float | None,
        typer.Option(
            "--eps",
            metavar="RADIUS",
            parser=options.parse_number,
            rich_help_panel=_ATTACKS,
            help="Radius of those L-infinity attacks that do not state their own, as 8/255 or 0.1.",
        ),
    ] = None,
    severity: Annotated[
        int | None,
        typer.Option(
            "--severity",
            metavar="LEVEL",
            rich_help_panel=_ATTACKS,
            help="Level, 1 to 5, of those corruptions that do not state their own.",
        ),
    ] = None,
    checks: Annotated[
        bool, typer.Option("--checks/--no-checks", rich_help_panel=_ATTACKS, help="Look for masked gradients.")
    ] = True,
    check_samples: Annotated[
        int,
        typer.Option(
            "--check-samples", metavar="N", min=1, rich_help_panel=_ATTACKS, help="On how many images to do that."
        ),
    ] = 256,
    twin: Annotated[
        str | None,
        typer.Option(
            "--twin",
            metavar="MODEL",
            rich_help_panel=_ATTACKS,
            help="A network of the same task that was not defended, for the check by transfer.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where the results go; without it they are only shown."),
    ] = None,
    save_examples: Annotated[
        Path | None,
        typer.Option("--save-examples", metavar="FOLDER", help="Where adversarial examples go; else none are kept."),
    ] = None,
    verify: Annotated[
        Path | None,
        typer.Option(
            "--verify",
            metavar="PATH",
            help="Check saved adversarial examples again, a file or a folder of them, and evaluate nothing; "
            "exit code 1 if they are not what they were.",
        ),
    ] = None,
    batch_size: options.BatchSize = 128,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            rich_help_panel="The run",
            help="Go on with the evaluation in --out: what is done is not done again.",
        ),
    ] = False,
    workers: options.Workers = 0,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure accuracy under attacks and corruptions, with signs of masked gradients.

    Clean accuracy comes first, every accuracy has its 95 % interval, and several networks see the same images. Ctrl-C
    keeps what is done; --resume goes on.
    """
    from attackroute.cli.evaluate_report import report, report_verification
    from attackroute.cli.verification import verify_with
    from attackroute.core.distributed import current
    from attackroute.robustness.evaluate import evaluate as run_evaluation
    from attackroute.zoo.data import ImageBatches
    from attackroute.zoo.sources import load_data
    from attackroute.zoo.weights import find_card, open_network

    output = Output(as_json, quiet)
    home = options.resolve_device(device)
    files = _weights_for(model, weights)
    if verify is not None:
        _only_verifying(data, attack, out, save_examples, resume=resume)
        found = current().first(lambda: verify_with(verify, model, files, model_width, classes, home))
        sound = report_verification(output, found)
        if not sound:
            raise typer.Exit(1)
        return
    if data is None:
        raise UserError("there is nothing to evaluate on; name the images with --data")
    if resume and out is None:
        raise UserError("--resume goes on with the evaluation in a folder; name it with --out")
    attacks = _attacks(attack, eps, severity, seed)
    if image_size is None:
        cards = [card for name in model if (card := find_card(name)) is not None]
        image_size = cards[0][1].spec.image_size if cards else None
    images = load_data(
        data, split=split.value, image_size=image_size, samples=samples, seed=seed, skip_unreadable=skip_unreadable
    )
    options.report_skipped(images, output)

    def network(name: str, file: Path | None = None) -> nn.Module:
        return open_network(name, images, weights=file, width=model_width, classes=classes).to(home)

    models = dict(zip(_names(model), map(network, model, files), strict=True))
    other = None if twin is None else network(twin)
    origin = {
        "model_names": dict(zip(models, model, strict=True)),
        "data": data,
        "split": images.split,
        "samples": samples,
        "images": [len(images), *images.shape],
    }
    batches = ImageBatches(images, batch_size, workers=workers)
    try:
        with output.progress("images") as progress:
            evaluation = run_evaluation(
                models,
                batches,
                attacks,
                batch_size=batch_size,
                seed=seed,
                checks=check_samples if checks else 0,
                twin=other,
                save_examples=save_examples,
                folder=out,
                resume=resume,
                origin=origin,
                progress=lambda done, total, what: progress(done, total, f"{what}, {batches.reading}"),
            )
    except KeyboardInterrupt:
        kept = "nothing is kept without --out" if out is None else "what is done is kept; go on with --resume"
        output.note(f"interrupted: {kept}")
        raise
    report(output, evaluation, out, save_examples)


def _attacks(given: list[str] | None, eps: float | None, severity: int | None, seed: int) -> list[Perturbation]:
    """The attacks, with what the options say in place of what they leave open."""
    from attackroute.robustness.evaluate import DEFAULT_ATTACKS
    from attackroute.robustness.evaluation_table import CLEAN
    from attackroute.robustness.registry import parse_attack

    defaults = {"seed": seed, **({} if severity is None else {"severity": severity})}
    found = []
    for text in given or DEFAULT_ATTACKS:
        if text == CLEAN:
            continue
        attack = parse_attack(text, **defaults)
        ball = attack.ball
        if eps is not None and ball is not None and ball.norm == "linf":  # a radius in another norm is another thing
            attack = parse_attack(text, eps=eps, **defaults)
        found.append(attack)
    return found


def _weights_for(models: list[str], weights: list[Path] | None) -> list[Path | None]:
    if not weights:
        return [None] * len(models)
    if len(weights) != len(models):
        raise UserError(
            f"there are {len(models)} --model and {len(weights)} --weights; give one for each, in that order, or none"
        )
    return list(weights)


def _names(models: list[str]) -> list[str]:
    """The models as the table names them: as they were given, with a number where that repeats."""
    return [
        name if models.index(name) == place else f"{name}#{models[:place].count(name) + 1}"
        for place, name in enumerate(models)
    ]


def _only_verifying(*others: object, resume: bool) -> None:
    if resume or any(other is not None and other != [] for other in others):
        raise UserError(
            "--verify evaluates nothing: leave out --data, --attack, --out, --save-examples and --resume, or --verify"
        )
