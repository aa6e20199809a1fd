"""Weights from files: what is loaded, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from attackroute.core.errors import UserError
from attackroute.core.files import sealed_weights
from attackroute.zoo.data import ImageBatches, load_data
from attackroute.zoo.networks import build_model
from attackroute.zoo.weights import ModelCard, load_weights
from model_checks import one_line, randomise


def save_torch(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def save_checkpoint(model: nn.Module, path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": model.state_dict(), "best": 0.5}, path)


def save_model_key(model: nn.Module, path: Path) -> None:
    torch.save({"model": model.state_dict(), "args": {"lr": 0.1}}, path)


def save_parallel(model: nn.Module, path: Path) -> None:
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, path)


def save_without_counters(model: nn.Module, path: Path) -> None:
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(state, path)


def save_compiled(model: nn.Module, path: Path) -> None:
    torch.save({"model_state_dict": {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}}, path)


def save_averaged(model: nn.Module, path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save({"net": averaged.state_dict(), "acc": np.float64(0.5), "best": np.float32(0.5), "epoch": 3}, path)


def save_lightning(model: nn.Module, path: Path) -> None:
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    content = {"state_dict": {**state, "criterion.weight": torch.ones(10)}, "args": Namespace(lr=0.1)}
    torch.save({**content, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, path)


def save_robustness(model: nn.Module, path: Path) -> None:
    normalise = model.normalise
    state = {"module.normalizer.new_mean": normalise.mean, "module.normalizer.new_std": normalise.std}
    for part in ("model", "attacker.model"):
        state |= {f"module.{part}.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, path)


def save_half(model: nn.Module, path: Path) -> None:
    torch.save({name: value.bfloat16() for name, value in model.state_dict().items()}, path)


class TestWeights:
    @pytest.mark.parametrize(
        "save",
        [
            *(save_torch, save_checkpoint, save_model_key, save_parallel, save_without_counters, save_half),
            *(save_compiled, save_averaged, save_lightning, save_robustness),
        ],
    )
    def test_load_from_what_torch_saved(self, save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        self._check(save, tmp_path / "weights.pt", exact=save is not save_half)

    def test_load_from_safetensors(self, tmp_path: Path) -> None:
        self._check(
            lambda model, path: safetensors.torch.save_file(model.state_dict(), path), tmp_path / "w.safetensors"
        )

    def _check(self, save, path: Path, exact: bool = True) -> None:  # type: ignore[no-untyped-def]
        source, target = build_model("vgg_small").eval(), build_model("vgg_small").eval()
        randomise(source)
        save(source, path)
        images = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            assert not torch.allclose(target(images), source(images))
            load_weights(target, path)
            tolerance = 1e-5 if exact else 0.1
            torch.testing.assert_close(target(images), source(images), rtol=tolerance, atol=tolerance)
        assert {value.dtype for value in target.parameters()} == {torch.float32}

    def test_keep_the_prefix_where_the_model_has_it_too(self, tmp_path: Path) -> None:
        source = nn.Sequential()
        source.add_module("module", nn.Linear(2, 2))
        target = copy.deepcopy(source)
        nn.init.zeros_(source.get_parameter("module.weight"))
        save_torch(source, tmp_path / "w.pt")
        load_weights(target, tmp_path / "w.pt")
        assert not target.get_parameter("module.weight").any()

    def test_name_at_most_three_faults_and_change_nothing(self, tmp_path: Path) -> None:
        model = build_model("vgg_small")
        before = copy.deepcopy(model.state_dict())
        state = build_model("vgg_small", num_classes=3).state_dict()
        del state["features.0.bias"], state["features.1.num_batches_tracked"]
        state["extra.weight"] = torch.zeros(2, 5)
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(UserError) as error:
            load_weights(model, tmp_path / "w.pt")
        message = one_line(error)
        assert "classifier.weight is (3, 64) instead of (10, 64)" in message
        assert "classifier.bias is (3,) instead of (10,)" in message
        assert "features.0.bias (16,) is missing" in message
        assert "and 1 more" in message and "extra.weight" not in message
        assert "num_batches_tracked" not in message
        assert message.index("classifier.weight") < message.index("classifier.bias")
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

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
            save_torch(model, path)
        else:
            path.write_bytes(sealed_weights(model.state_dict()))
        load_weights(model, path)
        content = path.read_bytes()
        for place in range(len(content) // 3, len(content), len(content) // 7):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            with pytest.raises(UserError, match="damaged"):
                load_weights(model, path)

    def test_name_what_is_unexpected(self, tmp_path: Path) -> None:
        state = {**build_model("vgg_small").state_dict(), "head.weight": torch.zeros(2, 5)}
        torch.save(state, tmp_path / "w.pt")
        with pytest.raises(UserError, match=r"head.weight \(2, 5\) is unexpected; check"):
            load_weights(build_model("vgg_small"), tmp_path / "w.pt")

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (build_model("vgg_small", width=0.1), "not a state dict"),  # a whole model
            ([1, 2], "type list, not a state dict"),
            ({}, "hold nothing"),
            ({"epoch": 3, "lr": 0.1}, "'epoch' is of type int, not a tensor"),
            (torch.zeros(3), "type Tensor, not"),
            ({"state_dict": {"weight": "text"}}, "'weight' is of type str"),
        ],
    )
    def test_refuse_what_is_no_state_dict(self, content: object, expected: str, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "w.pt")
        with pytest.raises(UserError) as error:
            load_weights(build_model("vgg_small"), tmp_path / "w.pt")
        assert expected in one_line(error)

    def test_never_run_code_from_a_pickle(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, ...]:
                return os.mkdir, (str(tmp_path / "ran"),)

        for name, content in (("plain.pkl", pickle.dumps(Evil())), ("empty.pt", b""), ("text.pt", b"hello")):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError) as error:
                load_weights(build_model("vgg_small"), tmp_path / name)
            assert name in one_line(error)
        torch.save({"weight": Evil()}, tmp_path / "evil.pt")
        with pytest.raises(UserError):
            load_weights(build_model("vgg_small"), tmp_path / "evil.pt")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    @pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
    def test_refuse_truncated_files(self, suffix: str, kept: float, tmp_path: Path) -> None:
        path = tmp_path / f"w{suffix}"
        model = build_model("vgg_small")
        if suffix == ".pt":
            save_torch(model, path)
        else:
            safetensors.torch.save_file(model.state_dict(), path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(UserError) as error:
            load_weights(model, path)
        assert str(path) in one_line(error)

    def test_refuse_folders_and_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="is a folder"):
            load_weights(build_model("vgg_small"), tmp_path)
        with pytest.raises(UserError, match="do not exist"):
            load_weights(build_model("vgg_small"), tmp_path / "none.pt")
        os.mkfifo(tmp_path / "pipe.pt")
        for path in (tmp_path / "pipe.pt", "/dev/zero", "~no-such-user/w.pt", "x" * 5000):
            with pytest.raises(UserError, match=r"cannot be read \("):
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


@pytest.mark.skipif("ATTACKROUTE_STUDY_DATA" not in os.environ, reason="ATTACKROUTE_STUDY_DATA names no folder")
class TestStudyWeights:
    def test_vgg16_knows_the_images_it_was_trained_on(self, tmp_path: Path) -> None:
        study = Path(os.environ["ATTACKROUTE_STUDY_DATA"])
        with zipfile.ZipFile(study / "data" / "cifar10-jpeg.zip") as archive:
            wanted = [name for name in archive.namelist() if name.startswith("test/") and name.endswith("0.jpg")]
            archive.extractall(tmp_path, wanted[::2])
        model = build_model("vgg16", width=0.25, num_classes=10)
        load_weights(model, study / "models" / "vgg16-w025-cifar10jpeg.safetensors")
        model.eval()
        data = load_data(f"folder:{tmp_path}", samples=500)
        with torch.no_grad():
            hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in ImageBatches(data, 250))
        assert len(data) == 500
        assert hits / len(data) == pytest.approx(0.848, abs=0.05)
