"""``attackroute report`` and ``compare``: a run, or two, as one HTML page that can be mailed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attackroute.cli.arguments import option, parse_path, shared
from attackroute.cli.console import Output
from attackroute.cli.options import FILES, ImageOptions, NetworkOptions, RunOptions, count, resolve_device
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
    samples: int = count(
        "--samples",
        "How many of the run's images, evenly apart, to measure influence, gradients and sensitivity on.",
        64,
    )
    attacks: tuple[str, ...] = option(
        "--attack", "What attacks the images, beside what the run has traced; repeat it for several. Without any, pgd.",
        str, "NAME", default=None, repeat=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Put a run into one HTML page: the route to explore, figures, tables and all numbers as JSON.

    The page needs no server and no connection, so that it can be mailed as it is. Network and images are those that the
    run's files name, unless others are given.
    """

    title: ClassVar[str] = FILES
    folder: Path = option("", "Folder of a trace, of the demo, or above them.", parse_path, "RUN_DIR")
    page: Path | None = option("--page", "The page; else report.html in RUN_DIR.", parse_path, "FILE", default=None)
    network: NetworkOptions = shared(model="")
    measuring: MeasuringOptions
    run: RunOptions = shared(hide=("workers", "overwrite"))


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Put two runs onto one HTML page: their routes over one another and side by side, and what changed.

    Says which channels left the route and which entered it, and how accuracies, occurrence, sensitivity and gradients
    differ.
    """

    title: ClassVar[str] = "The networks"
    first: Path = option("", "Folder of the one run, such as before hardening.", parse_path, "RUN_A", group=FILES)
    second: Path = option("", "Folder of the other, such as after it.", parse_path, "RUN_B", group=FILES)
    page: Path | None = option(
        "--page", "The page; else compare.html in RUN_B.", parse_path, "FILE", default=None, group=FILES
    )
    model_a: str = option("--model-a", "The network of RUN_A.", str, "MODEL", default="")
    model_b: str = option("--model-b", "The network of RUN_B.", str, "MODEL", default="")
    measuring: MeasuringOptions
    run: RunOptions = shared(hide=("workers", "overwrite"))

    def of(self, folder: Path, model: str) -> ReportOptions:
        """What is said of one run, as for a page of its own."""
        network = NetworkOptions(model=model)
        return ReportOptions(folder=folder, network=network, measuring=self.measuring, run=self.run)


def report(options: ReportOptions) -> None:
    """Write the page of a run."""
    from attackroute.report.page import Content, build_page, require_page
    from attackroute.report.run_folder import RunFolder

    output = options.run.output
    target = options.page or options.folder / "report.html"
    require_page(target)
    run = RunFolder.open(options.folder)
    measured, classes, notes = _measured_or_not(options, run, "Influence between channels was not measured")
    notes += _remarks(measured)
    page = build_page(Content(run, measured, classes, notes))
    written = _write(page, target, output)
    for note in notes:
        output.line(f"  {note}")
    output.result({**written, "missing": notes, **page.data})


def compare(options: CompareOptions) -> None:
    """Write the page of two runs."""
    from attackroute.report.page import require_page
    from attackroute.report.two_runs import build_comparison, difference_table

    output = options.run.output
    target = options.page or options.second / "compare.html"
    require_page(target)
    comparison = _comparison(options.of(options.first, options.model_a), options.of(options.second, options.model_b))
    page = build_comparison(comparison)
    written = _write(page, target, output)
    numbers = difference_table(page.data["differences"], comparison.names)
    output.table(numbers.columns, numbers.rows)
    for note in comparison.notes:
        output.line(f"  {note}")
    output.result({**written, **page.data})


def _write(page: Page, target: Path, output: Output) -> dict[str, Any]:
    from attackroute.core.files import replace_file

    encoded = page.html.encode()
    replace_file(target, encoded)
    output.line(f"{target}: {len(encoded) / 1e6:.2f} MB")
    return {"page": str(target), "bytes": len(encoded)}


# The network and the images behind a run's files


def _attacks(options: ReportOptions, run: RunFolder) -> dict[str, Perturbation]:
    """Attacks by the names that the run's traces bear: those traced and those asked for, or else the usual one."""
    from attackroute.robustness.registry import parse_attack

    attacks: dict[str, Perturbation] = {}
    for routes in run.attacked:
        with suppress(UserError):  # an attack of the user's own code: its trace is shown, and nothing is measured
            attacks[str(routes.provenance.attack)] = parse_attack(str(routes.provenance.attack))
    asked = list(options.measuring.attacks)
    if not asked and not run.attacked:
        asked = [_ATTACK]
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
    """What is measured of a run, on some of its own images or those of another run; the images' classes; and notes.

    Traces that the run lacks are made. Where it cannot be measured and the user named nothing, a note that begins with
    ``otherwise`` says why.
    """
    from torch.utils.data import Subset

    from attackroute.report.measuring import measure, unmeasured
    from attackroute.report.route_view import Limits, spread
    from attackroute.zoo.data import ImageBatches

    named = options.network
    classes: tuple[str, ...] = ()
    known = unmeasured(run.routes, run.attacked, run.route)
    try:
        network, images = _opened(options, run, images_of or run)
        classes = tuple(images.classes)
        rows = spread(len(images), options.measuring.samples)
        chosen = replace(images, dataset=Subset(images.dataset, rows))
        traced = run.routes if run.routes is not None else next(iter(run.attacked), None)
        with options.run.output.progress("images") as progress:
            measured = measure(
                network, ImageBatches(chosen, options.run.batch_size), known,
                _attacks(options, run) if attacks is None else attacks,
                rows=rows if _are_samples(chosen, len(images), rows, traced) else None,
                linear=run.settings.get("linear") is True, width=_WIDTH if run.routes is None else run.routes.width,
                shown=Limits().samples, progress=progress,
            )  # fmt: skip
    except UserError as error:
        if otherwise is None or named.model or named.weights or options.measuring.data or options.measuring.attacks:
            raise
        note = f"{otherwise}: {error}."
        options.run.output.note(f"note: {note}")
        return known, classes, [note]
    return measured, classes, []


