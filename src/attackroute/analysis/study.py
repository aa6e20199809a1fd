"""A study of one network: images in two halves, what all experiments share, and running them with or without files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attackroute.analysis.controls import ROUTE, Comparison, sample_routes
from attackroute.analysis.criteria import ChannelScores, MixedChannelsError, channel_scores
from attackroute.analysis.experiment import Experiment, ExperimentResult, chosen_experiments
from attackroute.analysis.sites import check_site
from attackroute.core import __version__
from attackroute.core.distributed import current, leading
from attackroute.core.document import Document
from attackroute.core.errors import UserError
from attackroute.core.layers import OUTPUT
from attackroute.core.model_state import frozen, placement, weights_digest
from attackroute.core.table import plain
from attackroute.robustness.attack import Perturbation
from attackroute.robustness.registry import parse_attack
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route
from attackroute.tracing.config import UNIT, TraceConfig
from attackroute.tracing.trace import Progress, trace_routes

if TYPE_CHECKING:
    from attackroute.zoo.data import ImageBatches, ImageData

BASELINES = ("activation", "weight", "gradient", "sensitivity", "attribution")
_UNDER_ATTACK = ("sensitivity", "attribution")
SAMPLE_WIDTH = 0.2
"""Share of each layer's channels on a sample's route, as the paper has it."""

_SHOWN = 4


def _silent(_: str) -> None:
    """Say nothing."""


@contextmanager
def _unseen(_: str) -> Iterator[Progress]:
    """Show no progress."""
    yield lambda done, total: None


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """A network, images in two halves, and everything that experiments share, made when it is first asked for.

    Attributes:
        model: The network on its device.
        images: The images; half of them, drawn by the seed, decide on routes and ranks, the others are measured.
        attacks: Attacks by name; shares grow for the first, which baselines and routes that follow noise take too.
        config: How routes are traced.
        layers: Names of layers; None for all.
        share: Share of each layer's channels on the route.
        at: Where channels are changed: the layers' ``"output"``, or after their ``"activation"``.
        draws: Number of random controls.
        batch_size: Images at a time.
        workers: Processes that read images, for each that computes.
        seed: Of the halves.
        folder: Where results, figures and the route go; None writes nothing.
        settings: What else the results depend on, such as the names of model and data.
        note: Called with what there is to say in passing.
        progress: Called with a unit, such as ``"images traced"``; gives a context whose value is called with what is
            done, and of how much.
    """

    model: nn.Module
    images: ImageData
    attacks: Mapping[str, Perturbation]
    config: TraceConfig = field(default_factory=TraceConfig)
    layers: Sequence[str] | None = None
    share: float = 0.3
    at: str = OUTPUT
    draws: int = 5
    batch_size: int = 128
    workers: int = 0
    seed: int = 0
    folder: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: Callable[[str], None] = _silent
    progress: Callable[[str], AbstractContextManager[Progress]] = _unseen

    def __post_init__(self) -> None:
        if not self.attacks:
            raise UserError("no attack is given: pass one by name, such as pgd")
        check_site(self.at)
        self.config.check_attack(self.attack)

    @property
    def attack(self) -> Perturbation:
        """The first attack."""
        return next(iter(self.attacks.values()))

    @property
    def seeds(self) -> range:
        """Seeds of the random controls."""
        return range(self.draws)

    @cached_property
    def halves(self) -> tuple[list[int], list[int]]:
        """Indices of the images that decide on routes and ranks, and of those that are measured."""
        count = len(self.images)
        if count < 2:
            raise UserError("one image is too few: half of the images decide on the route, the others are measured")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        return sorted(order[: count // 2]), sorted(order[count // 2 :])

    @property
    def reference(self) -> ImageBatches:
        """The images that decide on routes and ranks."""
        return self._batches(self.halves[0])

    @property
    def measured(self) -> ImageBatches:
        """The images that are measured."""
        return self._batches(self.halves[1])

    def _batches(self, indices: Sequence[int]) -> ImageBatches:
        from attackroute.zoo.data import ImageBatches

        size = self.batch_size
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        return ImageBatches(self.images, size, batches=batches, workers=self.workers)

    @cached_property
    def routes(self) -> dict[str, InstanceRoutes]:
        """Routes of the reference images by criterion; where routes follow noise, that of the first attack."""
        return self.sample_routes(
            self.reference, self.config, attack=self.attack if self.config.follows_noise else None
        )

    @cached_property
    def all_routes(self) -> dict[str, InstanceRoutes]:
        """Routes by influence of all images, those that are measured too, by criterion."""
        return self.sample_routes(self._batches(range(len(self.images))), self.plain_config)

    @property
    def plain_config(self) -> TraceConfig:
        """How routes by influence are traced, whatever the study's follow."""
        return replace(self.config, carrier=UNIT)

    def sample_routes(
        self, data: ImageBatches, config: TraceConfig, *, attack: Perturbation | None = None
    ) -> dict[str, InstanceRoutes]:
        """As :func:`attackroute.analysis.controls.sample_routes`, at the paper's width."""
        with self.progress("images traced") as progress:
            return sample_routes(self.model, data, SAMPLE_WIDTH, attack=attack, config=config, progress=progress)

    @cached_property
    def attacked_route(self) -> Route:
        """The model's route by influence under the first attack."""
        with self.progress("attacked images traced") as progress:
            routes = trace_routes(
                self.model,
                self.reference,
                SAMPLE_WIDTH,
                attack=self.attack,
                config=self.plain_config,
                progress=progress,
            )
        return routes.aggregate(self.share)

    @cached_property
    def route(self) -> Route:
        """The model's route, on the layers to study."""
        route = self.routes[ROUTE].aggregate(self.share)
        if self.layers is not None:
            route = route.restrict(self.layers)
        if self.folder is not None and leading():
            route.save(self.folder / "route.json")
        return route

    @cached_property
    def baselines(self) -> dict[str, ChannelScores]:
        """Channels ranked by other criteria on the reference images; attacks on them are the first one.

        The criterion of weights is left out, with a note, where the network mixes channels between two layers.
        """
        scores = {}
        for by in BASELINES:
            with self.progress(f"images ranked by {by}") as progress:
                attack = self.attack if by in _UNDER_ATTACK else None
                try:
                    scores[by] = channel_scores(
                        self.model, self.reference, by, attack=attack, linear=self.config.linear, progress=progress
                    )
                except MixedChannelsError as error:
                    self.note(f"note: no control by {by}: {error}")
        return scores

    def comparison(self, progress: Progress) -> Comparison:
        """The route beside random channels and baselines, on the images that are measured."""
        return Comparison(
            model=self.model, data=self.measured, route=self.route, baselines=self.baselines, share=self.share,
            seeds=self.seeds, at=self.at, progress=progress,
        )  # fmt: skip

    def examples(self) -> tuple[Tensor, Tensor]:
        """A few images to measure that the network gets right, out of the first batch."""
        images, labels = next(iter(self.measured))
        device, dtype = placement(self.model)
        images, labels = images.to(device, dtype), labels.to(device)
        with frozen(self.model), torch.no_grad():
            right = (self.model(images).argmax(1) == labels).nonzero().flatten()
        if not len(right):  # then it is the experiment that has to say so
            right = torch.arange(1, device=images.device)
        spread = torch.linspace(0, len(right) - 1, min(_SHOWN, len(right))).long()  # images often come class by class
        chosen = right[spread.to(right.device)]
        return images[chosen], labels[chosen]

    @cached_property
    def pair(self) -> Tensor:
        """Two images on the network's device, to learn its shapes from."""
        images, _ = next(iter(self.reference))
        return images[:2].to(*placement(self.model))

    @cached_property
    def all_settings(self) -> dict[str, Any]:
        """All on which a result depends, as JSON values."""
        return {
            **self.settings,
            "version": __version__,
            "weights": weights_digest(self.model),
            "split": self.images.split,
            "images": [len(self.images), *self.images.shape],
            "seed": self.seed,
            "batch-size": self.batch_size,
            "layers": None if self.layers is None else list(self.layers),
            "linear": self.config.linear,
            "sketches": self.config.sketches,
            "sketch-seed": self.config.seed,
            "freeze-gates": self.config.freeze_gates,
            "carrier": self.config.carrier,
            "share": self.share,
            "at": self.at,
            "draws": self.draws,
            "attacks": [str(attack) for attack in self.attacks.values()],
        }

    def run(self, experiment: Experiment) -> tuple[ExperimentResult, Document]:
        """Run one experiment and write its files, the document last, so that where it is, all is there.

        Returns:
            The result, and its document.
        """
        started = time.perf_counter()
        with self.progress(f"images, {experiment.name}") as progress:
            result = experiment.run(self, progress)
        seconds = time.perf_counter() - started
        about = {"title": experiment.title, "order": experiment.order, "seconds": seconds}
        if self.folder is None or not leading():
            return result, result.document(self.all_settings, **about)
        from attackroute.analysis.figures.style import save_figure

        figures = result.figures()
        for name, figure in figures.items():
            save_figure(figure, self.folder, name)
        document = result.document(self.all_settings, **about, figures=list(figures))
        document.save(self.folder, experiment.name)
        return result, document

    def finished(self, experiment: Experiment) -> Document | None:
        """What the experiment left in the folder, if it was run on the same settings."""
        if self.folder is None:
            return None
        try:
            document = Document.load(self.folder / f"{experiment.name}.json")
        except UserError:  # not there, damaged, or another file
            return None
        return document if document.settings == plain(self.all_settings) else None

    def run_all(
        self,
        names: Sequence[str] | None = None,
        *,
        resume: bool = False,
        done: Callable[[Document, ExperimentResult | None], None] | None = None,
    ) -> dict[str, Document]:
        """Run experiments, one after another, in their order.

        Args:
            names: Of the experiments; None for all.
            resume: Take those that the folder holds already, on the same settings, from there.
            done: Called after each with its document, and its result if it was run now.

        Returns:
            The documents by experiment.

        Raises:
            UserError: There is no such experiment, a layer is not on the route, or an experiment says so.
        """
        experiments = chosen_experiments(names)
        if not resume and self.layers is not None:  # so that a wrong layer is named before anything has run
            self.routes[ROUTE].aggregate(self.share).restrict(self.layers)
        documents: dict[str, Document] = {}
        for each in experiments:
            before = current().first(lambda each=each: self.finished(each)) if resume else None  # type: ignore[misc]
            result = None
            if before is None:
                try:
                    result, before = self.run(each)
                except KeyboardInterrupt:
                    kept = ", ".join(documents) or "none yet"
                    self.note(f"interrupted in {each.name}; finished experiments are kept ({kept}): resume to go on")
                    raise
            documents[each.name] = before
            if done is not None:
                done(before, result)
        return documents


