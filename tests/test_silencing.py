"""Silencing a route beside its controls, its table, and its picture."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from architectures import chain, randomised
from attackroute.accuracy import Accuracy, count_correct
from attackroute.errors import UserError
from attackroute.experiments.silencing import RANDOM, ROUTE, Row, Silencing, silence, spread
from attackroute.figures import route_figure, save_figure
from attackroute.interventions import deactivate
from attackroute.routes import Route
from attackroute.trace import trace_routes


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, TensorDataset, Route, Route]:
    torch.manual_seed(0)
    model = randomised(chain()).eval()
    images = torch.rand(40, 3, 13, 13)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[::4] = (labels[::4] + 1) % 5  # some samples that the network gets wrong
    route = trace_routes(model, (images, labels)).aggregate(0.3)
    return model, TensorDataset(images, labels), route, route.random_like(7)


def test_each_row_is_what_silencing_that_layer_leaves(case: tuple[nn.Module, TensorDataset, Route, Route]) -> None:
    model, data, route, rival = case
    calls: list[tuple[int, int | None]] = []
    found = silence(
        model, data, route, {"rival": rival}, seeds=(3, 4), at="output", progress=lambda *at: calls.append(at)
    )
    assert found.baseline == count_correct(model, data) == Accuracy(30, 40)
    assert [(row.criterion, row.draw) for row in found.rows[:4]] == [
        (ROUTE, None),
        (RANDOM, 3),
        (RANDOM, 4),
        ("rival", None),
    ]
    assert len(found.rows) == 4 * len(route) and calls == [(i + 1, len(found.rows)) for i in range(len(found.rows))]
    choices = {ROUTE: route, "rival": rival}
    for row in found.rows:
        choice = choices.get(row.criterion) or route.random_like(row.draw or 0)
        with deactivate(model, choice, [row.layer]):
            assert row.accuracy == count_correct(model, data)
        assert row.silenced == len(route[row.layer])


def table(route: list[float], rival: list[float], draws: list[list[float]]) -> Silencing:
    def row(layer: int, criterion: str, draw: int | None, value: float) -> Row:
        return Row(f"layer{layer}", criterion, draw, 1, 4, Accuracy(round(100 * value), 100))

    rows: list[Row] = []
    for layer in range(len(route)):
        rows.append(row(layer, ROUTE, None, route[layer]))
        rows += [row(layer, RANDOM, seed, value) for seed, value in enumerate(draws[layer])]
        rows.append(row(layer, "weight", None, rival[layer]))
    return Silencing(tuple(rows), Accuracy(90, 100), "activation")


def test_the_sentence_counts_layers_in_which_the_route_costs_strictly_more() -> None:
    found = table([0.1, 0.5, 0.5], [0.2, 0.5, 0.4], [[0.3, 0.2], [0.9, 0.4], [0.6, 0.7]])
    assert "2 of 3 against every random draw, 1 of 3 against the choice by weight" in found.reading()
    assert found.values("layer1", RANDOM) == [0.9, 0.4]
    assert spread([0.9, 0.4]) == "65.0% (40 to 90)" and spread([0.5]) == "50.0%"
    plain = json.loads(json.dumps(found.to_json()))
    assert plain["rows"][1]["draw"] == 0 and plain["baseline"]["accuracy"] == 0.9


def test_the_picture_shows_every_measurement(tmp_path, case: tuple[nn.Module, TensorDataset, Route, Route]) -> None:
    names = [f"layer{index}" for index in range(2)]
    frequency: dict[str, Tensor] = {name: torch.tensor([0.2, 1.0, 0.0, 0.5], dtype=torch.float64) for name in names}
    route = Route({name: [1] for name in names}, dict.fromkeys(names, 4), frequency)
    figure = route_figure(route, table([0.1, 0.5], [0.2, 0.6], [[0.3, 0.2], [0.9, 0.4]]), "a <title> & more")
    left, right = figure.axes[:2]
    assert [list(image.get_array()[0]) for image in left.images] == [[1.0, 0.5, 0.2, 0.0]] * 2  # most frequent first
    points = {tuple(line.get_xdata()) for line in right.lines}
    assert {(10.0,), (50.0,), (20.0,), (60.0,), (25.0,), (65.0,), (20.0, 30.0), (40.0, 90.0), (90.0, 90.0)} == {
        tuple(round(float(x), 6) for x in xs) for xs in points
    }
    png, svg = save_figure(figure, tmp_path, "route")
    assert png.read_bytes().startswith(b"\x89PNG") and "a &lt;title&gt; &amp; more" in svg.read_text()
    with pytest.raises(UserError, match="cannot write the figure"):
        save_figure(figure, tmp_path / "missing", "route")
    with pytest.raises(UserError, match="no frequencies"):
        route_figure(case[2].random_like(0) | case[2], table([0.1], [0.1], [[0.1]]), "")
