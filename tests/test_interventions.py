"""Deactivation against arithmetic done by hand and against surgery on copied weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attackroute as ar
from architectures import CLOSED, MIXED, Function, Head, Perceptron, Residual, chain, conv, conv_bn, randomised, tokens
from attackroute.analysis.interventions import deactivate
from attackroute.core.errors import UserError
from attackroute.routes.route import Route
from attackroute.tracing import oracle
from tracing import every_other, same

pytestmark = pytest.mark.usefixtures("float64")


def images(samples: int = 3) -> Tensor:
    return torch.rand(samples, 3, 16, 16)


def operated(model: nn.Module, route: Route, layers: Iterable[str] | None = None) -> nn.Module:
    """A copy with the route's kernel rows and biases set to zero."""
    model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for layer in route if layers is None else layers:
            for parameter in (modules[layer].weight, modules[layer].bias):
                if parameter is not None:
                    parameter[route[layer]] = 0
    return model


def shifted_norm(scale: list[float], shift: list[float]) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(scale), eps=0.0)
    norm.weight.data, norm.bias.data = torch.tensor(scale), torch.tensor(shift)
    return norm.eval()


# at the layer's own output


@pytest.mark.parametrize("name", [*CLOSED, *MIXED])
def test_equals_surgery_on_the_weights(name: str) -> None:
    model = randomised({**CLOSED, **MIXED}[name]()).eval()
    route, x = every_other(model), images()
    expected_model = operated(model, route)
    if name == "reused":  # surgery on a shared kernel meets every call
        calls = ("conv", "conv#2", "conv#3")
        route = Route(dict.fromkeys(calls, route["conv"]), dict.fromkeys(calls, 4))
    with torch.no_grad():
        before = model(x)
        expected = expected_model(x)
        with deactivate(model, route):
            actual = model(x)
        same(actual, expected)
        assert not torch.allclose(before, expected)
        assert torch.equal(model(x), before)


def test_by_hand() -> None:
    # x = 2. a = [2, 2 + 1, -2], b = [a0 + 10 a1 + 100 a2, a0 - a1] + [0.5, 0].
    a, b = (conv([[1.0], [1.0], [-1.0]], [0.0, 1.0, 0.0]), conv([[1.0, 10.0, 100.0], [1.0, -1.0, 0.0]], [0.5, 0.0]))
    model = nn.Sequential(a, b, nn.Flatten())
    x = torch.full((1, 1, 1, 1), 2.0)
    assert model(x).tolist() == [[2 + 30 - 200 + 0.5, 2 - 3]]
    with deactivate(model, Route({"0": [1]}, {"0": 3})):
        assert model(x).tolist() == [[2 - 200 + 0.5, 2]]
    with deactivate(model, Route({"0": [1, 2], "1": [0]}, {"0": 3, "1": 2})):
        assert model(x).tolist() == [[0, 2]]


@pytest.mark.parametrize("layers", [["3"], ["10", "0"], []])
def test_only_the_layers_asked_for(layers: list[str]) -> None:
    model, x = randomised(chain()).eval(), images()
    route = every_other(model)
    if not layers:
        with pytest.raises(UserError, match="at least one layer"), deactivate(model, route, layers):
            pass
        return
    with deactivate(model, route, iter(layers)):
        actual = model(x)
    same(actual, operated(model, route, layers)(x))


def test_one_call_of_a_reused_layer() -> None:
    model, x = CLOSED["reused"]().eval(), images()
    y = F.conv2d(x, model.kernel, stride=2)
    y = F.relu(model.conv(y)) + y
    second = model.conv(y)
    second[:, [1, 3]] = 0
    y = F.relu(second) + y
    y = F.relu(model.conv(y)) + y
    with deactivate(model, Route({"conv#2": [1, 3]}, {"conv#2": 4})):
        same(model(x), model.head(y))
        same(model(x), model.head(y))  # calls are counted anew in every pass


