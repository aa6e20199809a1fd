"""``attackroute evaluate`` on a folder of tiny pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import attackroute as ar
from attackroute.robustness import evaluate
from attackroute.zoo.weights import load_weights
from command_line import refused
from command_line import run as run_command
from report_runs import make_network, make_pictures

SIZE = 32
QUICK = ("--batch-size", 4, "--check-samples", 3, "--device", "cpu")


def run(*arguments: object):
    return run_command("evaluate", *arguments)


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch):
    monkeypatch.setattr("attackroute.robustness.masking._QUERIES", 3)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """10 pictures of two classes, dark and bright."""
    root = tmp_path_factory.mktemp("pictures") / "classes"
    make_pictures(root, 5)
    return root


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("one", "two")):
        make_network(root / name, seed)
    return root / "one", root / "two"


def arguments(net: Path, pictures: Path) -> tuple[object, ...]:
    return ("--model", net, "--data", f"folder:{pictures}", *QUICK)


def test_files_and_json_agree_with_the_python_interface(nets, pictures, tmp_path):
    one, two = nets
    result = run(
        *arguments(one, pictures), "--model", two, "--attack", "fgsm", "--attack", "pgd:steps=2", "--eps", "1/10",
        "--attack", "gaussian-noise:std=0.08", "--seed", 3, "--out", tmp_path, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)

    models = {}
    for folder in nets:
        models[str(folder)] = ar.build_model("vgg_small", num_classes=2, width=0.25)
        load_weights(models[str(folder)], folder / "best.safetensors")
    data = ar.load_data(f"folder:{pictures}")
    images = torch.stack([image for image, _ in data.dataset])
    labels = torch.tensor([label for _, label in data.dataset])
    expected = ar.evaluate(
        models, (images, labels), ["fgsm:eps=0.1", "pgd:eps=0.1,steps=2", "gaussian-noise:std=0.08"],
        batch_size=4, seed=3, checks=3,
    )  # fmt: skip
    for rows in (printed["rows"], json.loads((tmp_path / "evaluation.json").read_text())["rows"]):
        assert [(row["model"], row["attack"], row["correct"], row["samples"]) for row in rows] == [
            (row["model"], row["attack"], row["correct"], row["samples"]) for row in expected.table
        ]
    assert printed["about"]["checks"] == [check.to_json() for check in expected.checks]
    assert (printed["settings"]["data"], printed["settings"]["images"]) == (f"folder:{pictures}", [10, 3, SIZE, SIZE])
    with (tmp_path / "evaluation.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in table] == expected.table.column("accuracy")
    assert [row["seed"] for row in table[:4]] == ["", "", "3", "3"]


def test_tables_and_default_attacks(nets, pictures):
    result = run(*arguments(nets[0], pictures), "--samples", 5)
    assert result.exit_code == 0, result.output
    for part in ("clean", "fgsm", "mi-fgsm", "pgd", "gaussian", "masked gradients, "):
        assert part in result.stdout
    assert "of 5 clean images" in result.stdout
    without = run(*arguments(nets[0], pictures), "--samples", 5, "--attack", "fgsm", "--check-samples", 0)
    assert "masked gradients, " not in without.stdout
    assert "no check for masked gradients" in without.stdout
    quiet = run(*arguments(nets[0], pictures), "--attack", "fgsm", "--check-samples", 0, "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")


def test_eps_fills_what_attacks_leave_open(nets, pictures):
    result = run(
        *arguments(nets[0], pictures), "--attack", "fgsm", "--attack", "mi-fgsm:eps=0.3", "--attack", "gaussian-noise",
        "--eps", 0.1, "--check-samples", 0, "--json",
    )  # fmt: skip
    rows = json.loads(result.stdout)["rows"]
    assert [row["eps"] for row in rows] == [None, 0.1, 0.3, None]


def test_the_same_network_with_other_weights(nets, pictures):
    one, two = nets
    result = run(
        "--model", "vgg_small", "--model", "vgg_small", "--model-width", 0.25, "--weights", one / "best.safetensors",
        "--weights", two / "best.safetensors", "--data", f"folder:{pictures}", "--attack", "clean",
        "--check-samples", 0, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    names = [str(folder / "best.safetensors") for folder in nets]
    assert [row["model"] for row in content["rows"]] == names
    assert len({content["settings"]["models"][name] for name in names}) == 2
    assert content["settings"]["model_names"] == dict.fromkeys(names, "vgg_small")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a crash")])
def test_an_interrupted_evaluation_goes_on_to_the_same_numbers(nets, pictures, tmp_path, monkeypatch, error):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = (*arguments(nets[0], pictures), "--attack", "fgsm", "--attack", "gaussian-noise")
    assert run(*options, "--out", whole).exit_code == 0
    real, calls = evaluate._Run._predictions, []

    def breaking(self, *positional):
        calls.append(positional)
        if len(calls) == 5:
            raise error
        return real(self, *positional)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate._Run, "_predictions", breaking)
        if isinstance(error, KeyboardInterrupt):
            result = run(*options, "--out", broken)
            assert (result.exit_code, result.stdout) == (130, "")
            assert "--resume" in result.stderr
        else:
            with pytest.raises(RuntimeError):
                run(*options, "--out", broken)
    assert [path.name for path in broken.iterdir()] == ["measurements.jsonl"]
    refused(run(*options, "--out", broken), "already holds", "--resume")
    refused(run(*options, "--samples", 9, "--out", broken, "--resume"), "samples", "9")
    refused(run(*options, "--split", "train", "--seed", 1, "--out", broken, "--resume"), "seed")
    assert run(*options, "--out", broken, "--resume").exit_code == 0

    def timeless(folder: Path):
        content = json.loads((folder / "evaluation.json").read_text())
        return {**content, "rows": [{**row, "seconds": 0} for row in content["rows"]]}

    assert timeless(broken) == timeless(whole)


class TestBadInput:
    """Everything that a user can get wrong: exit code 2 and one line."""

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            (("--attack", "fgsm:eps=1.5"), ("eps", "1.5")),
            (("--eps", 2), ("eps", "2")),
            (("--eps", -0.1), ("eps",)),
            (("--eps", "eight"), ("eight",)),
            (("--attack", "pgd:steps=0"), ("steps",)),
            (("--attack", "pdg"), ("pdg", "did you mean pgd")),
            (("--attack", "pgd:step=3"), ("step", "did you mean")),
            (("--attack", "gaussian-noise:severity=6"), ("severity", "with std")),
            (("--check-samples", -1), ("check-samples",)),
            (("--resume",), ("--out",)),
            (("--weights", "a.pt", "--weights", "b.pt"), ("1 --model", "2 --weights")),
            (("--model", "vgg61"), ("vgg61",)),
            (("--image-size", 4), ("(1, 3, 4, 4)",)),
        ],
        ids=lambda value: None,
    )
    def test_options(self, nets, pictures, options, parts):
        refused(run(*arguments(nets[0], pictures), *options), *parts)

    def test_missing_data(self, nets, tmp_path):
        refused(run("--model", nets[0]), "--data")
        refused(run("--model", nets[0], "--data", f"folder:{tmp_path / 'none'}"), "none")

    def test_a_folder_that_is_a_file(self, nets, pictures, tmp_path):
        file = tmp_path / "file"
        file.touch()
        refused(run(*arguments(nets[0], pictures), "--out", file), file)

    def test_outputs_that_are_no_logits(self, pictures, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "odd_outputs.py").write_text(
            "from torch import nn\n"
            "def maps(): return nn.Conv2d(3, 2, 1)\n"
            "def shares(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 2), nn.Softmax(1))\n"
        )
        data = ("--data", f"folder:{pictures}", *QUICK)
        refused(run("--model", "odd_outputs:maps", *data), "logits")
        refused(run("--model", "odd_outputs:shares", *data), "softmax")
