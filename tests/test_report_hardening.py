"""The part of the page on hardening: the files of ``attackroute harden``, controls beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attackroute as ar
from attackroute.report.fragments import percent
from attackroute.report.hardening_section import hardening
from attackroute.report.run_folder import RunFolder
from test_report import Elements


def row(model: str, attack: str, correct: int) -> dict[str, Any]:
    share = correct / 50
    return {
        "model": model, "attack": attack, "accuracy": share, "accuracy_low": share - 0.1, "accuracy_high": share + 0.1,
        "correct": correct, "samples": 50,
    }  # fmt: skip


def write(folder: Path, target: str, after: tuple[int, int], before: tuple[int, int] = (48, 10)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        row(model, attack, correct)
        for model, found in (("before", before), ("after", after))
        for attack, correct in zip(("clean", "pgd:eps=0.1"), found, strict=True)
    ]
    content = {
        "folder": str(folder),
        "lambda": 0.1,
        "epochs": 3,
        "penalties": {"gradient": 0.5},
        "strengths": {"gradient": 2.5},
        "route_changes": [],
        "overlap_with_full_route": None,
        "evaluation": {"rows": rows, "checks": []},
    }
    (folder / "hardening.json").write_text(json.dumps(content))
    (folder / "settings.json").write_text(
        json.dumps({"target": target, "lr": 0.01, "attack": None, "trainable": ["w"]})
    )
    ar.Route({"a": [1]}, {"a": 3}).save(folder / "route.json")


def words(folder: Path) -> str:
    found = RunFolder.open(folder)
    return Elements(f'<section id="x">{hardening(found.hardenings, 100)}</section>').words["x"]


def test_before_and_after_with_settings(tmp_path: Path) -> None:
    write(tmp_path, "route", (47, 30))
    text = words(tmp_path)
    for share in (48 / 50, 10 / 50, 47 / 50, 30 / 50):
        assert percent(share) in text
    assert "A gradient penalty on the route's neurons, lambda 0.1, 3 epochs" in text
    assert "the gradient penalty's gradient was 2.5 times the task's" in text
    assert "lr" in text and "0.01" in text and "trainable" not in text
    assert "No check for masked gradients" in text


def test_the_punished_route_is_not_the_hardened_networks(tmp_path: Path) -> None:
    write(tmp_path, "route", (47, 30))
    assert RunFolder.open(tmp_path).route is None


def test_controls_stand_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "on-route", "route", (47, 30))
    write(tmp_path / "random", "random", (46, 25))
    found = RunFolder.open(tmp_path)
    assert [document.name for document in found.hardenings] == ["on-route", "random"]
    html = hardening(found.hardenings, 100)
    table = html[html.index("<table>") : html.index("</table>")]
    assert table.count("<th ") == 5 and [table.index(name) for name in ("before", "on-route", "random")] == sorted(
        table.index(name) for name in ("before", "on-route", "random")
    )
    assert all(percent(share) in table for share in (10 / 50, 30 / 50, 25 / 50))
    assert "as many random neurons off the route" in html


def test_hardenings_of_other_networks_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "one", "route", (47, 30))
    write(tmp_path / "two", "route", (46, 25), before=(40, 9))
    html = hardening(RunFolder.open(tmp_path).hardenings, 100)
    assert html.count("<table>") == 2 and "controls beside them" not in html


def test_odd_files_are_shown_as_far_as_they_go(tmp_path: Path) -> None:
    (tmp_path / "hardening.json").write_text(
        json.dumps({"evaluation": 3, "strengths": [1], "lambda": "x", "penalties": None, "<b>": "<i>"})
    )
    html = hardening(RunFolder.open(tmp_path).hardenings, 100)
    assert "Before and after were not compared" in html and "<b>" not in html and "&lt;i&gt;" in html
    assert "attackroute harden" in hardening((), 100)
