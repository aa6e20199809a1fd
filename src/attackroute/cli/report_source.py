"""The network and the images behind a run's files, for ``attackroute report`` and ``compare``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Subset

from attackroute.cli import options
from attackroute.cli.console import Output
from attackroute.core.errors import UserError
from attackroute.core.model_state import weights_digest
from attackroute.report.measuring import Measured, measure, unmeasured
from attackroute.report.route_view import Limits, spread
from attackroute.report.run_folder import RunFolder
from attackroute.robustness.attack import Perturbation
from attackroute.robustness.registry import parse_attack
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.zoo.data import ImageBatches, ImageData
from attackroute.zoo.sources import load_data
from attackroute.zoo.weights import find_card, open_network

ATTACK = "pgd"  # where neither the run nor the user names one
_WIDTH = 0.2  # the paper's


@dataclass(frozen=True)
class Wanted:
    """What the user says beside the run's files; None where the files shall say it.

    Attributes:
        model: The network.
        weights: Its weights.
        width: Factor on a built-in network's channels.
        classes: Number of its outputs.
        data: The images.
        split: Which part of them.
        samples: How many to measure on.
        attacks: What attacks them.
        batch_size: Images at a time.
        seed: Of the attacks.
        device: Where the network runs.
        linear: Whether linear maps are layers of what is traced for the page; those of the run's traces are.
    """

    model: str | None
    weights: Path | None
    width: float | None
    classes: int | None
    data: str | None
    split: str | None
    samples: int
    attacks: Sequence[str]
    batch_size: int
    seed: int
    device: str
    linear: bool = False

    @property
    def is_anything(self) -> bool:
        """Whether the user named what to measure."""
        return any(item is not None for item in (self.model, self.weights, self.data)) or bool(self.attacks)


@dataclass(frozen=True, eq=False)
class Source:
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
    def open(cls, run: RunFolder, wanted: Wanted, images_of: RunFolder | None = None) -> Source:
        """Load them from where the run's files or the user say.

        Args:
            run: The run of the network.
            wanted: What the user says.
            images_of: The run whose images to take; None for the same run.

        Raises:
            UserError: Neither names them, or they are not those of the run.
        """
        settings, chosen_by = run.settings, (run if images_of is None else images_of).settings
        found = wanted.model or (None if run.model is None else str(run.model)) or settings.get("model")
        if not isinstance(found, str):
            raise UserError("the run does not name its network; give --model")
        if wanted.model is None and _calls_code(found):
            raise UserError(f"the run's network {found} is code to be called; give --model to call it")
        data = wanted.data or chosen_by.get("data")
        if not isinstance(data, str):
            raise UserError("the run does not name its images; give --data")
        home = options.resolve_device(wanted.device)
        card = find_card(found)
        images = load_data(
            data,
            split=wanted.split or ("train" if chosen_by.get("split") == "train" else "test"),  # type: ignore[arg-type]
            image_size=_side(chosen_by) if card is None else card[1].spec.image_size,
            samples=_count(chosen_by.get("samples")),
            seed=_count(chosen_by.get("seed")) or 0,
        )
        rows = spread(len(images), wanted.samples)
        chosen = replace(images, dataset=Subset(images.dataset, rows))
        network = open_network(found, images, weights=wanted.weights, width=wanted.width, classes=wanted.classes).to(
            home
        )
        if settings.get("dtype") == "float64":
            network = network.double()
        traced = settings.get("weights")
        if wanted.model is None and isinstance(traced, str) and traced != weights_digest(network):
            raise UserError(
                f"{found} has other weights than the run was made with; give --model to take them all the same"
            )
        routes = run.routes if run.routes is not None else next(iter(run.attacked), None)
        return cls(network, chosen, rows if _are_samples(chosen, len(images), rows, routes) else None)

    def measure(
        self,
        run: RunFolder,
        attacks: Mapping[str, Perturbation],
        batch_size: int,
        output: Output,
        *,
        linear: bool = False,
    ) -> Measured:
        """Influence, gradients and sensitivities, and the traces that the run lacks.

        Raises:
            UserError: ``linear`` is asked for, and the run was traced without it.
        """
        if run.settings.get("linear") is True:
            linear = True
        elif linear and run.routes is not None:
            raise UserError("the run was traced without --linear; trace it with --linear, or leave it out here")
        with output.progress("images") as progress:
            return measure(
                self.network,
                ImageBatches(self.images, batch_size),
                unmeasured(run.routes, run.attacked, run.route),
                attacks,
                rows=self.rows,
                linear=linear,
                width=_WIDTH if run.routes is None else run.routes.width,
                shown=Limits().samples,
                progress=progress,
            )


def chosen_attacks(run: RunFolder, wanted: Wanted) -> dict[str, Perturbation]:
    """Attacks by the names that the run's traces bear: those traced and those asked for, or else the usual one."""
    found: dict[str, Perturbation] = {}
    for routes in run.attacked:
        name = routes.provenance.attack
        try:
            found[str(name)] = parse_attack(str(name))
        except UserError:  # an attack of the user's own code: its trace is shown, and nothing is measured
            continue
    asked = list(wanted.attacks)
    if not asked and not run.attacked:
        used = run.settings.get("attacks")
        asked = [used[0] if isinstance(used, list) and used and isinstance(used[0], str) else ATTACK]
    known = set(map(str, found.values()))
    for text in asked:
        attack = parse_attack(text, seed=wanted.seed)
        if str(attack) not in known:
            found[str(attack)] = attack
    return found


def remarks(measured: Measured) -> list[str]:
    """What a reader of the drawing must know."""
    notes = []
    traced = [item for item in measured.conditions if item.traced and item.routes is not None]
    if traced and traced[0].routes is not None:
        names = ", ".join(item.name for item in traced)
        notes.append(f"The run has no trace of {names}: {len(traced[0].routes)} images were traced for this page.")
    measurements = [item for item in measured.conditions if item.influence is not None]
    if measurements:
        first = measurements[0].influence
        assert first is not None
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


def _are_samples(chosen: ImageData, count: int, rows: Sequence[int], routes: InstanceRoutes | None) -> bool:
    """Whether the images are samples of the trace, as far as can be told: as many in all, and the same labels."""
    if routes is None or routes.labels is None or len(routes) != count:
        return False
    labels = [label for _, label in ImageBatches(chosen, 1)]
    return all(int(label) == int(routes.labels[row]) for label, row in zip(labels, rows, strict=True))


def _count(value: object) -> int | None:
    """A number above zero from a file; None for anything else."""
    return value if isinstance(value, int) and value > 0 else None


def _calls_code(model: str) -> bool:
    """Whether it is a factory: a file that came by mail must not choose what runs."""
    source, colon, _ = model.partition(":")
    return bool(colon) and source not in ("torchvision", "timm") and not Path(model).is_dir()


def _side(settings: Mapping[str, Any]) -> int | None:
    """Height of the traced images, where they are square."""
    shape = settings.get("images")
    if isinstance(shape, list) and len(shape) == 4 and shape[2] == shape[3] and isinstance(shape[2], int):
        return shape[2]
    return None
