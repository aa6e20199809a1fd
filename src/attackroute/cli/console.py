"""What commands say: results on stdout, progress and notes on stderr, JSON alone on stdout when it is asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from attackroute.core.distributed import leading
from attackroute.core.table import aligned


class Progress(Protocol):
    """Moves a progress bar: how much is done, of how much where that is known, and a message beside it."""

    def __call__(self, done: int, total: int | None, message: str = "") -> None: ...


def print_error(message: str) -> None:
    """Print ``error: message`` on stderr, as one line whatever the message holds."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


@dataclass(frozen=True)
class Output:
    """Where a command's words go; of several processes, the first one speaks."""

    as_json: bool = False  # print the result as one JSON object on stdout, and no table
    quiet: bool = False  # no tables, progress or notes; errors and JSON are still printed

    def note(self, text: str) -> None:
        """Say something in passing, on stderr."""
        if not self.quiet and leading():
            print(text, file=sys.stderr)

    def result(self, payload: Mapping[str, Any]) -> None:
        """Print the machine-readable result, if it was asked for."""
        if self.as_json and leading():
            print(json.dumps(payload, indent=2, allow_nan=False))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table on stdout, as wide as it is: a name that is broken in the middle cannot be copied."""
        cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
        words = next((place for place in range(len(columns)) if all(row[place][:1].isdigit() for row in cells)), 1)
        self.line(f"\n{aligned(columns, cells, words=max(1, words))}\n")

    def line(self, text: str) -> None:
        """Print a line of the result on stdout."""
        if not (self.quiet or self.as_json) and leading():
            print(text)

    @contextmanager
    def progress(self, unit: str, kept: str | None = None) -> Iterator[Progress]:
        """A progress bar on stderr, where that is a terminal, until the block ends; after Ctrl-C, what is kept."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        columns = MofNCompleteColumn(), TextColumn(unit), BarColumn(), TimeElapsedColumn(), TextColumn("left:")
        words = TextColumn("{task.description}", markup=False)
        silent = self.quiet or not leading() or not console.is_terminal
        bar = Bar(*columns, TimeRemainingColumn(), words, console=console, transient=True, disable=silent)
        task = bar.add_task("", total=None)

        def move(done: int, total: int | None, message: str = "") -> None:
            bar.update(task, completed=done, total=total, description=message)

        try:
            with bar:
                yield move
        except KeyboardInterrupt:
            if kept is not None:
                self.note(f"interrupted: {kept}")
            raise
