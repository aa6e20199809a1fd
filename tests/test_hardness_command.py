"""``attackroute hardness`` on a folder of tiny pictures: files, tables, JSON, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.utils import save_image

import attackroute as ar
from attackroute.analysis.hardness_experiment import _fooled
from attackroute.zoo.data import ImageBatches, load_data
from attackroute.zoo.weights import open_network
from command_line import refused, run
from report_runs import make_pictures


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes, and a trained network."""
    root = tmp_path_factory.mktemp("hardness")
    for split, count in (("train", 24), ("test", 12)):
        make_pictures(root / "pictures" / split, count)
    result = run(
        "train", "--model", "vgg_small", "--model-width", 0.2, "--data", f"folder:{root / 'pictures'}", "--epochs", 4,
        "--batch-size", 8, "--lr", "0.02", "--quiet", "--out", root / "net",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return root


def hardness(home: Path, *arguments: object) -> Any:
    return run("hardness", "--model", home / "net", "--data", f"folder:{home / 'pictures'}", *arguments)


def test_everything_is_written_and_agrees(home: Path, tmp_path: Path) -> None:
    result = hardness(
        home, "--attack", "fgsm:eps=8/255", "--attack", "gaussian-noise:std=0.2", "--out", tmp_path / "out", "--json"
    )
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("note: no --route is given, so one is traced from these 24 images")
    content = json.loads(result.stdout)
    names = {f"hardness.{kind}" for kind in ("csv", "json", "png", "svg")}
    names |= {"hardness-images.csv", "measurements.jsonl"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"route.json"}
    assert content == json.loads((tmp_path / "out" / "hardness.json").read_text()) | {"folder": str(tmp_path / "out")}
    data = load_data(f"folder:{home / 'pictures'}")
    network = open_network(str(home / "net"), data)
    route = ar.Route.load(tmp_path / "out" / "route.json", model=network)
    expected = ar.hardness(network, route, ImageBatches(data))
    with (tmp_path / "out" / "hardness-images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["V"]) for row in rows] == expected.values.tolist() and len(rows) == 24
    assert content["about"]["samples"] == 24
    attacks = {"fgsm:eps=8/255", "gaussian-noise:std=0.2"}
    assert set(content["about"]["attacks"]) == {row["target"] for row in content["rows"]} == attacks
    assert (content["settings"]["data"], content["settings"]["split"]) == (f"folder:{home / 'pictures'}", "test")


def test_a_given_route_is_used_and_tables_are_shown(home: Path, tmp_path: Path) -> None:
    data = load_data(f"folder:{home / 'pictures'}", split="train")
    network = open_network(str(home / "net"), data)
    route = ar.trace_routes(network, ImageBatches(data)).aggregate(0.5)
    route.save(tmp_path / "route.json")
    result = hardness(
        home, "--route", tmp_path / "route.json", "--attack", "fgsm:eps=8/255", "--samples", 20,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert not (tmp_path / "out" / "route.json").exists()
    shown = ImageBatches(load_data(f"folder:{home / 'pictures'}", samples=20))
    with (tmp_path / "out" / "hardness-images.csv").open() as file:
        values = [float(row["V"]) for row in csv.DictReader(file)]
    assert values == ar.hardness(network, route, shown).values.tolist()
    assert "fgsm:eps=8/255 fools the model on" in result.stdout
    quiet = hardness(home, "--attack", "fgsm:eps=1/255", "--samples", 5, "--out", tmp_path / "quiet", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_bad_input_is_one_line(home: Path, tmp_path: Path) -> None:
    out = "--out", tmp_path / "out"
    ar.Route({"features.0": [0]}, {"features.0": 777}).save(tmp_path / "other.json")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "plain").mkdir()
    save_image(torch.rand(3, 32, 32), tmp_path / "plain" / "a.png")
    (tmp_path / "file").write_text("")
    refused(hardness(home, *out, "--route", tmp_path / "other.json"), "other.json", "features.0", "777 channels")
    refused(hardness(home, *out, "--route", tmp_path / "broken.json"), "broken.json")
    refused(hardness(home, *out, "--route", tmp_path / "none.json"), "none.json")
    refused(hardness(home, *out, "--samples", 1), "one sample")
    refused(hardness(home, *out, "--attack", "fgsn"), "unknown attack 'fgsn'", "fgsm")
    refused(hardness(home, *out, "--attack", "fgsm:eps=300"), "eps")
    refused(run("hardness", "--model", home / "net", "--data", f"folder:{tmp_path / 'plain'}", *out), str(tmp_path))
    refused(hardness(home, "--out", tmp_path / "file"), str(tmp_path / "file"))
    refused(hardness(home), "--out")


def test_a_broken_run_goes_on_to_the_same_result(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--attack", "pgd:eps=8/255,steps=2", "--attack", "fgsm:eps=8/255", "--batch-size", 4, "--seed", 3)
    whole = hardness(home, *words, "--out", tmp_path / "whole", "--json")
    attacks: list[int] = []

    def counted(*args: Any) -> Any:
        attacks.append(1)
        if len(attacks) == 6:
            raise KeyboardInterrupt
        return _fooled(*args)

    monkeypatch.setattr("attackroute.analysis.hardness_experiment._fooled", counted)
    assert hardness(home, *words, "--out", tmp_path / "broken").exit_code == 130
    refused(hardness(home, *words, "--out", tmp_path / "broken"), "--resume")
    refused(hardness(home, *words[2:], "--out", tmp_path / "broken", "--resume"), "has attacks")
    attacks[:] = [1] * 10
    resumed = hardness(home, *words, "--out", tmp_path / "broken", "--resume", "--json")
    assert resumed.exit_code == 0, resumed.output
    assert len(attacks) == 10 + 6 * 2 - 4  # two batches of the six were judged
    assert json.loads(resumed.stdout)["rows"] == json.loads(whole.stdout)["rows"]
    files = [(tmp_path / folder / "hardness-images.csv").read_bytes() for folder in ("whole", "broken")]
    assert files[0] == files[1]