def _opened(options: ReportOptions, run: RunFolder, images_of: RunFolder) -> tuple[nn.Module, ImageData]:
    """The run's network on its device, and all the images; a file that came by mail chooses no code to be called."""
    from attackroute.core.model_state import weights_digest
    from attackroute.zoo.weights import ModelCard, is_factory, kept_weights

    weights, model = options.network.weights, options.network.model
    if not model:
        model = str(run.settings.get("model") or "") if run.model is None else str(run.model)
        if not model:
            raise UserError("the run does not name its network; give --model")
        if is_factory(model) and not Path(model).is_dir():
            raise UserError(f"the run's network {model} is code to be called; give --model to call it")
    elif weights is None and run.model and is_factory(model) and ModelCard.load(run.model).spec.name == model:
        weights = kept_weights(run.model)  # the run's own network, which the user allows to be called
    images = _images(options, model, images_of.settings)
    network = replace(options.network, model=model, weights=weights).open(images)
    network = network.to(resolve_device(options.run.device))
    if run.settings.get("dtype") == "float64":
        network = network.double()
    traced = run.settings.get("weights")
    if not options.network.model and isinstance(traced, str) and traced != weights_digest(network):
        raise UserError(f"{model} has other weights than the run was made with; give --model to take them all the same")
    return network, images


