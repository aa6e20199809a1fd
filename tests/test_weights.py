"""Weights from files: what is loaded, and what is refused."""

from __future__ import annotations

import copy
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from attackroute.core.errors import UserError
from attackroute.zoo.data import ImageBatches, load_data
from attackroute.zoo.networks import build_model
from attackroute.zoo.weights import load_weights
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


def save_half(model: nn.Module, path: Path) -> None:
    torch.save({name: value.bfloat16() for name, value in model.state_dict().items()}, path)


class TestWeights:
    @pytest.mark.parametrize(
        "save", [save_torch, save_checkpoint, save_model_key, save_parallel, save_without_counters, save_half]
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
