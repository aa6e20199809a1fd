"""``attackroute compare``: two runs on one HTML page, such as a network before and after hardening."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attackroute.cli import options, report_options
from attackroute.cli.console import Output, command_line
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from attackroute.cli.report_source import Wanted
    from attackroute.report.run_folder import RunFolder
    from attackroute.report.two_runs import Comparison

EXAMPLES = """
 Examples:

   Before and after hardening: both networks are traced on the same images for the page
   $ attackroute harden --model runs/digits --data mnist-sample --penalty gradient --lam 0.1 --out runs/hardened
   $ attackroute compare runs/digits runs/hardened --data mnist-sample --attack pgd:eps=0.1

   Two runs that hold traces of the same images, clean and attacked
   $ attackroute compare runs/vgg runs/vgg-hardened --out hardened.html

   The differences for another program
   $ attackroute compare runs/digits runs/hardened --data mnist-sample --json | jq '.differences.numbers'

 The page:

   Both routes over one another, with the channels that left, entered and stayed, then side by side; the numbers of both
   and their differences; then all that attackroute report shows, of both. One file, at most 10 MB, that loads nothing.

   Routes are compared on the same images only. Where the runs do not hold traces of the same images, both networks are
   traced for the page on --samples images; attacks are made for each network by itself.
"""


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of the one run, such as before hardening.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Folder of the other, such as after it.")],
    model_a: Annotated[
        str | None,
        typer.Option("--model-a", metavar="MODEL", rich_help_panel="The networks", help="The network of RUN_A."),
    ] = None,
    model_b: Annotated[
        str | None,
        typer.Option("--model-b", metavar="MODEL", rich_help_panel="The networks", help="The network of RUN_B."),
    ] = None,
    weights_a: Annotated[
        Path | None,
        typer.Option("--weights-a", metavar="FILE", rich_help_panel="The networks", help="Weights of RUN_A's network."),
    ] = None,
    weights_b: Annotated[
        Path | None,
        typer.Option("--weights-b", metavar="FILE", rich_help_panel="The networks", help="Weights of RUN_B's network."),
    ] = None,
    model_width: options.ModelWidth = None,
    classes: options.Classes = None,
    data: report_options.Data = None,
    split: report_options.Split = None,
    samples: report_options.Samples = 64,
    attack: report_options.Attacks = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The page; else compare.html in RUN_B.")
    ] = None,
    batch_size: options.BatchSize = 128,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Put two runs onto one HTML page: their routes over one another and side by side, and what changed.

    Says which channels left the route and which entered it, and how accuracies, occurrence, sensitivity and gradients
    differ.
    """
    from attackroute.cli.report_source import Wanted
    from attackroute.core.files import replace_file
    from attackroute.report.run_folder import RunFolder
    from attackroute.report.two_runs import build_comparison

    output = Output(as_json, quiet)
    runs = RunFolder.open(run_a), RunFolder.open(run_b)
    part = None if split is None else split.value
    shared = (model_width, classes, data, part, samples, attack or (), batch_size, seed, device)
    wanted = Wanted(model_a, weights_a, *shared), Wanted(model_b, weights_b, *shared)
    comparison = _comparison(runs, wanted, output)
    page = build_comparison(comparison)
    target = out if out is not None else run_b / "compare.html"
    encoded = page.html.encode()
    replace_file(target, encoded)
    output.line(f"{target}: {len(encoded) / 1e6:.2f} MB{', with some parts left out for its size' * page.pruned}")
    output.table(
        ["", *comparison.names, "change"],
        [[str(row["number"]), *(f"{value:.4g}" for value in row["values"]), _change(row)]
         for row in page.data["differences"]["numbers"] if None not in row["values"]],
    )  # fmt: skip
    for note in comparison.notes:
        output.line(f"  {note}")
    output.result({"page": str(target), "bytes": len(encoded), "pruned": page.pruned, **page.data})


def _comparison(runs: tuple[RunFolder, RunFolder], wanted: tuple[Wanted, Wanted], output: Output) -> Comparison:
    """Both runs on the same images: by their own traces where these are of the same samples, else by new ones."""
    from attackroute.cli.report_source import Source, chosen_attacks
    from attackroute.report.measuring import Measured, unmeasured
    from attackroute.report.page import Content
    from attackroute.report.two_runs import Comparison, comparable_notes, told_apart

    first, second = runs
    kept = comparable(first, second)
    if kept:
        shared = {routes.provenance.attack for routes in first.attacked}
        shared &= {routes.provenance.attack for routes in second.attacked}
        first, second = (_with_attacks(run, shared) for run in runs)
    else:
        first, second = (replace(run, routes=None, attacked=(), route=None) for run in runs)
    images_of = first if wanted[0].data is not None or isinstance(first.settings.get("data"), str) else second
    attacks = chosen_attacks(first, wanted[0])
    notes: list[str] = []
    measured: list[Measured] = []
    names: tuple[str, ...] = ()
    started = time.perf_counter()
    for run, told in zip((first, second), wanted, strict=True):
        try:
            source = Source.open(run, told, images_of)
            names = names or source.images.classes
            measured.append(source.measure(run, attacks, told.batch_size, output))
        except UserError as error:
            if not kept:
                raise UserError(
                    f"{run.path}: {error} (the runs hold no traces of the same images to compare)"
                ) from None
            if told.is_anything:
                raise
            notes.append(f"Nothing was measured on the network of {run.path.name}: {error}.")
            output.note(f"note: {notes[-1]}")
            measured.append(unmeasured(run.routes, run.attacked, run.route))
    seconds = time.perf_counter() - started
    one, other = (
        Content(run, found, names, (), command_line(), seconds)
        for run, found in zip((first, second), measured, strict=True)
    )
    clean = one.measured.clean.routes
    compared = [item.attack for item in one.measured.attacked if item.attack is not None]
    notes = [*comparable_notes(0 if clean is None else len(clean), compared, traced=not kept), *notes]
    return Comparison(one, other, told_apart(one.name, other.name), notes)


def comparable(first: RunFolder, second: RunFolder) -> bool:
    """Whether both runs hold traces of the same samples at the same width."""
    from attackroute.report.measuring import same_samples

    ours, theirs = first.routes, second.routes
    return ours is not None and theirs is not None and same_samples(ours, theirs) and ours.width == theirs.width


def _with_attacks(run: RunFolder, attacks: set[str | None]) -> RunFolder:
    """The run with the traces of these attacks alone."""
    return replace(run, attacked=tuple(item for item in run.attacked if item.provenance.attack in attacks))


def _change(row: Mapping[str, Any]) -> str:
    if row["change"] is None:
        return ""
    return f"{row['change']:+.1f} points" if row["kind"] == "points" else f"x {row['change']:.3g}"
