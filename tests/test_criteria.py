"""Rival criteria against slow explicit computations, and against arithmetic done by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attackroute as ar
from architectures import CLOSED, MIXED, Dense, Function, Head, Inverted, Perceptron, Residual, chain, conv, randomised
from attackroute.analysis.criteria import CRITERIA, NEED_ATTACK, ChannelScores, channel_scores, rank_channels
from attackroute.core.errors import UserError
from attackroute.tracing import oracle
from tracing import conv_outputs

UNREAD = ("weight", "kernel")
"""Criteria that look at two images for the layers alone."""

pytestmark = pytest.mark.usefixtures("float64")


def shifted(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """An attack that knows nothing of the model: every image has its own change."""
    return (x * (0.5 + 0.1 * y.to(x.dtype).view(-1, 1, 1, 1)) + 0.2).flip(-1)


def batch(samples: int = 5) -> tuple[Tensor, Tensor]:
    return torch.rand(samples, 3, 16, 16), torch.arange(samples) % 5


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-300)


# activation and gradient


@pytest.mark.parametrize("name", [*CLOSED, *MIXED])
def test_activation_and_gradient_of_every_architecture(name: str) -> None:
    model = randomised({**CLOSED, **MIXED}[name]()).eval()
    x, y = batch()
    activation = channel_scores(model, (x, y), "activation", batch_size=2)
    gradient = channel_scores(model, (x, y), "gradient", batch_size=2)
    expected = conv_outputs(model, x, y)
    assert set(expected) == set(activation.values) - {"model"} and list(activation.values) == list(gradient.values)
    for layer, (z, slope) in expected.items():
        same(activation.values[layer], z.abs().mean((0, 2, 3)))
        same(gradient.values[layer], torch.zeros(z.shape[1]) if slope is None else slope.abs().sum((2, 3)).mean(0))


def test_by_hand() -> None:
    # Two images of 1x2: Z = [x, -2x] with x = [1, -3] and [2, 2]; mean |x| = (4 + 4) / 4 = 2.
    # Logits: sums over positions, so dL/dZ is p - onehot at both positions. Logits (-2, 4) and (4, -8):
    # with label 0 the doubts are sigmoid(6) and sigmoid(-12), and |dL/dZ| is the doubt, for both channels.
    model = Function(lambda parts, x: parts["conv"](x).sum((2, 3)), conv=conv([[1.0], [-2.0]]))
    x = torch.tensor([[1.0, -3.0], [2.0, 2.0]]).reshape(2, 1, 1, 2)
    same(channel_scores(model, x, "activation").values["parts.conv"], torch.tensor([2.0, 4.0]))
    doubt = (1 / (1 + math.exp(-6)) + 1 / (1 + math.exp(12))) / 2
    found = channel_scores(model, (x, torch.tensor([0, 0])), "gradient")
    same(found.values["parts.conv"], torch.tensor([2 * doubt, 2 * doubt]))
    doubt = (1 / (1 + math.exp(6)) + 1 / (1 + math.exp(12))) / 2  # of its own predictions, 1 and 0
    same(channel_scores(model, x, "gradient").values["parts.conv"], torch.tensor([2 * doubt, 2 * doubt]))


def test_linear_maps() -> None:
    model = Perceptron()
    x, y = batch()
    model(x)
    model = randomised(model).eval()
    hidden = F.max_pool2d(F.relu(model.conv(x)), 2).flatten(1)
    z1 = model.fc1(hidden).detach().requires_grad_()
    z2 = model.fc2(F.relu(model.bn1(z1)))
    z2.retain_grad()
    F.cross_entropy(model.fc3(F.gelu(z2)), y, reduction="sum").backward()
    activation = channel_scores(model, (x, y), "activation", linear=True).values
    gradient = channel_scores(model, (x, y), "gradient", linear=True).values
    assert list(activation) == ["conv", "fc1", "fc2", "fc3"]
    assert z1.grad is not None and z2.grad is not None
    for layer, z in (("fc1", z1), ("fc2", z2)):
        same(activation[layer], z.detach().abs().mean(0))
        same(gradient[layer], z.grad.abs().mean(0))


def confident(scale: float) -> tuple[nn.Module, Tensor]:
    """Two samples that light channel 0 or channel 1, with logit margins of ``scale`` and ``1.5 * scale``."""
    model = Function(
        lambda p, x: p["b"](p["a"](x) ** 2).sum((2, 3)),
        a=conv([[1.0, 0.0], [0.0, 1.0]]),
        b=conv([[1.0, 1.0], [0.0, 0.0]]),
    )
    return model, torch.tensor([[scale**0.5, 0.0], [0.0, (1.5 * scale) ** 0.5]]).reshape(2, 2, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_gradients_of_saturated_samples_keep_their_magnitude(dtype: torch.dtype, batch_size: int) -> None:
    # p is 1.0 in floating point; dL/dZ_a of the lit channel is 2 z (1 - p), 1 - p = exp(-margin).
    model, x = confident(100.0)
    found = channel_scores(model.to(dtype), x.to(dtype), "gradient", batch_size=batch_size).values
    first, second = 2 * 10 * math.exp(-100) / 2, 2 * 150**0.5 * math.exp(-150) / 2
    torch.testing.assert_close(found["parts.a"], torch.tensor([first, second]), rtol=1e-4, atol=0)
    doubt = (math.exp(-100) + math.exp(-150)) / 2
    torch.testing.assert_close(found["parts.b"], torch.tensor([doubt, doubt]), rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:the images lie far outside")
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_gradients_that_no_number_can_hold_still_rank(order: list[int]) -> None:
    model, x = confident(900.0)  # exp(-900) is zero in float64
    found = channel_scores(model, x[order], "gradient", batch_size=1).values["parts.a"]
    assert found[0] > 0 and found[0] > found[1]
    assert rank_channels(model, x[order], "gradient", 0.5).indices["parts.a"] == (0,)


def test_gradients_follow_all_paths() -> None:
    # Z_a reaches the logits through b and past it: dlogit_0/da = 1 + 3, dlogit_1/da = 1 + 5.
    model = Function(lambda p, x: ((z := p["a"](x)) + p["b"](z)).sum((2, 3)), a=conv([[1.0]]), b=conv([[3.0], [5.0]]))
    x = torch.zeros(1, 1, 1, 1)
    same(channel_scores(model, (x, torch.tensor([0])), "gradient").values["parts.a"], torch.tensor([0.5 * (6 - 4)]))


def test_gradients_end_where_the_model_ends_them() -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = parts["a"](x)
        return parts["head"](F.relu_(parts["c"](F.relu_(parts["b"](x)).detach())))

    model = Function(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1), c=nn.Conv2d(4, 4, 1), head=Head(4))
    x, y = batch()
    parts = model.parts
    z = parts["c"](F.relu(parts["b"](parts["a"](x)))).detach().requires_grad_()
    F.cross_entropy(parts["head"](F.relu(z)), y, reduction="sum").backward()
    found = channel_scores(model, (x, y), "gradient").values
    assert not found["parts.a"].any() and not found["parts.b"].any()
    same(found["parts.c"], z.grad.abs().sum((2, 3)).mean(0))


def test_weights_outside_the_parameters_do_not_hide_a_layer() -> None:
    kernel = torch.rand(4, 3, 1, 1, requires_grad=True)
    model = Function(lambda parts, x: parts["head"](F.relu(F.conv2d(x, kernel))), head=Head(4))
    assert channel_scores(model, batch(), "gradient").values["model"].all()
    assert kernel.grad is None


# weight


def size(module: nn.Module, dim: int) -> Tensor:
    """``sum |W|`` of a convolution's kernel over all but its outputs (0) or its inputs (1)."""
    return module.weight.abs().sum([d for d in range(4) if d != dim]).detach()


