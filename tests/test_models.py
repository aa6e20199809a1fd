"""Networks by name and their normalisation."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from attackroute.core.errors import UserError, did_you_mean
from attackroute.zoo.networks import BUILT_IN, build_model
from attackroute.zoo.spec import Normalise
from attackroute.zoo.weights import check_input
from model_checks import one_line, randomise

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


class TestBuiltIn:
    @pytest.mark.parametrize(
        ("name", "image_size"), [*((name, size) for name in BUILT_IN for size in (32, 64)), ("vgg_small", 224)]
    )
    @pytest.mark.parametrize("in_channels", [1, 3])
    def test_gives_logits_for_images_of_its_size(self, name: str, image_size: int, in_channels: int) -> None:
        model = build_model(name, width=0.05, num_classes=7, image_size=image_size, in_channels=in_channels).eval()
        images = torch.rand(2, in_channels, image_size, image_size)
        with torch.no_grad():
            logits = model(images)
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()
        assert not torch.equal(logits[0], logits[1])

    def test_resnet18_computes_what_torchvisions_does_behind_another_stem(self) -> None:
        ours = build_model("resnet18", num_classes=5, width=1.0).eval()
        reference = torchvision.models.resnet18(num_classes=5).eval()
        reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        reference.maxpool = nn.Identity()
        randomise(reference)
        ours.load_state_dict(reference.state_dict())
        images = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), reference(ours.get_submodule("normalise")(images)))

    def test_alexnet_features_compute_what_torchvisions_do_behind_another_stem(self) -> None:
        ours = build_model("alexnet").eval().get_submodule("features")
        reference = torchvision.models.alexnet().features.eval()
        reference[0] = nn.Conv2d(3, 64, 5, padding=2)
        randomise(reference)
        ours.load_state_dict(reference.state_dict())
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), reference(images))

    @pytest.mark.parametrize(("name", "other"), [("vgg16", "vgg16_bn"), ("alexnet", ""), ("resnet18", "")])
    def test_large_images_are_for_torchvisions(self, name: str, other: str) -> None:
        with one_line(match=f"{name} is for images of at most 64 pixels, not 65.*torchvision:{other or name}"):
            build_model(name, image_size=65)

    @pytest.mark.parametrize("image_size", [32, 64])
    def test_vgg16_features_compute_what_torchvisions_do(self, image_size: int) -> None:
        plan = [step if step == "M" else int(step) // 16 for step in torchvision.models.vgg.cfgs["D"]]
        reference = torchvision.models.vgg.make_layers(plan, batch_norm=True).eval()
        randomise(reference)
        ours = build_model("vgg16", width=1 / 16, image_size=image_size).eval().get_submodule("features")
        ours.load_state_dict(reference.state_dict())
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(ours(images), reference(images))

    def test_vgg16_for_cifar_ends_in_one_linear_layer(self) -> None:
        with torch.device("meta"):
            stored = shapes(build_model("vgg16"))
        assert stored["features.0.weight"] == (64, 3, 3, 3)
        assert stored["features.40.weight"] == (512, 512, 3, 3)
        assert {k: v for k, v in stored.items() if not k.startswith("features.")} == {
            "classifier.weight": (10, 512),
            "classifier.bias": (10,),
        }

    def test_alexnet_for_cifar_keeps_three_overlapping_poolings(self) -> None:
        model = build_model("alexnet", width=0.1)
        sizes = []
        maps = torch.rand(1, 3, 32, 32)
        for layer in model.features:
            maps = layer(maps)
            if isinstance(layer, nn.MaxPool2d):
                sizes.append(maps.shape[-1])
        assert sizes == [15, 7, 3]
        assert [i for i, layer in enumerate(model.features) if isinstance(layer, nn.Conv2d)] == [0, 3, 6, 8, 10]

    def test_resnet18_for_cifar_keeps_the_resolution_in_its_first_stage(self) -> None:
        model = build_model("resnet18", width=0.05).eval()
        seen: list[torch.Size] = []
        model.get_submodule("layer1").register_forward_hook(lambda module, args, out: seen.append(out.shape))
        model.get_submodule("layer4").register_forward_hook(lambda module, args, out: seen.append(out.shape))
        model(torch.rand(1, 3, 32, 32))
        assert [tuple(shape[-2:]) for shape in seen] == [(32, 32), (4, 4)]

    @pytest.mark.parametrize(("width", "expected"), [(0.25, 16), (0.31, 20), (1.5, 96), (0.001, 1)])
    def test_width_scales_channels(self, width: float, expected: int) -> None:
        with torch.device("meta"):
            model = build_model("vgg16", width=width)
        assert shapes(model)["features.0.weight"][0] == expected

    @pytest.mark.parametrize("name", BUILT_IN)
    def test_one_channel_a_layer_runs(self, name: str) -> None:
        model = build_model(name, width=1e-6).eval()
        convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
        assert {conv.out_channels for conv in convolutions} == {1}
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)

    @pytest.mark.parametrize("name", BUILT_IN)
    def test_gradient_reaches_every_parameter(self, name: str) -> None:
        torch.manual_seed(0)
        model = build_model(name, width=0.2)
        nn.functional.cross_entropy(model(torch.rand(8, 3, 32, 32)), torch.arange(8)).backward()  # type: ignore[no-untyped-call]
        assert all(
            p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "bias" not in n
        )


class TestNormalisation:
    @pytest.mark.parametrize(
        ("arguments", "mean", "std"),
        [
            ({}, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            ({"image_size": 224}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ({"in_channels": 1}, (0.1307,), (0.3081,)),
            ({"mean": (0.1, 0.2, 0.3)}, (0.1, 0.2, 0.3), (0.2470, 0.2435, 0.2616)),
            ({"std": (1.0, 2.0, 4.0)}, (0.4914, 0.4822, 0.4465), (1.0, 2.0, 4.0)),
            ({"in_channels": 2, "mean": (0.0, 0.5), "std": (1.0, 0.5)}, (0.0, 0.5), (1.0, 0.5)),
        ],
    )
    def test_first_layer_sees_normalised_images(
        self, arguments: dict[str, object], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        model = build_model("vgg_small", **arguments).eval()  # type: ignore[arg-type]
        seen: list[Tensor] = []
        model.get_submodule("features.0").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        images = torch.rand(2, len(mean), 32, 32)
        model(images)
        by_hand = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(len(mean))], dim=1)
        torch.testing.assert_close(seen[0], by_hand)

    def test_is_absent_from_the_state_dict_and_follows_the_model(self) -> None:
        model = build_model("vgg_small").double()
        assert not [name for name in model.state_dict() if "normalise" in name]
        assert {buffer.dtype for name, buffer in model.named_buffers() if "normalise" in name} == {torch.float64}

    @pytest.mark.parametrize(
        ("images", "expected"),
        [
            (torch.rand(2, 1, 32, 32), "3 channels, not 1"),
            (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "torch.uint8"),
            (torch.rand(3, 32, 32), "(3, 32, 32)"),
        ],
    )
    def test_refuses_images_that_broadcasting_would_let_pass(self, images: Tensor, expected: str) -> None:
        with one_line(expected):
            build_model("vgg_small")(images)

    @pytest.mark.parametrize(
        "arguments",
        [
            *({"mean": (0.5,)}, {"mean": (float("nan"), 0.0, 0.0)}, {"std": (0.5, 0.5)}, {"std": (0.5, 0.0, 0.5)}),
            {"in_channels": 4},
        ],
    )
    def test_refuses_statistics_that_do_not_fit(self, arguments: dict[str, object]) -> None:
        with one_line():
            build_model("vgg_small", **arguments)  # type: ignore[arg-type]


class TestTorchvision:
    @pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1", "densenet121", "googlenet"])
    def test_keeps_every_name(self, name: str) -> None:
        extra = {"init_weights": False} if name == "googlenet" else {}
        with torch.device("meta"):
            model = build_model(f"torchvision:{name}", num_classes=4)
            reference = torchvision.models.get_model(name, weights=None, num_classes=4, **extra)
        modules = [key for key, _ in model.named_modules() if key != "normalise"]
        assert modules == [key for key, _ in reference.named_modules()]
        assert shapes(model) == shapes(reference)
        assert isinstance(model, type(reference))

    def test_normalises_first_also_as_a_copy_or_pickle(self) -> None:
        model = build_model("torchvision:mobilenet_v3_small", num_classes=3).eval()
        reference = torchvision.models.mobilenet_v3_small(num_classes=3).eval()
        reference.load_state_dict(model.state_dict())
        images = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            expected = reference((images - IMAGENET_MEAN) / IMAGENET_STD)
            for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                torch.testing.assert_close(twin(images), expected)

    def test_takes_the_normalisation_of_the_networks_own_weights(self) -> None:
        for name, mean in (("efficientnet_v2_s", (0.485, 0.456, 0.406)), ("efficientnet_v2_l", (0.5, 0.5, 0.5))):
            with torch.device("meta"):
                normalise = build_model(f"torchvision:{name}").normalise
            assert isinstance(normalise, Normalise)
            assert normalise.statistics.mean == mean

    @pytest.mark.parametrize(
        ("arguments", "expected"), [({"width": 0.5}, "width"), ({"in_channels": 1}, "3 channels, not 1")]
    )
    def test_refuses_what_it_cannot_do(self, arguments: dict[str, object], expected: str) -> None:
        with pytest.raises(UserError, match=expected):
            build_model("torchvision:resnet18", **arguments)  # type: ignore[arg-type]


class TestTimm:
    def test_takes_channels_classes_and_statistics(self) -> None:
        timm = pytest.importorskip("timm")
        model = build_model("timm:lcnet_035", num_classes=6).eval()
        reference = timm.create_model("lcnet_035", pretrained=False, num_classes=6).eval()
        reference.load_state_dict(model.state_dict())
        mean = torch.tensor(reference.pretrained_cfg["mean"])[:, None, None]
        std = torch.tensor(reference.pretrained_cfg["std"])[:, None, None]
        images = torch.rand(2, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(model(images), reference((images - mean) / std))
        assert build_model("timm:lcnet_035", in_channels=1).eval()(images[:, :1]).shape == (2, 10)

    @pytest.mark.parametrize("name", ["lcnet_03", "hf-hub:timm/lcnet_050.ra2_in1k", "local-dir:models", "lcnet_050.no"])
    def test_refuses_names_it_does_not_know_itself(self, name: str) -> None:
        pytest.importorskip("timm")
        with one_line():
            build_model(f"timm:{name}")

    def test_names_the_extra_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(UserError, match=r'pip install "attackroute\[timm\]"'):
            build_model("timm:resnet18")


FACTORIES = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 30 * 30, 4))

def needy(size):
    return small()

def wrong():
    return 3

instance = small()
"""


