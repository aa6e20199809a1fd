"""The networks that come with the package: small, whole, in float16, and as accurate as they say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from attackroute.core.errors import UserError
from attackroute.core.statistics import count_correct
from attackroute.zoo.data import load_data
from attackroute.zoo.weights import ModelCard, load_preset, preset_folder, preset_names
from command_line import run as run_command

NAMES = preset_names()
_DATA = "ATTACKROUTE_CIFAR10"


def training(name: str) -> dict[str, Any]:
    """How a preset says that it was trained."""
    return json.loads((preset_folder(name) / "training.json").read_bytes())


def test_there_is_one_for_each_network_of_the_paper() -> None:
    assert {"alexnet-cifar10", "resnet18-cifar10", "vgg16-cifar10"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_small_whole_and_ready(name: str) -> None:
    folder = preset_folder(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4e6
    stored = load_file(folder / "best.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert all(value.isfinite().all() for value in stored.values())
    model = load_preset(name)
    assert not model.training and {value.dtype for value in model.parameters()} == {torch.float32}
    state = model.state_dict()
    assert all(torch.equal(state[key], value.float()) for key, value in stored.items())
    card = ModelCard.load(folder)
    assert card.classes[0] == "airplane" and len(card.classes) == 10
    logits = model(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 10) and logits.isfinite().all()
    told = training(name)
    assert told["command"].startswith("attackroute ") and told["accuracy"]["correct"] / told["accuracy"]["total"] > 0.2
    assert "/" not in told["command"].replace("/255", "").replace("~/", "").replace("runs/", "")  # no one's machine


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(UserError, match=r"no preset 'vgg16-cifar'.*vgg16-cifar10"):
        load_preset("vgg16-cifar")


@pytest.mark.slow
@pytest.mark.skipif(_DATA not in os.environ, reason=f"{_DATA} names no data, such as cifar10:~/data")
@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_as_accurate_as_it_says(name: str) -> None:
    tests = load_data(os.environ[_DATA], split="test")
    told = training(name)["accuracy"]
    found = count_correct(load_preset(name), tests.dataset)
    assert found.total == told["total"] and abs(found.correct - told["correct"]) <= 5


def test_a_page_of_a_presets_run_opens_the_preset(tmp_path: Path) -> None:
    for number, name in enumerate(ModelCard.load(preset_folder("alexnet-cifar10")).classes):
        (tmp_path / "images" / name).mkdir(parents=True)
        pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name / "0.png")
    run, folder = tmp_path / "run", f"folder:{tmp_path / 'images'}"
    result = run_command("trace", "--model", "preset:alexnet-cifar10", "--data", folder, "--units", "std", "--out", run)
    assert result.exit_code == 0, result.output
    result = run_command("report", run)
    assert result.exit_code == 0 and "was not measured" not in result.output, result.output
