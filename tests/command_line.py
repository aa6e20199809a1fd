"""The command line, run in this process."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from attackroute.cli import app


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
