"""The gradient penalty beside other ways to write the same derivative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn import functional

from architectures import CLOSED, Function, Perceptron, Residual, Reused, chain
from attackroute.core.errors import UserError
from attackroute.core.layers import CHANNEL_DIM, LayerCall, LayerCalls
from attackroute.hardening.gradient_penalty import GradientPenalty
from attackroute.routes.route import Route
from tracing import ready, require_slopes


def smooth() -> nn.Module:
    """Twice differentiable, so that difference quotients converge."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.Conv2d(4, 5, 3, stride=2), nn.Tanh(),
        nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


def some_of(model: nn.Module, images: Tensor, *, linear: bool = False) -> Route:
    """The even channels of every layer that runs."""
    channels: dict[str, int] = {}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        channels[call.name] = output.shape[-1 if call.kind == "linear" else 1]
        return output

    with torch.no_grad(), LayerCalls(model, visit, linear=linear):
        model(images.clone())
    return Route({name: range(0, count, 2) for name, count in channels.items()}, channels)


def penalised(
    penalty: GradientPenalty, model: nn.Module, images: Tensor, labels: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The penalty and its gradients; zeros for parameters that it does not depend on."""
    with penalty.watch():
        logits = model(images.clone())
    value = penalty(logits, labels)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return value.detach(), list(torch.autograd.grad(value, parameters, materialize_grads=True))


def written_out() -> tuple[nn.Module, Route]:
    """A network for tests that write it out by its parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip
    return model.double(), Route({"0": [0, 2], "3": [1, 2, 3], "6": [1]}, {"0": 3, "3": 4, "6": 3})


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_against_autograd_functional() -> None:
    """The same network written out, with a zero added at each layer's output; its Jacobian is dL/dZ."""
    model, route = written_out()
    x, y = torch.rand(4, 2, 8, 8).double(), torch.tensor([0, 1, 2, 0])

    def penalty(*parameters: Tensor) -> Tensor:
        w0, b0, w1, b1, w2, b2 = parameters

        def loss(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
            z = functional.conv2d(x, w0, b0) + first
            z = functional.conv2d(functional.max_pool2d(z.relu(), 2), w1, b1) + second
            return functional.cross_entropy(functional.linear(z.relu().flatten(1), w2, b2) + third, y)

        zeros = [torch.zeros(4, 3, 6, 6).double(), torch.zeros(4, 4, 2, 2).double(), torch.zeros(4, 3).double()]
        gradients = jacobian(loss, tuple(zeros), create_graph=True)
        return sum(gradient[:, route[name]].abs().sum() for name, gradient in zip(route, gradients, strict=True))

    value, gradients = penalised(GradientPenalty(model, route), model, x, y)
    parameters = tuple(parameter.detach() for parameter in model.parameters())
    torch.testing.assert_close(value, penalty(*parameters))
    for slope, expected in zip(gradients, jacobian(penalty, parameters), strict=True):
        torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("training", [False, True])
def test_against_a_difference_quotient_over_the_parameters(training: bool) -> None:
    model, images, labels = ready(smooth, samples=4)
    model.train(training)
    penalty = GradientPenalty(model, some_of(model, images))
    _, gradients = penalised(penalty, model, images, labels.clamp(max=3))
    require_slopes(model, gradients, lambda: penalised(penalty, model, images, labels.clamp(max=3))[0])


@pytest.mark.parametrize("build", [chain, Residual])
def test_halves_of_a_batch_add_up_in_eval_mode(build: Callable[[], nn.Module]) -> None:
    model, images, labels = ready(build, samples=4, size=20)
    penalty = GradientPenalty(model, some_of(model, images))
    whole, gradients = penalised(penalty, model, images, labels)
    halves = [penalised(penalty, model, images[part], labels[part]) for part in (slice(2), slice(2, None))]
    torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, whole)
    mean = (flat(halves[0][1]) + flat(halves[1][1])) / 2
    torch.testing.assert_close(mean, flat(gradients), rtol=1e-4, atol=1e-4 * float(mean.abs().max()))


def test_writing_in_place_changes_nothing() -> None:
    slopes = []
    for inplace in (False, True):
        model, images, labels = ready(lambda inplace=inplace: chain(inplace=inplace))
        penalty = GradientPenalty(model, some_of(model, images))
        slopes.append(penalised(penalty, model, images, labels))
    torch.testing.assert_close(slopes[1], slopes[0])


@pytest.mark.parametrize(
    "gate",
    [
        nn.Hardsigmoid(), nn.Hardsigmoid(inplace=True), functional.hardsigmoid, torch.ops.aten.hardsigmoid,
        torch._C._nn.hardsigmoid, lambda x: torch.ops.aten.hardsigmoid_(x + 0),
    ],
)  # fmt: skip
def test_hard_sigmoids_have_a_second_derivative(gate: Callable[[Tensor], Tensor]) -> None:
    """PyTorch's own has none, however it is called; the same gate of clamps tells what it is."""

    def gated(gate: Callable[[Tensor], Tensor]) -> nn.Module:
        def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
            x = parts["b"](parts["a"](x).tanh())
            return parts["head"](torch.flatten(x * gate(5 * x.mean((2, 3), keepdim=True)), 1))

        return Function(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3), head=nn.LazyLinear(5))

    found = []
    for function in (gate, lambda x: (x + 3).clamp(0, 6) / 6):
        model, images, labels = ready(lambda function=function: gated(function))
        found.append(penalised(GradientPenalty(model, some_of(model, images)), model, images, labels))
    torch.testing.assert_close(found[0], found[1])


