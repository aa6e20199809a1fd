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
    from attackroute.report.two_runs import RunComparison
    from attackroute.robustness.attack import Perturbation
    from attackroute.routes.instance_routes import InstanceRoutes
    from attackroute.zoo.data import ImageData


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
class ReportedNetwork(NetworkOptions):
    """The network of a run; without a name, that which its files say."""

    model: str = option("--model", "The network of the run; else as its files say.", str, "MODEL", default="")


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
    run: RunOptions = shared(hide=("workers", "overwrite"))

    @property
    def names_anything(self) -> bool:
        """Whether the user named what to measure."""
        return bool(self.network.model or self.network.weights or self.measuring.data or self.measuring.attacks)


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
    model_a: str = option("--model-a", "The network of RUN_A.", str, "MODEL", default="")
    model_b: str = option("--model-b", "The network of RUN_B.", str, "MODEL", default="")
    weights_a: Path | None = option("--weights-a", "Weights of RUN_A's network.", Path, "FILE", default=None)
    weights_b: Path | None = option("--weights-b", "Weights of RUN_B's network.", Path, "FILE", default=None)
    model_width: float | None = model_width_option()
    classes: int | None = classes_option()
    measuring: MeasuringOptions
    run: RunOptions = shared(hide=("workers", "overwrite"))

    @property
    def reports(self) -> tuple[ReportOptions, ReportOptions]:
        """What is said of each run, as for a page of its own."""
        named = (self.first, self.model_a, self.weights_a), (self.second, self.model_b, self.weights_b)
        one, other = (
            ReportOptions(
                folder=folder,
                network=ReportedNetwork(
                    model=model, weights=weights, model_width=self.model_width, classes=self.classes
                ),
                measuring=self.measuring,
                run=self.run,
            )
            for folder, model, weights in named
        )
        return one, other


def report(options: ReportOptions) -> None:
    """Write the page of a run."""
    from attackroute.report.page import Content, build_page, require_page
    from attackroute.report.run_folder import RunFolder

    output = options.run.output
    target = options.out or options.folder / "report.html"
    require_page(target)
    run = RunFolder.open(options.folder)
    started = time.perf_counter()
    measured, classes, notes = _measured_or_not(options, run, "Influence between channels was not measured")
    seconds = time.perf_counter() - started
    notes += _remarks(measured)
    page = build_page(Content(run, measured, classes, notes, command=command_line(), seconds=seconds))
    written = _write(page, target, output)
    for note in notes:
        output.line(f"  {note}")
    output.result({**written, "missing": notes, **page.data})