def gain(norm: nn.Module) -> Tensor:
    return (norm.weight / (norm.running_var + norm.eps).sqrt()).abs().detach()


def test_weight_by_hand() -> None:
    # Channel 0 is read by |1| + |-2| = 3, channel 1 by |4| + |5| = 9; norm gains 6 / sqrt(4) and -1 / sqrt(4).
    norm = nn.BatchNorm2d(2, eps=0.0)
    norm.weight.data, norm.running_var = torch.tensor([6.0, -1.0]), torch.full((2,), 4.0)
    model = nn.Sequential(conv([[1.0], [1.0]]), norm, nn.ReLU(), conv([[1.0, 4.0], [-2.0, 5.0]]), nn.Flatten())
    found = channel_scores(model, -torch.ones(1, 1, 1, 1), "weight")  # dead ReLUs change nothing
    assert found.values["0"].tolist() == [9.0, 4.5]
    assert found.values["3"].tolist() == [5.0, 7.0]  # a sink: its own kernel
    assert found.samples == 0


def test_weight_of_a_chain() -> None:
    model = randomised(chain()).eval()
    found = channel_scores(model, batch(), "weight").values
    same(found["0"], gain(model[1]) * size(model[3], 1))
    same(found["3"], gain(model[4]) * size(model[8], 1))
    same(found["8"], size(model[10], 1))
    same(found["10"], size(model[10], 0))


