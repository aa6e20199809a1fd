"""The weight penalty beside sums that are written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from architectures import Function, Inverted, Perceptron, Residual, Reused, Shuffled, randomised
from attackroute.core.errors import UserError
from attackroute.hardening.weight_penalty import WeightPenalty
from attackroute.routes.route import Route
from tracing import ready


def small() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.BatchNorm2d(6, eps=0.1), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.Flatten(), nn.Linear(5, 2),
    )  # fmt: skip
    return randomised(model).double().eval()  # type: ignore[return-value]


ROUTE = Route({"0": [0, 3], "3": [1, 2, 4], "6": [0, 4]}, {"0": 4, "3": 6, "6": 5})
IMAGES = torch.rand(2, 3, 5, 5).double()


def by_hand(model: nn.Sequential, *, folded: bool) -> Tensor:
    """Eq. (13) over pairs (m, n), one at a time."""
    total = torch.zeros(()).double()
    for m in (1, 2, 4):
        gain = (model[4].weight[m] / (model[4].running_var[m] + 0.1).sqrt()).abs() if folded else 1.0
        for n in (0, 3):
            if m // 3 == n // 2:  # of one group
                total = total + gain * model[3].weight[m, n % 2].abs().sum()
    for m in (0, 4):
        for n in (1, 2, 4):
            total = total + model[6].weight[m, n].abs().sum()  # no batch norm follows
    return total


@pytest.mark.parametrize("folded", [False, True])
def test_value_and_gradient_by_hand(folded: bool) -> None:
    model = small()
    penalty = WeightPenalty(model, ROUTE, IMAGES, folded=folded)
    expected = by_hand(model, folded=folded)
    torch.testing.assert_close(penalty(), expected)
    gradients, references = (
        torch.autograd.grad(value, list(model.parameters()), materialize_grads=True) for value in (penalty(), expected)
    )
    torch.testing.assert_close(gradients, references)


def test_it_follows_the_model() -> None:
    """Steps of an optimiser, other statistics, another type: the penalty is of the model as it is."""
    model = small()
    penalty = WeightPenalty(model, ROUTE, IMAGES)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    torch.testing.assert_close(penalty(), by_hand(model, folded=True))
    model.float()
    torch.testing.assert_close(penalty(), by_hand(model, folded=True).float())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("between", [nn.ReLU, nn.ReLU6, lambda inplace: InPlace() if inplace else nn.ReLU()])
def test_a_norm_behind_an_activation_is_not_folded(between: Callable[..., nn.Module], inplace: bool) -> None:
    """However the activation works: in place, the norm reads the very tensor that the layer gave."""
    model = small()
    model[4] = nn.Sequential(between(inplace=inplace), model[4])
    if between is nn.ReLU:
        model[3].weight.data.abs_()  # it changes no value
    model[0] = nn.Sequential(model[0])  # names change: 0.0, 3, 6
    route = Route({"0.0": [0, 3], "3": [1, 2, 4]}, {"0.0": 4, "3": 6})
    plain = WeightPenalty(model, route, IMAGES.abs(), folded=False)
    torch.testing.assert_close(WeightPenalty(model, route, IMAGES.abs())(), plain())


class InPlace(nn.Module):
    """A ReLU past PyTorch's count of writes."""

    def forward(self, x: Tensor) -> Tensor:
        x.data.relu_()
        return x


def test_only_the_folded_penalty_is_blind_to_a_scale_that_batch_norm_undoes() -> None:
    model = small()
    folded, raw = WeightPenalty(model, ROUTE, IMAGES), WeightPenalty(model, ROUTE, IMAGES, folded=False)
    before, logits = (folded(), raw()), model(IMAGES)
    with torch.no_grad():
        model[3].weight.mul_(0.01)
        model[4].running_mean.mul_(0.01)
        model[4].running_var.copy_((model[4].running_var + 0.1) * 0.01**2 - 0.1)
    torch.testing.assert_close(model(IMAGES), logits)
    torch.testing.assert_close(folded(), before[0])
    assert raw() < before[1]


