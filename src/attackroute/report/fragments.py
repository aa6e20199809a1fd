"""Pieces of HTML in which every string is escaped."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_NUMBER = ' class="number"'


def text(value: object) -> str:
    """A value as escaped text: numbers short, nothing for None."""
    readable = _plain(value).encode(errors="replace").decode()  # half a surrogate pair has no place in a file
    return html.escape(readable, quote=True)


def sentence(value: object) -> str:
    """A paragraph."""
    return f"<p>{text(value)}</p>"


def missing(value: str) -> str:
    """What stands where a part is missing."""
    return f'<p class="missing">{text(value)}</p>'


def table(rows: Sequence[Mapping[str, Any]], most: int) -> str:
    """Rows of one table, with the columns of the first that names them; the first ``most`` are shown."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    counted = {name for name in columns if any(_is_number(row.get(name)) for row in rows)}
    head = "".join(f'<th scope="col"{_NUMBER * (name in counted)}>{text(name)}</th>' for name in columns)
    body = "".join(f"<tr>{''.join(_cell(row.get(name)) for name in columns)}</tr>" for row in rows[:most])
    more = f"<p>{len(rows) - most} more rows are in the data below.</p>" if len(rows) > most else ""
    return (
        '<div class="table-box" tabindex="0"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>{more}"
    )


def folded(title: str, content: str) -> str:
    """What a reader opens when wanted."""
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def numbers(pairs: Iterable[tuple[str, object]]) -> str:
    """Key numbers, with what they are."""
    items = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="numbers">{items}</dl>'


def terms(pairs: Iterable[tuple[str, object]]) -> str:
    """Settings, with what they are."""
    items = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs)
    return f'<dl class="made">{items}</dl>'


def meter(share: float | None) -> str:
    """A share as a bar and in per cent."""
    if share is None:
        return ""
    return f'<meter min="0" max="1" value="{share:.6g}" aria-hidden="true"></meter> {percent(share)}'


def percent(share: float | None, digits: int = 1) -> str:
    """``0.125`` as ``12.5 %``, with a space that does not break."""
    return "" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def inlined_json(value: object) -> str:
    """JSON that can stand in a script element: no tag or comment can begin or end in it."""
    compact = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return compact.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _cell(value: object) -> str:
    if isinstance(value, Markup):
        return f"<td>{value.html}</td>"
    return f"<td{_NUMBER * _is_number(value)}>{text(value)}</td>"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Markup:
    """HTML that stands in a table's cell as it is."""

    def __init__(self, html: str) -> None:
        self.html = html


def _plain(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return str(value)