def test_weight_sums_over_successors() -> None:
    model = randomised(Residual()).eval()
    found = channel_scores(model, batch(), "weight").values
    after_a = size(model.b1[0], 1) + size(model.down[0], 1)
    same(found["conv1"], gain(model.bn1) * (size(model.a1[0], 1) + after_a))
    same(found["a1.0"], gain(model.a1[1]) * size(model.a2[0], 1))
    same(found["a2.0"], gain(model.a2[1]) * after_a)
    same(found["b2.0"], gain(model.b2[1]) * size(model.c1[0], 1))
    same(found["down.0"], gain(model.down[1]) * size(model.c1[0], 1))
    same(found["c2.0"], size(model.c2[0], 0))
    own = channel_scores(model, batch(), "kernel").values
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            same(own[name], size(module, 0))


def test_weight_of_concatenated_channels() -> None:
    model = randomised(Dense()).eval()
    found = channel_scores(model, batch(), "weight").values
    expected = torch.zeros(3)  # the first block's output stands at channels 4 .. 7 of what comes after
    for norm, reader in (
        (model.layers[1][0], model.layers[1][1]),
        (model.layers[2][0], model.layers[2][1]),
        (model.norm, model.transition),
    ):
        expected += (gain(norm) * size(reader, 1))[4:7]
    same(found["layers.0.3"], expected)


def test_weight_of_grouped_convolutions() -> None:
    model = randomised(Inverted()).eval()
    found = channel_scores(model, batch(), "weight").values
    deep = model.deep[0].weight.detach().abs().sum((1, 2, 3))  # depthwise: channel i feeds outputs 2 i and 2 i + 1
    same(found["expand.0"], gain(model.expand[1]) * (deep[0::2] + deep[1::2]))
    kernel = model.grouped[0].weight.detach().abs().sum((2, 3))  # (6, 2): outputs 0 .. 2 read inputs 0, 1
    read = torch.cat([kernel[:3].sum(0), kernel[3:].sum(0)])
    same(found["project.0"], gain(model.project[1]) * read)
    same(found["excite"], size(model.project[0], 1))  # a gate


def test_weight_before_linear_maps() -> None:
    model = Perceptron()
    model(batch()[0])
    model = randomised(model).eval()
    found = channel_scores(model, batch(), "weight", linear=True).values
    same(found["conv"], model.fc1.weight.detach().abs().sum(0).reshape(4, -1).sum(1))
    same(found["fc1"], gain(model.bn1) * model.fc2.weight.detach().abs().sum(0))
    same(found["fc3"], model.fc3.weight.detach().abs().sum(1))


def test_weight_is_the_influence_of_a_network_without_masks() -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = 0.5 * parts["stem"](x)
        x = x + parts["b"](parts["norm"](parts["a"](x)))
        return parts["last"](-x).flatten(1)

    layers = dict(stem=nn.Conv2d(3, 6, 1), a=nn.Conv2d(6, 4, 1, groups=2), norm=nn.BatchNorm2d(4), b=nn.Conv2d(4, 6, 1))
    model = randomised(Function(forward, **layers, last=nn.Conv2d(6, 5, 1))).eval()
    found = channel_scores(model, torch.rand(2, 3, 1, 1), "weight").values
    influences = oracle.trace(model, torch.rand(1, 3, 1, 1)).influence
    for layer in ("stem", "a", "b"):
        same(
            found[f"parts.{layer}"],
            sum(m[0].sum(0) for (source, _), m in influences.items() if source == f"parts.{layer}"),
        )


def test_weight_is_not_defined_where_channels_mix() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), Head(4))
    with pytest.raises(UserError, match=r"no weight norm for the channels of layer '0': .* between it and '2' mixes"):
        channel_scores(model, batch(), "weight")


# every criterion


@pytest.mark.parametrize("by", CRITERIA)
def test_the_route(by: str) -> None:
    model, data = randomised(Residual()), batch()
    route = rank_channels(model, data, by, 0.4, attack=shifted)
    scores = channel_scores(model, data, by, attack=shifted)
    traced = ar.trace_routes(model, data, width=0.4)
    assert route.layers == tuple(scores.values) == tuple(traced.layers)
    for layer, values in scores.values.items():
        kept = max(1, round(0.4 * len(values)))
        best = sorted(range(len(values)), key=lambda channel: (-values[channel], channel))[:kept]
        assert route.indices[layer] == tuple(sorted(best))
        assert values.dtype == torch.float64 and values.device.type == "cpu"
    assert route == scores.route(0.4)
    origin = route.provenance
    assert origin is not None and (origin.criterion, origin.width) == (by, 0.4)
    assert origin.samples == (0 if by in UNREAD else 5)
    assert origin.attack == ("shifted" if by in NEED_ATTACK else None)


def test_ties_go_to_the_lower_index() -> None:
    scores = ChannelScores("activation", {"conv": torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])}, 1)
    assert scores.route(0.4).indices["conv"] == (1, 2)