def _images(options: ReportOptions, model: str, settings: Mapping[str, Any]) -> ImageData:
    """The images that the user names, or else a run's settings, as far as these make sense."""
    data, shape = options.measuring.data or settings.get("data"), settings.get("images")
    if not isinstance(data, str):
        raise UserError("the run does not name its images; give --data")
    _, channels, height, width = shape if isinstance(shape, list) and len(shape) == 4 else [None] * 4
    images = ImageOptions(
        data=data,
        split="train" if settings.get("split") == "train" else "test",
        samples=_count(settings.get("samples")),
        image_size=_count(height) if height == width else None,
        grey=channels == 1,
    )
    return images.open(replace(options.run, seed=_count(settings.get("seed")) or 0), [model])


def _count(value: object) -> int | None:
    """A number above zero from a file; None for anything else."""
    return value if isinstance(value, int) and value > 0 else None


def _are_samples(measured: ImageData, count: int, rows: Sequence[int], routes: InstanceRoutes | None) -> bool:
    """Whether the images are samples of the trace, as far as can be told: as many in all, and the same labels."""
    from attackroute.zoo.data import ImageBatches

    if routes is None or routes.labels is None or len(routes) != count:
        return False
    labels = [label for _, label in ImageBatches(measured, 1)]
    return all(int(label) == int(routes.labels[row]) for label, row in zip(labels, rows, strict=True))


def _remarks(measured: Measured) -> list[str]:
    """What a reader of the drawing must know."""
    notes = []
    traced = [item for item in measured.conditions if item.traced]
    if traced and traced[0].routes is not None:
        names = ", ".join(item.name for item in traced)
        notes.append(f"The run has no trace of {names}: {len(traced[0].routes)} images were traced for this page.")
    influences = [item.influence for item in measured.conditions if item.influence is not None]
    for first in influences[:1]:
        left = f"; {len(first.unmeasured)} edges without a closed form were left out" if first.unmeasured else ""
        notes.append(f"Influence, gradient and sensitivity are means over {first.samples} images of each kind{left}.")
    if not measured.attacked:
        notes.append("There is no trace of attacked samples; attackroute trace --attack makes one.")
    return notes


# Two runs


def _comparison(*options: ReportOptions) -> RunComparison:
    """Both runs on the same images: by their own traces where these are of the same samples, else by new ones."""
    from attackroute.report.measuring import same_samples
    from attackroute.report.page import Content
    from attackroute.report.run_folder import RunFolder
    from attackroute.report.two_runs import RunComparison, comparable_note

    runs = [RunFolder.open(each.folder) for each in options]
    ours, theirs = (run.routes for run in runs)
    comparable = same_samples(ours, theirs) and len({run.routes.width for run in runs if run.routes is not None}) == 1
    traced = [{routes.provenance.attack for routes in run.attacked} for run in runs]
    for place, run in enumerate(runs):
        kept = [each for each in run.attacked if comparable and each.provenance.attack in traced[0] & traced[1]]
        runs[place] = replace(run, attacked=tuple(kept))
        if not comparable:
            runs[place] = replace(runs[place], routes=None, route=None)
    names_images = options[0].measuring.data is not None or isinstance(runs[0].settings.get("data"), str)
    attacks = _attacks(options[0], runs[0])
    notes: list[str] = []
    contents: list[Content] = []
    for run, each in zip(runs, options, strict=True):
        otherwise = f"Nothing was measured on the network of {run.path.name}" if comparable else None
        try:
            measured, classes, missing = _measured_or_not(each, run, otherwise, attacks, runs[0 if names_images else 1])
        except UserError as error:
            if comparable:
                raise
            told = str(error).replace("give --model", f"give --model-{'a' if run is runs[0] else 'b'}")
            raise UserError(f"{run.path}: {told} (the runs hold no traces of the same images to compare)") from None
        contents.append(Content(run, measured, classes))
        notes += missing
    one, other = (replace(content, classes=contents[0].classes or contents[1].classes) for content in contents)
    names = (one.name, other.name) if one.name != other.name else (f"{one.name} (1)", f"{other.name} (2)")
    return RunComparison((one, other), names, [comparable_note(one.measured, traced=not comparable), *notes])
