"""Text tables."""

from __future__ import annotations

from collections.abc import Sequence

_MAX_ROWS = 10


def plural(number: int, noun: str) -> str:
    """``"1 layer"``, ``"13 layers"``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def layer_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a header and rows with :func:`aligned`: at most 11 lines, the middle rows left out."""
    shown = [list(row) for row in rows]
    if len(shown) > _MAX_ROWS:
        head, tail = _MAX_ROWS // 2, _MAX_ROWS - _MAX_ROWS // 2 - 1
        shown = [*shown[:head], ["...", *[""] * (len(header) - 1)], *shown[-tail:]]
    return aligned(header, shown)


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
