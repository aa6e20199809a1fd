"""A claim of the paper and a plain verdict by a stated rule; and the experiments' results that both are read from."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from attackroute.analysis.controls import OFF_ROUTE, RANDOM, ROUTE
from attackroute.analysis.intervention_table import UNTOUCHED
from attackroute.core.document import Document
from attackroute.core.table import Record, Table

HOLDS, PART, FAILS = "holds", "holds in part", "does not hold"
UNDECIDED, NOTHING = "undecided", "says nothing"
"""Where no interval decides; and where what is asked cannot be told from what was measured."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper on one network: what it says, the paper's figure, if it gives one, and the one found here.

    Controls that did as well as the route, or better, are its ``equals``; None where no control was run.
    """

    text: str
    paper: str
    found: str
    verdict: str
    equals: tuple[str, ...] | None = None
    network: str = ""

    def __str__(self) -> str:
        equals = f"; as good: {', '.join(self.equals)}" if self.equals else ""
        return f"{self.verdict}, {self.network}: {self.text}: {self.found}{equals}"

    @property
    def cells(self) -> dict[str, str]:
        """The claim as a row of a table."""
        equals = "no control was run" if self.equals is None else ", ".join(self.equals)
        return {
            "claim": self.text, "paper": self.paper, "network": self.network, "found": self.found,
            "verdict": f"**{self.verdict}**", "controls that do as well": equals,
        }  # fmt: skip


def verdict(whole: bool, part: bool) -> str:
    """The verdict of a rule with two thresholds."""
    return HOLDS if whole else PART if part else FAILS


def by_count(good: int, of: int) -> str:
    """The verdict where a claim is about every one of several cases: all, more than half, or fewer."""
    return verdict(good == of, 2 * good > of)


Row = Mapping[str, str]
"""A row of a table in Markdown: cells by the title of their column."""


def markdown(rows: Iterable[Row]) -> str:
    """A table in Markdown, with columns as they first appear; empty without rows."""
    table = Table.of(rows)
    lines = [table.columns, ["---"] * len(table.columns), *table.rows] if len(table) else []
    return "\n".join(f"| {' | '.join(cell or '' for cell in cells)} |" for cells in lines)


def kind(attack: str) -> str:
    """An attack's name without its settings, which the paper states once."""
    return attack.partition(":")[0]


def percent(share: float | None) -> str:
    """A share for a table; empty for none."""
    return "" if share is None else f"{100 * share:.1f}"


@dataclass(frozen=True)
class Findings:
    """One experiment's document: its measurements, and by their names its settings and what its rows have in common."""

    table: Table
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, document: Document) -> Findings:
        """Those of a document."""
        return cls(document.table, {**document.settings, **document.about})

    def __getitem__(self, fact: str) -> Any:
        return self.facts[fact]

    def entries(self, name: str, **cells: Any) -> list[Record]:
        """Rows of a further table of the document, such as ``"verdicts"``, that have these values."""
        return list(Table.of(self[name]).select(**cells)) if self[name] else []

    def mean(self, column: str, **cells: Any) -> float | None:
        """Mean over such rows, those of random draws, say; None where there is none."""
        values = self.table.select(**cells).column(column)
        return statistics.fmean(values) if values else None

    def distinct(self, column: str, **cells: Any) -> list[Any]:
        """Values of a column in such rows, in the order of the table."""
        return self.table.select(**cells).distinct(column)

    @property
    def rivals(self) -> list[str]:
        """Criteria other than the route and random channels."""
        others = (ROUTE, RANDOM, OFF_ROUTE, UNTOUCHED)
        return [criterion for criterion in self.distinct("criterion") if criterion not in others]

    def unbeaten(self, **cells: Any) -> tuple[str, ...]:
        """Controls that the route does not clearly beat where these columns of the verdicts have these values."""
        verdicts = self.entries("verdicts", **cells)
        return tuple(dict.fromkeys(each["control"] for each in verdicts if each["verdict"] != "beats"))

    def accuracies(self, **cells: Any) -> Row:
        """Mean accuracy by the route and by each control in percent, for a table; empty where it was not measured."""
        return {
            criterion: percent(self.mean("accuracy", criterion=criterion, **cells))
            for criterion in (ROUTE, RANDOM, *self.rivals)
        }


@dataclass(frozen=True)
class NetworkResults:
    """What the experiments, by name, measured on one network; and where it comes from, its size and its accuracy."""

    name: str
    about: Mapping[str, Any]
    experiments: Mapping[str, Findings]

    @property
    def layers(self) -> list[str]:
        """Its route layers in forward order."""
        return list(self.about["layers"])

    @property
    def family(self) -> str:
        """The architecture that begins the name."""
        return self.name.partition("-")[0]

    def title(self, layer: str) -> str:
        """A layer as the paper names it, ``conv4``, in a chain; else the module's name."""
        chain = all(name.startswith("features.") for name in self.layers)
        return f"conv{self.layers.index(layer) + 1}" if chain else layer

    def group_title(self, group: str) -> str:
        """Layers that are changed together: one, the first few, or all."""
        names = group.split("+")
        if len(names) == 1:
            return self.title(group)
        if names == self.layers:
            return f"all {len(names)} layers"
        return f"{'first ' if names == self.layers[: len(names)] else ''}{len(names)} layers"


Results = Sequence[NetworkResults]
Make = Callable[[NetworkResults, Findings], Iterator[Any]]
"""What an experiment on a network has for the page: rows of a table, or claims."""


@dataclass(frozen=True)
class Entry:
    """An entry in a section of the page: what a function makes of some experiments on each network."""

    section: str
    experiments: tuple[str, ...]
    make: Make

    @property
    def title(self) -> str:
        """What stands above it: the function's docstring."""
        return " ".join((self.make.__doc__ or "").split())

    def of(self, results: Results) -> Iterator[tuple[str, Any]]:
        """All that it makes, each with the network's name."""
        for experiment in self.experiments:
            for network in results:
                if experiment in network.experiments:
                    for each in self.make(network, network.experiments[experiment]):
                        yield network.name, each


TABLES: list[Entry] = []
JUDGES: list[Entry] = []


def _registering(entries: list[Entry], section: str, *experiments: str) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        entries.append(Entry(section, experiments, make))
        return make

    return register


table = partial(_registering, TABLES)
"""Registers a function whose rows are a table of the page, beneath the function's docstring."""

judge = partial(_registering, JUDGES)
"""Registers a function that judges claims of the paper."""
