"""``attackroute trace``: critical attacking routes of images, and the route of the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attackroute.cli import options
from attackroute.cli.console import Output
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from attackroute.cli.tracer import Tracer
    from attackroute.routes.folder import Missing, RouteWriter

EXAMPLES = """
 Examples:

   Routes of the test images of a network that was trained here
   $ attackroute trace --model runs/digits --data mnist-sample --out runs/digits/routes

   Compare the first four images with the brute-force oracle, in double precision (slow: for small networks)
   $ attackroute trace --model runs/digits --data mnist-sample --samples 100 --dtype float64 --check 4

   Routes of the same images after an attack, to compare with the clean ones
   $ attackroute trace --model runs/digits --data mnist-sample --attack pgd:eps=0.1 --out runs/digits/attacked

   Routes that follow what the attack changes, instead of what channels could do
   $ attackroute trace --model runs/digits --data mnist-sample --attack pgd:eps=0.1 --carrier noise \\
       --out runs/digits/noise

   A network of torchvision on 1,000 of your own images
   $ attackroute trace --model torchvision:resnet18 --weights resnet18.pth --classes 1000 \\
       --data folder:photos --image-size 224 --samples 1000 --out runs/photos

   A transformer: attention projections and MLPs, its mixing edges approximately, by 32 random products each
   $ attackroute trace --model torchvision:vit_b_16 --weights vit.pth --classes 1000 --linear --sketches 32 \\
       --data folder:photos --image-size 224 --samples 100 --batch-size 4 --out runs/vit

   Go on after an interruption: the same command with --resume, for the same result
   $ attackroute trace --model runs/vgg --data cifar10:~/data --out runs/vgg/routes --resume

   More images than one process can take: two processes, for the same files, byte for byte
   $ torchrun --nproc-per-node 2 -m attackroute trace --model runs/vgg --data imagenet:~/data --out runs/vgg/routes

   For another program
   $ attackroute trace --model runs/digits --data mnist-sample --json | jq '.layers[].occurrence'

 The files:

   routes.safetensors   the route of each sample (attackroute.InstanceRoutes.load); of more than 8,192 samples in
                        several files, routes-00000-of-00005.safetensors, ... (attackroute.StoredRoutes.open)
   route.json           the route of the model (attackroute.Route.load)
   summary.json         the table, and the settings on which the result depends

 The table:

   occurrence   How often a layer's most frequent channels are on a sample's route: 100 % where every sample uses
                the same channels, about the share of --width where samples have nothing in common.
   computed     How the edges into a layer were computed, and how many there are where it is not one.
                closed-form: exact, from the forward pass. autograd: exact, from vector-Jacobian products.
                sketch: approximate, from --sketches random products. replay: with --carrier noise, exact, from
                passes in which one channel at a time is as on the clean image.
   overlap      With --sketches: share of a sample's kept channels that exact scores are expected to keep as well, and
                of all channels those within two standard errors of the cut; for the critical channels of later
                layers as they were found.
"""


class Dtypes(str, Enum):
    """Number formats; the short ones run under autocast."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


_ROUTES = "The routes"


