"""Deactivation of a growing share of channels, against one sample and one set at a time."""

from __future__ import annotations

import json

import pytest
import torch

from attackroute.analysis.accuracy_table import UNTOUCHED, AccuracyTable, Cost, Row, Setting
from attackroute.analysis.deactivation import deactivation_accuracy
from attackroute.analysis.interventions import deactivate
from attackroute.analysis.rankings import RANDOM, ROUTE
from attackroute.analysis.tables import csv_text, to_json
from attackroute.core.accuracy import Accuracy
from attackroute.core.errors import UserError
from attackroute.core.statistics import sign_test
from attackroute.routes.route import Route
from experiment_samples import Case, counting, make_case


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case()


def chosen(case: Case, row: Row) -> Route:
    """The row's channels, by another way than the experiment's."""
    if row.criterion == ROUTE:
        whole = case.routes.aggregate(row.setting.share)
    elif row.criterion == "weight":
        whole = case.weight.route(row.setting.share)
    else:
        assert row.criterion == RANDOM and row.setting.share == 0.3 and row.draw is not None
        whole = case.route.random_like(row.draw)
    return whole.restrict(row.setting.layers)


@pytest.mark.parametrize("at", ["output", "activation"])
def test_every_number_is_that_of_one_sample_at_a_time(case: Case, at: str) -> None:
    calls: list[tuple[int, int | None]] = []
    with counting(case.model) as sizes:
        table = deactivation_accuracy(
            case.model, case.data, case.route, {"weight": case.weight}, seeds=(5, 6), shares=(0, 0.3, 0.8, 1.0), at=at,
            batch_size=7, progress=lambda *args: calls.append(args),
        )  # fmt: skip
    right = case.right()
    assert 0 < len(right) < len(case.images)
    assert table.cost == Cost(30, len(right), 5, len(sizes))
    hits: dict[Row, list[bool]] = {}
    for row in table.rows:
        if row.criterion == UNTOUCHED or row.setting.share == 0:
            assert row.accuracy == Accuracy(len(right), len(right)) and row.neurons == 0
            continue
        if row.criterion == RANDOM and row.setting.share != 0.3:
            continue
        route = chosen(case, row)
        with deactivate(case.model, route, at=at):
            hits[row] = [case.predict(case.images[i]) == case.labels[i] for i in right]
        assert row.accuracy == Accuracy(sum(hits[row]), len(right))
        assert (row.neurons, row.channels) == (route.size, sum(route.channels.values()))
    ours = {row.setting: values for row, values in hits.items() if row.criterion == ROUTE}
    for row, values in hits.items():
        pairs = list(zip(ours[row.setting], values, strict=True))
        assert (row.route_only, row.control_only) == (pairs.count((True, False)), pairs.count((False, True)))
    assert len({row.accuracy for row in table.rows}) > 3  # the interventions do something
    assert calls[-1][0] == calls[-1][1] and calls == sorted(calls)


def test_each_distinct_forward_pass_runs_once_a_batch(case: Case) -> None:
    with counting(case.model) as sizes:
        table = deactivation_accuracy(
            case.model,
            case.data,
            case.route,
            {"weight": case.weight},
            seeds=(5, 6),
            shares=(0, 0.3, 1.0),
            batch_size=10,
        )
    sets = {
        (row.setting.layers, row.setting.share, chosen(case, row) if row.setting.share < 1 else None)
        for row in table.rows
        if row.setting.share > 0
    }
    # at a share of 1 all criteria choose the same, and at 0 nobody chooses any
    assert len(sizes) == table.cost.forward_passes == 3 * (1 + len(sets))
    assert len(sets) < len(table.rows)


def test_the_batches_do_not_matter_and_the_model_comes_back(case: Case) -> None:
    state = {name: value.clone() for name, value in case.model.state_dict().items()}
    tables = [
        deactivation_accuracy(case.model, data, case.route, seeds=(0,), shares=(0.5,), batch_size=size)
        for data, size in (
            (case.data, 4),
            (case.data, 30),
            ([(case.images[:9], case.labels[:9]), (case.images[9:], case.labels[9:])], 1),
        )
    ]
    assert tables[0].rows == tables[1].rows == tables[2].rows
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in case.model.modules())
    assert all(torch.equal(value, state[name]) for name, value in case.model.state_dict().items())