def compare(options: CompareOptions) -> None:
    """Write the page of two runs."""
    from attackroute.report.page import require_page
    from attackroute.report.two_runs import build_comparison

    output = options.run.output
    target = options.out or options.second / "compare.html"
    require_page(target)
    comparison = _comparison(*options.reports)
    page = build_comparison(comparison)
    written = _write(page, target, output)
    output.table(
        ["", *comparison.names, "change"],
        [[row["number"], *(f"{value:.4g}" for value in row["values"]), _change(row)]
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


def _change(row: Mapping[str, Any]) -> str:
    if row["change"] is None:
        return ""
    return f"{row['change']:+.1f} points" if row["kind"] == "points" else f"x {row['change']:.3g}"


# The network and the images behind a run's files


def _attacks(options: ReportOptions, run: RunFolder) -> dict[str, Perturbation]:
    """Attacks by the names that the run's traces bear: those traced and those asked for, or else the usual one."""
    from attackroute.robustness.registry import parse_attack

    attacks: dict[str, Perturbation] = {}
    for routes in run.attacked:
        name = str(routes.provenance.attack)
        try:
            attacks[name] = parse_attack(name)
        except UserError:  # an attack of the user's own code: its trace is shown, and nothing is measured
            continue
    asked = list(options.measuring.attacks)
    if not asked and not run.attacked:
        used = run.settings.get("attacks")
        asked = [used[0] if isinstance(used, list) and used and isinstance(used[0], str) else _ATTACK]
    traced = set(map(str, attacks.values()))
    for text in asked:
        attack = parse_attack(text, seed=options.run.seed)
        if str(attack) not in traced:
            attacks[str(attack)] = attack
    return attacks


def _measured_or_not(
    options: ReportOptions, run: RunFolder, otherwise: str | None, attacks: Mapping[str, Perturbation] | None = None,
    images_of: RunFolder | None = None,
) -> tuple[Measured, tuple[str, ...], list[str]]:  # fmt: skip
    """What is measured of a run, the classes of its images, and notes.

    Args:
        options: What the user says, which goes before what the files say.
        run: The run of the network.
        otherwise: Begins the note on why nothing was measured, where the user named nothing; None raises the error.
        attacks: On the images; None for those of the run.
        images_of: The run whose images to take; None for the same run.

    Raises:
        UserError: Network or images are named nowhere, are not those of the run, or do not fit.
    """
    from attackroute.report.measuring import unmeasured

    classes: tuple[str, ...] = ()
    try:
        network, images = _opened(options, run, images_of or run)
        classes = images.classes
        measured = _measured(options, run, network, images, _attacks(options, run) if attacks is None else attacks)
    except UserError as error:
        if otherwise is None or options.names_anything:
            raise
        note = f"{otherwise}: {error}."
        options.run.output.note(f"note: {note}")
        return unmeasured(run.routes, run.attacked, run.route), classes, [note]
    return measured, classes, []


def _measured(
    options: ReportOptions, run: RunFolder, network: nn.Module, images: ImageData, attacks: Mapping[str, Perturbation]
) -> Measured:
    """Influence, gradients and sensitivities on some of the images, and the traces that the run lacks."""
    from torch.utils.data import Subset

    from attackroute.report.measuring import measure, unmeasured
    from attackroute.report.route_view import Limits, spread
    from attackroute.zoo.data import ImageBatches

    linear = options.linear
    if run.settings.get("linear") is True:
        linear = True
    elif linear and run.routes is not None:
        raise UserError("the run was traced without --linear; trace it with --linear, or leave it out here")
    rows = spread(len(images), options.measuring.samples)
    chosen = replace(images, dataset=Subset(images.dataset, rows))
    traced = run.routes if run.routes is not None else next(iter(run.attacked), None)
    with options.run.output.progress("images") as progress:
        return measure(
            network,
            ImageBatches(chosen, options.run.batch_size),
            unmeasured(run.routes, run.attacked, run.route),
            attacks,
            rows=rows if _are_samples(chosen, len(images), rows, traced) else None,
            linear=linear,
            width=_WIDTH if run.routes is None else run.routes.width,
            shown=Limits().samples,
            progress=progress,
        )


def _opened(options: ReportOptions, run: RunFolder, images_of: RunFolder) -> tuple[nn.Module, ImageData]:
    """The run's network on its device, and all the images."""
    from attackroute.core.model_state import weights_digest
    from attackroute.zoo.weights import ModelCard, is_factory, kept_weights

    model = _model(options, run)
    images = _images(options, model, images_of.settings)
    weights = options.network.weights
    if weights is None and run.model is not None and is_factory(model) and ModelCard.load(run.model).spec.name == model:
        weights = kept_weights(run.model)  # the run's own network, which the user allows to be called
    network = replace(options.network, model=model, weights=weights).open(images)
    network = network.to(resolve_device(options.run.device))
    if run.settings.get("dtype") == "float64":
        network = network.double()
    traced = run.settings.get("weights")
    if not options.network.model and isinstance(traced, str) and traced != weights_digest(network):
        raise UserError(f"{model} has other weights than the run was made with; give --model to take them all the same")
    return network, images


def _model(options: ReportOptions, run: RunFolder) -> str:
    """The network's name; a file that came by mail must not choose code to be called."""
    from attackroute.zoo.weights import is_factory

    if options.network.model:
        return options.network.model
    model = run.settings.get("model") if run.model is None else str(run.model)
    if not isinstance(model, str):
        raise UserError("the run does not name its network; give --model")
    if is_factory(model) and not Path(model).is_dir():
        raise UserError(f"the run's network {model} is code to be called; give --model to call it")
    return model


def _images(options: ReportOptions, model: str, settings: Mapping[str, Any]) -> ImageData:
    """The images that the user names, or else a run's settings."""
    from attackroute.zoo.data import load_data
    from attackroute.zoo.weights import find_card

    data = options.measuring.data or settings.get("data")
    if not isinstance(data, str):
        raise UserError("the run does not name its images; give --data")
    card = find_card(model)
    return load_data(
        data,
        split=options.measuring.split or ("train" if settings.get("split") == "train" else "test"),  # type: ignore[arg-type]
        image_size=_side(settings) if card is None else card[1].spec.image_size,
        samples=_count(settings.get("samples")),
        seed=_count(settings.get("seed")) or 0,
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


def _side(settings: Mapping[str, Any]) -> int | None:
    """Height of the traced images, where they are square."""
    shape = settings.get("images")
    if isinstance(shape, list) and len(shape) == 4 and shape[2] == shape[3] and isinstance(shape[2], int):
        return shape[2]
    return None


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


def _comparison(*options: ReportOptions) -> RunComparison:
    """Both runs on the same images: by their own traces where these are of the same samples, else by new ones."""
    from attackroute.report.page import Content
    from attackroute.report.run_folder import RunFolder
    from attackroute.report.two_runs import RunComparison, comparable_notes, told_apart

    runs = [RunFolder.open(each.folder) for each in options]
    comparable = _comparable(*runs)
    if comparable:
        of_first, of_second = ({routes.provenance.attack for routes in run.attacked} for run in runs)
        shared = of_first & of_second
        runs = [
            replace(run, attacked=tuple(each for each in run.attacked if each.provenance.attack in shared))
            for run in runs
        ]
    else:
        runs = [replace(run, routes=None, attacked=(), route=None) for run in runs]
    names_images = options[0].measuring.data is not None or isinstance(runs[0].settings.get("data"), str)
    images_of = runs[0 if names_images else 1]
    attacks = _attacks(options[0], runs[0])
    notes: list[str] = []
    measured: list[Measured] = []
    classes: tuple[str, ...] = ()
    started = time.perf_counter()
    for run, each in zip(runs, options, strict=True):
        otherwise = f"Nothing was measured on the network of {run.path.name}" if comparable else None
        try:
            of_run, classes_of_run, missing = _measured_or_not(each, run, otherwise, attacks, images_of)
        except UserError as error:
            if comparable:
                raise
            raise UserError(f"{run.path}: {error} (the runs hold no traces of the same images to compare)") from None
        measured.append(of_run)
        classes = classes or classes_of_run
        notes += missing
    seconds = time.perf_counter() - started
    one, other = (
        Content(run, of_run, classes, command=command_line(), seconds=seconds)
        for run, of_run in zip(runs, measured, strict=True)
    )
    clean = one.measured.clean.routes
    compared = [item.attack for item in one.measured.attacked if item.attack is not None]
    notes = [*comparable_notes(0 if clean is None else len(clean), compared, traced=not comparable), *notes]
    return RunComparison(one, other, told_apart(one.name, other.name), notes)


def _comparable(first: RunFolder, second: RunFolder) -> bool:
    """Whether both runs hold traces of the same samples at the same width."""
    from attackroute.report.measuring import same_samples

    ours, theirs = first.routes, second.routes
    return ours is not None and theirs is not None and same_samples(ours, theirs) and ours.width == theirs.width
