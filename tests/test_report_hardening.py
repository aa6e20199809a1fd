"""The part of the page on hardening: the files of ``attackroute harden``, controls beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import attackroute as ar
from attackroute.core.document import Document
from attackroute.core.table import Table
from attackroute.report.measuring import unmeasured
from attackroute.report.page import Content, build_page, percent
from attackroute.report.run_folder import RunFolder
from report_runs import shares
from test_report import Elements


def write(folder: Path, target: str, after: tuple[int, int], before: tuple[int, int] = (48, 10)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"model": model, "attack": attack, **shares(correct, 50)}
        for model, found in (("before", before), ("after", after))
        for attack, correct in zip(("clean", "pgd:eps=0.1"), found, strict=True)
    ]
    settings = {"target": target, "lambda": 0.1, "lr": 0.01, "attack": None, "trainable": ["w"], "epochs": 5}
    about = {
        "epochs": 3,
        "penalties": {"gradient": 0.5},
        "strengths": {"gradient": 2.5},
        "overlap_with_full_route": {"share": 0.8125},
        "evaluation": {"checks": []},
    }
    Document("hardening", settings, "Told.", Table.of(rows), about).save(folder)
    ar.Route({"a": [1]}, {"a": 3}).save(folder / "route.json")


def page_of(folder: Path) -> str:
    return build_page(Content(RunFolder.open(folder), unmeasured(None))).html


def section_of(folder: Path) -> str:
    html = page_of(folder)
    start = html.index('<section id="hardening">')
    return html[start : html.index("</section>", start)]


def words(folder: Path) -> str:
    return Elements(page_of(folder)).words["hardening"]


def test_before_and_after_with_settings(tmp_path: Path) -> None:
    write(tmp_path, "route", (47, 30))
    text = words(tmp_path)
    for share in (48 / 50, 10 / 50, 47 / 50, 30 / 50):
        assert percent(share) in text
    assert "A gradient penalty on the route's neurons, lambda 0.1, 3 epochs" in text
    assert "the gradient penalty's gradient was 2.5 times the task's" in text
    assert "shares 81.2\u00a0% of its neurons." in text
    assert "lr" in text and "0.01" in text and "trainable" not in text
    assert "No check for masked gradients" in text


def test_the_punished_route_is_not_the_hardened_networks(tmp_path: Path) -> None:
    write(tmp_path, "route", (47, 30))
    assert RunFolder.open(tmp_path).route is None


def test_controls_stand_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "on-route", "route", (47, 30))
    write(tmp_path / "random", "random", (46, 25))
    found = RunFolder.open(tmp_path)
    assert [document.folder for document in found.hardenings] == ["on-route", "random"]
    html = section_of(tmp_path)
    table = html[html.index("<table>") : html.index("</table>")]
    assert table.count("<th ") == 5 and [table.index(name) for name in ("before", "on-route", "random")] == sorted(
        table.index(name) for name in ("before", "on-route", "random")
    )
    assert all(percent(share) in table for share in (10 / 50, 30 / 50, 25 / 50))
    assert "as many random neurons off the route" in html


def test_one_lambda_for_all_is_told_and_checks_elsewhere_are_pointed_at(tmp_path: Path) -> None:
    for name in ("on-route", "random"):
        write(tmp_path / name, "route", (47, 30))
    assert "One lambda, 0.1, serves all of them and was chosen for none" in words(tmp_path)
    assert words(tmp_path).count("No check for masked gradients") == 2
    check = {"model": "runs/random", "check": "no limit", "verdict": "silent", "samples": 8, "sentence": "Told."}
    Document("evaluation", {}, "Told.", about={"checks": [check]}).save(tmp_path)
    assert words(tmp_path).count("No check for masked gradients") == 1
    assert words(tmp_path).count("stand with the evaluation under attack") == 1
    document = Document.load(tmp_path / "random" / "hardening.json")
    replace(document, settings={**document.settings, "lambda": 0.2}).save(tmp_path / "random")
    assert "One lambda" not in words(tmp_path)


def test_hardenings_of_other_networks_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "one", "route", (47, 30))
    write(tmp_path / "two", "route", (46, 25), before=(40, 9))
    html = section_of(tmp_path)
    assert html.count("<table>") == 2 and "controls beside them" not in html


def test_signs_of_masking_are_told(tmp_path: Path) -> None:
    write(tmp_path, "all", (47, 30))
    document = Document.load(tmp_path / "hardening.json")
    check = {"model": "after", "check": "no limit", "verdict": "suspicious", "samples": 8, "numbers": {"share": 0.5}}
    replace(document, about={**document.about, "evaluation": {"checks": [check]}}).save(tmp_path)
    text = words(tmp_path)
    assert "on all neurons" in text and "suspicious" in text and "share: 0.5" in text
    assert "No check" not in text


def test_an_evaluation_that_a_hardening_has_made_is_not_shown_twice(tmp_path: Path) -> None:
    write(tmp_path, "route", (47, 30))
    (tmp_path / "evaluation").mkdir()
    rows = Document.load(tmp_path / "hardening.json").table
    Document("evaluation", {}, "Told.", Table.of({**row, "step": 1} for row in rows)).save(tmp_path / "evaluation")
    again = "The table is that of the hardening above"
    assert again in Elements(page_of(tmp_path)).words["evaluation"]
    Document("evaluation", {}, "Told.", Table.of([*rows, {"model": "x"}])).save(tmp_path / "evaluation")
    assert again not in Elements(page_of(tmp_path)).words["evaluation"]


def test_odd_files_are_shown_as_far_as_they_go(tmp_path: Path) -> None:
    odd = {"evaluation": 3, "strengths": [1], "penalties": None, "overlap_with_full_route": "?", "<b>": "<i>"}
    Document("hardening", {"lambda": "x", "attack": {"name": "pgd"}, "target": 3}, about=odd).save(tmp_path)
    html = section_of(tmp_path)
    assert "Before and after were not compared" in html and "<b>" not in html and "&lt;i&gt;" in html
    assert "<p>Fine-tuning, against pgd.</p>" in html
