"""The command line, run in this process."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from attackroute.cli import app
from attackroute.zoo.data import ImageData, load_data


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code and what it printed."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """All that it printed."""
        return self.stdout + self.stderr


def run(*words: object) -> Result:
    """Run ``attackroute WORD ...``; what is not caught there is not caught here."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        code = app.run([str(word) for word in words])
    return Result(code, stdout.getvalue(), stderr.getvalue())


def done(*words: object) -> Result:
    """Run a command that must succeed."""
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result


def refused(result: Result, *parts: object) -> None:
    """Exit code 2, nothing on stdout, and on stderr behind notes one line that says what was wrong."""
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    *notes, line = result.stderr.splitlines()
    assert all(note.startswith(("note: ", "epoch ")) for note in notes), result.stderr
    assert line.startswith("error: ")
    for part in parts:
        assert str(part) in line


def load_few(spec: str, count: int, **options: Any) -> ImageData:
    """What ``load_data`` gives, but at most so many images."""
    return load_data(spec, **{**options, "samples": min(options.get("samples") or count, count)})


@contextmanager
def empty_figures() -> Iterator[None]:
    """Figures are made, but their files are empty pictures: how they look has tests of its own, and takes long."""

    def save(_: Any, file: Any, **options: Any) -> None:
        if isinstance(file, (str, Path)):
            Path(file).write_text("<svg></svg>")
        else:
            file.write(b"no picture")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", save)
        yield
