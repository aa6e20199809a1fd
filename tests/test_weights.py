"""Weights from files: what is loaded, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError
from attackroute.core.files import sealed_weights
from attackroute.zoo.networks import build_model
from attackroute.zoo.weights import ModelCard, load_weights
from model_checks import Trap, one_line, randomise


def prefixed(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in model.state_dict().items()}


SAVED: dict[str, Callable[[nn.Module], object]] = {
    "weights": lambda model: model.state_dict(),
    "checkpoint": lambda model: {"epoch": 3, "state_dict": model.state_dict(), "best": 0.5},
    "model key": lambda model: {"model": model.state_dict(), "args": {"lr": 0.1}},
    "parallel": lambda model: prefixed(model, "module."),
    "without counters": lambda model: {
        name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")
    },
    "half": lambda model: {name: value.bfloat16() for name, value in model.state_dict().items()},
    "compiled": lambda model: {"model_state_dict": prefixed(model, "_orig_mod.")},
    "averaged": lambda model: {
        "net": torch.optim.swa_utils.AveragedModel(model).state_dict(),
        "acc": np.float64(0.5), "best": np.float32(0.5), "epoch": 3,
    },
    "lightning": lambda model: {
        "state_dict": {**prefixed(model, "model."), "criterion.weight": torch.ones(10)}, "args": Namespace(lr=0.1),
        "optimizer": {"state": {0: {"step": torch.ones(1)}}},
    },
    "robustness": lambda model: {
        "model": {
            "module.normalizer.new_mean": model.normalise.mean, "module.normalizer.new_std": model.normalise.std,
            **prefixed(model, "module.model."), **prefixed(model, "module.attacker.model."),
        },
        "epoch": 3,
    },
}  # fmt: skip


class TestWeights:
    @pytest.mark.parametrize("kind", [*SAVED, "safetensors"])
    def test_load(self, kind: str, tmp_path: Path) -> None:
        source, target = build_model("vgg_small").eval(), build_model("vgg_small").eval()
        randomise(source)
        if kind == "safetensors":
            path = tmp_path / "w.safetensors"
            safetensors.torch.save_file(source.state_dict(), path)
        else:
            path = tmp_path / "weights.pt"
            torch.save(SAVED[kind](source), path)
        images = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            assert not torch.allclose(target(images), source(images))
            load_weights(target, path)
            tolerance = 0.1 if kind == "half" else 1e-5
            torch.testing.assert_close(target(images), source(images), rtol=tolerance, atol=tolerance)
        assert {value.dtype for value in target.parameters()} == {torch.float32}

    def test_keep_the_prefix_where_the_model_has_it_too(self, tmp_path: Path) -> None:
        source = nn.Sequential()
        source.add_module("module", nn.Linear(2, 2))
        target = copy.deepcopy(source)
        nn.init.zeros_(source.get_parameter("module.weight"))
        torch.save(source.state_dict(), tmp_path / "w.pt")
        load_weights(target, tmp_path / "w.pt")
        assert not target.get_parameter("module.weight").any()

    def test_name_at_most_three_faults_and_change_nothing(self, tmp_path: Path) -> None:
        model = build_model("vgg_small")
        before = copy.deepcopy(model.state_dict())
        state = build_model("vgg_small", num_classes=3).state_dict()
        del state["features.0.bias"], state["features.1.num_batches_tracked"]
        state["extra.weight"] = torch.zeros(2, 5)
        torch.save(state, tmp_path / "w.pt")
        faults = ("classifier.weight is (3, 64) instead of (10, 64)", "classifier.bias is (3,) instead of (10,)")
        with one_line(*faults, "features.0.bias (16,) is missing", "and 1 more") as error:
            load_weights(model, tmp_path / "w.pt")
        message = str(error.value)
        assert "extra.weight" not in message and "num_batches_tracked" not in message
        assert message.index("classifier.weight") < message.index("classifier.bias")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        torch.save({**before, "head.weight": torch.zeros(2, 5)}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"head.weight \(2, 5\) is unexpected; check"):
            load_weights(model, tmp_path / "w.pt")

    def test_of_several_networks_one_must_be_named(self, tmp_path: Path) -> None:
        state = build_model("vgg_small").state_dict()
        torch.save({"model": state, "ema": state, "optimizer": {"lr": 0.1}}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"several networks that fit \(model, ema\); save the one"):
            load_weights(build_model("vgg_small"), tmp_path / "w.pt")

    def test_of_another_normaliser_are_refused(self, tmp_path: Path) -> None:
        state = {f"1.{name}": value for name, value in build_model("vgg_small").state_dict().items()}
        torch.save({**state, "0.mu": torch.full((3, 1, 1), 0.5), "0.sigma": torch.ones(3, 1, 1)}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"normaliser \(0.mu, 0.sigma\): give the model mean \[0.5, 0.5, 0.5\]"):
            load_weights(build_model("vgg_small"), tmp_path / "w.pt")
        load_weights(build_model("vgg_small", mean=[0.5] * 3, std=[1] * 3), tmp_path / "w.pt")

    def test_of_other_kinds_of_numbers(self, tmp_path: Path) -> None:
        state = build_model("vgg_small").state_dict()
        name, path = "classifier.weight", tmp_path / "w.pt"
        for value in (state[name].to(torch.complex64), state[name].to("meta"), state[name].to_sparse()):
            torch.save({**state, name: value}, path)
            with pytest.raises(UserError, match=f"{name} is .*; save plain tensors"):
                load_weights(build_model("vgg_small"), path)
        torch.save({**state, name: state[name].long()}, path)
        with pytest.warns(UserWarning, match=r"no floating numbers in classifier.weight \(torch.int64\)"):
            load_weights(build_model("vgg_small"), path)

    @pytest.mark.parametrize("kind", [".pt", ".safetensors"])
    def test_a_flipped_bit_is_found(self, kind: str, tmp_path: Path) -> None:
        path, model = tmp_path / f"best{kind}", build_model("vgg_small")
        if kind == ".pt":
            torch.save(model.state_dict(), path)
        else:
            path.write_bytes(sealed_weights(model.state_dict()))
        load_weights(model, path)
        content = path.read_bytes()
        for place in range(len(content) // 3, len(content), len(content) // 7):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            with pytest.raises(UserError, match="damaged"):
                load_weights(model, path)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (build_model("vgg_small", width=0.1), "not a state dict"),  # a whole model
            ([1, 2], "hold a list, not a state dict"),
            ({}, "hold a dict, not a state dict"),
            ({"epoch": 3, "lr": 0.1}, "hold a dict of epoch, lr, not a state dict"),
            (torch.zeros(3), "hold a Tensor, not"),
            ({"state_dict": {"weight": "text"}}, "hold a dict of state_dict, not"),
        ],
    )
    def test_refuse_what_is_no_state_dict(self, content: object, expected: str, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "w.pt")
        with one_line(expected):
            load_weights(build_model("vgg_small"), tmp_path / "w.pt")

    def test_never_run_code_from_a_pickle(self, tmp_path: Path) -> None:
        trap = Trap(tmp_path / "ran")
        for name, content in (("plain.pkl", pickle.dumps(trap)), ("empty.pt", b""), ("text.pt", b"hello")):
            (tmp_path / name).write_bytes(content)
            with one_line(name):
                load_weights(build_model("vgg_small"), tmp_path / name)
        torch.save({"weight": trap}, tmp_path / "evil.pt")
        with pytest.raises(UserError):
            load_weights(build_model("vgg_small"), tmp_path / "evil.pt")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    @pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
    def test_refuse_truncated_files(self, suffix: str, kept: float, tmp_path: Path) -> None:
        path = tmp_path / f"w{suffix}"
        model = build_model("vgg_small")
        if suffix == ".pt":
            torch.save(model.state_dict(), path)
        else:
            safetensors.torch.save_file(model.state_dict(), path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * kept)])
        with one_line(str(path)):
            load_weights(model, path)

    def test_refuse_folders_and_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is a folder"):
            load_weights(build_model("vgg_small"), tmp_path)
        with pytest.raises(UserError, match="do not exist"):
            load_weights(build_model("vgg_small"), tmp_path / "none.pt")
        os.mkfifo(tmp_path / "pipe.pt")
        for path in (tmp_path / "pipe.pt", "/dev/zero", "~no-such-user/w.pt", "x" * 5000):
            with pytest.raises(UserError, match=r"cannot be read|names no file"):
                load_weights(build_model("vgg_small"), path)


NESTED = "[" * 100_000
GOOD = {"name": "vgg_small", "num_classes": 2, "width": 0.1}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"width": 1e9}, "width must be a number above 0, at most 64, not 1000000000.0"),
        ({"width": "wide"}, "width must be a number"),
        ({"num_classes": 4.5}, "num_classes must be a whole number from 1 to 1000000, not 4.5"),
        ({"num_classes": True}, "num_classes must be a whole number"),
        ({"image_size": 33.5}, "image_size must be a whole number"),
        ({"image_size": 1e9}, "image_size must be a whole number"),
        ({"mean": ["0", 0, 0]}, "mean must be numbers"),
        ({"mean": "000"}, "mean must be numbers"),
        ({"name": None}, "name must be a string"),
        ({"deep": 3}, "a network has no 'deep'"),
    ],
)
def test_a_card_names_the_wrong_field(change: dict[str, object], expected: str, tmp_path: Path) -> None:
    card = {"format": "attackroute model", "version": 1, "classes": ["a", "b"], "model": {**GOOD, **change}}
    (tmp_path / "model.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=rf"model\.json: .*{expected}"):
        ModelCard.load(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"format": "attackroute model", "version": 1, "model": {}, "classes": [null]}', NESTED, "null", "{}", ""]
)
def test_a_card_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.json: "):
        ModelCard.load(tmp_path)
