"""Results of experiments as their files hold them, and what several tables ask of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attackroute.analysis.accuracy_table import UNTOUCHED
from attackroute.analysis.rankings import OFF_ROUTE, RANDOM, ROUTE
from attackroute.paper.claims import percent

Content = Mapping[str, Any]
"""An experiment's JSON file."""


_CHAIN = "features."


_NOT_RIVALS = (ROUTE, RANDOM, OFF_ROUTE, UNTOUCHED)


@dataclass(frozen=True)
class NetworkResults:
    """What was found on one network.

    Attributes:
        name: Of the network.
        layers: Its route layers in forward order.
        about: Where it comes from, and its accuracy.
        parts: Experiments' files by name.
    """

    name: str
    layers: tuple[str, ...]
    about: Content
    parts: Mapping[str, Content]

    @property
    def family(self) -> str:
        """The architecture that begins the name."""
        return self.name.partition("-")[0]

    def title(self, layer: str) -> str:
        """A layer as the paper names it, ``conv4``, in a chain; else the module's name."""
        chain = all(name.startswith(_CHAIN) for name in self.layers)
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


def having(results: Results, part: str) -> Iterator[tuple[NetworkResults, Content]]:
    """Networks for which there is this experiment, with its file's content."""
    for network in results:
        if part in network.parts:
            yield network, network.parts[part]


def matching(records: Iterable[Content], **conditions: Any) -> list[Content]:
    """Records in which these entries have these values."""
    return [record for record in records if all(record[name] == value for name, value in conditions.items())]


def rows(content: Content, **conditions: Any) -> list[Content]:
    """Rows of a tidy table in which these columns have these values."""
    return matching(content["rows"], **conditions)


def mean(content: Content, column: str, **conditions: Any) -> float | None:
    """Mean over such rows, those of random draws, say; None where there is none."""
    values = [row[column] for row in rows(content, **conditions)]
    return statistics.fmean(values) if values else None


def distinct(content: Content, column: str, **conditions: Any) -> list[Any]:
    """Values of a column, in the order of the table."""
    return list(dict.fromkeys(row[column] for row in rows(content, **conditions)))


def rivals(content: Content) -> list[str]:
    """Criteria other than the route and random channels."""
    return [name for name in distinct(content, "criterion") if name not in _NOT_RIVALS]


def unbeaten(content: Content, **conditions: Any) -> tuple[str, ...]:
    """Controls that the route does not clearly beat where these columns of the verdicts have these values."""
    verdicts = matching(content["verdicts"], **conditions)
    return tuple(dict.fromkeys(found["control"] for found in verdicts if found["verdict"] != "beats"))


def accuracies(content: Content, criteria: Iterable[str], **conditions: Any) -> list[str]:
    """Mean accuracy by each criterion in percent, for a table; empty where it was not measured."""
    values = (mean(content, "accuracy", criterion=name, **conditions) for name in criteria)
    return ["" if value is None else percent(value) for value in values]
