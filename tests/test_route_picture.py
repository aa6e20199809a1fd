"""The picture of a route, and how figures are saved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attackroute.analysis.controls import RANDOM, ROUTE
from attackroute.analysis.experiments.interventions import Deactivation
from attackroute.analysis.figures.accuracy import route_figure
from attackroute.analysis.figures.style import save_figure
from attackroute.analysis.intervention_table import UNTOUCHED, Setting
from attackroute.core.errors import UserError
from attackroute.core.table import Table
from attackroute.routes.route import Route


def measured() -> Deactivation:
    accuracies = [
        (ROUTE, None, (10, 50)), (RANDOM, 0, (30, 90)), (RANDOM, 1, (20, 40)), ("weight", None, (20, 60)),
    ]  # fmt: skip
    settings = tuple(Setting((f"layer{layer}",), 0.3) for layer in range(2))
    rows = [{**Setting((), 0.0).cells, "criterion": UNTOUCHED, "draw": None, "accuracy": 1.0, "samples": 100}]
    rows += [
        {**setting.cells, "criterion": criterion, "draw": draw, "accuracy": values[layer] / 100, "samples": 100}
        for layer, setting in enumerate(settings)
        for criterion, draw, values in accuracies
    ]
    return Deactivation(
        table=Table.of(rows), settings=settings, main_share=0.3, at="activation", samples=120, counted=100
    )


def test_it_shows_every_measurement(tmp_path) -> None:
    names = [f"layer{index}" for index in range(2)]
    frequency: dict[str, Tensor] = {name: torch.tensor([0.2, 1.0, 0.0, 0.5], dtype=torch.float64) for name in names}
    route = Route({name: [1] for name in names}, dict.fromkeys(names, 4), frequency)
    figure = route_figure(route, measured(), "a <title> & more")
    left, right = figure.axes[:2]
    assert [list(image.get_array()[0]) for image in left.images] == [[1.0, 0.5, 0.2, 0.0]] * 2  # most frequent first
    points = {tuple(line.get_xdata()) for line in right.lines}
    assert {(10.0,), (50.0,), (20.0,), (60.0,), (25.0,), (65.0,), (20.0, 30.0), (40.0, 90.0), (100.0, 100.0)} == {
        tuple(round(float(x), 6) for x in xs) for xs in points
    }
    png, svg = save_figure(figure, tmp_path, "route")
    assert png.read_bytes().startswith(b"\x89PNG") and "a &lt;title&gt; &amp; more" in svg.read_text()
    with pytest.raises(UserError, match="cannot write the figure"):
        save_figure(figure, tmp_path / "missing", "route")
