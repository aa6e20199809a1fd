"""Weakened connections against surgery on copied weights, and against arithmetic done by hand."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attackroute as ar
from architectures import CLOSED, Function, Head, Inception, Perceptron, Residual, chain, randomised, tokens
from architectures import conv as pointwise
from attackroute.analysis.interventions import deactivate, transplant, weaken
from attackroute.core.errors import UserError
from attackroute.routes.route import Route
from attackroute.tracing.connections import Connections
from tracing import same, state

pytestmark = pytest.mark.usefixtures("float64")


def images(samples: int = 3) -> Tensor:
    return torch.rand(samples, 3, 16, 16)


def some(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Conv2d,)) -> Route:
    """About half of the channels of every layer, no two layers alike."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    counts = {name: module.weight.shape[0] for name, module in modules.items()}
    return Route({name: torch.randperm(count)[: (count + 1) // 2] for name, count in counts.items()}, counts)


def carried(model: nn.Module, x: Tensor) -> dict[str, dict[str, Tensor]]:
    """By autograd, for each convolution and each one before it: whether input channel c depends on channel i, (c, i).

    Every output is cut and replaced by large random values, so that no activation is dead throughout.
    """
    model = copy.deepcopy(model).eval()
    leaves: dict[str, Tensor] = {}
    inputs: dict[str, tuple[Tensor, list[str]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):

            def read(_module: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                inputs[name] = args[0].clone(), list(leaves)

            def cut(_module: nn.Module, _args: object, output: Tensor, name: str = name) -> Tensor:
                leaves[name] = (3 * torch.randn_like(output)).requires_grad_()
                return leaves[name].clone()

            module.register_forward_pre_hook(read)
            module.register_forward_hook(cut)
    model(x)
    found: dict[str, dict[str, Tensor]] = {}
    for target, (values, sources) in inputs.items():
        found[target] = {source: torch.zeros(values.shape[1], leaves[source].shape[1]) for source in sources}
        for channel in range(values.shape[1] if sources and values.requires_grad else 0):
            noise = torch.randn_like(values[:, channel])
            slopes = torch.autograd.grad(
                (values[:, channel] * noise).sum(), [leaves[s] for s in sources], retain_graph=True, allow_unused=True
            )
            for source, slope in zip(sources, slopes, strict=True):
                if slope is not None:
                    found[target][source][channel] = slope.abs().sum((0, 2, 3)) > 0
    return found


def operated(model: nn.Module, x: Tensor, route: Route, beta: float, targets: list[str] | None = None) -> nn.Module:
    """A copy with the kernel slices between route neurons multiplied by beta, one weight at a time."""
    known = carried(model, x)
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for target in route if targets is None else targets:
        conv = modules[target]
        width, rows = conv.weight.shape[1], conv.weight.shape[0] // conv.groups
        for j in route.indices[target]:
            for u in range(width):
                channel = j // rows * width + u
                if any(known[target][source][channel, i] for source in known[target] for i in route.indices[source]):
                    with torch.no_grad():
                        conv.weight[j, u] *= beta
    return model


@pytest.mark.parametrize("name", [name for name in CLOSED if name != "reused"])
def test_equals_surgery_on_the_weights(name: str) -> None:
    model, x = randomised(CLOSED[name]()).eval(), images()
    route = some(model)
    for beta, targets in ((0.3, None), (0.0, list(route)[1::2])):
        other = operated(model, x, route, beta, targets)
        with torch.no_grad():
            before = model(x)
            with weaken(model, route, beta=beta, layers=targets):
                same(model(x), other(x))
                same(model(x[:1]), other(x[:1]))
            assert not torch.allclose(before, other(x))
            assert torch.equal(model(x), before)


def conv(weight: list[list[float]]) -> nn.Conv2d:
    """A pointwise convolution with a bias of one."""
    return pointwise(weight, [1.0] * len(weight))


def test_by_hand() -> None:
    # x = 2: a = [3, 5]; b = [3 + 10 * 5 + 1, 2 * 3 - 5 + 1]. On the route: a_1 and b_0, so that only the 10 weakens.
    model = nn.Sequential(conv([[1.0], [2.0]]), conv([[1.0, 10.0], [2.0, -1.0]]), nn.Flatten())
    x, route = torch.full((1, 1, 1, 1), 2.0), Route({"0": [1], "1": [0]}, {"0": 2, "1": 2})
    assert model(x).tolist() == [[54, 2]]
    with weaken(model, route, beta=0.5):
        assert model(x).tolist() == [[29, 2]]
        with weaken(model, Route({"0": [1], "1": [0, 1]}, {"0": 2, "1": 2}), 0):
            assert model(x).tolist() == [[4, 7]]
        assert model(x).tolist() == [[29, 2]]
    with weaken(model, route, 2):
        assert model(x).tolist() == [[104, 2]]
    with weaken(model, route, 0.5, ["0"]):  # nothing stands before it
        assert model(x).tolist() == [[54, 2]]


def test_grouped_and_depthwise_by_hand() -> None:
    # Two groups of two inputs, two outputs each: outputs 0, 1 read inputs 0, 1; outputs 2, 3 read inputs 2, 3.
    a, b = nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 4, 1, groups=2, bias=False)
    deep = nn.Conv2d(4, 8, 1, groups=4, bias=False)
    for layer in (a, b, deep):
        layer.weight.data.fill_(1)
    model, x = nn.Sequential(a, b, deep, nn.Flatten()), torch.ones(1, 1, 1, 1)
    route = Route({"0": [1, 2], "1": [0, 2], "2": [0, 1, 2]}, {"0": 4, "1": 4, "2": 8})
    with weaken(model, route, 0.5, ["1"]):  # b = [1.5, 2, 1.5, 2]
        assert model(x).tolist() == [[1.5, 1.5, 2, 2, 1.5, 1.5, 2, 2]]
    with weaken(model, route, 0.5, ["2"]):  # outputs 0, 1 read input 0, on the route; output 2 reads input 1, off it
        assert model(x).tolist() == [[1, 1, 2, 2, 2, 2, 2, 2]]


def test_a_sum_counts_if_any_of_its_neurons_is_on_the_route() -> None:
    model = Function(
        lambda p, x: p["c"](p["a"](x) + p["b"](x)).flatten(1),
        a=conv([[1.0], [1.0], [1.0]]), b=conv([[1.0], [1.0], [1.0]]), c=conv([[1.0, 10.0, 100.0]]),
    )  # fmt: skip
    counts = {"parts.a": 3, "parts.b": 3, "parts.c": 1}
    x = torch.zeros(1, 1, 1, 1)  # every sum is 2
    assert model(x).item() == 223
    with weaken(model, Route({"parts.a": [0], "parts.b": [2], "parts.c": [0]}, counts), 0.5):
        assert model(x).item() == 122
    with weaken(model, Route({"parts.b": [2], "parts.c": [0]}, {"parts.b": 3, "parts.c": 1}), 0.5):
        assert model(x).item() == 123


def test_calls_of_a_reused_layer() -> None:
    model, x = randomised(CLOSED["reused"]()).eval(), images()
    route = Route({"model": [0], "conv": [1], "conv#2": [2]}, {"model": 4, "conv": 4, "conv#2": 4})
    first, second = model.conv.weight.detach().clone(), model.conv.weight.detach().clone()
    first[1, 0] *= 0.5
    second[2, [0, 1]] *= 0.5  # the sum of both
    y = F.conv2d(x, model.kernel, stride=2)
    for kernel in (first, second, model.conv.weight):
        y = F.relu(F.conv2d(y, kernel, model.conv.bias, padding=1)) + y
    with weaken(model, route, 0.5):
        same(model(x), model.head(y))


def test_linear_maps() -> None:
    model = Perceptron()
    x = images()
    model(x)
    model = randomised(model).eval()
    route = Route({"conv": [1, 3], "fc1": [0, 4], "fc2": [2], "fc3": [0, 3]}, {"conv": 4, "fc1": 7, "fc2": 6, "fc3": 5})
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.fc1.weight.view(7, 4, -1)[[[0], [4]], [[1, 3]]] *= 0.25  # a channel is flattened to its positions
        other.fc2.weight[[2], [[0], [4]]] *= 0.25
        other.fc3.weight[[0, 3], 2] *= 0.25
    with weaken(model, route, 0.25):
        same(model(x), other(x))
    convolutions_only = Route({"conv": [1, 3]}, {"conv": 4})
    with weaken(model, convolutions_only, 0.25):
        assert torch.equal(model(x), model(x.clone()))


@pytest.mark.parametrize("name", ["chain in place", "residual", "dense"])
def test_a_factor_of_one_is_the_identity(name: str) -> None:
    model, x = randomised(CLOSED[name]()).eval().float(), images().float()
    before = model(x)
    with weaken(model, some(model), 1.0):
        assert torch.equal(model(x), before)


def test_gradients_reach_the_weights_and_the_images() -> None:
    model, x = randomised(chain(inplace=True)).eval(), images().requires_grad_()
    route = some(model)
    other = operated(model, x.detach(), route, 0.5)
    with torch.inference_mode(), weaken(model, route, 0.5) as nothing:
        assert nothing is None
        model(x)
    with weaken(model, route, 0.5):
        with torch.inference_mode():
            model(x)
        model(x).square().sum().backward()
    found, x.grad = x.grad, None
    other(x).square().sum().backward()
    same(found, x.grad)
    for module, twin in zip(model.modules(), other.modules(), strict=True):
        if isinstance(module, nn.Conv2d):
            factor = torch.where(module.weight == 0, torch.ones(()), twin.weight / module.weight).detach()
            same(module.weight.grad, twin.weight.grad * factor)


def test_autocast_and_train_mode() -> None:
    model, x = randomised(chain()).eval().float(), images().float()
    route = some(model)
    other = operated(model.double(), x.double(), route, 0.5).float()
    model.float()
    with weaken(model, route, 0.5), torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low, other(x))
    model.train(), other.train()
    model[7].p = other[7].p = 0.0
    with weaken(model, route, 0.5):
        torch.testing.assert_close(model(x), other(x))
    torch.testing.assert_close(model[1].running_mean, other[1].running_mean)
    assert model[1].num_batches_tracked == other[1].num_batches_tracked == 1 and model.training


def test_under_other_interventions_and_around_them() -> None:
    model, x = randomised(Residual()).eval(), images()
    route, clean = some(model), images()
    off = route.complement()
    other = operated(model, x, route, 0.4)
    with deactivate(other, off, ["a1.0", "b2.0"]), transplant(other, clean, route, ["conv1"]):
        expected = other(x)
    silent = deactivate(model, off, ["a1.0", "b2.0"])
    with weaken(model, route, 0.4), silent, transplant(model, clean, route, ["conv1"]):
        same(model(x), expected)
    silent = deactivate(model, off, ["a1.0", "b2.0"])
    with silent, weaken(model, route, 0.4), transplant(model, clean, route, ["conv1"]):
        same(model(x), expected)
    with deactivate(model, off, ["a1.0", "b1.0"], at="activation"), weaken(model, route, 0.4):
        found = model(x)
    with deactivate(other, off, ["a1.0", "b1.0"], at="activation"):
        same(found, other(x))


def test_routes_traced_inside() -> None:
    model, x = randomised(Inception()).eval(), images()
    route = some(model)
    expected = ar.trace_routes(operated(model, x, route, 0.1), x, keep_scores=True)
    with weaken(model, route, 0.1):
        found = ar.trace_routes(model, x, keep_scores=True)
    assert found.methods == expected.methods
    for layer in expected.layers:
        same(found.scores[layer], expected.scores[layer])


def test_linear_maps_are_not_traced_inside() -> None:
    model = Perceptron()
    model(images())
    route = some(model.eval(), (nn.Conv2d, nn.Linear))
    with (
        weaken(model, route, 0.1),
        pytest.raises(UserError, match="'fc1' is weakened, so the network cannot be traced"),
    ):
        ar.trace_routes(model, images(), config=ar.TraceConfig(linear=True))


def test_known_connections_save_the_look_at_the_first_batch() -> None:
    model, x = randomised(chain()).eval(), images()
    route = some(model)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    with weaken(model, route, 0.5):
        expected = model(x)
        model(x)
    assert sizes == [3, 2, 2, 2, 3]  # the first pass is under way when the model is looked at
    known = Connections.find(model, x[:1])
    sizes.clear()
    with weaken(model, route, 0.5, connections=known):
        assert torch.equal(model(x), expected)
    assert sizes == [3]


def test_the_model_is_left_as_it_was() -> None:
    model, x = randomised(chain(inplace=True)).train(), images()
    model[1].eval()
    next(model.parameters()).requires_grad_(False)
    before, route = state(model), some(model)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), weaken(model, route, 0.5):
            with torch.no_grad():
                model.eval()(x)
            model.train()
            model[1].eval()
            raise ZeroDivisionError
        with pytest.raises(UserError, match="cannot run on a batch"), weaken(model, route, 0.5):
            model(torch.rand(2, 4, 16, 16))
    assert state(model) == before


@pytest.mark.parametrize("beta", [-0.1, float("nan"), float("inf"), "half", None, True])
def test_bad_factors(beta: object) -> None:
    model = chain()
    with pytest.raises(UserError, match=r"is no factor of at least 0"), weaken(model, some(model), beta):  # type: ignore[arg-type]
        pass


def test_bad_routes() -> None:
    model, x = chain().eval(), images()
    route = some(model)
    twice = Route({"0": [1], "0#2": [1], "3": [1]}, {"0": 6, "0#2": 6, "3": 8})
    for weakened, message in (
        (weaken(model, route, 0.5, ["9"]), "no layer '9' in the route"),
        (weaken(model, twice, 0.5), r"layer '0#2' .* is not in the model"),
    ):
        with pytest.raises(UserError, match=message), weakened:
            model(x)
    with pytest.raises(UserError, match=r"call model\(images\)"), weaken(model, route, 0.5):
        model(input=x)


def test_where_channels_or_positions_mix() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model, x = nn.Sequential(model, Head(4)).eval(), images()
    counts = {"0.0": 4, "0.2": 4, "0.4": 4}
    route = Route({"0.0": [0], "0.2": [1], "0.4": [2]}, counts)
    message = r"no kernel slice of layer '0\.2' belongs to a channel of layer '0\.0'"
    with pytest.raises(UserError, match=message), weaken(model, route, 0.5):
        model(x)
    before = model(x)
    with weaken(model, route, 0.0, ["0.4"]):
        assert not torch.equal(model(x), before)
    with weaken(model, Route({"0.0": [], "0.2": [1], "0.4": [2]}, counts), 0.0):
        assert not torch.equal(model(x), before)
    mixer = tokens().eval()
    with pytest.raises(UserError, match="no kernel slice"), weaken(mixer, some(mixer, (nn.Conv2d, nn.Linear)), 0.5):
        mixer(x)


def test_a_custom_function_in_between() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x / 2

        @staticmethod
        def backward(ctx: object, slope: Tensor) -> Tensor:
            return slope / 2

    model = Function(
        lambda p, x: p["b"](Halved.apply(p["a"](x))).mean((2, 3)), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1)
    ).eval()
    with pytest.raises(UserError, match="no kernel slice"), weaken(model, some(model), 0.5):
        model(images())
