"""The stabilisation penalty beside other ways to write the same sum and the same derivative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn import functional

import attackroute as ar
from architectures import Perceptron, Residual, Reused
from attackroute.core.errors import UserError
from attackroute.hardening.harden import harden
from attackroute.hardening.stabilisation_penalty import StabilisationPenalty
from attackroute.routes.route import Route
from test_gradient_penalty import smooth, some_of, written_out
from toy_training import toy_data, toy_model
from tracing import ready, require_slopes, state


def penalised(
    penalty: StabilisationPenalty, model: nn.Module, clean: Tensor, attacked: Tensor
) -> tuple[Tensor, list[Tensor]]:
    with penalty.watch():
        model(attacked.clone())
    value = penalty(clean)
    return value.detach(), list(torch.autograd.grad(value, list(model.parameters()), materialize_grads=True))


def test_against_autograd_functional() -> None:
    """The same network written out."""
    model, route = written_out()
    x, noisy = torch.rand(2, 4, 2, 8, 8).double()

    def penalty(*parameters: Tensor) -> Tensor:
        w0, b0, w1, b1, w2, b2 = parameters

        def outputs(images: Tensor) -> list[Tensor]:
            first = functional.conv2d(images, w0, b0)
            second = functional.conv2d(functional.max_pool2d(first.relu(), 2), w1, b1)
            return [first.flatten(2), second.flatten(2), functional.linear(second.relu().flatten(1), w2, b2)[..., None]]

        total = x.new_zeros(())
        for name, before, after in zip(route, outputs(x), outputs(noisy), strict=True):
            for channel in route[name].tolist():
                for sample in range(4):
                    total = total + (after - before)[sample, channel].abs().sum() / before.shape[2] / 4
        return total

    value, gradients = penalised(StabilisationPenalty(model, route), model, x, noisy)
    parameters = tuple(parameter.detach() for parameter in model.parameters())
    torch.testing.assert_close(value, penalty(*parameters))
    for slope, expected in zip(gradients, jacobian(penalty, parameters), strict=True):
        torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("training", [False, True])
def test_against_a_difference_quotient_over_the_parameters(training: bool) -> None:
    model, images, _ = ready(smooth, samples=4)
    noisy = (images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2)).double()).clamp(0, 1)
    model.train(training)
    penalty = StabilisationPenalty(model, some_of(model, images))
    _, gradients = penalised(penalty, model, images, noisy)
    require_slopes(model, gradients, lambda: penalised(penalty, model, images, noisy)[0])


@pytest.mark.parametrize("build", [Residual, Reused, Perceptron])
def test_it_is_the_sum_of_sensitivities(build: Callable[[], nn.Module]) -> None:
    model, images, _ = ready(build)
    noisy = (images + 0.1).clamp(0, 1)
    route = some_of(model, images, linear=build is Perceptron)
    value, _ = penalised(StabilisationPenalty(model, route), model, images, noisy)
    responses = ar.sensitivity(model, images, noisy, linear=build is Perceptron)
    expected = sum(float(responses[layer][route[layer]].sum()) for layer in route)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_dropout_is_no_noise_and_statistics_are_those_of_the_attacked_pass() -> None:
    torch.manual_seed(0)
    model, images = toy_model(dropout=0.5).train(), torch.rand(6, 3, 8, 8)
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(4, 3))
    route = Route({"0": [0, 1], "6": [0, 3], "8": [2]}, {"0": 6, "6": 4, "8": 3})
    value, _ = penalised(StabilisationPenalty(model, route), model, images, images)
    assert value == 0
    alone = toy_model(dropout=0.5).train()
    penalty = StabilisationPenalty(alone, Route({"0": [0]}, {"0": 6}))
    fresh = toy_model(dropout=0.5).train()
    torch.manual_seed(3)
    fresh(images / 2)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    with penalty.watch():
        alone(images / 2)
    assert penalty(images) > 0
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(one, other) for one, other in zip(alone.buffers(), fresh.buffers(), strict=True))


def test_nothing_is_left_behind() -> None:
    model, images, _ = ready(Residual)
    before = state(model)
    penalty = StabilisationPenalty(model, some_of(model, images))
    with pytest.raises(RuntimeError), penalty.watch():
        model(images[:, :2])
    with pytest.raises(UserError, match="both must be the same images"):
        with penalty.watch():
            model(images)
        penalty(images[:1])
    assert state(model) == before


def test_errors_say_what_to_do() -> None:
    model, images, _ = ready(Residual)
    penalty = StabilisationPenalty(model, some_of(model, images))
    with pytest.raises(UserError, match=r"inside penalty\.watch"):
        penalty(images)
    with penalty.watch():
        model(images)
    penalty(images)
    with pytest.raises(UserError, match=r"inside penalty\.watch"):  # each pass serves once
        penalty(images)
    with pytest.raises(UserError, match="no_grad"), penalty.watch(), torch.no_grad():
        model(images)
    with pytest.raises(UserError, match="no neuron"):
        StabilisationPenalty(model, Route({"conv1": []}, {"conv1": 4}))
    with pytest.raises(UserError, match="--attack pgd"):
        harden(toy_model(), toy_data(), penalty="stabilisation")