def test_contexts_nest_and_compose() -> None:
    model, x = randomised(Residual()).eval(), images()
    counts = {"conv1": 4, "b1.0": 6}
    one, two = Route({"conv1": [0], "b1.0": [1, 2]}, counts), Route({"conv1": [0, 3], "b1.0": []}, counts)
    before = model(x)
    with deactivate(model, one):
        alone = model(x)
        with deactivate(model, two):
            both = model(x)
        assert torch.equal(model(x), alone)
    same(both, operated(model, one | two)(x))
    same(alone, operated(model, one)(x))
    assert torch.equal(model(x), before)


def test_contexts_of_two_models() -> None:
    first, second, x = randomised(chain()).eval(), randomised(Residual()).eval(), images()
    with deactivate(first, every_other(first)), deactivate(second, every_other(second)):
        together = first(x) + second(x)
    same(together, operated(first, every_other(first))(x) + operated(second, every_other(second))(x))


def test_linear_maps() -> None:
    model, x = Perceptron(), images()
    model(x)
    model = randomised(model).eval()
    route = every_other(model, (nn.Conv2d, nn.Linear))
    with deactivate(model, route):
        same(model(x), operated(model, route)(x))
    with deactivate(model, route, ["fc1"]):
        same(model(x), operated(model, route, ["fc1"])(x))
    mixer = tokens().eval()  # linear maps on (N, T, C): channels stand last
    route = every_other(mixer, (nn.Conv2d, nn.Linear))
    with deactivate(mixer, route):
        same(mixer(x), operated(mixer, route)(x))


def test_gradients_are_those_of_the_operated_model() -> None:
    model, x = randomised(chain(inplace=True)).eval(), images().requires_grad_()
    route = every_other(model)
    other = operated(model, route)
    with deactivate(model, route):
        model(x).square().sum().backward()
    found, x.grad = x.grad, None
    other(x).square().sum().backward()
    same(found, x.grad)
    for name in route:
        kernels, expected = (net.get_submodule(name).weight.grad for net in (model, other))
        same(kernels[1 - route[name][0] :: 2], expected[1 - route[name][0] :: 2])
        assert not kernels[route[name]].any()


def test_train_mode_takes_the_statistics_of_what_is_left() -> None:
    model, x = nn.Sequential(*conv_bn(3, 4), nn.ReLU(), Head(4)).train(), images()
    route = Route({"0": [2]}, {"0": 4})
    other = operated(model, route)
    with deactivate(model, route):
        same(model(x), other(x))
    assert model.training
    same(model[1].running_mean, other[1].running_mean)
    assert model[1].running_mean[2] == 0 != model[1].running_mean[1]


def test_modes_of_execution() -> None:
    model, x = randomised(chain(inplace=True)).eval().float(), images().float()
    route = every_other(model)
    other = operated(model, route)
    with deactivate(model, route):
        with torch.inference_mode():
            inferred = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(x)
        learned = model(x.requires_grad_())
        learned.sum().backward()  # an index first made in inference mode would fail here
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low, other(x))
    torch.testing.assert_close(inferred, other(x).detach())
    torch.testing.assert_close(learned, other(x))


def test_infinite_values_are_silenced_too() -> None:
    model = nn.Sequential(conv([[1.0], [1.0]]), conv([[1.0, 1.0]]), nn.Flatten())
    x = torch.full((1, 1, 1, 1), torch.inf)
    with deactivate(model, Route({"0": [0, 1]}, {"0": 2})):
        assert model(x).tolist() == [[0]]


def test_memory_format_is_kept() -> None:
    seen = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Function(lambda _, x: (seen.append(x), x)[1]))
    model = model.to(memory_format=torch.channels_last)
    with deactivate(model, Route({"0": [1]}, {"0": 4})):
        model(images().contiguous(memory_format=torch.channels_last))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("at", ["output", "activation"])
def test_an_empty_layer_changes_nothing(at: str) -> None:
    model, x = randomised(chain()).eval(), images()
    before = model(x)
    with deactivate(model, Route({"0": [], "3": []}, {"0": 6, "3": 8}), at=at):
        assert torch.equal(model(x), before)


def test_a_copy_made_inside_is_a_model_of_its_own() -> None:
    model, x = randomised(chain()).eval(), images()
    before = model(x)
    with deactivate(model, every_other(model)):
        assert torch.equal(copy.deepcopy(model)(x), before)
        assert not torch.equal(model(x), before)


