"""Accuracies under attacks as a table: a row an attack, a column a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attackroute.report.fragments import Markup, meter, percent, table, text
from attackroute.robustness.attack_order import brief


def records(value: object) -> list[Mapping[str, Any]]:
    """The rows of a table in a file, without what is none."""
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def accuracy_table(rows: Sequence[Mapping[str, Any]], most: int) -> str:
    """Accuracies with their 95 % intervals.

    Args:
        rows: As :meth:`attackroute.Evaluation.to_json` has them.
        most: Rows of the table at most.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        attack = str(row.get("attack"))
        line = found.setdefault(attack, {"attack": brief(attack)})
        line[str(row.get("model"))] = Markup(_cell(row))
        line["images"] = row.get("samples")
    ordered = [{**{key: value for key, value in line.items() if key != "images"}, "images": line["images"]}
               for line in found.values()]  # fmt: skip
    return table(ordered, most)


def _cell(row: Mapping[str, Any]) -> str:
    value = row.get("accuracy")
    if not isinstance(value, (int, float)):
        return ""
    ends = [row.get(name) for name in ("accuracy_low", "accuracy_high")]
    known = [end for end in ends if isinstance(end, (int, float))]
    interval = f" ({text(percent(known[0], 0))} to {text(percent(known[1], 0))})" if len(known) == 2 else ""
    return f'{meter(value)}<span class="quiet">{interval}</span>'
