"""Figures of a run as data in the page."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from attackroute.core.errors import UserError
from attackroute.core.files import shown
from attackroute.report.fragments import missing, text

_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


def inlined_figures(figures: Mapping[str, Mapping[str, Path]], largest: int) -> str:
    """Each figure as an image in the page: the SVG where it fits, else the PNG, else a sentence.

    An image cannot run a script or load anything, whatever its file holds.

    Args:
        figures: Files by title, then by ending.
        largest: Bytes that one file may have.
    """
    shown_, left = [], []
    for title, files in figures.items():
        file = next((files[kind] for kind in _TYPES if kind in files and _size(files[kind]) <= largest), None)
        if file is None:
            left.append(title)
            continue
        content = base64.b64encode(_bytes(file)).decode()
        source = f"data:{_TYPES[file.suffix]};base64,{content}"
        shown_.append(f'<figure data-title="{text(title)}"><img src="{source}" alt="Figure {text(title)}"></figure>')
    note = missing(f"Left out, to keep the page small: {', '.join(left)}.") if left else ""
    return f'<div class="figures">{"".join(shown_)}</div>{note}' if shown_ else note


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise UserError(f"{shown(file)}: cannot be read: {error.strerror or error}") from None


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{shown(file)}: cannot be read: {error.strerror or error}") from None
