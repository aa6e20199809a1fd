"""``attackroute report`` and ``compare``: a run, or two, as one HTML page that can be mailed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attackroute.cli.arguments import integer, one_of, option, shared, switch
from attackroute.cli.console import Output, command_line
from attackroute.cli.options import (
    EXPECTED_WEIGHTS,
    FILES,
    ROUTE,
    SPLITS,
    NetworkOptions,
    RunOptions,
    classes_option,
    model_width_option,
    resolve_device,
)
from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from attackroute.report.measuring import Measured
    from attackroute.report.page import Page
    from attackroute.report.run_folder import RunFolder
    from attackroute.report.two_runs import Comparison
    from attackroute.robustness.attack import Perturbation
    from attackroute.routes.instance_routes import InstanceRoutes
    from attackroute.zoo.data import ImageData

REPORT_EXAMPLES = """
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

COMPARE_EXAMPLES = """
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

_ATTACK = "pgd"  # where neither the run nor the user names one
_WIDTH = 0.2  # the paper's


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions:
    """What is measured for the page, beside what the run's files hold."""

    title: ClassVar[str] = "The images"
    data: str | None = option(
        "--data", "The run's images, as attackroute trace takes them; else as its files say.", str, "DATA", default=None
    )
    split: str | None = option(
        "--split", "Which part of the data; else as the run had it.", one_of(*SPLITS), default=None
    )
    samples: int = option(
        "--samples", "How many of the run's images, evenly apart, to measure influence, gradients and sensitivity on.",
        integer(1), "N", default=64,
    )  # fmt: skip
    attacks: tuple[str, ...] = option(
        "--attack", "What attacks the images, beside what the run has traced; repeat it for several. Without any, pgd.",
        str, "NAME", default=None, repeat=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReportedNetwork:
    """The network of a run, where its files do not say it."""

    title: ClassVar[str] = "The network"
    model: str | None = option("--model", "The network of the run; else as its files say.", str, "MODEL", default=None)
    weights: Path | None = option("--weights", EXPECTED_WEIGHTS, Path, "FILE", default=None)
    model_width: float | None = model_width_option()
    classes: int | None = classes_option()


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Put a run into one HTML page: the route to explore, figures, tables and all numbers as JSON.

    The page needs no server and no network, so that it can be mailed as it is.
    """

    title: ClassVar[str] = FILES
    folder: Path = option("", "Folder of a trace, of the demo, or above them.", Path, "RUN_DIR")
    out: Path | None = option("--out", "The page; else report.html in RUN_DIR.", Path, "FILE", default=None)
    network: ReportedNetwork
    measuring: MeasuringOptions
    linear: bool = switch(
        "--linear", "Where routes are traced for the page, linear maps are layers too (attention projections and "
        "MLPs); a run of trace, analyze or hardness with --linear needs no telling.", group=ROUTE,
    )  # fmt: skip
    run: RunOptions = shared(hide=("workers",))


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Put two runs onto one HTML page: their routes over one another and side by side, and what changed.

    Says which channels left the route and which entered it, and how accuracies, occurrence, sensitivity and gradients
    differ.
    """

    title: ClassVar[str] = "The networks"
    first: Path = option("", "Folder of the one run, such as before hardening.", Path, "RUN_A", group=FILES)
    second: Path = option("", "Folder of the other, such as after it.", Path, "RUN_B", group=FILES)
    out: Path | None = option("--out", "The page; else compare.html in RUN_B.", Path, "FILE", default=None, group=FILES)
    model_a: str | None = option("--model-a", "The network of RUN_A.", str, "MODEL", default=None)
    model_b: str | None = option("--model-b", "The network of RUN_B.", str, "MODEL", default=None)
    weights_a: Path | None = option("--weights-a", "Weights of RUN_A's network.", Path, "FILE", default=None)
    weights_b: Path | None = option("--weights-b", "Weights of RUN_B's network.", Path, "FILE", default=None)
    model_width: float | None = model_width_option()
    classes: int | None = classes_option()
    measuring: MeasuringOptions
    run: RunOptions = shared(hide=("workers",))


def report(options: ReportOptions) -> None:
    """Write the page of a run."""
    from attackroute.report.measuring import unmeasured
    from attackroute.report.page import Content, build_page
    from attackroute.report.run_folder import RunFolder

    output = options.run.output
    run = RunFolder.open(options.folder)
    request = _Request(options.network, options.measuring, options.run, options.linear)
    notes: list[str] = []
    classes: tuple[str, ...] = ()
    measured = unmeasured(run.routes, run.attacked, run.route)
    started = time.perf_counter()
    try:
        source = _Source.open(run, request)
        classes = source.images.classes
        measured = source.measure(run, request.attacks(run), request)
    except UserError as error:
        if request.names_anything:
            raise
        notes.append(f"Influence between channels was not measured: {error}.")
        output.note(f"note: {notes[-1]}")
    seconds = time.perf_counter() - started
    notes += _remarks(measured)
    page = build_page(Content(run, measured, classes, notes, command_line(), seconds))
    written = _write(page, options.out or options.folder / "report.html", output)
    for note in notes:
        output.line(f"  {note}")
    output.result({**written, "missing": notes, **page.data})


def compare(options: CompareOptions) -> None:
    """Write the page of two runs."""
    from attackroute.report.run_folder import RunFolder
    from attackroute.report.two_runs import build_comparison

    output = options.run.output
    runs = RunFolder.open(options.first), RunFolder.open(options.second)
    requests = tuple(
        _Request(
            ReportedNetwork(model=model, weights=weights, model_width=options.model_width, classes=options.classes),
            options.measuring, options.run,
        )
        for model, weights in ((options.model_a, options.weights_a), (options.model_b, options.weights_b))
    )  # fmt: skip
    comparison = _comparison(runs, requests, output)
    page = build_comparison(comparison)
    written = _write(page, options.out or options.second / "compare.html", output)
    output.table(
        ["", *comparison.names, "change"],
        [[str(row["number"]), *(f"{value:.4g}" for value in row["values"]), _change(row)]
         for row in page.data["differences"]["numbers"] if None not in row["values"]],
    )  # fmt: skip
    for note in comparison.notes:
        output.line(f"  {note}")
    output.result({**written, **page.data})


def _write(page: Page, target: Path, output: Output) -> dict[str, Any]:
    from attackroute.core.files import replace_file

    encoded = page.html.encode()
    replace_file(target, encoded)
    output.line(f"{target}: {len(encoded) / 1e6:.2f} MB{', with some parts left out for its size' * page.pruned}")
    return {"page": str(target), "bytes": len(encoded), "pruned": page.pruned}


# The network and the images behind a run's files


@dataclass(frozen=True)
class _Request:
    """What the user says beside the run's files.

    Attributes:
        network: The network.
        measuring: The images, and what attacks them.
        run: Size of batches, seed of the attacks, device and output.
        linear: Whether linear maps are layers of what is traced for the page; those of the run's traces are.
    """

    network: ReportedNetwork
    measuring: MeasuringOptions
    run: RunOptions
    linear: bool = False

    @property
    def names_anything(self) -> bool:
        """Whether the user named what to measure."""
        named = (self.network.model, self.network.weights, self.measuring.data)
        return any(each is not None for each in named) or bool(self.measuring.attacks)

    def attacks(self, run: RunFolder) -> dict[str, Perturbation]:
        """Attacks by the names that the run's traces bear: those traced and those asked for, or else the usual one."""
        from attackroute.robustness.registry import parse_attack

        attacks: dict[str, Perturbation] = {}
        for routes in run.attacked:
            name = str(routes.provenance.attack)
            try:
                attacks[name] = parse_attack(name)
            except UserError:  # an attack of the user's own code: its trace is shown, and nothing is measured
                continue
        asked = list(self.measuring.attacks)
        if not asked and not run.attacked:
            used = run.settings.get("attacks")
            asked = [used[0] if isinstance(used, list) and used and isinstance(used[0], str) else _ATTACK]
        traced = set(map(str, attacks.values()))
        for text in asked:
            attack = parse_attack(text, seed=self.run.seed)
            if str(attack) not in traced:
                attacks[str(attack)] = attack
        return attacks


@dataclass(frozen=True, eq=False)
class _Source:
    """A run's network, and some of its images.

    Attributes:
        network: On its device.
        images: Those that are measured.
        rows: Which samples of the run's traces they are; None where they are none of them.
    """

    network: nn.Module
    images: ImageData
    rows: Sequence[int] | None

    @classmethod
    def open(cls, run: RunFolder, request: _Request, images_of: RunFolder | None = None) -> _Source:
        """Load them from where the run's files or the user say.

        Args:
            run: The run of the network.
            request: What the user says.
            images_of: The run whose images to take; None for the same run.

        Raises:
            UserError: Neither names them, or they are not those of the run.
        """
        from torch.utils.data import Subset

        from attackroute.core.model_state import weights_digest
        from attackroute.report.route_view import spread
        from attackroute.zoo.data import load_data
        from attackroute.zoo.weights import find_card

        chosen, measuring = request.network, request.measuring
        terms, terms_of_images = run.settings, (run if images_of is None else images_of).settings
        model = chosen.model or (None if run.model is None else str(run.model)) or terms.get("model")
        if not isinstance(model, str):
            raise UserError("the run does not name its network; give --model")
        if chosen.model is None and _calls_code(model):
            raise UserError(f"the run's network {model} is code to be called; give --model to call it")
        data = measuring.data or terms_of_images.get("data")
        if not isinstance(data, str):
            raise UserError("the run does not name its images; give --data")
        device = resolve_device(request.run.device)
        card = find_card(model)
        images = load_data(
            data,
            split=measuring.split or ("train" if terms_of_images.get("split") == "train" else "test"),  # type: ignore[arg-type]
            image_size=_side(terms_of_images) if card is None else card[1].spec.image_size,
            samples=_count(terms_of_images.get("samples")),
            seed=_count(terms_of_images.get("seed")) or 0,
        )
        rows = spread(len(images), measuring.samples)
        measured = replace(images, dataset=Subset(images.dataset, rows))
        network = NetworkOptions(
            model=model, weights=chosen.weights, model_width=chosen.model_width, classes=chosen.classes
        ).open(images).to(device)  # fmt: skip
        if terms.get("dtype") == "float64":
            network = network.double()
        traced = terms.get("weights")
        if chosen.model is None and isinstance(traced, str) and traced != weights_digest(network):
            raise UserError(
                f"{model} has other weights than the run was made with; give --model to take them all the same"
            )
        routes = run.routes if run.routes is not None else next(iter(run.attacked), None)
        return cls(network, measured, rows if _are_samples(measured, len(images), rows, routes) else None)

    def measure(self, run: RunFolder, attacks: Mapping[str, Perturbation], request: _Request) -> Measured:
        """Influence, gradients and sensitivities, and the traces that the run lacks.

        Raises:
            UserError: Linear maps are asked for as layers, and the run was traced without them.
        """
        from attackroute.report.measuring import measure, unmeasured
        from attackroute.report.route_view import Limits
        from attackroute.zoo.data import ImageBatches

        linear = request.linear
        if run.settings.get("linear") is True:
            linear = True
        elif linear and run.routes is not None:
            raise UserError("the run was traced without --linear; trace it with --linear, or leave it out here")
        with request.run.output.progress("images") as progress:
            return measure(
                self.network,
                ImageBatches(self.images, request.run.batch_size),
                unmeasured(run.routes, run.attacked, run.route),
                attacks,
                rows=self.rows,
                linear=linear,
                width=_WIDTH if run.routes is None else run.routes.width,
                shown=Limits().samples,
                progress=progress,
            )


def _are_samples(measured: ImageData, count: int, rows: Sequence[int], routes: InstanceRoutes | None) -> bool:
    """Whether the images are samples of the trace, as far as can be told: as many in all, and the same labels."""
    from attackroute.zoo.data import ImageBatches

    if routes is None or routes.labels is None or len(routes) != count:
        return False
    labels = [label for _, label in ImageBatches(measured, 1)]
    return all(int(label) == int(routes.labels[row]) for label, row in zip(labels, rows, strict=True))


def _count(value: object) -> int | None:
    """A number above zero from a file; None for anything else."""
    return value if isinstance(value, int) and value > 0 else None


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


# What a reader must know


def _remarks(measured: Measured) -> list[str]:
    """What a reader of the drawing must know."""
    notes = []
    traced = [item for item in measured.conditions if item.traced and item.routes is not None]
    if traced and traced[0].routes is not None:
        names = ", ".join(item.name for item in traced)
        notes.append(f"The run has no trace of {names}: {len(traced[0].routes)} images were traced for this page.")
    influences = [item.influence for item in measured.conditions if item.influence is not None]
    if influences:
        first = influences[0]
        left = f"; {len(first.unmeasured)} edges without a closed form were left out" if first.unmeasured else ""
        notes.append(f"Influence, gradient and sensitivity are means over {first.samples} images of each kind{left}.")
    if not measured.attacked:
        notes.append("There is no trace of attacked samples; attackroute trace --attack makes one.")
    clean = measured.clean
    if clean.routes is not None and not clean.routes.methods and clean.influence is None:
        notes.append("The routes do not say how layers are joined.")
    if measured.pictures is None and clean.routes is not None:
        notes.append("Without the network and its images there are no pictures of what channels respond to.")
    elif all(item.rows is None for item in measured.conditions):
        notes.append("The images are not those of the traces, so samples have no pictures.")
    return notes


# Two runs


def _comparison(runs: tuple[RunFolder, RunFolder], requests: Sequence[_Request], output: Output) -> Comparison:
    """Both runs on the same images: by their own traces where these are of the same samples, else by new ones."""
    from attackroute.report.measuring import unmeasured
    from attackroute.report.page import Content
    from attackroute.report.two_runs import Comparison, comparable_notes, told_apart

    first, second = runs
    comparable = _comparable(first, second)
    if comparable:
        attacks_of_both = {routes.provenance.attack for routes in first.attacked}
        attacks_of_both &= {routes.provenance.attack for routes in second.attacked}
        first, second = (_with_attacks(run, attacks_of_both) for run in runs)
    else:
        first, second = (replace(run, routes=None, attacked=(), route=None) for run in runs)
    names_images = requests[0].measuring.data is not None or isinstance(first.settings.get("data"), str)
    images_of = first if names_images else second
    attacks = requests[0].attacks(first)
    notes: list[str] = []
    measured: list[Measured] = []
    classes: tuple[str, ...] = ()
    started = time.perf_counter()
    for run, request in zip((first, second), requests, strict=True):
        try:
            source = _Source.open(run, request, images_of)
            classes = classes or source.images.classes
            measured.append(source.measure(run, attacks, request))
        except UserError as error:
            if not comparable:
                raise UserError(
                    f"{run.path}: {error} (the runs hold no traces of the same images to compare)"
                ) from None
            if request.names_anything:
                raise
            notes.append(f"Nothing was measured on the network of {run.path.name}: {error}.")
            output.note(f"note: {notes[-1]}")
            measured.append(unmeasured(run.routes, run.attacked, run.route))
    seconds = time.perf_counter() - started
    one, other = (
        Content(run, each, classes, (), command_line(), seconds)
        for run, each in zip((first, second), measured, strict=True)
    )
    clean = one.measured.clean.routes
    compared = [item.attack for item in one.measured.attacked if item.attack is not None]
    notes = [*comparable_notes(0 if clean is None else len(clean), compared, traced=not comparable), *notes]
    return Comparison(one, other, told_apart(one.name, other.name), notes)


def _comparable(first: RunFolder, second: RunFolder) -> bool:
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
