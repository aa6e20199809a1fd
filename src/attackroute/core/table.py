"""One table for all results: named columns of plain values, as JSON, CSV or aligned text."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from attackroute.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = dict[str, Any]
"""One row by column."""

_MAX_ROWS = 10


@dataclass(frozen=True)
class Table:
    """Rows of plain values under named columns, tidy: one measurement a row (``pandas.DataFrame(list(table))``).

    Attributes:
        columns: Names of the columns, in order.
        rows: One tuple of cells a row, as long as `columns`.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> Table:
        """A table of records; columns come in the order in which they first appear, absent cells are None."""
        records = list(records)
        columns = tuple(dict.fromkeys(name for record in records for name in record))
        return cls(columns, tuple(tuple(record.get(name) for name in columns) for record in records))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Record]:
        return (dict(zip(self.columns, row, strict=True)) for row in self.rows)

    def __getitem__(self, index: int) -> Record:
        return dict(zip(self.columns, self.rows[index], strict=True))

    def __repr__(self) -> str:
        return f"<Table of {plural(len(self), 'row')}: {', '.join(self.columns)}>"

    def __str__(self) -> str:
        return aligned(self.columns, [[_text(cell) for cell in row] for row in self.rows])

    def column(self, name: str) -> list[Any]:
        """All cells of a column; a `UserError` names the columns if there is none of that name."""
        index = self._index(name)
        return [row[index] for row in self.rows]

    def distinct(self, name: str) -> list[Any]:
        """The different cells of a column, in order of appearance."""
        return list(dict.fromkeys(self.column(name)))

    def select(self, **cells: Any) -> Table:
        """The rows that hold these cells: ``table.select(criterion="route", layer="features.0")``."""
        indices = {self._index(name): value for name, value in cells.items()}
        return Table(self.columns, tuple(row for row in self.rows if all(row[i] == v for i, v in indices.items())))

    def one(self, **cells: Any) -> Record:
        """The only row that holds these cells."""
        (row,) = self.select(**cells)
        return row

    def mean(self, name: str) -> float:
        """Mean of a column's defined cells; NaN where there are none."""
        cells = [cell for cell in self.column(name) if not undefined(cell)]
        return statistics.fmean(cells) if cells else math.nan

    def to_json(self) -> list[Record]:
        """The rows as JSON values; what is not defined becomes null."""
        return [plain(record) for record in self]

    def to_csv(self) -> str:
        """The table as CSV text; what is not defined is empty."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(["" if undefined(cell) else cell for cell in row] for row in self.rows)
        return text.getvalue()

    def to_frame(self) -> Any:
        """The table as a ``pandas.DataFrame``, which needs pandas."""
        try:
            import pandas
        except ImportError:
            raise UserError("to_frame() needs pandas: pip install pandas, or take to_csv()") from None
        return pandas.DataFrame.from_records(list(self.rows), columns=list(self.columns))

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        lines = [f"<tr><th>{'</th><th>'.join(map(escape, self.columns))}</th></tr>"]
        lines += [f"<tr><td>{'</td><td>'.join(escape(_text(cell)) for cell in row)}</td></tr>" for row in self.rows]
        return f"<table>{''.join(lines)}</table>"

    def _index(self, name: str) -> int:
        try:
            return self.columns.index(name)
        except ValueError:
            raise UserError(f"the table has no column {name!r}; it has {', '.join(self.columns)}") from None


class Shown:
    """What a notebook shows as it prints, in columns, and what draws itself."""

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"

    @staticmethod
    def _axes(ax: Axes | None) -> Axes:
        """The axes to draw on; without any, those of a new figure."""
        if ax is not None:
            return ax
        from matplotlib import pyplot

        axes: Axes = pyplot.subplots(layout="constrained")[1]
        return axes


def undefined(value: object) -> bool:
    """Whether a cell is None, NaN or infinite."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def plain(value: Any) -> Any:
    """A value as JSON knows it: tuples become lists, undefined numbers null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if undefined(value) else value


def plural(number: int, noun: str) -> str:
    """``"1 layer"``, ``"13 layers"``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def layer_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a header and rows with :func:`aligned`: at most 11 lines, the middle rows left out."""
    lines = [list(row) for row in rows]
    if len(lines) > _MAX_ROWS:
        head, tail = _MAX_ROWS // 2, _MAX_ROWS - _MAX_ROWS // 2 - 1
        lines = [*lines[:head], ["...", *[""] * (len(header) - 1)], *lines[-tail:]]
    return aligned(header, lines)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """Lay out a header and rows in columns: the first ``words`` and the last to the left, the others to the right."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    last = len(header) - 1
    lines = (
        "  ".join(
            cell.ljust(width) if column < words or column == last else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _text(cell: Any) -> str:
    if undefined(cell):
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