def test_routes_traced_inside() -> None:
    model, x = randomised(chain()).eval(), images()
    route = every_other(model)
    layers = ["3", "8"]
    expected = ar.trace_routes(operated(model, route, layers), x, keep_scores=True)
    with deactivate(model, route, layers):
        found = ar.trace_routes(model, x, keep_scores=True)
    same(found.scores["10"], expected.scores["10"])


# after the activation


def test_batch_norm_makes_a_constant_of_zero() -> None:
    # x = 3: Z = [3, -3]; norm: [2 * 3 + 1, -(-3) + 5] = [7, 8]; relu; sum with weights 1, 10: 87.
    # Z_1 = 0 passes as relu(0 + 5) = 5: 7 + 50. After the activation it is gone: 7. Z_0 = 0 leaves 1: 1 + 80.
    model = nn.Sequential(
        conv([[1.0], [-1.0]]), shifted_norm([2.0, -1.0], [1.0, 5.0]), nn.ReLU(), conv([[1.0, 10.0]]), nn.Flatten()
    )
    x, route = torch.full((1, 1, 1, 1), 3.0), Route({"0": [1]}, {"0": 2})
    assert model(x).item() == 87
    with deactivate(model, route):
        assert model(x).item() == 57
    with deactivate(model, route, at="activation"):
        assert model(x).item() == 7
    with deactivate(model, route), deactivate(model, route.complement(), at="activation"):
        assert model(x).item() == 50
    with deactivate(model, route.complement(), at="activation"), deactivate(model, route):
        assert model(x).item() == 50
    with deactivate(model, route, at="activation"), deactivate(model, route.complement(), at="activation"):
        assert model(x).item() == 0


ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    nn.ReLU(), nn.ReLU(True), nn.ReLU6(True), nn.LeakyReLU(0.1, True), nn.ELU(inplace=True), nn.CELU(), nn.SELU(),
    nn.SiLU(True), nn.GELU(), nn.Mish(), nn.Hardswish(True), nn.Hardtanh(), nn.Hardsigmoid(), nn.PReLU(5),
    nn.Softplus(), nn.Sigmoid(), nn.Tanh(), nn.LogSigmoid(), nn.Threshold(0.1, 2.0), nn.Softsign(), nn.RReLU(),
    nn.Hardshrink(), nn.Tanhshrink(), nn.Softshrink(), torch.relu, torch.relu_, torch.sigmoid, torch.tanh_, F.silu,
    F.leaky_relu_, Tensor.relu_, Tensor.sigmoid_, lambda x: x.clamp(min=0), lambda x: x.clamp_(0, 6),
    lambda x: F.threshold_(x, 0.1, 2.0), lambda x: F.relu(input=x), lambda x: x.clone().contiguous().to(x.dtype).tanh(),
]  # fmt: skip


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("index", range(len(ACTIVATIONS)))
def test_every_activation(index: int, normed: bool) -> None:
    act = ACTIVATIONS[index]
    stem = randomised(conv_bn(3, 5)) if normed else nn.Conv2d(3, 5, 3)
    body = act.double() if isinstance(act, nn.Module) else Function(lambda _, x: act(x))
    model = nn.Sequential(*(stem if normed else [stem]), body, nn.Conv2d(5, 4, 2), Head(4)).eval()
    x = images().requires_grad_()
    with torch.no_grad():
        hidden = model[:-2](x)
        hidden[:, [1, 4]] = 0
        expected = model[-2:](hidden)
    with deactivate(model, Route({"0": [1, 4]}, {"0": 5}), at="activation"):
        actual = model(x)
    same(actual.detach(), expected)
    actual.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_linear_maps_after_their_activation() -> None:
    model, x = Perceptron(), images()
    model(x)
    model = randomised(model).eval()
    y = F.max_pool2d(F.relu(model.conv(x)), 2)
    y = F.relu(model.bn1(model.fc1(torch.flatten(y, 1))))
    y[:, 3] = 0
    with deactivate(model, Route({"fc1": [3]}, {"fc1": 7}), at="activation"):
        same(model(x), model.fc3(F.gelu(model.fc2(y))))


