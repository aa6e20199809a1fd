"""Grad-CAM over tokens against loops, and how their grid is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attackroute.analysis.gradcam import layer_evidence, layer_maps
from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall
from experiment_samples import grad_cam
from token_networks import CLASSES, GATED, TOKENS, Attentive, made, vit
from tracing import state


def by_hand(
    model: nn.Module, image: Tensor, layer: nn.Module, channels: list[int], target: int, grid: tuple[int, int]
) -> Tensor:
    """One image at a time, one channel at a time; the last tokens are those of the grid."""
    held: list[Tensor] = []

    def hold(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        output = output.detach().requires_grad_()
        held.append(output)
        return output.clone()

    handle = layer.register_forward_hook(hold)
    with torch.enable_grad():
        model(image[None])[0, target].backward()
    handle.remove()
    (values,) = held
    assert values.grad is not None
    count = grid[0] * grid[1]
    tokens, slopes = values.detach().flatten(1, -2)[0, -count:], values.grad.flatten(1, -2)[0, -count:]
    cam = torch.zeros(grid, dtype=values.dtype)
    for channel in channels:
        cam += slopes[:, channel].mean() * tokens[:, channel].reshape(grid)
    return cam.clamp(min=0)


def require_loops(model: nn.Module, images: Tensor, layer: str, channels: list[int], grid: tuple[int, int]) -> None:
    target = torch.tensor([4, 0, 2])
    ours = grad_cam(model, images, layer, channels, target=target)
    expected = [
        by_hand(model, image, model.get_submodule(layer), channels, int(label), grid)
        for image, label in zip(images, target, strict=True)
    ]
    torch.testing.assert_close(ours, torch.stack(expected))
    assert ours.any()


@pytest.mark.parametrize(
    ("name", "layer", "grid"),
    [
        ("vit", "encoder.layers.encoder_layer_0.mlp.3", (4, 6)),
        ("attentive", "proj", (4, 6)),
        ("attentive", "fc2", (4, 6)),
        ("encoder", "encoder.layers.1.linear1", (4, 6)),
        ("swin", "features.1.1.mlp.0", (8, 12)),
        ("convnext", "features.1.0.block.5", (4, 6)),
    ],
)
def test_maps_of_tokens_agree_with_loops(name: str, layer: str, grid: tuple[int, int]) -> None:
    build = {**TOKENS, **GATED}[name]
    model, _, _ = made(build)
    if name == "vit":  # whose images are square
        model.image_size, grid = 16, (4, 4)
    images = torch.rand(3, 3, 4 * 4, 4 * (4 if name == "vit" else 6)).double()
    before = state(model)
    for channels in ([0, 3, 5], list(range(model.get_submodule(layer).out_features))):
        require_loops(model, images, layer, channels, grid)
    model.zero_grad()
    assert state(model) == before


@pytest.mark.parametrize(
    ("layer", "at", "value"),
    [
        ("attn#2", "output", lambda output: output[0]),  # the projection, that multi-head attention never calls
        ("fc1", "activation", F.gelu),
    ],
)
def test_maps_are_what_the_layer_gives(layer: str, at: str, value: Callable[[Any], Tensor]) -> None:
    model, images, _ = made(Attentive)
    found = layer_evidence(model, images, layer, target=torch.arange(3) % CLASSES, at=at)
    kept: list[Tensor] = []
    model.get_submodule(layer.partition("#")[0]).register_forward_hook(lambda *args: kept.append(value(args[2])))
    model(images)
    assert found.maps.shape[2:] == (4, 4)
    torch.testing.assert_close(found.maps.flatten(2).transpose(1, 2), kept[0][:, 1:].detach())


def call_of(values: Tensor, *, folded: bool = False) -> LayerCall:
    return LayerCall("fc", "linear", values, torch.empty(0), lambda: values, folded)


@pytest.mark.parametrize(
    ("tokens", "seen", "expected", "leading"),
    [
        (24, [(4, 6)], (4, 6), 0),
        (25, [(4, 6)], (4, 6), 1),  # not 5 x 5: the patches are seen
        (29, [(8, 12), (4, 6)], (4, 6), 5),  # a class token and four registers
        (17, [(4, 4), (1, 1)], (4, 4), 1),  # the map of a gate is none of patches
        (25, [(2, 11)], (2, 11), 3),
    ],
)
def test_the_grid_of_tokens(tokens: int, seen: list[tuple[int, int]], expected: tuple[int, int], leading: int) -> None:
    values = torch.rand(2, tokens, 3)
    maps = layer_maps(call_of(values), values, seen)
    assert maps.shape == (2, 3, *expected)
    for row in range(expected[0]):
        for column in range(expected[1]):
            assert torch.equal(maps[:, :, row, column], values[:, leading + row * expected[1] + column])


@pytest.mark.parametrize(
    ("shape", "seen", "folded"),
    [
        ((2, 23, 3), [], False),
        ((2, 23, 3), [(2, 2)], False),
        ((2, 10, 3), [(4, 3)], False),
        ((2, 4, 5, 3), [(5, 4)], False),
        ((2, 4, 49, 3), [(14, 14)], False),
        ((2, 4, 4, 3), [(4, 4)], True),
        ((2, 3), [(1, 1)], False),
    ],
)
def test_tokens_without_a_grid_are_one_line(shape: tuple[int, ...], seen: list[tuple[int, int]], folded: bool) -> None:
    values = torch.rand(shape)
    with pytest.raises(UserError, match=r"no tokens whose places .* give grid=\(rows, columns\)") as error:
        layer_maps(call_of(values, folded=folded), values, seen)
    assert "\n" not in str(error.value)


def test_what_has_no_map_says_what_to_take() -> None:
    model, images, _ = made(vit)
    with pytest.raises(UserError, match=r"class token .* alone.* before the last attention"):
        grad_cam(model, images, "encoder.layers.encoder_layer_1.mlp.3")
    with pytest.raises(UserError, match=r'before any activation.*at="output"'):
        grad_cam(model, images, "encoder.layers.encoder_layer_0.self_attention", at="activation")
    model, images, _ = made(TOKENS["swin"])
    with pytest.raises(UserError, match="tokens in windows"):
        grad_cam(model, images, "features.1.0.attn#2")


@pytest.mark.parametrize(("kind", "leading"), [("registers", 5), ("distilled", 2)])
def test_tokens_before_the_image_are_left_out_in_timm(kind: str, leading: int) -> None:
    timm = pytest.importorskip("timm", reason="the networks are timm's")
    size = {"num_classes": CLASSES, "embed_dim": 8, "depth": 2, "num_heads": 2}

    def build() -> nn.Module:
        if kind == "distilled":
            return timm.models.deit.VisionTransformerDistilled(img_size=(16, 24), patch_size=4, **size)
        return timm.models.vision_transformer.VisionTransformer((16, 24), 4, reg_tokens=4, global_pool="avg", **size)

    model, _, _ = made(build)
    images, layer = torch.rand(3, 3, 16, 24).double(), "blocks.0.mlp.fc2"
    kept: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda _module, _args, output: kept.append(output))
    model(images)
    handle.remove()
    assert kept[0].shape[1] == 24 + leading
    require_loops(model, images, layer, [0, 5], (4, 6))