def test_random_sets_are_missing_where_they_would_reach_the_route(case: Case) -> None:
    table = deactivation_accuracy(case.model, case.data, case.route, seeds=(0,), shares=(0.3, 0.9), together=())
    layer = case.route.layers[0]
    assert len(table.values(Setting((layer,), 0.3), RANDOM)) == 1 and not table.values(Setting((layer,), 0.9), RANDOM)
    assert len(table.values(Setting((layer,), 0.9), ROUTE)) == 1


def table_of(route: list[int], draws: list[list[int]], rival: list[int]) -> AccuracyTable:
    """A table of one layer a number, out of 40 samples; what a control gets right beyond the route is its own."""
    rows = [Row(Setting((), 0.0), UNTOUCHED, None, 0, 0, Accuracy(40, 40), 0, 0)]
    for number, ours in enumerate(route):
        setting = Setting((f"layer{number}",), 0.3)
        rows.append(Row(setting, ROUTE, None, 1, 4, Accuracy(ours, 40), 0, 0))
        controls = [(RANDOM, draw, value) for draw, value in enumerate(draws[number])]
        for criterion, draw, value in [*controls, ("weight", None, rival[number])]:
            only = max(0, ours - value), max(0, value - ours)
            rows.append(Row(setting, criterion, draw, 1, 4, Accuracy(value, 40), *only))
    return AccuracyTable("deactivate", tuple(rows), 0.3, False, "output", Cost(50, 40, 1, 9), 12)


def test_verdicts_are_clear_only_against_every_draw() -> None:
    table = table_of([10, 20, 30], [[30, 20], [30, 28], [29, 31]], [11, 10, 40])
    found = {(v.setting.layers[0], v.criterion): v for v in table.verdicts()}
    random = [found[f"layer{number}", RANDOM] for number in range(3)]
    assert [(v.stronger, v.weaker, v.draws, v.verdict) for v in random] == [
        (2, 0, 2, "beats"), (2, 0, 2, "beats"), (0, 0, 2, "undecided against"),
    ]  # fmt: skip
    assert random[0].difference == pytest.approx(10 / 40 - 25 / 40)
    assert [found[f"layer{number}", "weight"].verdict for number in range(3)] == [
        "undecided against", "loses to", "beats",
    ]  # fmt: skip
    assert sign_test(0, 10) < 0.05 and sign_test(1, 0) == 1
    assert "every random draw in 2 (loses in 0) of 3, weight in 1 (loses in 1) of 3" in table.reading()
    assert "at its output" in table.reading()
    helpful = AccuracyTable("transplant", table.rows, 0.3, True, "output", table.cost, 12)
    assert [v.verdict for v in helpful.verdicts() if v.criterion == RANDOM] == ["loses to"] * 2 + ["undecided against"]


def test_the_table_as_json_and_csv_holds_every_number(case: Case) -> None:
    table = deactivation_accuracy(case.model, case.data, case.route, {"weight": case.weight}, seeds=(1,), shares=(0.5,))
    plain = json.loads(json.dumps(to_json(table), allow_nan=False))
    assert plain["reading"] == table.reading() and plain["at"] == "output" and plain["counted"] == len(case.right())
    assert [row["accuracy"] for row in plain["rows"]] == [row.accuracy.value for row in table.rows]
    lines = csv_text(table.records()).splitlines()
    assert len(lines) == 1 + len(table.rows) and lines[0].split(",")[:4] == ["attack", "layers", "share", "beta"]
    assert {verdict["verdict"] for verdict in plain["verdicts"]} <= {"beats", "loses to", "undecided against"}


def test_bad_input_is_one_line(case: Case) -> None:
    wrong = (case.labels + 1) % 5
    with torch.no_grad():
        wrong = (case.model(case.images).argmax(1) + 1) % 5
    attempts = [
        ({"data": (case.images, wrong)}, "none of the 30 samples right"),
        ({"data": case.images}, "no labels"),
        ({"layers": ["99"]}, "no layer '99'"),
        ({"shares": (1.2,)}, "share 1.2 is outside"),
        ({"share": -1.0}, "share -1.0 is outside"),
        ({"at": "outputs"}, "did you mean output"),
        ({"data": (case.images, case.labels + 7)}, "outside the model's 5 logits"),
    ]
    for options, message in attempts:
        settings = {"data": case.data, "seeds": (0,), **options}
        with pytest.raises(UserError, match=message) as error:
            deactivation_accuracy(case.model, settings.pop("data"), case.route, **settings)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
