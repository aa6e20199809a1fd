"""Sensitivity, gradient and attribution against slow explicit computations, and against arithmetic done by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attackroute as ar
import attackroute.analysis.channel_statistics as statistics
from architectures import CLOSED, MIXED, Function, Head, Perceptron, chain, conv, randomised
from attackroute.analysis.channel_statistics import loss_gradient, sensitivity
from attackroute.analysis.criteria import channel_scores, rank_channels
from attackroute.analysis.interventions import transplant
from attackroute.core.errors import UserError
from attackroute.routes.route import Route
from tracing import conv_outputs, state

MODELS = {**CLOSED, **MIXED}


pytestmark = pytest.mark.usefixtures("float64")


def batch(samples: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Images, attacked images, labels."""
    return torch.rand(samples, 3, 16, 16), torch.rand(samples, 3, 16, 16), torch.arange(samples) % 5


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-15)


def to(images: Tensor) -> Callable[..., Tensor]:
    """An attack that turns any batch of as many images into these."""
    return lambda model, x, y: images


def outputs(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs and gradients of all convolutions, zero where none arrives."""
    calls = conv_outputs(model, x, y)
    return {name: (z, torch.zeros_like(z) if gradient is None else gradient) for name, (z, gradient) in calls.items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture(name: str) -> None:
    model = randomised(MODELS[name]()).eval()
    x, attacked, y = batch()
    clean, changed = outputs(model, x, y), outputs(model, attacked, y)
    moved, slope = sensitivity(model, x, attacked, batch_size=2), loss_gradient(model, (x, y), batch_size=2)
    by = channel_scores(model, (x, y), "attribution", attack=to(attacked)).values
    path = channel_scores(model, (x, y), "path", attack=to(attacked)).values
    assert list(moved) == list(slope) == list(by) == list(path)
    between = [outputs(model, x + (2 * step + 1) / 16 * (attacked - x), y) for step in range(8)]
    assert set(clean) == set(moved) - {"model"}
    for layer, (z, dz) in clean.items():
        other, other_dz = changed[layer]
        same(moved[layer], (z - other).abs().mean((0, 2, 3)))
        same(slope[layer], dz.abs().sum((2, 3)).mean(0))
        same(by[layer], -((z - other) * other_dz).sum((2, 3)).mean(0))
        slopes = sum(point[layer][1] for point in between) / 8
        same(path[layer], -((z - other) * slopes).sum((2, 3)).mean(0))


def test_by_hand() -> None:
    # Two images of 1x2, Z = [x, -2x]: x = [1, -3] and [2, 2], x' = [0, 0] and [2, 6].
    # |x - x'| has the means 2 and 2 over positions. Logits are sums over positions: z' = (0, 0) and (8, -16).
    # With label 0, dL/dZ' is p - onehot = (-1, 1) * doubt' at every position, doubt' = 1/2 and sigmoid(-24).
    # sum (x - x') = -2 and -4, so -(Z - Z') dL/dZ' = -2 doubt', -4 doubt' for channel 0 and the double for channel 1,
    # with the sign (-2 * -1 = 2 for x' - x): channel 1: -(-2)(-2)(1) doubt' = -4 doubt'.
    model = Function(lambda parts, x: parts["conv"](x).sum((2, 3)), conv=conv([[1.0], [-2.0]]))
    x = torch.tensor([[1.0, -3.0], [2.0, 2.0]]).reshape(2, 1, 1, 2)
    attacked = torch.tensor([[0.0, 0.0], [2.0, 6.0]]).reshape(2, 1, 1, 2)
    same(sensitivity(model, x, attacked)["parts.conv"], torch.tensor([2.0, 4.0]))
    same(sensitivity(model, x[:1], attacked[:1])["parts.conv"], torch.tensor([2.0, 4.0]))
    doubts = 0.5, 1 / (1 + math.exp(24))
    weighted = (2 * doubts[0] + 4 * doubts[1]) / 2
    found = channel_scores(model, (x, torch.tensor([0, 0])), "attribution", attack=to(attacked))
    same(found.values["parts.conv"], torch.tensor([-weighted, -2 * weighted]))
    slopes = 1 / (1 + math.exp(-6)), 1 / (1 + math.exp(12))  # of the clean logits (-2, 4) and (4, -8), label 0
    mean = torch.tensor(slopes).mean() * 2
    same(loss_gradient(model, (x, torch.tensor([0, 0])))["parts.conv"], mean.expand(2))
    same(loss_gradient(model, (x[:1], torch.tensor([0])))["parts.conv"], torch.full((2,), 2 * slopes[0]))


def test_attribution_is_the_loss_that_a_transplant_takes_away() -> None:
    model = randomised(CLOSED["residual"]()).eval()
    x, noise, y = batch(4)
    attacked = x + 1e-5 * (noise - 0.5)
    scores = channel_scores(model, (x, y), "attribution", attack=to(attacked)).values
    with torch.no_grad():
        loss = F.cross_entropy(model(attacked.clone()), y)
        for layer in ("conv1", "b1.0", "down.0", "c2.0"):
            for channel in range(len(scores[layer])):
                with transplant(model, x, Route({layer: [channel]}, {layer: len(scores[layer])})):
                    taken = loss - F.cross_entropy(model(attacked.clone()), y)
                torch.testing.assert_close(scores[layer][channel], taken, rtol=1e-2, atol=1e-9)
    assert (scores["conv1"] > 0).any() and (scores["conv1"] < 0).any()


@pytest.mark.parametrize("linear", [False, True])
def test_a_path_of_one_point_is_attribution(linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, attacked, y) = Perceptron(), batch()
    model(x)
    model = randomised(model).eval()

    def scores(by: str) -> dict[str, Tensor]:
        return dict(channel_scores(model, (x, y), by, attack=to(attacked), linear=linear).values)

    whole = scores("path")
    monkeypatch.setattr(statistics, "PATH_POINTS", (1.0,))
    for layer, values in scores("attribution").items():
        same(scores("path")[layer], values)
        assert not torch.allclose(whole[layer], values)


def test_the_path_of_a_linear_map_adds_up_to_the_change_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    # What lies before the layer is linear, so that its outputs lie on the path too, and the integral is the difference.
    monkeypatch.setattr(statistics, "PATH_POINTS", [(step + 0.5) / 200 for step in range(200)])
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5 * 144, 5)).eval()
    x, attacked, y = batch()
    found = channel_scores(model, (x, y), "path", attack=to(attacked)).values["0"].sum()
    torch.testing.assert_close(
        found, F.cross_entropy(model(attacked), y) - F.cross_entropy(model(x), y), rtol=1e-4, atol=0
    )


def test_equal_images_are_no_change() -> None:
    model, (x, _, y) = randomised(chain(inplace=True)).eval().float(), batch()
    x = x.float()
    assert not any(values.any() for values in sensitivity(model, x, x.clone()).values())
    assert not any(v.any() for v in channel_scores(model, (x, y), "attribution", attack=to(x)).values.values())


def test_two_forward_passes_a_batch() -> None:
    model, (x, attacked, y) = chain(), batch(6)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    looked = [2]
    sensitivity(model, x, attacked, batch_size=4)
    assert sizes == [*looked, 4, 4, 2, 2]
    for by in ("sensitivity", "attribution"):
        sizes.clear()
        channel_scores(model, (x, y), by, attack=lambda model, images, labels: images / 2, batch_size=4)
        assert sizes == [*looked, 4, 4, 2, 2]
    sizes.clear()
    channel_scores(model, (x, y), "path", attack=to(attacked))
    assert sizes == [*looked, *[6] * 10]
    sizes.clear()
    loss_gradient(model, (x, y))
    assert sizes == [*looked, 6]


@pytest.mark.parametrize("measure", ["sensitivity", "attribution", "path"])
def test_real_attacks_and_data_without_labels(measure: str) -> None:
    model, (x, _, y) = randomised(chain()).eval(), batch()
    attack = ar.parse_attack("pgd:eps=0.1,steps=3")
    with torch.no_grad():
        predicted = model(x).argmax(1)
    attacked = attack(model, x, predicted)
    if measure == "sensitivity":
        found, expected = sensitivity(model, x, attack=attack, batch_size=2), sensitivity(model, x, attacked)
    else:
        found = channel_scores(model, x, measure, attack=attack, batch_size=2).values
        expected = channel_scores(model, (x, predicted), measure, attack=to(attacked)).values
    for layer, values in expected.items():
        same(found[layer], values)
    route = rank_channels(model, (x, y), measure, 0.5, attack=attack)
    assert route.provenance is not None and route.provenance.attack == str(attack)
    assert route.provenance.criterion == measure


def test_batches_and_order_do_not_matter() -> None:
    model = randomised(CLOSED["inverted"]()).eval()
    x, attacked, y = batch(7)
    order = torch.randperm(7)
    expected, slopes = sensitivity(model, x, attacked), loss_gradient(model, (x, y))
    loaders = [DataLoader(TensorDataset(images), batch_size=3) for images in (x, attacked)]
    for first, second in ((x[order], attacked[order]), loaders, ((x, y), attacked)):
        for layer, values in sensitivity(model, first, second, batch_size=3).items():
            same(values, expected[layer])
    for layer, values in loss_gradient(model, DataLoader(TensorDataset(x[order], y[order]), batch_size=2)).items():
        same(values, slopes[layer])


def test_linear_maps() -> None:
    model, (x, attacked, y) = Perceptron(), batch()
    model(x)
    model = randomised(model).eval()

    def features(images: Tensor) -> Tensor:
        return model.fc1(F.max_pool2d(F.relu(model.conv(images)), 2).flatten(1))

    moved = sensitivity(model, x, attacked, linear=True)
    assert list(moved) == ["conv", "fc1", "fc2", "fc3"]
    same(moved["fc1"], (features(x) - features(attacked)).abs().mean(0).detach())
    same(moved["fc3"], (model(x) - model(attacked)).abs().mean(0).detach())
    assert list(loss_gradient(model, (x, y), linear=True)) == list(moved)
    assert list(sensitivity(model, x, attacked)) == ["conv"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attribution_of_confident_samples(dtype: torch.dtype) -> None:
    # Logits (z_0 ** 2 + z_1 ** 2, 0); the attacked images have margins of 100 and 120, where p is 1.0 in floating
    # point, and the doubt is exp(-margin), each image's own. -(z - z') dL/dz' = (z - z') 2 z' exp(-margin).
    model = Function(
        lambda p, x: p["b"](p["a"](x) ** 2).sum((2, 3)),
        a=conv([[1.0, 0.0], [0.0, 1.0]]), b=conv([[1.0, 1.0], [0.0, 0.0]]),
    ).to(dtype)  # fmt: skip
    x = torch.tensor([[11.0, 0.0], [0.0, 12.0]], dtype=dtype).reshape(2, 2, 1, 1)
    attacked = torch.tensor([[10.0, 0.0], [0.0, 120**0.5]], dtype=dtype).reshape(2, 2, 1, 1)
    expected = [(11 - 10) * 2 * 10 * math.exp(-100) / 2, (12 - 120**0.5) * 2 * 120**0.5 * math.exp(-120) / 2]
    for rows in ([0, 1], [1, 0]):
        found = channel_scores(
            model,
            [(x[[row]], torch.tensor([0])) for row in rows],
            "attribution",
            attack=lambda model, images, labels: attacked[[0]] if images[0, 0] else attacked[[1]],
        ).values["parts.a"]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_point_of_a_path_counts_with_its_own_doubt(dtype: torch.dtype) -> None:
    # Logits (z ** 2, 0), label 0, z = 12 and 10 at x and x': the doubt at z is 1 / (1 + exp(z ** 2)), below 1e-43, and
    # -(12 - 10) dL/dz = 2 * 2 z * doubt.
    model = Function(lambda p, x: p["b"](p["a"](x) ** 2).sum((2, 3)), a=conv([[1.0]]), b=conv([[1.0], [0.0]])).to(dtype)
    x = torch.full((1, 1, 1, 1), 12.0, dtype=dtype)
    found = channel_scores(model, (x, torch.tensor([0])), "path", attack=lambda model, images, labels: images - 2)
    points = [12 - 2 * (step + 0.5) / 8 for step in range(8)]
    expected = torch.tensor([sum(4 * z / (1 + math.exp(z**2)) for z in points) / 8])
    torch.testing.assert_close(found.values["parts.a"], expected, rtol=1e-4, atol=0)


def test_a_layer_that_runs_between_the_images_alone_is_named() -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        between = parts["b"](parts["a"](x)) if 0.1 < float(x.detach().mean()) < 0.9 else parts["a"](x)
        return between.sum((2, 3))

    model = Function(forward, a=conv([[1.0], [2.0]]), b=conv([[1.0, 0.0], [0.0, 1.0]]))
    with pytest.raises(UserError, match="structure must not vary"):
        channel_scores(model, torch.zeros(1, 1, 1, 1), "path", attack=lambda model, images, labels: images + 1)


def test_what_lies_before_a_cut_has_no_attribution() -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = parts["a"](x)
        return parts["head"](F.relu_(parts["b"](F.relu_(x))))

    model = Function(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1), head=Head(4)).eval()
    x, attacked, y = batch()
    found = channel_scores(model, (x, y), "attribution", attack=to(attacked)).values
    assert not found["parts.a"].any() and found["parts.b"].any()
    assert sensitivity(model, x, attacked)["parts.a"].all()


def test_the_model_and_the_images_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.ReLU(True), randomised(chain(inplace=True))).train()
    model[1][1].eval()
    x, attacked, y = batch()
    images = x - 0.5
    kept, before = images.clone(), state(model)

    def breaks(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model.train()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return x.zero_()

    def fails(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model.train()
        raise ZeroDivisionError

    def run(attack: Callable[..., Tensor]) -> None:
        sensitivity(model, images, attacked)
        loss_gradient(model, (images, y))
        sensitivity(model, images, attack=attack)
        rank_channels(model, (images, y), "attribution", attack=attack)

    run(breaks)
    with torch.inference_mode():
        run(breaks)
    with pytest.raises(ZeroDivisionError):
        run(fails)
    with pytest.raises(UserError):
        loss_gradient(model, (images, y + 5))
    assert state(model) == before and torch.equal(images, kept)


def test_attacks_are_taken_by_their_specification() -> None:
    model, (x, _, y) = randomised(chain()).eval(), batch()
    made = ar.parse_attack("fgsm:eps=0.1")
    for layer, values in sensitivity(model, (x, y), attack=made).items():
        same(sensitivity(model, (x, y), attack="fgsm:eps=0.1")[layer], values)
    for by in ("sensitivity", "attribution"):
        named = rank_channels(model, (x, y), by, attack="fgsm:eps=0.1")
        assert named == rank_channels(model, (x, y), by, attack=made)
        assert named.provenance is not None and named.provenance.attack == str(made)


def test_progress() -> None:
    calls: list[tuple[int, int | None]] = []
    x, attacked, _ = batch()
    sensitivity(chain(), x, attacked, batch_size=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_bad_input() -> None:
    model, (x, attacked, y) = chain().eval(), batch()
    with pytest.raises(UserError, match="pass the attacked images x_adv, or the attack"):
        sensitivity(model, x)
    with pytest.raises(UserError, match="pass the attacked images x_adv, or the attack"):
        sensitivity(model, x, attacked, attack=to(attacked))
    with pytest.raises(UserError, match="x and x_adv are no pairs"):
        sensitivity(model, x, attacked[:4])
    with pytest.raises(UserError, match="x and x_adv are no pairs"):
        sensitivity(model, x, attacked[:4], batch_size=4)
    with pytest.raises(UserError, match="no sample"):
        sensitivity(model, [], [])
    with pytest.raises(UserError, match="NaN or inf"):
        sensitivity(model, x, attacked / 0)
    with pytest.raises(UserError, match=r"no 2-D convolution ran .* pass linear=True"):
        loss_gradient(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)), (x, y))
    for wrong, message in ((x[:4], r"returns \(4,"), (x / 0, "NaN or inf"), (None, "returns NoneType")):
        with pytest.raises(UserError, match=message):
            sensitivity(model, x, attack=to(wrong))  # type: ignore[arg-type]
    for by in ("sensitivity", "attribution"):
        with pytest.raises(UserError, match=f"criterion '{by}' compares images with attacked ones: pass attack="):
            rank_channels(model, x, by)


@pytest.mark.parametrize("by", ["sensitivity", "attribution"])
def test_a_structure_that_varies(by: str) -> None:
    model = Function(
        lambda p, x: p["head"](p["b"](p["a"](x)) if x.mean() < 1 else p["a"](x)),
        a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1), head=Head(3),
    ).eval()  # fmt: skip
    x, _, y = batch()
    for images, attack in ((x, lambda _m, x, _y: x + 2), (x + 2, lambda _m, x, _y: x - 2)):
        with pytest.raises(UserError, match="structure must not vary"):
            rank_channels(model, (images, y), by, attack=attack)
    with pytest.raises(UserError, match="structure must not vary"):
        rank_channels(model, [(x, y), (x + 2, y)], by, attack=lambda _m, x, _y: x)