@pytest.mark.parametrize(
    ("forward", "culprit"),
    [
        (lambda p, x: p["b"](F.relu(p["a"](x) + 1)), "add"),
        (lambda p, x: p["b"](F.relu((z := p["a"](x)) + x[:, :1]) + F.relu(z)), "add"),
        (lambda p, x: p["b"](p["a"](x)), "conv2d"),
        (lambda p, x: p["b"](F.relu(F.max_pool2d(p["a"](x), 2))), "max_pool2d"),
        (lambda p, x: p["b"](F.group_norm(p["a"](x), 2)), "conv2d"),
        (lambda p, x: p["b"]((z := p["a"](x)) * torch.sigmoid(z)), "mul"),
        (lambda p, x: (F.relu_(z := p["a"](x)), p["b"](z))[1], "conv2d"),  # the output is thrown away
        (lambda p, x: p["b"](F.relu(torch.cat([p["a"](x)[:, :2], x[:, :2]], 1))), "__getitem__"),
        (lambda p, x: p["b"](torch.cat([p["a"](x)], 1)), "cat"),
        (lambda p, x: (z := p["a"](x), z.__setitem__((0, 0), 0.0), p["b"](F.relu(z)))[2], "__setitem__"),
        (lambda p, x: p["b"](F.relu(torch.where(x[:, :1] > 2, x[:, :1], p["a"](x)))), "where"),
        (lambda p, x: p["b"](torch.clamp(x[:, :1].repeat(1, 4, 1, 1), p["a"](x))), "clamp"),  # not what is activated
        (lambda p, x: p["b"](torch.clamp(z := p["a"](x), z)), "clamp"),
        (lambda p, x: p["b"](F.relu(torch.sub(input=torch.ones(1), other=p["a"](x)))), "sub"),
    ],
)  # fmt: skip
def test_a_layer_without_an_activation_of_its_own(forward: Any, culprit: str) -> None:
    model = nn.Sequential(Function(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1)), Head(4)).eval()
    route = Route({"0.parts.a": [1]}, {"0.parts.a": 4})
    with (
        pytest.raises(UserError, match=rf"layer '0\.parts\.a' meets '.*{culprit}.*' before any activation"),
        deactivate(model, route, at="activation"),
    ):
        model(images())
    with deactivate(model, route):
        assert model(images()).isfinite().all()


def test_an_output_that_meets_nothing_has_no_activation() -> None:
    model = Function(lambda p, x: F.relu(p["a"](x)) if len(x) > 1 else p["a"](x), a=nn.Conv2d(3, 4, 1))
    with deactivate(model, Route({"parts.a": [1]}, {"parts.a": 4}), at="activation"):
        assert not model(images(2))[:, 1].any()
        with pytest.raises(UserError, match=r"no activation follows layer 'parts\.a'"):
            model(images(1))


def test_the_shape_may_be_read_on_the_way() -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        z = parts["a"](x)
        _, c, *_ = z.shape
        assert z.ndim == 4 and z.size(1) == c and z.dim() == 4 and z.is_contiguous() and z.requires_grad
        return F.relu(z).flatten(1)[:, : 16 * 16 * c]

    model = Function(forward, a=nn.Conv2d(3, 4, 1))
    with deactivate(model, Route({"parts.a": [1]}, {"parts.a": 4}), at="activation"):
        y = model(images()).view(3, 4, 16, 16)
    assert not y[:, 1].any() and y[:, 0].any()


def test_routes_traced_inside_after_an_activation() -> None:
    model, x = randomised(chain()).eval(), images()
    with deactivate(model, every_other(model), ["0", "3"], at="activation"):
        found = ar.trace_routes(model, x, keep_scores=True)
        by = ar.rank_channels(model, x, "gradient", width=1.0)
    assert not found.scores["0"][:, every_other(model)["0"]].any() and found.scores["0"].any()
    assert by.layers == found.layers


# the model afterwards, and faults


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