class TestFactory:
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "own_networks.py").write_text(FACTORIES)
        (tmp_path / "own_broken.py").write_text("import own_missing_dependency\n")
        monkeypatch.chdir(tmp_path)
        for name in ("own_networks", "own_broken"):
            monkeypatch.delitem(sys.modules, name, raising=False)

    def test_is_found_in_the_current_directory_and_taken_as_it_is(self) -> None:
        before = list(sys.path)
        model = build_model("own_networks:small")
        assert type(model) is nn.Sequential
        assert [name for name, _ in model.named_children()] == ["0", "1", "2"]
        assert sys.path == before
        sys.modules.pop("own_networks")

    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ("own_network:small", "no module 'own_network'"),
            ("own_networks.deeper:small", "no module 'own_networks.deeper'"),
            ("own_networks:smal", "did you mean small?"),
            ("own_networks:needy", "without arguments"),
            ("own_networks:wrong", "returned int"),
            ("own_networks:instance", "function"),
            ("own_networks:", "package.module:factory"),
            (":small", "package.module:factory"),
            ("networks/own.py:small", "no module's name"),
            (".own_networks:small", "no module's name"),
        ],
    )
    def test_says_what_is_wrong(self, spec: str, expected: str) -> None:
        with one_line(expected):
            build_model(spec)
        sys.modules.pop("own_networks", None)

    def test_leaves_the_users_own_import_error_alone(self) -> None:
        with pytest.raises(ModuleNotFoundError, match="own_missing_dependency"):
            build_model("own_broken:small")

    @pytest.mark.parametrize("arguments", [{"width": 0.5}, {"mean": (0.0,) * 3}, {"std": (1.0,) * 3}])
    def test_refuses_arguments_that_would_be_ignored(self, arguments: dict[str, object]) -> None:
        with pytest.raises(UserError, match="taken as it is"):
            build_model("own_networks:small", **arguments)  # type: ignore[arg-type]


