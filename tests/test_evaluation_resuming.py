"""Evaluations that were killed, interrupted or damaged, and how they go on."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attackroute as ar
from attackroute.core import journal as journals
from attackroute.core.errors import UserError
from attackroute.core.journal import MEASUREMENTS, Journal
from attackroute.robustness import evaluate
from attackroute.robustness.evaluation import Evaluation
from evaluated_models import ATTACKS, images_and_labels, noisy, small_model
from toy_training import Killed

SETTINGS: dict[str, Any] = {"batch_size": 8, "checks": 6, "seed": 2}
RELABELLED = images_and_labels()[0], torch.cat([images_and_labels()[1][:-1], (images_and_labels()[1][-1:] + 1) % 4])
LINES = 1 + 3 * 2 * 4 + 2 * 6  # header; batches, models and attacks; models and probes


def models() -> dict[str, nn.Module]:
    return {"one": small_model(), "random": noisy(small_model(3))}


def evaluated(folder: Path | None = None, **changes: Any) -> Evaluation:
    options = {"models": models(), "data": images_and_labels(), "attacks": ATTACKS, **SETTINGS, **changes}
    return ar.evaluate(options.pop("models"), options.pop("data"), options.pop("attacks"), folder=folder, **options)


def timeless(result: Evaluation) -> dict[str, Any]:
    content = result.document().to_json()
    for row in content["rows"]:
        del row["seconds"]
    return content


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attackroute.robustness.masking._QUERIES", 5)
    monkeypatch.setattr("attackroute.robustness.masking._STEPS", 6)


@contextmanager
def killed_after(lines: int) -> Iterator[None]:
    """Die when so many lines are written."""
    written, real = itertools.count(1), journals._append

    def append(path: Path, line: bytes) -> None:
        if next(written) > lines:
            with path.open("ab") as file:
                file.write(line[: len(line) // 2])  # a torn line, as a kill leaves it
            raise Killed
        real(path, line)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(journals, "_append", append)
        yield


def test_files(tmp_path: Path) -> None:
    result = evaluated(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.csv", "evaluation.json", MEASUREMENTS]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result.document().to_json()
    rows = (tmp_path / "evaluation.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 4
    assert len((tmp_path / MEASUREMENTS).read_text().splitlines()) == LINES
    assert timeless(result) == timeless(evaluated())


@pytest.mark.parametrize("lines", [0, 1, 7, 23, 24, 31, LINES - 2])
def test_a_kill_at_any_line(tmp_path: Path, lines: int) -> None:
    whole = timeless(evaluated())
    with killed_after(lines):
        evaluated(tmp_path)
    assert not (tmp_path / "evaluation.json").exists()
    with pytest.raises(UserError, match="unfinished evaluation; pass --resume"):
        evaluated(tmp_path)
    kept = (tmp_path / MEASUREMENTS).read_bytes().rpartition(b"\n")[0]
    assert timeless(evaluated(tmp_path, resume=True)) == whole
    content = (tmp_path / MEASUREMENTS).read_bytes()
    assert content.startswith(kept)
    assert len(content.splitlines()) == LINES


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_done(tmp_path: Path, sent: signal.Signals) -> None:
    whole = timeless(evaluated())

    def interrupt(done: int, _total: int | None, _message: str) -> None:
        if done == 48:
            os.kill(os.getpid(), sent)
            time.sleep(1)  # the signal arrives meanwhile

    previous = signal.signal(sent, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluated(tmp_path, progress=interrupt)
    finally:
        signal.signal(sent, previous)
    assert 1 < len((tmp_path / MEASUREMENTS).read_bytes().splitlines()) < LINES
    assert timeless(evaluated(tmp_path, resume=True)) == whole


def test_a_finished_evaluation_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluated(tmp_path)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to do")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate._Run, "_predictions", never)
        patch.setattr(journals, "_append", never)
        assert evaluated(tmp_path, resume=True) == first
    assert timeless(evaluated(tmp_path)) == timeless(first)  # without resume, it makes way for a new one


def test_a_mistake_does_not_cost_the_results_that_are_there(tmp_path: Path) -> None:
    evaluated(tmp_path)
    with pytest.raises(UserError, match="no labels"):
        evaluated(tmp_path, data=images_and_labels()[0])
    assert (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": ATTACKS[:2]}, "attacks"),
        ({"attacks": ["fgsm:eps=0.2", *ATTACKS[1:]]}, "attacks"),
        ({"seed": 3}, "seed 2, not 3|attacks"),
        ({"batch_size": 4}, "batch_size 8, not 4"),
        ({"checks": 5}, "check_samples 6, not 5"),
        ({"models": {"one": small_model(9), "random": noisy(small_model(3))}}, "models"),
        ({"models": {"one": small_model()}}, "models"),
        ({"origin": {"data": "others"}}, "data None, not 'others'"),
        ({"data": images_and_labels(16)}, "samples_in_all 23, not 16"),
        ({"data": images_and_labels(seed=2)}, "samples / 0 / one / clean of other images"),
        ({"data": RELABELLED}, "samples / 2 / one / clean of other images or labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_terms_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    evaluated(tmp_path / "run", checks=6)
    with pytest.raises(UserError, match=message):
        evaluated(tmp_path / "run", resume=True, **change)


def test_damaged_measurements_are_refused_by_line(tmp_path: Path) -> None:
    evaluated(tmp_path)
    path = tmp_path / MEASUREMENTS
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    for number, broken in [(1, b"x" + lines[0]), (5, lines[4][:-9] + b"\n"), (len(lines) - 1, b"\xff\n"), (3, b"{}\n")]:
        path.write_bytes(b"".join([*lines[: number - 1], broken, *lines[number:]]))
        with pytest.raises(UserError, match=f"measurements.jsonl: line {number} is damaged"):
            evaluated(tmp_path, resume=True)
    path.write_bytes(b'{"some": "thing"}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        evaluated(tmp_path, resume=True)
    path.write_bytes(b"")
    assert evaluated(tmp_path, resume=True).table  # nothing was written yet


def test_a_journal_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, {"a": [1, None, 0.1]})
    assert not path.exists()
    journal.keep(("x", 1), "digest", values=[0.1 + 0.2, 1e-300, "ü"])
    again = Journal(path, {"a": [1, None, 0.1]})
    again.resume()
    assert again.recall(("x", 1), "digest") == {"samples": "digest", "values": [0.1 + 0.2, 1e-300, "ü"]}
    assert again.recall(("x", 2), "digest") is None
    with pytest.raises(UserError, match="x / 1 of other images"):
        again.recall(("x", 1), "another")
    with pytest.raises(UserError, match="cannot be written"):
        Journal(tmp_path / "none" / "journal", {}).keep(("x",), "digest")