@pytest.mark.parametrize("by", CRITERIA)
def test_batches_and_order_do_not_matter(by: str) -> None:
    model = randomised(CLOSED["inverted"]()).eval()
    x, y = batch(7)
    expected = channel_scores(model, (x, y), by, attack=shifted).values
    order = torch.randperm(7)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    for data, size_ in (
        ((x, y), 1),
        ((x, y), 4),
        ((x[order], y[order]), 3),
        (loader, 128),
        (iter([(x[:5], y[:5]), (x[5:], y[5:])]), 9),
    ):
        for layer, values in channel_scores(model, data, by, attack=shifted, batch_size=size_).values.items():
            same(values, expected[layer])


@pytest.mark.filterwarnings("ignore:the images lie far outside")
@pytest.mark.parametrize("by", ["activation", "gradient"])
def test_sums_do_not_lose_small_samples(by: str) -> None:
    model, x = randomised(chain()).eval().float(), torch.rand(65, 3, 16, 16).float()
    x[0] *= 1e4
    found = channel_scores(model, x, by, batch_size=1).values
    for layer, values in channel_scores(copy.deepcopy(model).double(), x.double(), by).values.items():
        torch.testing.assert_close(found[layer], values, rtol=2e-4, atol=1e-30)


@pytest.mark.parametrize("by", CRITERIA)
def test_the_model_is_left_as_it_was(by: str) -> None:
    model = randomised(chain(inplace=True)).train()
    model[3].eval()
    next(model.parameters()).requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    x, y = batch()
    x.requires_grad_()
    before = x.detach().clone()
    rank_channels(model, (x, y), by, attack=shifted)
    with torch.inference_mode():
        inside = rank_channels(model, (x, y), by, attack=shifted)
    with torch.no_grad():
        assert rank_channels(model, (x, y), by, attack=shifted) == inside
    wrong = torch.rand(2, 4, 16, 16), y[:2]
    with pytest.raises(UserError, match="cannot run on a batch"):
        rank_channels(model, wrong if by in UNREAD else [(x, y), wrong], by, attack=shifted)
    assert flags == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters()) and x.grad is None and torch.equal(x, before)


def test_criteria_without_data_read_one_batch() -> None:
    def data() -> Iterator[Tensor]:
        yield torch.rand(64, 3, 16, 16)
        raise AssertionError("read on")

    seen: list[int] = []
    model = chain()
    model.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    for by in UNREAD:
        rank_channels(model, data(), by)
    assert seen == [2, 2]


def test_unknown_criteria() -> None:
    message = "unknown criterion 'wieght'; did you mean weight.*choose from activation, gradient, .* weight, kernel"
    with pytest.raises(UserError, match=message):
        rank_channels(chain(), batch(), "wieght")


@pytest.mark.parametrize("by", CRITERIA)
def test_bad_input(by: str) -> None:
    x, y = batch()
    with pytest.raises(UserError, match="width 0 is outside"):
        rank_channels(chain(), (x, y), by, 0, attack=shifted)
    with pytest.raises(UserError, match="no sample"):
        rank_channels(chain(), [], by, attack=shifted)
    with pytest.raises(UserError, match="no 2-D convolution"):
        rank_channels(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 5)), (x, y), by, attack=shifted)
    with pytest.raises(UserError, match="cannot run on a batch"):
        rank_channels(chain(), torch.rand(2, 4, 16, 16), by, attack=shifted)
    with pytest.raises(UserError, match="NaN or inf"):
        rank_channels(chain(), x / 0, by, attack=shifted)


def test_bad_labels_and_outputs_for_the_gradient() -> None:
    x, y = batch()
    with pytest.raises(UserError, match="label 5 is outside"):
        rank_channels(chain(), (x, y + 5), "gradient")
    with pytest.raises(UserError, match="not logits"):
        rank_channels(nn.Sequential(nn.Conv2d(3, 4, 3)), (x, y), "gradient")
    with pytest.raises(UserError, match="do not depend on any route layer"):
        rank_channels(Function(lambda p, x: p["a"](x).mean((2, 3)).detach(), a=nn.Conv2d(3, 4, 3)), x, "gradient")


@pytest.mark.parametrize("by", ["activation", "gradient"])
@pytest.mark.parametrize(
    "odd", [lambda p, x: p["a"](x), lambda p, x: p["b"](p["a"](p["a"](x))), lambda p, x: p["a"](p["b"](x))]
)
def test_a_structure_that_varies(by: str, odd: Any) -> None:
    model = Function(
        lambda p, x: p["head"](odd(p, x) if len(x) == 3 else p["b"](p["a"](x))),
        a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1), head=Head(3),
    )  # fmt: skip
    with pytest.raises(UserError, match="structure must not vary"):
        rank_channels(model, batch(7), by, batch_size=4)