class TestNames:
    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            ("vgg61", "did you mean vgg16"),
            ("resnet81", "did you mean resnet18?"),
            ("convnext_tiny", "did you mean torchvision:convnext_tiny"),
            ("torchvision:resnet81", "did you mean resnet18"),
            ("zzzzzz", "no model 'zzzzzz' (built in"),
        ],
    )
    def test_an_unknown_one_brings_the_nearest(self, spec: str, expected: str) -> None:
        with one_line(expected):
            build_model(spec)

    def test_nearest_are_joined_as_prose(self) -> None:
        assert did_you_mean("ab", ["abc", "abd"]) == "; did you mean abd or abc?"
        assert did_you_mean("ab", ["xyz"]) == ""

    @pytest.mark.parametrize(
        ("name", "values"),
        [
            ("num_classes", [0]),
            ("width", [0.0, -1.0, math.nan, math.inf]),
            ("in_channels", [0]),
            ("image_size", [0, 31]),
        ],
    )
    def test_arguments_out_of_range(self, name: str, values: list[float]) -> None:
        for value in values:
            with one_line(name.partition("_")[0]):
                build_model("vgg16", **{name: value})  # type: ignore[arg-type]


class TestChecks:
    def test_input_that_fits_leaves_the_model_as_it_was(self) -> None:
        model = build_model("vgg_small")
        model.get_submodule("features.1").eval()
        before = copy.deepcopy(model.state_dict())
        flags = [module.training for module in model.modules()]
        check_input(model, (3, 32, 32))
        assert [module.training for module in model.modules()] == flags
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    @pytest.mark.parametrize("shape", [(1, 32, 32), (3, 16, 16)])
    def test_input_of_another_shape_is_refused(self, shape: tuple[int, int, int]) -> None:
        with one_line():
            check_input(build_model("vgg16", width=0.1), shape)

    def test_input_that_the_users_own_model_cannot_take(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(8, 2)).double()
        check_input(model, (3, 4, 4))
        with pytest.raises(UserError, match=r"a batch of shape \(1, 3, 8, 9\) and type torch.float64: .+"):
            check_input(model, (3, 8, 9))
