"""``attackroute report``: a run as one HTML page that can be mailed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attackroute.cli import options
from attackroute.cli.console import Output
from attackroute.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from attackroute.data import ImageData
    from attackroute.report.measuring import Measured
    from attackroute.report.run_folder import RunFolder

EXAMPLES = """
 Examples:

   The run of the demo; its network is in its folder
   $ attackroute demo
   $ attackroute report runs/demo --data mnist-sample

   A trace, with the influence between channels on 200 of its images, clean and after FGSM
   $ attackroute trace --model runs/digits --data mnist-sample --out runs/digits/routes
   $ attackroute report runs/digits/routes --samples 200 --attack fgsm:eps=0.1

   A network of torchvision needs its weights again
   $ attackroute report runs/photos --weights resnet18.pth

   The page and its data for another program
   $ attackroute report runs/demo --out demo.html --json | jq '.missing'

 The page:

   One file, at most 10 MB; it loads nothing and sends nothing. What trace, analyze, hardness, evaluate or demo left in
   the folder, or directly below it, is in it: the route as a drawing to explore, figures, tables, and all numbers as
   JSON. A part that is missing leaves a sentence.

   Influence between channels, and attacked samples where no trace of them is there, need the network and its images.
   They are taken from where the run's files say, or from --model and --data; without them, lines are left out.
"""

_WIDTH = 0.2  # the paper's
_ATTACK = "pgd"


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
    classes: options.Classes = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="DATA",
            rich_help_panel="The images",
            help="Its images, as attackroute trace takes them; else as its files say.",
        ),
    ] = None,
    split: Annotated[
        options.Splits | None,
        typer.Option("--split", rich_help_panel="The images", help="Which part of the data; else as the run had it."),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            metavar="N",
            min=1,
            rich_help_panel="The images",
            help="How many images influence is averaged over.",
        ),
    ] = 64,
    attack: Annotated[
        str | None,
        typer.Option(
            "--attack",
            metavar="NAME",
            rich_help_panel="The images",
            help=f"What attacks the images; else as the run had it, or {_ATTACK}.",
        ),
    ] = None,
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
    from attackroute.files import replace_file
    from attackroute.report.measuring import Measured
    from attackroute.report.page import Content, build_page
    from attackroute.report.run_folder import RunFolder

    output = Output(as_json, quiet)
    run = RunFolder.open(run_dir)
    asked = any(item is not None for item in (model, weights, data, attack))
    notes: list[str] = []
    names: tuple[str, ...] = ()
    measured = Measured(run.routes, run.attacked)
    try:
        images, network = _open(run, model, weights, classes, data, split, samples, seed, device)
        options.report_skipped(images, output)
        names = images.classes
        measured = _measure(run, network, images, attack, batch_size, output)
    except UserError as error:
        if asked:
            raise
        notes.append(f"Influence between channels was not measured: {error}.")
        output.note(f"note: {notes[-1]}")
    notes += _remarks(run, measured)
    target = out if out is not None else run_dir / "report.html"
    page = build_page(Content(run, measured, names, notes))
    encoded = page.html.encode()
    replace_file(target, encoded)
    output.line(f"{target}: {len(encoded) / 1e6:.2f} MB{', with some parts left out for its size' * page.pruned}")
    for note in notes:
        output.line(f"  {note}")
    output.result({"page": str(target), "bytes": len(encoded), "pruned": page.pruned, "missing": notes, **page.data})


def _open(
    run: RunFolder,
    model: str | None,
    weights: Path | None,
    classes: int | None,
    data: str | None,
    split: options.Splits | None,
    samples: int,
    seed: int,
    device: str,
) -> tuple[ImageData, nn.Module]:
    """The run's network and some of its images.

    Raises:
        UserError: The run does not name them and no option does, or they are not those of the run.
    """
    from attackroute.cli.networks import find_card, open_network
    from attackroute.data import load_data
    from attackroute.fingerprint import weights_digest

    terms = run.terms
    found = model or (None if run.model is None else str(run.model)) or terms.get("model")
    if not isinstance(found, str):
        raise UserError("the run does not name its network; give --model")
    if model is None and _calls_code(found):
        raise UserError(f"the run's network {found} is code to be called; give --model to call it")
    source = data or terms.get("data")
    if not isinstance(source, str):
        raise UserError("the run does not name its images; give --data")
    home = options.resolve_device(device)
    card = find_card(found)
    size = _side(terms) if card is None else card[1].spec.image_size
    part = split.value if split is not None else "train" if terms.get("split") == "train" else "test"
    images = load_data(source, split=part, image_size=size, samples=samples, seed=seed)  # type: ignore[arg-type]
    network = open_network(found, images, weights=weights, classes=classes).to(home)
    if terms.get("dtype") == "float64":
        network = network.double()
    traced = terms.get("weights")
    if model is None and isinstance(traced, str) and traced != weights_digest(network):
        raise UserError(f"{found} has other weights than the run was made with; give --model to take them all the same")
    return images, network


def _measure(
    run: RunFolder, network: nn.Module, images: ImageData, attack: str | None, batch_size: int, output: Output
) -> Measured:
    """Influence on clean and attacked images, and the traces that the run lacks."""
    from attackroute.attacks import parse_attack
    from attackroute.data import loader
    from attackroute.report.measuring import measure

    traced = None if run.attacked is None else run.attacked.provenance.attack
    if attack is not None and traced is not None and str(parse_attack(attack)) != str(parse_attack(traced)):
        raise UserError(f"the run holds a trace after {traced}; leave out --attack, or take that")
    used = run.terms.get("attacks")
    listed = used[0] if isinstance(used, list) and used and isinstance(used[0], str) else None
    with output.progress("images") as progress:
        return measure(
            network,
            loader(images, batch_size),
            run,
            parse_attack(attack or traced or listed or _ATTACK),
            linear=run.terms.get("linear") is True,
            width=_WIDTH if run.routes is None else run.routes.width,
            progress=progress,
        )


def _remarks(run: RunFolder, measured: Measured) -> list[str]:
    """What a reader of the drawing must know."""
    notes = []
    for name in measured.traced:
        trace = measured.clean if name == "clean" else measured.attacked
        assert trace is not None
        after = "" if trace.provenance.attack is None else f" after {trace.provenance.attack}"
        notes.append(f"The run has no trace of {name} samples: {len(trace)} images were traced for this page{after}.")
    for name, found in (("clean", measured.clean_influence), ("attacked", measured.attacked_influence)):
        if found is not None:
            left = f"; {len(found.unmeasured)} edges without a closed form were left out" if found.unmeasured else ""
            notes.append(f"Influence is a mean over {found.samples} {name} images{left}.")
    if measured.attacked is None:
        notes.append("There is no trace of attacked samples; attackroute trace --attack makes one.")
    if measured.clean is not None and not measured.clean.methods and measured.clean_influence is None:
        notes.append("The routes do not say how layers are joined.")
    return notes


def _calls_code(model: str) -> bool:
    """Whether it is a factory: a file that came by mail must not choose what runs."""
    source, colon, _ = model.partition(":")
    return bool(colon) and source not in ("torchvision", "timm") and not Path(model).is_dir()


def _side(terms: Mapping[str, Any]) -> int | None:
    """Height of the traced images, where they are square."""
    shape = terms.get("images")
    if isinstance(shape, list) and len(shape) == 4 and shape[2] == shape[3] and isinstance(shape[2], int):
        return shape[2]
    return None