def analyze(
    model: nn.Module,
    data: ImageData,
    out: Path | str | None = None,
    experiments: Sequence[str] | None = None,
    *,
    attacks: Iterable[str | Perturbation] = ("pgd",),
    config: TraceConfig | None = None,
    layers: Sequence[str] | None = None,
    share: float = 0.3,
    at: str = OUTPUT,
    draws: int = 5,
    batch_size: int = 128,
    seed: int = 0,
    resume: bool = False,
) -> dict[str, Document]:
    """What a network's critical attacking route is worth, in the experiments of the paper's section 4.

    Half of the images decide on routes and ranks, the others are measured. Controls of the route's size stand beside
    it everywhere: random channels off the route, and the channels that other criteria rank first.

    Args:
        model: The network on its device.
        data: The images, from :func:`attackroute.load_data`.
        out: A folder for tables, figures and the route, made if need be; None writes nothing.
        experiments: Names of experiments; None for all.
        attacks: What attacks the images, by name, as in ``"pgd:eps=4/255"``; shares grow for the first.
        config: How routes are traced; None for the paper's way.
        layers: Names of layers; None for all.
        share: Share of each layer's channels on the route.
        at: Where channels are changed: the layers' ``"output"``, or after their ``"activation"``.
        draws: Number of random controls.
        batch_size: Images at a time.
        seed: Of the halves.
        resume: Leave out experiments that ``out`` holds already, on the same settings.

    Returns:
        The documents by experiment: a table each, its sentence and its verdicts.

    Raises:
        UserError: A name is unknown, an input does not fit the model, or files cannot be written.
    """
    named = {str(attack): parse_attack(attack) if isinstance(attack, str) else attack for attack in attacks}
    folder = None if out is None else Path(out)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made: {error.strerror}; choose another folder") from None
    study = Study(
        model=model, images=data, attacks=named, config=config or TraceConfig(), layers=layers, share=share, at=at,
        draws=draws, batch_size=batch_size, seed=seed, folder=folder,
    )  # fmt: skip
    return study.run_all(experiments, resume=resume)