def test_reused_modules_and_functional_calls_count_each_by_its_name() -> None:
    model, images, labels = ready(Reused)
    route = some_of(model, images)
    assert list(route) == ["model", "conv", "conv#2", "conv#3"]
    whole, _ = penalised(GradientPenalty(model, route), model, images, labels)
    parts = [penalised(GradientPenalty(model, route.restrict([name])), model, images, labels)[0] for name in route]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)
    assert all(part > 0 for part in parts)


def test_parameters_behind_frozen_layers() -> None:
    model, images, labels = ready(smooth)
    route = some_of(model, images)
    whole, gradients = penalised(GradientPenalty(model, route), model, images, labels)
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    value, rest = penalised(GradientPenalty(model, route), model, images, labels)
    torch.testing.assert_close(value, whole)
    torch.testing.assert_close(rest, gradients[4:])


def test_a_model_inside_a_wrapper() -> None:
    model, images, labels = ready(smooth)
    penalty = GradientPenalty(model, some_of(model, images))
    alone, _ = penalised(penalty, model, images, labels)
    wrapper = nn.ModuleDict({"inner": model})
    with penalty.watch():
        logits = wrapper["inner"](images) * 1
    assert penalty(logits, labels).item() == alone.item()


def test_it_counts_as_one_pass() -> None:
    """Batch statistics and random numbers go on as after a single pass, and hooks are gone."""
    states = []
    for punished in (False, True):
        model, images, labels = ready(chain)
        penalty = GradientPenalty(model, some_of(model.eval(), images))
        torch.manual_seed(3)
        model.train()
        if punished:
            penalised(penalty, model, images, labels)
        else:
            model(images)
        states.append(({**model.state_dict()}, torch.get_rng_state()))
        assert not model._forward_pre_hooks and not model._forward_hooks
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", [*CLOSED, "perceptron"])
def test_it_is_the_sum_over_the_layers_gradients(name: str) -> None:
    """Of networks of every kind, also where the outputs of two layers are added and so have one gradient."""
    model, images, labels = ready(Perceptron if name == "perceptron" else CLOSED[name], samples=3)
    labels = labels % 4
    route = some_of(model, images, linear=name == "perceptron")
    outputs: dict[str, Tensor] = {}
    dims: dict[str, int] = {}

    def visit(call: LayerCall) -> Tensor:
        outputs[call.name], dims[call.name] = call.run(), CHANNEL_DIM[call.kind]
        return outputs[call.name].clone()

    with LayerCalls(model, visit, linear=True):
        loss = functional.cross_entropy(model(images.clone()), labels)
    chosen = {layer: outputs[layer] for layer in route}
    gradients = torch.autograd.grad(loss, list(chosen.values()), materialize_grads=True)
    expected = sum(
        gradient.index_select(dims[layer], route[layer]).abs().sum()
        for layer, gradient in zip(chosen, gradients, strict=True)
    )
    value, _ = penalised(GradientPenalty(model, route), model, images, labels)
    torch.testing.assert_close(value, expected)


def test_misuse_is_named() -> None:
    model, images, labels = ready(smooth)
    route = some_of(model, images)
    penalty = GradientPenalty(model, route)
    with pytest.raises(UserError, match="watch"):
        penalty(model(images), labels)
    with penalty.watch():
        logits = model(images)
    penalty(logits, labels)
    with pytest.raises(UserError, match="once"):
        penalty(logits, labels)
    with penalty.watch(), torch.no_grad(), pytest.raises(UserError, match="no_grad"):
        model(images)
    with penalty.watch():
        logits = model(images)
    with pytest.raises(UserError, match="detach"):
        penalty(logits.detach(), labels)
    with penalty.watch():
        other = nn.Linear(3, 5)(torch.rand(3, 3))
        model(images)
    with pytest.raises(UserError, match="do not depend"):
        penalty(other, labels)
    with penalty.watch():
        logits = model(images)
    with pytest.raises(UserError, match="label 9"):
        penalty(logits, torch.tensor([0, 9, 1]))
    with pytest.raises(UserError, match="no neuron"):
        GradientPenalty(model, Route({"0": []}, {"0": 4}))
    with pytest.raises(UserError, match="layer '9'"):
        GradientPenalty(model, Route({"9": [0]}, {"9": 4}))
    exact = GradientPenalty(model.float(), route)
    with torch.autocast("cpu", torch.float16), exact.watch(), pytest.raises(UserError, match="float16"):
        model(images.float())


def test_bfloat16_autocast_is_close() -> None:
    model, images, labels = ready(smooth, dtype=torch.float32, samples=8)
    penalty = GradientPenalty(model, some_of(model, images))
    value, gradients = penalised(penalty, model, images, labels % 5)
    with penalty.watch(), torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    coarse = penalty(logits, labels % 5)
    torch.testing.assert_close(coarse, value, rtol=0.05, atol=0)
    slopes = torch.autograd.grad(coarse, list(model.parameters()), materialize_grads=True)
    assert functional.cosine_similarity(flat(list(slopes)), flat(gradients), dim=0) > 0.95


def test_a_layer_that_does_not_run_is_named() -> None:
    model, images, labels = ready(Reused)
    with pytest.raises(UserError, match="'conv#4'"):
        penalised(GradientPenalty(model, Route({"conv#4": [0]}, {"conv#4": 4})), model, images, labels)
