"""What an experiment is, and how it is found: each is one file in `analysis/experiments`, and nothing else names it.

The command's help, the files, the figures and the report's sections all follow from what the file declares::

    @experiment("mine", order=8, title="My section of the report", help="what it measures, in half a line")
    def run(study: Study, progress: Progress) -> Mine:
        ...

where ``Mine`` is an :class:`ExperimentResult`.
"""

from __future__ import annotations

import pkgutil
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from attackroute.core.document import Result
from attackroute.core.errors import UserError, did_you_mean
from attackroute.core.table import Table
from attackroute.tracing.trace import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attackroute.analysis.study import Study

_FOLDER = "attackroute.analysis.experiments"


class ExperimentResult(Result):
    """What an experiment found: a :class:`Result` that can be shown."""

    @abstractmethod
    def summary(self) -> Table:
        """The few numbers that are worth a look, as a small table of text."""

    @abstractmethod
    def figures(self) -> Mapping[str, Figure]:
        """Pictures of the table by file name, the one to look at first in front."""


@dataclass(frozen=True)
class Experiment:
    """One experiment on a study.

    Attributes:
        name: What it is called on the command line, and what its files are called.
        order: Its place among the others.
        title: Of its section in the report.
        help: What it measures, for the command's help.
        run: Measures it on a study, and calls ``progress(done, in all or None)`` meanwhile.
    """

    name: str
    order: int
    title: str
    help: str
    run: Callable[[Study, Progress], ExperimentResult]


_registered: dict[str, Experiment] = {}

Run = Callable[["Study", Progress], ExperimentResult]


def experiment(name: str, *, order: int, title: str, help: str) -> Callable[[Run], Run]:
    """Register a function as an experiment; see :class:`Experiment`."""

    def register(run: Run) -> Run:
        _registered[name] = Experiment(name, order, title, help, run)
        return run

    return register


def all_experiments() -> dict[str, Experiment]:
    """All experiments by name, in order."""
    for module in pkgutil.iter_modules(import_module(_FOLDER).__path__):
        import_module(f"{_FOLDER}.{module.name}")
    return {each.name: each for each in sorted(_registered.values(), key=lambda each: each.order)}


def chosen_experiments(names: Sequence[str] | None) -> list[Experiment]:
    """Some experiments, in order; all where ``names`` is None.

    Raises:
        UserError: There is none of some name.
    """
    experiments = all_experiments()
    for name in names or ():
        if name not in experiments:
            close, names_text = did_you_mean(name, experiments), ", ".join(experiments)
            raise UserError(f"unknown experiment {name!r}{close}; choose from {names_text}")
    return [each for each in experiments.values() if names is None or each.name in names]
