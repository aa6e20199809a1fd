"""A claim of the paper and a plain verdict by a stated rule; and the experiments' results that both are read from."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from attackroute.analysis.controls import OFF_ROUTE, RANDOM, ROUTE
from attackroute.analysis.intervention_table import UNTOUCHED
from attackroute.core.table import Table

HOLDS, PART, FAILS = "holds", "holds in part", "does not hold"


@dataclass(frozen=True)
class Claim:
    """One claim on one network.

    Attributes:
        text: What the paper says.
        paper: The paper's figure; empty where it gives none.
        network: On what it was tried.
        found: The figure found here.
        verdict: :data:`HOLDS`, :data:`PART` or :data:`FAILS`.
        equals: Controls that did as well as the route, or better.
    """

    text: str
    paper: str
    network: str
    found: str
    verdict: str
    equals: tuple[str, ...] = ()

    def __str__(self) -> str:
        equals = f"; as good: {', '.join(self.equals)}" if self.equals else ""
        return f"{self.verdict}, {self.network}: {self.text}: {self.found}{equals}"

    def cells(self) -> list[str]:
        """The claim as a row of a table."""
        return [self.text, self.paper, self.network, self.found, f"**{self.verdict}**", ", ".join(self.equals)]


HEADER = ("claim", "paper", "network", "found", "verdict", "controls that do as well")


def verdict(whole: bool, part: bool) -> str:
    """The verdict of a rule with two thresholds."""
    return HOLDS if whole else PART if part else FAILS


def by_count(good: int, of: int) -> str:
    """The verdict where a claim is about every one of several cases: all, more than half, or fewer."""
    return verdict(good == of, 2 * good > of)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; empty without rows."""
    body = list(rows)
    lines = [header, ["---"] * len(header), *body] if body else []
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def claims_table(claims: Iterable[Claim]) -> str:
    """Claims as a table in Markdown."""
    return markdown(HEADER, (claim.cells() for claim in claims))


def percent(value: float) -> str:
    """A share for a table."""
    return f"{100 * value:.1f}"


@dataclass(frozen=True)
class Findings:
    """One experiment's result, as its file holds it.

    Attributes:
        content: All of the file; of a document, entries of its settings and of what its rows have in common too.
    """

    content: Mapping[str, Any]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Findings:
        """From the values of a JSON file."""
        return cls({**content.get("settings", {}), **content.get("about", {}), **content})

    def __getitem__(self, entry: str) -> Any:
        return self.content[entry]

    @cached_property
    def table(self) -> Table:
        """The measurements."""
        return Table.of(self.content["rows"])

    def entries(self, name: str, **cells: Any) -> list[dict[str, Any]]:
        """Those of a further table of the file, such as ``"verdicts"``, that have these values."""
        return list(Table.of(self.content[name]).select(**cells)) if self.content[name] else []

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

    def accuracies(self, criteria: Iterable[str], **cells: Any) -> list[str]:
        """Mean accuracy by each criterion in percent, for a table; empty where it was not measured."""
        values = (self.mean("accuracy", criterion=criterion, **cells) for criterion in criteria)
        return ["" if value is None else percent(value) for value in values]


@dataclass(frozen=True)
class NetworkResults:
    """What was found on one network.

    Attributes:
        name: Of the network.
        layers: Its route layers in forward order.
        about: Where it comes from, and its accuracy.
        parts: Experiments by name.
    """

    name: str
    layers: tuple[str, ...]
    about: Mapping[str, Any]
    parts: Mapping[str, Findings]

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
        if names == list(self.layers):
            return f"all {len(names)} layers"
        if names == list(self.layers[: len(names)]):
            return f"first {len(names)} layers"
        return f"{len(names)} layers"


Results = Sequence[NetworkResults]


def having(results: Results, part: str) -> Iterator[tuple[NetworkResults, Findings]]:
    """Networks for which there is this experiment, with its result."""
    for network in results:
        if part in network.parts:
            yield network, network.parts[part]