@pytest.mark.parametrize("at", ["output", "activation"])
def test_the_model_is_left_as_it_was(at: str) -> None:
    model, x = randomised(chain()).train(), images()
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    route = every_other(model).restrict(["0", "3"])
    model.eval()
    before = model(x)
    model.train()
    model[1].eval()
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), deactivate(model, route, at=at):
            model.eval()(x)
            model.train()
            model[1].eval()
            raise ZeroDivisionError
        with pytest.raises(RuntimeError), deactivate(model, route, at=at):  # the forward pass itself fails
            model(torch.rand(2, 4, 16, 16))
        assert hooks(model) == 0
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.eval()(x), before)


@pytest.mark.parametrize("at", ["output", "activation"])
def test_a_pass_after_one_that_broke_off(at: str) -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = parts["a"](x)
        if x.shape[0] == 1:
            raise RuntimeError("one")
        return F.relu(x) if x.shape[0] == 2 else F.relu(parts["a"](F.relu(x)))

    model, x = Function(forward, a=nn.Conv2d(3, 3, 1)), images()
    with deactivate(model, Route({"parts.a": [], "parts.a#2": [1]}, {"parts.a": 3, "parts.a#2": 3}), at=at):
        for samples, error in [(1, RuntimeError), (3, None), (2, UserError), (1, RuntimeError), (2, UserError)]:
            if error is None:
                assert not model(x[:samples])[:, 1].any()
            else:
                with pytest.raises(error, match=r"one|layer 'parts\.a#2' did not run"):
                    model(x[:samples])


def test_routes_and_places_that_do_not_fit() -> None:
    model, route = chain(), Route({"0": [1], "3": [2]}, {"0": 6, "3": 8})
    functional = Function(lambda _, x: F.conv2d(x, torch.ones(5, 3, 1, 1)))
    for deactivated, message in (
        (deactivate(model, route, ["9"]), "no layer '9' in the route: its layers are 0, 3"),
        (deactivate(model, route, at="activatoin"), "at='activatoin'; did you mean activation"),
        (deactivate(model, every_other(Residual())), r"layer 'conv1' .* is not in the model"),
        (deactivate(model, Route({"3": [1]}, {"3": 9})), "layer '3' has 9 channels in the route but 8"),
        (deactivate(functional, Route({"model": [1]}, {"model": 4})), "layer .model. has 4 channels .* but 5"),
    ):
        with pytest.raises(UserError, match=message), deactivated:
            functional(images())
    assert hooks(model) == 0


def test_a_layer_that_does_not_run() -> None:
    model = Function(lambda parts, x: parts["a"](x), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1))
    for route in (Route({"parts.b": [1]}, {"parts.b": 4}), Route({"parts.a#2": [1]}, {"parts.a#2": 4})):
        layer = route.layers[0]
        with pytest.raises(UserError, match=f"layer '{layer}' did not run"), deactivate(model, route):
            model(images())


KERNEL, MATRIX = torch.rand(4, 3, 1, 1).double(), torch.rand(4, 4).double()


def gated(parts: nn.ModuleDict, x: Tensor) -> Tensor:
    """Convolutions and a linear map under one name: model, model#2 (the linear map) and model#3."""
    x = F.conv2d(x, KERNEL)
    gate = F.linear(x.mean((2, 3)), MATRIX)
    return parts["last"](F.conv2d(x * gate[..., None, None], KERNEL[:, :1], groups=4))


def test_names_do_not_depend_on_whether_linear_maps_are_route_layers() -> None:
    model = Function(gated, last=nn.Conv2d(4, 4, 1)).double()
    x = images()
    plain = oracle.trace(Function(lambda parts, x: gated(parts, x).mean((2, 3)), last=model.parts["last"]), x).layers
    assert plain == ("model", "model#3", "parts.last")
    for layer in plain:
        with deactivate(model, Route({layer: [0]}, {layer: 4})):
            assert not torch.equal(model(x), model(x * 0))
        with torch.no_grad(), deactivate(model, Route({layer: range(4)}, {layer: 4})):
            assert torch.equal(model(x), model(x * 0.5))  # nothing of the image passes a silent layer
