"""Deactivation of a growing share of channels, against one sample and one set at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from attackroute.analysis.controls import RANDOM, ROUTE
from attackroute.analysis.experiments.interventions import Deactivation, Transplantation, deactivate_accuracy
from attackroute.analysis.intervention_table import UNTOUCHED, InterventionTable, Setting, Trial
from attackroute.analysis.interventions import deactivate
from attackroute.core.document import Document
from attackroute.core.errors import UserError
from attackroute.core.statistics import Accuracy, sign_test
from attackroute.core.table import Record, Table
from attackroute.routes.route import Route
from experiment_samples import Case, counting, make_case


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(18)


def chosen(case: Case, row: Record) -> Route:
    """The row's channels, by another way than the experiment's."""
    if row["criterion"] == ROUTE:
        whole = case.routes.aggregate(row["share"])
    elif row["criterion"] == "weight":
        whole = case.weight.route(row["share"])
    else:
        assert row["criterion"] == RANDOM and row["share"] == 0.3 and row["draw"] is not None
        whole = case.route.random_like(row["draw"])
    return whole.restrict(row["layers"].split("+"))


@pytest.mark.parametrize("at", ["output", "activation"])
def test_every_number_is_that_of_one_sample_at_a_time(case: Case, at: str) -> None:
    calls: list[tuple[int, int | None]] = []
    compared = case.compared(
        baselines={"weight": case.weight}, seeds=(5, 6), at=at, batch_size=7, progress=lambda *args: calls.append(args)
    )
    result = deactivate_accuracy(compared, shares=(0, 0.3, 0.8, 1.0))
    right = case.right()
    assert 0 < len(right) < len(case.images)
    assert (result.samples, result.counted) == (18, len(right))
    ours: dict[tuple[str, float], list[bool]] = {}
    for row in result.table:
        if row["criterion"] == UNTOUCHED or row["share"] == 0:
            assert row["accuracy"] == 1 and row["samples"] == len(right) and row["neurons"] == 0
            continue
        if row["criterion"] == RANDOM and row["share"] != 0.3:
            continue
        route = chosen(case, row)
        with deactivate(case.model, route, at=at):
            hits = [bool(case.predict(case.images[i]) == case.labels[i]) for i in right]
        accuracy = Accuracy(sum(hits), len(right))
        assert (row["accuracy"], row["samples"]) == (accuracy.value, accuracy.total)
        assert (row["accuracy_low"], row["accuracy_high"]) == accuracy.interval
        assert (row["neurons"], row["channels"]) == (route.size, sum(route.channels.values()))
        setting = row["layers"], row["share"]
        if row["criterion"] == ROUTE:
            ours[setting] = hits
        pairs = list(zip(ours[setting], hits, strict=True))
        assert (row["route_only"], row["control_only"]) == (pairs.count((True, False)), pairs.count((False, True)))
        assert row["p"] == sign_test(row["route_only"], row["control_only"])
    assert len(set(result.table.column("accuracy"))) > 3  # the interventions do something
    assert calls[-1][0] == calls[-1][1] and calls == sorted(calls)


def test_each_distinct_forward_pass_runs_once_a_batch(case: Case) -> None:
    with counting(case.model) as sizes:
        compared = case.compared(baselines={"weight": case.weight}, seeds=(5, 6), batch_size=6)
        result = deactivate_accuracy(compared, shares=(0, 0.3, 1.0))
    sets = {
        (row["layers"], row["share"], chosen(case, row) if row["share"] < 1 else None)
        for row in result.table
        if row["share"] > 0
    }
    # at a share of 1 all criteria choose the same, and at 0 nobody chooses any
    assert len(sizes) == 3 * (1 + len(sets))
    assert len(sets) < len(result.table)


def test_the_batches_do_not_matter_and_the_model_comes_back(case: Case) -> None:
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    tables = [
        deactivate_accuracy(case.compared(data=data, seeds=(0,), batch_size=size), shares=(0.5,))
        for data, size in (
            (case.data, 4),
            (case.data, 30),
            ([(case.images[:9], case.labels[:9]), (case.images[9:], case.labels[9:])], 1),
        )
    ]
    assert tables[0].table == tables[1].table == tables[2].table
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())
    assert all(torch.equal(value, state[name]) for name, value in case.model.state_dict().items())


def test_random_sets_are_missing_where_they_would_reach_the_route(case: Case) -> None:
    table = deactivate_accuracy(case.compared(seeds=(0,)), shares=(0.3, 0.9), together=())
    layer = case.route.layers[0]
    assert len(table.values(Setting((layer,), 0.3), RANDOM)) == 1 and not table.values(Setting((layer,), 0.9), RANDOM)
    assert len(table.values(Setting((layer,), 0.9), ROUTE)) == 1


def table_of(
    route: list[int], draws: list[list[int]], other: list[int], kind: type[InterventionTable] = Deactivation
) -> InterventionTable:
    """A table of one layer a number, out of 40 samples; what a control gets right beyond the route is its own."""

    def row(setting: Setting, criterion: str, draw: int | None, value: int, ours: int) -> Record:
        trial = Trial(setting, criterion, draw, Route({"layer": [2]}, {"layer": 4}))
        return trial.row(Accuracy(value, 40), max(0, ours - value), max(0, value - ours), network=12)

    rows = [row(Setting((), 0.0), UNTOUCHED, None, 40, 40)]
    settings = tuple(Setting((f"layer{number}",), 0.3) for number in range(len(route)))
    for number, (setting, ours) in enumerate(zip(settings, route, strict=True)):
        controls = [(RANDOM, draw, value) for draw, value in enumerate(draws[number])]
        for criterion, draw, value in [(ROUTE, None, ours), *controls, ("weight", None, other[number])]:
            rows.append(row(setting, criterion, draw, value, ours))
    about: dict[str, Any] = {"main_share": 0.3, "at": "output", "samples": 50, "counted": 40}
    return kind(table=Table.of(rows), settings=settings, **about)


def test_verdicts_are_clear_only_against_every_draw() -> None:
    numbers = [10, 20, 30], [[30, 20], [30, 28], [29, 31]], [11, 10, 40]
    table = table_of(*numbers)
    columns = "clearly_stronger", "clearly_weaker", "draws", "verdict"
    random = table.verdicts.select(control=RANDOM)
    assert [tuple(row[name] for name in columns) for row in random] == [
        (2, 0, 2, "beats"), (2, 0, 2, "beats"), (0, 0, 2, "undecided against"),
    ]  # fmt: skip
    assert random[0]["accuracy_difference"] == pytest.approx(10 / 40 - 25 / 40)
    assert table.verdicts.select(control="weight").column("verdict") == ["undecided against", "loses to", "beats"]
    assert sign_test(0, 10) < 0.05 and sign_test(1, 0) == 1
    assert "every random draw in 2 (loses in 0) of 3, weight in 1 (loses in 1) of 3" in table.reading()
    assert "at its output" in table.reading()
    helpful = table_of(*numbers, kind=Transplantation)
    verdicts = helpful.verdicts.select(control=RANDOM).column("verdict")
    assert verdicts == ["loses to", "loses to", "undecided against"]


def test_the_document_holds_every_number(case: Case, tmp_path: Path) -> None:
    result = deactivate_accuracy(case.compared(baselines={"weight": case.weight}, seeds=(1,)), shares=(0.5,))
    result.document({"seed": 1}, seconds=2.5).save(tmp_path)
    document = Document.load(tmp_path / "deactivate.json")
    assert (document.reading, document.table, document.settings) == (result.reading(), result.table, {"seed": 1})
    about = document.about
    assert (about["at"], about["counted"], about["seconds"]) == ("output", len(case.right()), 2.5)
    assert document.table.columns[:5] == ("attack", "layers", "share", "beta", "criterion")
    assert {verdict["verdict"] for verdict in about["verdicts"]} <= {"beats", "loses to", "undecided against"}


def test_bad_input_is_one_line(case: Case) -> None:
    wrong = (case.labels + 1) % 5
    with torch.no_grad():
        wrong = (case.model(case.images).argmax(1) + 1) % 5
    attempts = [
        ({"data": (case.images, wrong)}, {}, "none of the 18 samples right"),
        ({"data": case.images}, {}, "no labels"),
        ({}, {"layers": ["99"]}, "no layer '99'"),
        ({"share": -1.0}, {}, "-1.0 is outside"),
        ({"at": "outputs"}, {}, "did you mean output"),
        ({"data": (case.images, case.labels + 7)}, {}, "outside the model's 5 logits"),
    ]
    for compared, options, message in attempts:
        with pytest.raises(UserError, match=message) as error:
            deactivate_accuracy(case.compared(seeds=(0,), **compared), **options)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
