"""Results of experiments as files: one tidy table as JSON and CSV, and its figures as PNG and SVG."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from attackroute.core.errors import UserError
from attackroute.core.files import replace_file
from attackroute.core.table import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Result(Protocol):
    """What every experiment gives."""

    def records(self) -> list[Record]:
        """The measurements as a tidy table."""

    def about(self) -> dict[str, Any]:
        """What all the measurements have in common, and the verdicts, as plain values."""

    def reading(self) -> str:
        """One sentence that says what was found."""


def to_json(result: Result) -> dict[str, Any]:
    """The whole result as plain values; numbers that are not defined become null."""
    content = {**result.about(), "reading": result.reading(), "rows": result.records()}
    return {key: _plain(value) for key, value in content.items()}


def save_result(
    result: Result, figures: Mapping[str, Figure], folder: str | os.PathLike[str], name: str, **notes: Any
) -> list[Path]:
    """Write ``name.json``, ``name.csv`` and each figure as PNG and SVG; the JSON comes last, when all is done.

    Args:
        result: The result.
        figures: Figures by file name.
        folder: A folder that exists.
        name: Name of the table's files.
        notes: Further entries of the JSON file.

    Raises:
        UserError: A file cannot be written.
    """
    from attackroute.analysis.figures.style import save_figure

    home = Path(folder)
    paths = [path for title, figure in figures.items() for path in save_figure(figure, home, title)]
    table, document = home / f"{name}.csv", home / f"{name}.json"
    replace_file(table, csv_text(result.records()).encode())
    content = {**{key: _plain(value) for key, value in notes.items()}, **to_json(result)}
    replace_file(document, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
    return [*paths, table, document]


def csv_text(records: Sequence[Record]) -> str:
    """A tidy table as CSV; what is not defined is empty."""
    if not records:
        raise UserError("the experiment measured nothing")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if _undefined(value) else value for key, value in row.items()} for row in records)
    return text.getvalue()


def _undefined(value: object) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if _undefined(value) else value
