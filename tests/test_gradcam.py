"""Grad-CAM of sets of channels, against captum and against loops."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from architectures import Residual, chain, randomised
from attackroute.analysis.gradcam import enlarged, jointly_normalised, layer_evidence
from attackroute.core.errors import UserError
from experiment_samples import grad_cam


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    return randomised(chain()).eval(), torch.rand(4, 3, 13, 13)


@pytest.mark.parametrize("layer", ["0", "3", "8", "10"])
def test_all_channels_agree_with_captum(case: tuple[nn.Module, Tensor], layer: str) -> None:
    captum = pytest.importorskip("captum.attr", reason="the second opinion is captum's")
    model, images = case
    target = torch.tensor([0, 1, 2, 4])
    judge = captum.LayerGradCam(model, model.get_submodule(layer))
    theirs = judge.attribute(images, target=target, relu_attributions=True)[:, 0].detach()
    torch.testing.assert_close(grad_cam(model, images, layer, target=target), theirs, rtol=1e-4, atol=1e-6)
    assert theirs.any()


@pytest.mark.parametrize("layer", ["2", "5"])
def test_maps_after_the_activation_agree_with_captum(case: tuple[nn.Module, Tensor], layer: str) -> None:
    captum = pytest.importorskip("captum.attr", reason="the second opinion is captum's")
    model, images = case
    target = torch.tensor([3, 1, 0, 4])
    theirs = captum.LayerGradCam(model, model.get_submodule(layer)).attribute(images, target, relu_attributions=True)
    convolution = {"2": "0", "5": "3"}[layer]
    ours = grad_cam(model, images, convolution, target=target, at="activation")
    torch.testing.assert_close(ours, theirs[:, 0].detach(), rtol=1e-4, atol=1e-6)


def test_a_set_of_channels_is_the_sum_of_its_own(case: tuple[nn.Module, Tensor]) -> None:
    model, images = case
    copied = copy.deepcopy(model)  # the network in two halves, differentiated by hand
    below, above = copied[:4], copied[4:]
    predicted = model(images).argmax(1)
    sets = [], [5], [0, 2, 7]
    masks = torch.stack([torch.isin(torch.arange(8), torch.tensor(channels)) for channels in sets])
    for channels, ours in zip(sets, layer_evidence(model, images, "3").cams(masks), strict=True):
        for row in range(len(images)):
            maps = below(images[row : row + 1]).detach().requires_grad_()
            above(maps)[0, predicted[row]].backward()
            assert maps.grad is not None
            expected = torch.zeros(maps.shape[2:])
            for channel in channels:
                expected += maps.grad[0, channel].mean() * maps.detach()[0, channel]
            torch.testing.assert_close(ours[row], expected.clamp(min=0), rtol=1e-4, atol=1e-6)


def test_the_model_comes_back_as_it_was() -> None:
    torch.manual_seed(0)
    model = randomised(Residual()).train()
    before = copy.deepcopy(model.state_dict())
    images = torch.rand(2, 3, 16, 16)
    for at, layer in (("output", "a2.0"), ("activation", "conv1")):
        grad_cam(model, images, layer, at=at)
    with pytest.raises(UserError):
        grad_cam(model, images, "a2.0", at="activation")  # the residual sum comes before any activation
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_one_scale_for_all_sets_of_an_image() -> None:
    cams = torch.rand(3, 5, 4, 4)
    cams[:, 2] = 0
    ours = jointly_normalised(cams)
    for image in range(5):
        largest = max(float(cams[s, image].max()) for s in range(3)) or 1.0
        torch.testing.assert_close(ours[:, image], cams[:, image] / largest)


def test_enlarged_maps_keep_their_mean_and_their_constants() -> None:
    assert torch.equal(enlarged(torch.full((2, 3, 2, 2), 0.5), (8, 8)), torch.full((2, 3, 8, 8), 0.5))
    cams = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(enlarged(cams, (16, 16)).mean((-1, -2)), cams.mean((-1, -2)), rtol=0, atol=0.03)
    row = enlarged(torch.tensor([[[0.0, 1.0]]]), (1, 4))  # by hand: cell centres at 1/4 and 3/4
    torch.testing.assert_close(row, torch.tensor([[[0.0, 0.25, 0.75, 1.0]]]))


def test_bad_input_is_one_line(case: tuple[nn.Module, Tensor]) -> None:
    model, images = case
    wrong: list[tuple[str, dict[str, object], str]] = [
        ("99", {}, "did not run"),
        ("12.fc", {}, "no maps"),
        ("3", {"at": "activations"}, "did you mean activation"),
        ("3", {"target": torch.tensor([0, 1, 2, 5])}, "label 5 is outside"),
    ]
    for layer, options, message in wrong:
        with pytest.raises(UserError, match=message) as error:
            layer_evidence(model, images, layer, **options)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