def test_residual_sums_count_each_entry_once() -> None:
    model, images, _ = ready(Residual)
    route = Route({"conv1": [0, 1], "a2.0": [1, 2], "b1.0": [0]}, {"conv1": 4, "a2.0": 4, "b1.0": 6})
    # b1 reads relu(a2 + pooled conv1), so both carry into channels 0, 1 and 1, 2; a2 reads a1, which is off the route
    expected = model.b1[0].weight[0, [0, 1, 2]].abs().sum()
    torch.testing.assert_close(WeightPenalty(model, route, images, folded=False)(), expected)


def test_linear_maps_behind_a_flattening() -> None:
    model, images, _ = ready(Perceptron)
    route = Route({"conv": [1, 3], "fc1": [0, 2, 5], "fc2": [4]}, {"conv": 4, "fc1": 7, "fc2": 6})
    kernel = model.fc1.weight.view(7, 4, -1)
    gain = (model.bn1.weight / (model.bn1.running_var + 1e-5).sqrt()).abs()
    expected = (kernel[:, [1, 3]].abs().sum((1, 2)) * gain)[[0, 2, 5]].sum() + model.fc2.weight[
        4, [0, 2, 5]
    ].abs().sum()
    torch.testing.assert_close(WeightPenalty(model, route, images)(), expected)


def test_a_reused_layer_counts_once_for_each_call() -> None:
    model, images, _ = ready(Reused)
    route = Route({"conv": [0], "conv#2": [0, 1]}, {"conv": 4, "conv#2": 4})
    torch.testing.assert_close(WeightPenalty(model, route, images)(), model.conv.weight[:2, 0].abs().sum())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of older norms
@pytest.mark.parametrize(
    ("compute", "original"),
    [
        (lambda layer: prune.random_unstructured(layer, "weight", 0.3), "weight_orig"),
        (lambda layer: [prune.l1_unstructured(layer, "weight", share) for share in (0.3, 0.4)], "weight_orig"),
        (nn.utils.weight_norm, "weight_v"), (nn.utils.spectral_norm, "weight_orig"),
        (nn.utils.parametrizations.weight_norm, "parametrizations.weight.original1"),
    ],
)  # fmt: skip
def test_weights_that_a_hook_or_parametrisation_computes(compute: Callable[[nn.Module], object], original: str) -> None:
    model = small()
    compute(model[3])
    compute(model[6])
    penalty = WeightPenalty(model, ROUTE, IMAGES)
    for layer in (model[3], model[6]):
        layer.get_parameter(original).data.add_(0.1)  # as an optimiser's step does
    value = penalty()
    model(IMAGES)  # now the layers have their new weights
    torch.testing.assert_close(value, by_hand(model, folded=True))
    value.backward()
    assert all(layer.get_parameter(original).grad.abs().sum() > 0 for layer in (model[3], model[6]))
    torch.testing.assert_close(penalty(), value)


def test_the_model_comes_back_as_it_was() -> None:
    model = small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    WeightPenalty(model, ROUTE, IMAGES)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not model._forward_pre_hooks


def test_what_cannot_be_punished_is_named() -> None:
    model = small()
    with pytest.raises(UserError, match="no layer of the route follows"):
        WeightPenalty(model, ROUTE.restrict(["0", "6"]), IMAGES)
    with pytest.raises(UserError, match="'nowhere'"):
        WeightPenalty(model, Route({"nowhere": [0]}, {"nowhere": 3}), IMAGES)
    mixed, images, _ = ready(Shuffled)
    with pytest.raises(UserError, match="mixes channels"):
        WeightPenalty(mixed, Route({"conv1": [0], "conv2": [0]}, {"conv1": 8, "conv2": 8}), images)
    gated, images, _ = ready(Inverted)
    route = Route({"deep.0": [0, 5], "project.0": [1]}, {"deep.0": 16, "project.0": 4})
    expected = gated.project[0].weight[1, [0, 5]].abs().sum()
    torch.testing.assert_close(WeightPenalty(gated, route, images, folded=False)(), expected)

    kernel = nn.Parameter(torch.rand(2, 4, 1, 1))
    computed = Function(
        lambda parts, x: nn.functional.conv2d(parts["first"](x), kernel * 2).flatten(1), first=nn.Conv2d(3, 4, 1)
    )
    route = Route({"parts.first": [0], "model": [0]}, {"parts.first": 4, "model": 2})
    with pytest.raises(UserError, match="'model' computes its weight elsewhere"):
        WeightPenalty(computed, route, IMAGES.float())