def trace(
    model: options.Model,
    data: options.Data,
    weights: options.Weights = None,
    model_width: options.ModelWidth = None,
    classes: options.Classes = None,
    split: options.Split = options.Splits.TEST,
    samples: options.Samples = None,
    image_size: options.ImageSize = None,
    skip_unreadable: options.SkipUnreadable = False,
    width: Annotated[
        float,
        typer.Option(
            "--width",
            metavar="SHARE",
            parser=options.parse_share,
            rich_help_panel=_ROUTES,
            help="Share of each layer's channels on a sample's route.",
        ),
    ] = 0.2,
    route_width: Annotated[
        float,
        typer.Option(
            "--route-width",
            metavar="SHARE",
            parser=options.parse_share,
            rich_help_panel=_ROUTES,
            help="Share of each layer's channels on the model's route: those that are on most samples' routes.",
        ),
    ] = 0.3,
    attack: Annotated[
        str | None,
        typer.Option(
            "--attack",
            metavar="NAME",
            rich_help_panel=_ROUTES,
            help="Trace the images after this attack or corruption: fgsm, pgd, pgd:eps=4/255,steps=20, ...",
        ),
    ] = None,
    carrier: options.Carrier = options.Carriers.UNIT,
    linear: options.Linear = False,
    sketches: options.Sketches = None,
    freeze_gates: Annotated[
        bool,
        typer.Option(
            "--freeze-gates",
            rich_help_panel=_ROUTES,
            help="Take statistics of layer and group norm, attention weights and squeeze-excite gates as constants: "
            "approximate, and more edges have a closed form.",
        ),
    ] = False,
    keep_scores: Annotated[
        bool,
        typer.Option(
            "--keep-scores", rich_help_panel=_ROUTES, help="Keep each channel's score too; files grow 32-fold."
        ),
    ] = False,
    check: Annotated[
        int | None,
        typer.Option(
            "--check",
            metavar="N",
            min=1,
            rich_help_panel=_ROUTES,
            help="Compare the first N samples with the brute-force oracle; exit code 1 if they differ beyond rounding.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where the routes go; without it they are only shown."),
    ] = None,
    batch_size: options.BatchSize = 128,
    dtype: Annotated[
        Dtypes,
        typer.Option(
            "--dtype", rich_help_panel="The run", help="Precision; bfloat16 and float16 are faster, and not exact."
        ),
    ] = Dtypes.FLOAT32,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            rich_help_panel="The run",
            help="Go on with the trace in --out: samples that are done are not traced again.",
        ),
    ] = False,
    workers: options.Workers = 0,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find the critical attacking routes of images, exactly unless --sketches or --freeze-gates are given.

    A sample's route holds the channels of each layer that pass on the most of what changes its loss; the model's route
    holds those that are on most samples' routes. Ctrl-C keeps the samples that are done; --resume goes on.
    """
    import torch

    from attackroute.cli.trace_report import report, summarise
    from attackroute.cli.tracer import Tracer
    from attackroute.core.distributed import current
    from attackroute.core.model_state import weights_digest
    from attackroute.robustness.registry import parse_attack
    from attackroute.routes.folder import Missing, RouteWriter, StoredRoutes, TraceFolder
    from attackroute.tracing.noise import check_carrier
    from attackroute.zoo.sources import load_data
    from attackroute.zoo.weights import find_card, open_network

    output = Output(as_json, quiet)
    if resume and out is None:
        raise UserError("--resume goes on with the trace in a folder; name it with --out")
    perturbation = None if attack is None else parse_attack(attack)
    check_carrier(carrier.value, perturbation, sketches, freeze_gates=freeze_gates)
    home = options.resolve_device(device)
    if image_size is None and (card := find_card(model)) is not None:
        image_size = card[1].spec.image_size
    images = load_data(
        data, split=split.value, image_size=image_size, samples=samples, seed=seed, skip_unreadable=skip_unreadable
    )
    options.report_skipped(images, output)
    network = open_network(model, images, weights=weights, width=model_width, classes=classes)
    network = network.to(device=home, dtype=torch.float64 if dtype is Dtypes.FLOAT64 else None)
    autocast = getattr(torch, dtype.value) if dtype in (Dtypes.BFLOAT16, Dtypes.FLOAT16) else None
    tracer = Tracer(
        network, images, width, batch_size, linear, keep_scores, sketches, seed, freeze_gates, autocast, perturbation,
        (model, f"{data} {images.split}"), carrier.value,
    )  # fmt: skip
    team = current()
    folder = None
    if out is not None:
        terms = {
            "model": model,
            "weights": weights_digest(network),
            "data": data,
            "split": images.split,
            "samples": samples,
            "seed": seed,
            "images": [len(images), *images.shape],
            "width": width,
            "attack": None if perturbation is None else str(perturbation),
            "carrier": carrier.value,
            "linear": linear,
            "sketches": sketches,
            "freeze-gates": freeze_gates,
            "keep-scores": keep_scores,
            "batch-size": batch_size,
            "dtype": dtype.value,
            "device": home.type,
        }
        folder = TraceFolder(out, terms, len(images), batch_size)

    def begin() -> tuple[Missing, ...]:
        if folder is None:
            return (Missing(0, 0, len(images)),)
        options.open_folder(folder.path)
        return folder.open(network, resume=resume)

    missing = team.first(begin)
    for note in (note for part in missing for note in part.notes):
        output.note(f"note: {note}")
    started = time.perf_counter()
    writer = RouteWriter(folder, missing) if team.leads else None
    count = _trace(tracer, missing, workers, writer, output, kept=folder is not None)
    seconds = time.perf_counter() - started

    def finish() -> dict[str, Any]:
        assert writer is not None
        route, summary = summarise(writer.routes if folder is None else StoredRoutes.open(folder.path), route_width)
        if folder is not None:
            folder.finish(route, summary)
        return summary

    summary = team.first(finish)
    comparison = None if check is None else team.first(lambda: tracer.compare(check))
    report(output, summary, comparison, out, count, seconds)
    if comparison is not None and not comparison.passed:
        raise typer.Exit(1)


def _trace(
    tracer: Tracer, missing: Sequence[Missing], workers: int, writer: RouteWriter | None, output: Output, *, kept: bool
) -> int:
    """Trace what is not done, and say what is kept where that is broken off.

    Returns:
        How many samples were traced.
    """
    total = sum(part.stop - part.start for part in missing)
    if total < len(tracer.data):
        output.note(f"{len(tracer.data) - total} of {len(tracer.data)} samples are done already")
    try:
        with output.progress("images") as progress:
            for part in tracer.trace(missing, workers, progress) if total else ():
                if writer is not None:
                    writer.add(part)
    except BaseException as error:  # an interruption too
        if writer is not None:
            writer.keep()
        if isinstance(error, KeyboardInterrupt):
            kept_now = "finished samples are kept; go on with --resume" if kept else "nothing is kept without --out"
            output.note(f"interrupted: {kept_now}")
        raise
    return total
