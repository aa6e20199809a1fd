"""What an experiment is, how it is found and run; each is one file in `analysis/experiments`, which nothing else names.

The command's help, the files, the figures and the report's sections all follow from what the file declares with
:func:`experiment` and gives as an :class:`ExperimentResult`; docs/architecture.md has an example.
"""

from __future__ import annotations

import pkgutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import partial
from importlib import import_module
from operator import mul
from typing import Any, ClassVar, NamedTuple

from attackroute.analysis.controls import ROUTE
from attackroute.analysis.figures.style import Figure, save_figure
from attackroute.analysis.study import Study
from attackroute.core.distributed import current, leading
from attackroute.core.document import Document
from attackroute.core.errors import UserError, require_known
from attackroute.core.files import made_folder
from attackroute.core.table import Table, plain
from attackroute.tracing.trace import Progress

_WORTH_SAYING = 60  # seconds
_FOLDER = "attackroute.analysis.experiments"


@dataclass(frozen=True, kw_only=True)
class ExperimentResult(ABC):
    """What an experiment found: a table, a sentence about it, and what all its rows have in common.

    Attributes:
        kind: What was measured; the name of the document.
        table: The measurements.
    """

    kind: ClassVar[str]
    table: Table

    @abstractmethod
    def reading(self) -> str:
        """One sentence that says what came out."""

    def about(self) -> dict[str, Any]:
        """What all rows have in common, and the verdicts, as plain values: here the attributes beside the table."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "table"}

    def document(self, settings: Mapping[str, Any], **about: Any) -> Document:
        """The result as a document, with what else there is to say about it, such as the seconds that it took."""
        return Document(self.kind, settings, self.reading(), table=self.table, about={**about, **self.about()})

    @property
    def layers(self) -> tuple[str, ...]:
        """The table's layers, in forward order."""
        return tuple(self.table.distinct("layer"))

    @property
    def criteria(self) -> tuple[str, ...]:
        """What chose the table's channels, in the order in which it was measured: the route first."""
        return tuple(self.table.distinct("criterion"))

    @abstractmethod
    def figures(self) -> Mapping[str, Figure]:
        """Pictures of the table by file name, the one to look at first in front."""


class Work(NamedTuple):
    """About what an experiment does to each image that is measured, to tell how long it takes."""

    attacks: int = 0  # rounds of all attacks
    passes: int = 0  # forward passes for each layer and set of channels
    traces: int = 0  # for each attack
    held: int = 0  # rounds of all attacks for each layer and set of channels


_UNKNOWN = Work()
Run = Callable[[Study, Progress], ExperimentResult]


@dataclass(frozen=True)
class Experiment:
    """One experiment on a study."""

    name: str  # on the command line, and of its files
    order: int  # its place among the others
    title: str  # of its section in the report
    run: Run  # measures it on a study, and calls ``progress(done, in all or None)`` meanwhile
    work: Work = _UNKNOWN

    @property
    def help(self) -> str:
        """What it measures, for the command's help."""
        return (self.run.__doc__ or "").partition("\n")[0]

    def carry_out(self, study: Study) -> tuple[ExperimentResult, Document]:
        """Run it and write its files, the document last, so that where it is, all is there."""
        started = time.perf_counter()
        with study.progress(f"images, {self.name}") as progress:
            result = self.run(study, progress)
        writes = study.folder is not None and leading()
        figures = result.figures() if writes else {}
        about = {"title": self.title, "order": self.order, "seconds": time.perf_counter() - started}
        document = result.document(study.all_settings, **about, figures=list(figures))
        if study.folder is not None and writes:
            for name, figure in figures.items():
                save_figure(figure, study.folder, name)
            document.save(study.folder, self.name)
        return result, document

    def finished(self, study: Study) -> Document | None:
        """What it left in the study's folder, if it was run on the same settings."""
        if study.folder is None:
            return None
        try:
            document = Document.load(study.folder / f"{self.name}.json")
        except UserError:  # not there, damaged, or another file
            return None
        return document if document.settings == plain(study.all_settings) else None


_registered: dict[str, Experiment] = {}


def experiment(name: str, *, order: int, title: str, work: Work = _UNKNOWN) -> Callable[[Run], Run]:
    """Register a function as an experiment; see :class:`Experiment`."""

    def register(run: Run) -> Run:
        _registered[name] = Experiment(name, order=order, title=title, run=run, work=work)
        return run

    return register


def all_experiments() -> dict[str, Experiment]:
    """All experiments by name, in order."""
    for module in pkgutil.iter_modules(import_module(_FOLDER).__path__):
        import_module(f"{_FOLDER}.{module.name}")
    return {each.name: each for each in sorted(_registered.values(), key=lambda each: each.order)}


def chosen_experiments(names: Sequence[str] | None) -> list[Experiment]:
    """Some experiments, in order; where ``names`` is None, all that do not attack anew for each set of channels."""
    experiments = all_experiments()
    for name in names or ():
        require_known("experiment", name, experiments)
    return [each for each in experiments.values() if (not each.work.held if names is None else each.name in names)]


def analyze(
    study: Study,
    experiments: Sequence[str] | None = None,
    *,
    resume: bool = False,
    done: Callable[[Document, ExperimentResult | None], None] | None = None,
) -> dict[str, Document]:
    """What a network's critical attacking route is worth, in the experiments of the paper's section 4.

    Half of the images decide on routes and ranks, the others are measured. Controls of the route's size stand beside
    it everywhere: random channels off the route, and the channels that other criteria rank first.

    Args:
        study: The network, its images and the settings; ``study.folder``, made if need be, takes tables, figures and
            the route.
        experiments: Names of experiments; None for all but ``"hold"``, which takes longer than the others together.
        resume: Leave out experiments that the folder holds already, on the same settings.
        done: Called after each with its document, and its result if it was run now.

    Returns:
        The documents by experiment: a table each, its sentence and its verdicts.

    Raises:
        UserError: A name is unknown, an input does not fit the model, or files cannot be written.
    """
    chosen = chosen_experiments(experiments)
    if study.folder is not None:
        made_folder(study.folder)
    if not resume and study.layers is not None:  # so that a wrong layer is named before anything has run
        study.routes[ROUTE].aggregate(study.share).restrict(study.layers)
    finished = {each.name: current().first(partial(each.finished, study)) if resume else None for each in chosen}
    _announce(study, [each for each in chosen if finished[each.name] is None])
    documents: dict[str, Document] = {}
    for each in chosen:
        document, result = finished[each.name], None
        if document is None:
            try:
                result, document = each.carry_out(study)
            except KeyboardInterrupt:
                kept = ", ".join(documents) or "none yet"
                study.note(f"interrupted in {each.name}; finished experiments are kept ({kept}): resume to go on")
                raise
        documents[each.name] = document
        if done is not None:
            done(document, result)
    return documents


def _announce(study: Study, experiments: Sequence[Experiment]) -> None:
    """Say about how long experiments will take, where that is more than a minute."""
    if not experiments:
        return
    images = len(study.halves[1]) / current().count
    works = {"routes and controls": Work(2, traces=1), **{each.name: each.work for each in experiments}}
    parts = {name: sum(map(mul, work, study.unit_seconds)) for name, work in works.items()}
    if (total := images * sum(parts.values())) >= _WORTH_SAYING:
        times = ", ".join(f"{name} {timedelta(seconds=round(images * each))}" for name, each in parts.items())
        study.note(f"note: it takes about {timedelta(seconds=round(total))}, by a try on a few images: {times}")
