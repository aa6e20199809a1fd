"""``attackroute analyze``: what a route is worth, in the experiments of the paper's section 4."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from attackroute.cli import options
from attackroute.cli.console import Output
from attackroute.core.errors import UserError

EXAMPLES = """
 Examples:

   All experiments on a network that was trained here, under PGD
   $ attackroute analyze --model runs/digits --data mnist-sample --samples 500 --out runs/digits/analysis

   Transplants for the paper's attacks and for noise, in three layers
   $ attackroute analyze --model runs/vgg --data cifar10:~/data --samples 1000 --only transplant \\
       --attack pgd --attack fgsm --attack step-ll --attack mi-fgsm --attack gaussian-noise --attack fog:severity=3 \\
       --layers features.0,features.3,features.7 --out runs/vgg/analysis

   A vision transformer: its attention projections and MLPs as layers, Grad-CAM over its tokens
   $ attackroute analyze --model torchvision:vit_b_16 --weights vit.pth --data imagenet:~/data --samples 64 \\
       --linear --batch-size 8 --only sensitivity,deactivate,weaken,gradcam --out runs/vit/analysis

   Go on after an interruption: finished experiments on the same terms are not run again
   $ attackroute analyze --model runs/vgg --data cifar10:~/data --out runs/vgg/analysis --resume

   For another program
   $ attackroute analyze --model runs/digits --data mnist-sample --out runs/a --json | jq '.experiments[].reading'

 The experiments:

   occurrence    how much samples' routes have in common (Table 1), clean and attacked
   sensitivity   how much neurons move under attack, and the loss with them (Fig. 2)
   transplant    accuracy on attacked images with clean values in some channels (Fig. 3)
   deactivate    accuracy with channels set to zero (Fig. 4a)
   weaken        accuracy with the connections between channels scaled down (Fig. 4b)
   gradcam       where the route's channels look, and the others (Fig. 5)
   detect        whether an image's route gives an attack away

 The files:

   EXPERIMENT.json, EXPERIMENT.csv   every number, and the terms on which it depends
   EXPERIMENT*.png, EXPERIMENT*.svg  the figures
   route.json                        the route (attackroute.Route.load)

 Where attention or normalisation over channels stands between two layers, no kernel slice joins two channels:
 the control by weights is left out then, and weaken scales the connections that there are, as within MLPs; a note says
 so. A map of Grad-CAM over tokens leaves out class tokens; the grid is that of the patches.

 Controls of the route's size stand beside it everywhere: random channels off the route, and the channels that other
 criteria rank first. Half of the images decide on routes and ranks, the other half are measured.
"""

_EXPERIMENTS = "The experiments"


def analyze(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where tables and figures go.")],
    weights: options.Weights = None,
    model_width: options.ModelWidth = None,
    classes: options.Classes = None,
    split: options.Split = options.Splits.TEST,
    samples: options.Samples = None,
    image_size: options.ImageSize = None,
    skip_unreadable: options.SkipUnreadable = False,
    only: Annotated[
        str | None,
        typer.Option(
            "--only", metavar="NAME,NAME", rich_help_panel=_EXPERIMENTS, help="Some of the experiments; else all."
        ),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            "--attack",
            metavar="NAME",
            rich_help_panel=_EXPERIMENTS,
            help="An attack or corruption, such as pgd:eps=4/255; else pgd. May be repeated; shares grow for the first",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="NAME,NAME",
            rich_help_panel=_EXPERIMENTS,
            help="Some of the layers; else all. Occurrence and detection always take all.",
        ),
    ] = None,
    carrier: options.Carrier = options.Carriers.UNIT,
    linear: options.Linear = False,
    sketches: options.Sketches = None,
    share: Annotated[
        float,
        typer.Option(
            "--share",
            metavar="SHARE",
            rich_help_panel=_EXPERIMENTS,
            help="Share of each layer's channels on the route, and in the controls.",
            parser=options.parse_share,
        ),
    ] = 0.3,
    at: Annotated[
        str,
        typer.Option(
            "--at",
            metavar="PLACE",
            rich_help_panel=_EXPERIMENTS,
            help="Where channels are changed and maps taken: the layer's output (before batch norm), or activation.",
        ),
    ] = "output",
    draws: Annotated[
        int,
        typer.Option("--draws", metavar="N", min=1, rich_help_panel=_EXPERIMENTS, help="Random controls."),
    ] = 5,
    batch_size: options.BatchSize = 128,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            rich_help_panel="The run",
            help="Leave out experiments that --out holds already, on the same terms.",
        ),
    ] = False,
    workers: options.Workers = 0,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what the critical attacking route is worth, beside controls of the same size.

    Every experiment of the paper's section 4 gives a table, a figure and one sentence, and says in which layers the
    route beats each control. Ctrl-C keeps the experiments that are done; --resume goes on.
    """
    from attackroute.analysis.study import EXPERIMENTS, Study
    from attackroute.cli.analyze_report import report
    from attackroute.core.distributed import current
    from attackroute.core.errors import did_you_mean
    from attackroute.core.layers import ACTIVATION, OUTPUT
    from attackroute.robustness.registry import parse_attack
    from attackroute.tracing.noise import check_carrier
    from attackroute.zoo.sources import load_data
    from attackroute.zoo.weights import find_card, open_network

    output = Output(as_json, quiet)
    names = _listed(only, "--only") or list(EXPERIMENTS)
    for name in names:
        if name not in EXPERIMENTS:
            raise UserError(
                f"unknown experiment {name!r}{did_you_mean(name, EXPERIMENTS)}; choose from {', '.join(EXPERIMENTS)}"
            )
    if at not in (OUTPUT, ACTIVATION):
        raise UserError(f"unknown place --at {at}{did_you_mean(at, (OUTPUT, ACTIVATION))}; give output or activation")
    attacks = {text: parse_attack(text) for text in dict.fromkeys(attack or ["pgd"])}
    check_carrier(carrier.value, attacks, sketches)
    home = options.resolve_device(device)
    if image_size is None and (card := find_card(model)) is not None:
        image_size = card[1].spec.image_size
    images = load_data(
        data, split=split.value, image_size=image_size, samples=samples, seed=seed, skip_unreadable=skip_unreadable
    )
    options.report_skipped(images, output)
    network = open_network(model, images, weights=weights, width=model_width, classes=classes).to(home)
    study = Study(
        network, images, attacks, _listed(layers, "--layers"), share, at, draws, batch_size, seed,
        {"model": model, "data": data, "samples": samples, "device": home.type},
        options.open_folder(out), output, linear, sketches, workers, carrier.value,
    )  # fmt: skip
    if not resume:
        study.check_layers()
    results: dict[str, Any] = {}
    for name in (name for name in EXPERIMENTS if name in names):
        done = current().first(lambda name=name: study.finished(name)) if resume else None  # type: ignore[misc]
        if done is not None:
            output.line(f"{name}: done before. {done['reading']}")
            results[name] = done
            continue
        try:
            result, results[name] = study.run(name)
        except KeyboardInterrupt:
            kept = ", ".join(results) or "none yet"
            output.note(f"interrupted in {name}; finished experiments are kept ({kept}), go on with --resume")
            raise
        report(output, name, result, results[name]["seconds"])
    output.line(f"Tables and figures are in {out}")
    output.result({"folder": str(out), "experiments": results})


def _listed(text: str | None, option: str) -> list[str] | None:
    """Names separated by commas."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise UserError(f"{option} names nothing; separate names by commas, or leave it out for all")
    return list(dict.fromkeys(names))
