"""``attackroute report``: a run as one HTML page that can be mailed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from attackroute.cli import options, report_options
from attackroute.cli.console import Output, command_line
from attackroute.core.errors import UserError

EXAMPLES = """
 Examples:

   The run of the demo; its network is in its folder
   $ attackroute demo
   $ attackroute report runs/demo --data mnist-sample

   A trace, with the influence between channels on 200 of its images, clean and after FGSM
   $ attackroute trace --model runs/digits --data mnist-sample --out runs/digits/routes
   $ attackroute report runs/digits/routes --samples 200 --attack fgsm:eps=0.1

   Several radii, which a slider in the page moves between
   $ attackroute report runs/digits/routes --attack pgd:eps=0.02 --attack pgd:eps=0.05 --attack pgd:eps=0.1

   A network of torchvision needs its weights again
   $ attackroute report runs/photos --weights resnet18.pth

   The page and its data for another program
   $ attackroute report runs/demo --out demo.html --json | jq '.missing'

 The page:

   One file, at most 10 MB; it loads nothing and sends nothing. What trace, analyze, hardness, evaluate, harden or demo
   left in the folder, or directly below it, is in it: the route as a drawing to explore, figures, tables, and all
   numbers as JSON. A part that is missing leaves a sentence.

   Influence between channels, what they respond to, and attacked samples where no trace of them is there, need the
   network and its images. They are taken from where the run's files say, or from --model and --data; without them,
   these parts are left out. Some of the images are in the page.
"""


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a trace, of the demo, or above them.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            rich_help_panel="The network",
            help="The network of the run; else as its files say.",
        ),
    ] = None,
    weights: options.Weights = None,
    model_width: options.ModelWidth = None,
    classes: options.Classes = None,
    data: report_options.Data = None,
    split: report_options.Split = None,
    samples: report_options.Samples = 64,
    attack: report_options.Attacks = None,
    linear: report_options.Linear = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page; else report.html in RUN_DIR.")
    ] = None,
    batch_size: options.BatchSize = 128,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Put a run into one HTML page: the route to explore, figures, tables and all numbers as JSON.

    The page needs no server and no network, so that it can be mailed as it is.
    """
    from attackroute.cli.report_source import Source, Wanted, chosen_attacks, remarks
    from attackroute.core.files import replace_file
    from attackroute.report.measuring import unmeasured
    from attackroute.report.page import Content, build_page
    from attackroute.report.run_folder import RunFolder

    output = Output(as_json, quiet)
    run = RunFolder.open(run_dir)
    part = None if split is None else split.value
    wanted = Wanted(
        model, weights, model_width, classes, data, part, samples, attack or (), batch_size, seed, device,
        linear,
    )  # fmt: skip
    notes: list[str] = []
    names: tuple[str, ...] = ()
    measured = unmeasured(run.routes, run.attacked, run.route)
    started = time.perf_counter()
    try:
        source = Source.open(run, wanted)
        names = source.images.classes
        measured = source.measure(run, chosen_attacks(run, wanted), batch_size, output, linear=linear)
    except UserError as error:
        if wanted.is_anything:
            raise
        notes.append(f"Influence between channels was not measured: {error}.")
        output.note(f"note: {notes[-1]}")
    seconds = time.perf_counter() - started
    notes += remarks(measured)
    target = out if out is not None else run_dir / "report.html"
    page = build_page(Content(run, measured, names, notes, command_line(), seconds))
    encoded = page.html.encode()
    replace_file(target, encoded)
    output.line(f"{target}: {len(encoded) / 1e6:.2f} MB{', with some parts left out for its size' * page.pruned}")
    for note in notes:
        output.line(f"  {note}")
    output.result({"page": str(target), "bytes": len(encoded), "pruned": page.pruned, "missing": notes, **page.data})
