"""``attackroute train`` and ``attackroute trace`` on a folder of tiny pictures."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.utils import save_image

import attackroute
from attackroute.core.document import Document
from attackroute.core.model_state import weights_digest
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route
from attackroute.tracing import oracle_check
from attackroute.tracing.oracle import OracleTrace
from attackroute.tracing.trace import Tracer
from attackroute.zoo.weights import load_weights
from command_line import refused, run

SIZE = 32


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 training and 12 test pictures of two classes, dark and bright."""
    root = tmp_path_factory.mktemp("pictures")
    random = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 6)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = (torch.rand(3, SIZE, SIZE, generator=random) + label) / 2
                save_image(image, root / split / name / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """A train folder."""
    folder = tmp_path_factory.mktemp("runs") / "net"
    result = run(
        "train", "--model", "vgg_small", "--model-width", 0.2, "--data", f"folder:{pictures}", "--epochs", 2,
        "--batch-size", 8, "--lr", "0.02", "--out", folder,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "held-out accuracy" in result.stdout  # a tenth of the training pictures chose the epoch
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    return folder


def traced(trained, pictures, *arguments: object):
    return run("trace", "--model", trained, "--data", f"folder:{pictures}", "--batch-size", 4, *arguments)


def test_a_train_folder_can_be_rebuilt_without_options(trained, pictures):
    card = json.loads((trained / "model.json").read_text())
    assert card["classes"] == ["dark", "light"]
    expected = {"name": "vgg_small", "num_classes": 2, "width": 0.2, "image_size": SIZE, "in_channels": 3}
    assert {key: card["model"][key] for key in expected} == expected
    assert card["model"]["mean"] == pytest.approx([0.4914, 0.4822, 0.4465])
    result = traced(trained, pictures)
    assert result.exit_code == 0, result.output
    assert "features.0" in result.stdout
    assert "12 samples" in result.stdout


def test_training_resumes_and_refuses_to_overwrite(trained, pictures, tmp_path):
    folder = tmp_path / "net"
    shutil.copytree(trained, folder)
    same = (
        "train", "--model", "vgg_small", "--model-width", 0.2, "--data", f"folder:{pictures}", "--epochs", 2,
        "--batch-size", 8, "--out", folder,
    )  # fmt: skip
    refused(run(*same, "--lr", 0.02), folder, "--resume")
    refused(run(*same, "--lr", 0.03, "--resume"), "lr")
    refused(run(*same[:4], 0.4, *same[5:], "--lr", 0.02, "--resume"), "model.json", "another network")
    result = run(*same, "--lr", "1/50", "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["about"]["resumed_from"] == 2
    assert (folder / "last.safetensors").read_bytes() == (trained / "last.safetensors").read_bytes()


def test_training_repeats_with_the_seed(trained, pictures, tmp_path):
    def train(seed: int, name: str):
        result = run(
            "train", "--model", "vgg_small", "--model-width", 0.2, "--data", f"folder:{pictures}", "--epochs", 2,
            "--batch-size", 8, "--lr", 0.02, "--seed", seed, "--quiet", "--out", tmp_path / name,
        )  # fmt: skip
        assert (result.exit_code, result.output) == (0, "")
        return load_file(tmp_path / name / "last.safetensors")["features.0.weight"]

    expected = load_file(trained / "last.safetensors")["features.0.weight"]
    assert torch.equal(train(0, "a"), expected)
    assert not torch.equal(train(1, "b"), expected)


def test_an_undivided_folder_is_not_tested_on(pictures, tmp_path):
    result = run(
        "train", "--model", "vgg_small", "--model-width", 0.1, "--data", f"folder:{pictures / 'train'}", "--epochs", 1,
        "--holdout", 0, "--out", tmp_path / "net",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "nothing to test on" in result.stderr
    assert "test accuracy" not in result.stdout
    assert traced(tmp_path / "net", pictures).exit_code == 0  # there are no best weights, so the last ones


def test_files_and_json_agree_with_the_python_interface(trained, pictures, tmp_path):
    result = traced(trained, pictures, "--out", tmp_path, "--width", 0.4, "--route-width", 0.5, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)["about"]

    model = attackroute.build_model("vgg_small", num_classes=2, width=0.2)
    load_weights(model, trained / "best.safetensors")
    data = attackroute.load_data(f"folder:{pictures}")
    images = torch.stack([image for image, _ in data.dataset])
    labels = torch.tensor([label for _, label in data.dataset])
    expected = attackroute.trace_routes(model, (images, labels), 0.4, batch_size=4)

    assert InstanceRoutes.load(tmp_path / "routes.safetensors") == expected
    assert Route.load(tmp_path / "route.json", model=model) == expected.aggregate(0.5)
    assert [row["layer"] for row in printed["layers"]] == list(expected.layers)
    for row in printed["layers"]:
        assert row["occurrence"] == pytest.approx(expected.occurrence(0.4)[row["layer"]])
        assert row["route_channels"] == expected.aggregate(0.5)[row["layer"]].tolist()
    assert {
        (source, row["layer"]): how for row in printed["layers"] for source, how in row["incoming"].items()
    } == expected.methods
    summary = Document.load(tmp_path / "summary.json").about
    assert summary["finished"] is True
    assert summary["layers"] == printed["layers"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["route.json", "routes.safetensors", "summary.json"]


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module of small networks in the current folder; small, since the oracle is slow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_factories", raising=False)
    (tmp_path / "cli_factories.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def flat(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))\n"
        "def grey(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
        "def conv():\n"
        "    torch.manual_seed(0)\n"
        "    layers = [nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 9, 3), nn.ReLU(), nn.Conv2d(9, 10, 3, 2)]\n"
        "    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 2))\n"
    )


def checked(pictures, *arguments: object):
    return run("trace", "--model", "cli_factories:conv", "--data", f"folder:{pictures}", "--check", 3, *arguments)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9), ("bfloat16", None)])
def test_check_agrees_with_the_oracle(factories, pictures, dtype, tolerance):
    result = checked(pictures, "--dtype", dtype, "--json")
    assert result.exit_code == 0, result.output
    check = json.loads(result.stdout)["check"]
    assert (check["samples"], check["passed"]) == (3, True)
    if tolerance is not None:
        assert check["agreeing"] == 3
        assert check["deviation"] <= tolerance


def altered_oracle(monkeypatch, part: str, layer: str, change) -> None:
    def oracle(*arguments, **options) -> OracleTrace:
        found = trace(*arguments, **options)
        values = getattr(found, part)
        return replace(found, **{part: {**values, layer: change(values[layer])}})

    trace = oracle_check.oracle.trace
    monkeypatch.setattr(oracle_check.oracle, "trace", oracle)


def test_check_fails_when_the_oracle_disagrees(factories, pictures, monkeypatch):
    altered_oracle(monkeypatch, "scores", "2", lambda scores: scores * 1.001)
    result = checked(pictures)
    assert result.exit_code == 1
    assert "at most 1.0e-03 (2): MORE than the 0.0001" in result.stdout


def test_a_tie_does_not_count_upstream(factories, pictures, monkeypatch):
    """Past a neuron that ties within rounding, both traces sum over different neurons; that is no deviation."""
    altered_oracle(monkeypatch, "masks", "4", lambda masks: masks.roll(1, 1))
    altered_oracle(monkeypatch, "scores", "2", lambda scores: scores * 2)
    check = json.loads(checked(pictures, "--json").stdout)["check"]
    assert (check["agreeing"], check["passed"]) == (0, True)


def interrupt_after(monkeypatch, batches: int, error: BaseException):
    """Let the tracer break off, and count the samples that it traced."""
    traced_samples = []

    def trace(*arguments):
        if len(traced_samples) == batches:
            raise error
        routes = original(*arguments)
        traced_samples.append(len(routes))
        return routes

    original = Tracer.trace
    monkeypatch.setattr(Tracer, "trace", trace)
    return traced_samples


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a crash")])
def test_an_interrupted_trace_goes_on_to_the_same_files(trained, pictures, tmp_path, monkeypatch, error):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ("--keep-scores", "--seed", 3, "--samples", 11)
    assert traced(trained, pictures, *options, "--out", whole).exit_code == 0

    with monkeypatch.context() as patch:
        assert interrupt_after(patch, 1, error) is not None
        if isinstance(error, KeyboardInterrupt):
            result = traced(trained, pictures, *options, "--out", broken)
            assert (result.exit_code, result.stdout) == (130, "")
            assert "--resume" in result.stderr
        else:
            with pytest.raises(RuntimeError):
                traced(trained, pictures, *options, "--out", broken)
    assert sorted(path.name for path in broken.iterdir()) == ["routes.safetensors", "summary.json"]
    assert len(InstanceRoutes.load(broken / "routes.safetensors")) == 4

    refused(traced(trained, pictures, *options, "--out", broken), "already holds", "--resume")
    refused(traced(trained, pictures, *options, "--width", 0.3, "--out", broken, "--resume"), "width", 0.2)
    with monkeypatch.context() as patch:
        fresh = interrupt_after(patch, -1, error)
        assert traced(trained, pictures, *options, "--out", broken, "--resume").exit_code == 0
        assert sum(fresh) == 7
    assert sorted(path.name for path in broken.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        assert (broken / path.name).read_bytes() == path.read_bytes(), path.name

    with monkeypatch.context() as patch:
        interrupt_after(patch, 0, AssertionError("nothing is left to trace"))
        again = traced(trained, pictures, *options, "--out", broken, "--resume")
    assert again.exit_code == 0
    assert "traced before" in again.stdout


def test_interruption_without_out_keeps_nothing(trained, pictures, monkeypatch):
    interrupt_after(monkeypatch, 1, KeyboardInterrupt())
    result = traced(trained, pictures)
    assert result.exit_code == 130
    assert "--out" in result.stderr


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_resuming_needs_a_sound_folder(trained, pictures, tmp_path):
    refused(traced(trained, pictures, "--resume"), "--out")
    assert traced(trained, pictures, "--out", tmp_path, "--resume").exit_code == 0  # an empty one starts a trace
    whole = contents(tmp_path)
    (tmp_path / "routes.safetensors").write_bytes(b"damaged")
    result = traced(trained, pictures, "--out", tmp_path, "--resume")
    assert result.exit_code == 0 and "note: " in result.stderr and "routes.safetensors" in result.stderr
    assert contents(tmp_path) == whole
    (tmp_path / "summary.json").write_text("{")
    refused(traced(trained, pictures, "--out", tmp_path, "--resume"), "summary.json")
    file = tmp_path / "file"
    file.touch()
    refused(traced(trained, pictures, "--out", file), file, "cannot be a folder")


def test_changed_weights_cannot_be_resumed(trained, pictures, tmp_path, monkeypatch):
    folder = tmp_path / "net"
    shutil.copytree(trained, folder)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1, KeyboardInterrupt())
        assert traced(folder, pictures, "--out", tmp_path / "routes").exit_code == 130
    weights = load_file(folder / "best.safetensors")
    weights["features.0.weight"][0, 0, 0, 0] += 1e-3
    save_file(weights, folder / "best.safetensors")
    refused(traced(folder, pictures, "--out", tmp_path / "routes", "--resume"), "weights")


class TestBadInput:
    """Everything that a user can get wrong: exit code 2 and one line."""

    def test_networks(self, trained, pictures, tmp_path, monkeypatch):
        data = ("--data", f"folder:{pictures}")
        refused(run("trace", "--model", "vgg61", *data), "no model 'vgg61'; did you mean vgg16?")
        refused(run("trace", "--model", "vgg16", *data), "vgg16", "--weights")
        refused(run("trace", "--model", "torchvision:resnet18", *data), "--weights")
        refused(run("trace", "--model", tmp_path, *data), "model.json")
        refused(run("trace", "--model", trained, "--model-width", 0.5, *data), "--model-width")
        monkeypatch.chdir(trained.parent)
        (trained.parent / "vgg16").mkdir()
        refused(run("trace", "--model", "vgg16", *data), "./vgg16")

    def test_cards(self, trained, pictures, tmp_path):
        folder = tmp_path / "net"
        shutil.copytree(trained, folder)
        for content in ("{", "[]", '{"format": "attackroute model", "version": 9, "model": {}, "classes": []}'):
            (folder / "model.json").write_text(content)
            refused(traced(folder, pictures), "model.json")

    def test_weights(self, trained, pictures, tmp_path):
        for name in ("best.safetensors", "last.safetensors"):
            shutil.copy(trained / name, tmp_path / name)
        named = ("trace", "--model", "vgg_small", "--data", f"folder:{pictures}")
        refused(run(*named, "--weights", tmp_path / "none.pt"), "none.pt")
        refused(run(*named, "--weights", tmp_path / "best.safetensors"), "features.0", "width")
        code = tmp_path / "code.pt"
        code.write_bytes(pickle.dumps(print))
        refused(run(*named, "--weights", code), "code.pt", "state dict")
        right = run(*named, "--weights", tmp_path / "best.safetensors", "--model-width", 0.2)
        assert right.exit_code == 0, right.output

    def test_images(self, trained, pictures, tmp_path):
        refused(run("trace", "--model", trained, "--data", f"folder:{tmp_path / 'none'}"), "none")
        refused(traced(trained, pictures, "--image-size", 4), "(1, 3, 4, 4)")
        shutil.copytree(pictures, tmp_path / "broken")
        bad = tmp_path / "broken" / "test" / "light" / "00.png"
        bad.write_bytes(b"no picture")
        refused(traced(trained, tmp_path / "broken"), bad)

    def test_classes(self, trained, pictures, tmp_path):
        shutil.copytree(pictures, tmp_path / "more")
        shutil.copytree(pictures / "test" / "dark", tmp_path / "more" / "test" / "grey")
        refused(traced(trained, tmp_path / "more"), "dark, grey, light", "dark, light")
        result = run(
            "trace", "--model", "vgg_small", "--model-width", 0.2, "--classes", 2, "--weights",
            trained / "best.safetensors", "--data", f"folder:{tmp_path / 'more'}",
        )  # fmt: skip
        refused(result, "label 2")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_of_pixels(self, trained, pictures, monkeypatch, value):
        load_data = attackroute.load_data

        def spoilt(*arguments, **options):
            data = load_data(*arguments, **options)
            labels = torch.tensor([label for _, label in data.dataset])
            return replace(data, dataset=TensorDataset(torch.full((len(labels), 3, SIZE, SIZE), value), labels))

        monkeypatch.setattr("attackroute.zoo.data.load_data", spoilt)
        refused(traced(trained, pictures), "image 0", "NaN or inf")

    def test_factories(self, factories, pictures):
        data = ("--data", f"folder:{pictures}")
        refused(run("trace", "--model", "cli_factories:none", *data), "none")
        refused(run("trace", "--model", "cli_factories:flat", *data), "convolution", "--linear")
        refused(run("trace", "--model", "cli_factories:grey", *data), "3 channels")
        assert run("trace", "--model", "cli_factories:flat", *data, "--linear").exit_code == 0


def test_digests_see_every_parameter_and_buffer():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    model[1].register_buffer("hidden", torch.zeros(1), persistent=False)
    digests = {weights_digest(model)}
    for tensor in (model[0].bias, model[1].running_mean, model[1].hidden):
        tensor.data[0] += 1
        digests.add(weights_digest(model))
    assert len(digests) == 4


def test_attacked_images_are_traced(trained, pictures, tmp_path):
    clean, attacked = tmp_path / "clean", tmp_path / "attacked"
    assert traced(trained, pictures, "--out", clean).exit_code == 0
    result = traced(trained, pictures, "--attack", "fgsm:eps=128/255", "--out", attacked, "--check", 2, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    summary = printed["about"]
    assert summary["attack"] == Route.load(attacked / "route.json").provenance.attack == "fgsm:eps=128/255"
    assert printed["check"]["passed"]
    assert summary["accuracy"] < Document.load(clean / "summary.json").about["accuracy"]
    assert InstanceRoutes.load(attacked / "routes.safetensors") != InstanceRoutes.load(clean / "routes.safetensors")
    refused(traced(trained, pictures, "--attack", "pgd", "--out", attacked, "--resume"), "attack", "pgd:eps")
    refused(traced(trained, pictures, "--attack", "pdg"), "unknown attack 'pdg'", "did you mean pgd")
    refused(traced(trained, pictures, "--attack", "fgsm:eps=8"), "eps 8")


# Sketches


def shuffled(pictures) -> tuple[object, ...]:
    """Options of a network some of whose edges have no closed form."""
    data = ("--data", f"folder:{pictures}", "--samples", 4, "--image-size", 13)
    return ("--model", "architectures:Shuffled", "--classes", 5, *data)


def test_sketches_are_named_wherever_their_numbers_are_shown(pictures, tmp_path):
    options = shuffled(pictures)
    torch.manual_seed(0)
    result = run("trace", *options, "--sketches", 32, "--check", 1, "--out", tmp_path / "shown")
    assert result.exit_code == 0, result.output
    assert "sketch" in result.stdout
    assert "influence, approximate (32 sketches)" in result.stdout
    assert "rounding" not in result.stdout
    summary = Document.load(tmp_path / "shown" / "summary.json").about
    assert summary["criterion"] == "influence, approximate (32 sketches)"
    route = Route.load(tmp_path / "shown" / "route.json")
    assert "approximate" in route.provenance.criterion
    torch.manual_seed(0)
    resumed = run("trace", *options, "--sketches", 64, "--out", tmp_path / "shown", "--resume")
    refused(resumed, "has sketches 32")


@pytest.mark.parametrize("text", ["7", "0", "-8", "some", "32.0"])
def test_sketches_that_cannot_be_used_are_bad_input(pictures, text):
    result = run("trace", "--model", "vgg_small", "--data", f"folder:{pictures}", "--sketches", text)
    assert result.exit_code == 2
    assert "sketches" in result.output
    assert "Traceback" not in result.output
