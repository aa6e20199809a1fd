"""``attackroute train --attack`` and ``attackroute harden`` on a folder of tiny pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import attackroute
from attackroute.routes.route import Route
from attackroute.zoo.weights import load_weights
from command_line import refused, run
from report_runs import make_pictures

ATTACK = "pgd:eps=0.1,steps=2,step_size=0.05"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 12 test pictures of two classes, dark and bright."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 12), ("test", 6)):
        make_pictures(folder / split, count)
    return folder


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train folder of adversarial training."""
    folder = tmp_path_factory.mktemp("runs") / "robust"
    result = run(
        "train", "--model", "vgg_small", "--model-width", 0.2, "--data", f"folder:{pictures}", "--epochs", 2,
        "--batch-size", 8, "--attack", ATTACK, "--robust-samples", 6, "--out", folder, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["about"]["best_robust_accuracy"] is not None
    return folder


def hardened(trained: Path, pictures: Path, *arguments: object) -> Any:
    return run(
        "harden", "--model", trained, "--data", f"folder:{pictures}", "--epochs", 2, "--batch-size", 8,
        "--route-samples", 0.5, "--evaluate", "fgsm", "--evaluate", "pgd:steps=2", "--check-samples", 0,
        "--holdout", 0, *arguments,
    )  # fmt: skip


def test_adversarial_training_is_logged(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert all("robust_accuracy" in line and "test_accuracy" in line for line in lines)
    assert json.loads((trained / "settings.json").read_text())["attack"].startswith("pgd:eps=0.1,steps=2")


@pytest.mark.parametrize("penalty", ["gradient", "weight"])
def test_files_and_json_agree_with_the_python_interface(
    trained: Path, pictures: Path, tmp_path: Path, penalty: str
) -> None:
    arguments = ("--penalty", penalty, "--lam", "1/100", "--attack", ATTACK, "--json")
    result = hardened(trained, pictures, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    written = json.loads((tmp_path / "out" / "hardening.json").read_text())
    assert found == {**written, "folder": str(tmp_path / "out")}

    train, test = (attackroute.load_data(f"folder:{pictures}", split=part, image_size=32) for part in ("train", "test"))
    model = attackroute.build_model("vgg_small", num_classes=2, width=0.2, image_size=32)
    load_weights(model, trained / "best.safetensors")
    settings = attackroute.TrainSettings(epochs=2, batch_size=8, lr=0.01)
    expected = attackroute.harden(
        model, train, test, penalty=penalty, lam=0.01, attack=ATTACK,
        settings=attackroute.HardenSettings(route_samples=0.5), train=settings,
    )  # fmt: skip
    for name, value in load_file(tmp_path / "out" / "last.safetensors").items():
        assert value.equal(model.state_dict()[name]), name
    assert found["about"]["penalties"] == expected.training.last.penalties
    assert found["about"]["strengths"] == expected.strengths
    assert Route.load(tmp_path / "out" / "route.json", model) == expected.route
    rows = {(row["model"], row["attack"].partition(":")[0]) for row in found["rows"]}
    assert rows == {(name, attack) for name in ("before", "after") for attack in ("clean", "fgsm", "pgd")}
    assert "eps=0.1" in next(row["attack"] for row in found["rows"] if "fgsm" in row["attack"])


def test_hardening_resumes_and_refuses_to_overwrite(trained: Path, pictures: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert hardened(trained, pictures, "--lam", 0.01, "--out", whole).exit_code == 0
    refused(hardened(trained, pictures, "--lam", 0.01, "--out", whole), "--resume")
    shutil.copytree(whole, broken)
    result = hardened(trained, pictures, "--lam", 0.01, "--out", broken, "--resume", "--json")
    assert json.loads(result.stdout)["about"]["resumed_from"] == 2
    refused(hardened(trained, pictures, "--lam", 0.02, "--out", broken, "--resume"), "factors")
    assert (broken / "last.safetensors").read_bytes() == (whole / "last.safetensors").read_bytes()
    again = run("evaluate", "--model", whole, "--data", f"folder:{pictures}", "--attack", "fgsm", "--check-samples", 0)
    assert again.exit_code == 0, again.output


def test_images_are_held_out_of_the_training_and_choose_the_epoch(
    trained: Path, pictures: Path, tmp_path: Path
) -> None:
    result = hardened(trained, pictures, "--lam", 0.01, "--holdout", 0.25, "--out", tmp_path / "a", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert (settings["train_samples"], settings["test_samples"]) == (18, 6)
    assert found["about"]["best_epoch_by"] == "held-out images"
    assert {row["samples"] for row in found["rows"]} == {12}
    command = ("train", "--model", "vgg_small", "--model-width", 0.2, "--data", f"folder:{pictures}", "--epochs", 1)
    plain = run(*command, "--batch-size", 8, "--holdout", 0.25, "--channels-last", "--out", tmp_path / "b", "--json")
    assert plain.exit_code == 0, plain.output
    assert json.loads(plain.stdout)["about"]["tested_on"] == "held-out images"
    settings = json.loads((tmp_path / "b" / "settings.json").read_text())
    wanted = {"train_samples": 18, "channels_last": True}
    assert {name: settings[name] for name in wanted} == wanted


def test_the_comparison_has_a_radius_checks_and_an_overlap(
    trained: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attackroute.robustness.masking._QUERIES", 3)
    arguments = ("--lam", 0.01, "--out", tmp_path, "--eps", 0.5, "--check-samples", 4, "--json")
    result = hardened(trained, pictures, *arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = {(row["model"], row["attack"].partition(":")[0]): row for row in found["rows"]}
    assert "eps=0.5" in rows["before", "pgd"]["attack"] and rows["after", "fgsm"]["samples"] == 12
    assert [model for model, _ in rows] == ["before"] * 3 + ["after"] * 3
    checks = {(check["model"], check["check"]): check for check in found["about"]["evaluation"]["checks"]}
    assert checks["after", "one step against many"]["samples"] == 4
    assert found["about"]["overlap_with_full_route"]["size"] == Route.load(tmp_path / "route.json").size
    again = json.loads(hardened(trained, pictures, *arguments, "--resume").stdout)
    assert again["rows"] == found["rows"]
    assert again["about"]["evaluation"] == found["about"]["evaluation"]


def test_a_given_route_a_control_and_no_penalty(trained: Path, pictures: Path, tmp_path: Path) -> None:
    assert hardened(trained, pictures, "--lam", 0.1, "--out", tmp_path / "a").exit_code == 0
    again = hardened(trained, pictures, "--lam", 0.1, "--route", tmp_path / "a" / "route.json", "--out", tmp_path / "b")
    assert again.exit_code == 0, again.output
    weights = [(tmp_path / name / "last.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    control = hardened(trained, pictures, "--lam", 0.1, "--target", "random", "--out", tmp_path / "c")
    assert control.exit_code == 0
    none = hardened(trained, pictures, "--penalty", "none", "--out", tmp_path / "d")
    assert none.exit_code == 0, none.output
    assert not (tmp_path / "d" / "route.json").exists()


def test_a_built_in_network_with_weights_can_be_opened_again(trained: Path, pictures: Path, tmp_path: Path) -> None:
    arguments = ("--data", f"folder:{pictures}", "--epochs", 1, "--lam", 0.1, "--evaluate", "fgsm", "--image-size", 32)
    arguments += ("--check-samples", 0)
    weights = ("--weights", trained / "best.safetensors")
    result = run("harden", "--model", "vgg_small", "--model-width", 0.2, *weights, *arguments, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    again = run(
        "evaluate", "--model", tmp_path, "--data", f"folder:{pictures}", "--attack", "fgsm", "--check-samples", 0
    )
    assert again.exit_code == 0, again.output
    wide = run("harden", "--model", trained, "--model-width", 0.2, *arguments, "--out", tmp_path / "b")
    refused(wide, "--model-width")


def test_bad_input(trained: Path, pictures: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    refused(hardened(trained, pictures, *out), "--lam")
    refused(hardened(trained, pictures, "--lam", 1), "--out")
    refused(hardened(trained, pictures, "--lam", "nan", *out), "--lam", "nan")
    refused(hardened(trained, pictures, "--lam", 1, "--holdout", 1, *out), "--holdout 1")
    refused(hardened(trained, pictures, "--lam", 1, "--holdout", 0.001, *out), "24 training images")
    refused(hardened(trained, pictures, "--lam", -1, *out), "lambda")
    refused(hardened(trained, pictures, "--penalty", "none", "--lam", 1, *out), "--penalty none")
    refused(hardened(trained, pictures, "--lam", 1, "--attack", "pdg", *out), "pdg", "pgd")
    refused(hardened(trained, pictures, "--lam", 1, "--route", tmp_path / "none.json", *out), "none.json")
    refused(run("harden", "--model", "vgg_small", "--data", f"folder:{pictures}", "--lam", 1, *out), "weights")
    refused(
        run("train", "--model", "vgg_small", "--data", f"folder:{pictures}", "--attack", "pgd:steps=0", *out), "steps"
    )
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*.pt"))
