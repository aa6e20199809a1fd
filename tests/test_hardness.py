"""Hardness of samples against ranks done by hand, and against autograd one sample at a time in float64."""

from __future__ import annotations

import copy
import csv
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attackroute as ar
from architectures import CLOSED, MIXED, Function, Perceptron, chain, conv, randomised
from attackroute.analysis import Hardness
from attackroute.analysis.hardness import GradientReader, log_loss_and_margin
from attackroute.core.errors import UserError


def every_other(model: nn.Module, images: Tensor, *, linear: bool = False) -> ar.Route:
    """A route of every other channel, from the first on."""
    channels = ar.trace_routes(model, images[:2], config=ar.TraceConfig(linear=linear)).channels
    return ar.Route({layer: range(0, count, 2) for layer, count in channels.items()}, channels)


def slow_log_gradients(model: nn.Module, route: ar.Route, images: Tensor, labels: Tensor) -> Tensor:
    """Eq. (16), one sample and one layer at a time, by autograd through the plain cross entropy in float64."""
    model = copy.deepcopy(model).double().eval()
    rows = []
    for image, label in zip(images.double(), labels, strict=True):
        found: dict[str, Tensor] = {}

        def hook(name: str, found: dict[str, Tensor] = found):  # type: ignore[no-untyped-def]
            def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
                output.retain_grad()
                count = sum(known.partition("#")[0] == name for known in found) + 1
                found[name if count == 1 else f"{name}#{count}"] = output
                return output.clone()

            return keep

        handles = [
            module.register_forward_hook(hook(name))
            for name, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
        ]
        F.cross_entropy(model(image[None]), label[None]).backward()
        for handle in handles:
            handle.remove()
        row = []
        for layer in route:
            total = 0.0
            for channel in route[layer].tolist():
                grad = found[layer].grad
                total += 0.0 if grad is None else float(grad[0, channel].abs().sum())
            row.append(math.log(total) if total else -math.inf)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(5)
    return randomised(chain()).double().eval(), torch.rand(9, 3, 16, 16).double(), torch.arange(9) % 5


# ranks and votes


def test_votes_by_hand() -> None:
    # Layer 1: gradients 4, 1, 2, 3: one vote for the largest, four for the smallest.
    # Layer 2: 5, 5, 0, 7: the two fives share ranks 2 and 3, and log 0 is the smallest.
    logs = torch.tensor([[4.0, 5.0], [1.0, 5.0], [2.0, 0.0], [3.0, 7.0]]).double().log()
    expected = [[1.0, 2.5], [4.0, 2.5], [3.0, 4.0], [2.0, 1.0]]
    hardness = Hardness(
        ar.Route({"a": [0], "b": [0]}, {"a": 1, "b": 1}), logs, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 1, 1])
    )
    assert hardness.votes.tolist() == expected
    assert hardness.values.tolist() == [3.5, 6.5, 7.0, 3.0]
    assert hardness.hardest(4).tolist() == [2, 1, 0, 3] and hardness.weakest(2).tolist() == [3, 0]
    assert hardness.correct.tolist() == [True, True, False, True]


def test_votes_are_ranks() -> None:
    torch.manual_seed(0)
    logs = torch.randint(0, 9, (50, 3)).double().log()  # many ties, some of them of -inf
    route = ar.Route({layer: [0] for layer in "abc"}, dict.fromkeys("abc", 1))
    votes = Hardness(route, logs, torch.zeros(50).long(), torch.zeros(50).long()).votes
    assert torch.equal(votes, torch.from_numpy(rankdata(-logs.numpy(), axis=0)))


def test_equal_samples_keep_the_lower_index_first() -> None:
    hardness = Hardness(
        ar.Route({"a": [0]}, {"a": 1}), torch.zeros(5, 1).double(), torch.zeros(5).long(), torch.zeros(5).long()
    )
    assert hardness.values.tolist() == [3.0] * 5
    assert hardness.hardest(3).tolist() == hardness.weakest(3).tolist() == [0, 1, 2]
    for count in (0, 6):
        with pytest.raises(UserError, match="from 1 to 5"):
            hardness.hardest(count)


# gradients


@pytest.mark.parametrize("name", [*CLOSED, *MIXED])
def test_gradients_of_every_architecture_against_autograd(name: str) -> None:
    torch.manual_seed(1)
    model = randomised({**CLOSED, **MIXED}[name]()).double().eval()
    images, labels = torch.rand(4, 3, 16, 16).double(), torch.tensor([0, 4, 2, 2])
    model(images)  # lazy modules
    route = every_other(model, images)
    if "model" in route:  # calls that no module's hook sees
        route = route.restrict([layer for layer in route if layer != "model"])
    found = ar.hardness(model, route, (images, labels), batch_size=3)
    expected = slow_log_gradients(model, route, images, labels)
    torch.testing.assert_close(found.log_gradients, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(found.votes, torch.from_numpy(rankdata(-expected.numpy(), axis=0)))
    assert torch.equal(found.predictions, model(images).argmax(1))


def test_linear_layers_on_the_route_count_too() -> None:
    torch.manual_seed(2)
    model = Perceptron()
    images, labels = torch.rand(4, 3, 16, 16).double(), torch.tensor([0, 1, 2, 3])
    model.double()(images)
    model = randomised(model).double().eval()
    route = every_other(model, images, linear=True)
    assert "fc1" in route
    found = ar.hardness(model, route, (images, labels)).log_gradients
    torch.testing.assert_close(found, slow_log_gradients(model, route, images, labels), rtol=1e-9, atol=1e-9)


def saturated(scales: list[float]) -> tuple[nn.Module, Tensor]:
    """Samples ``s`` with logits ``(s^2, 0)``, so that ``1 - p`` is ``1 / (1 + exp(s^2))``."""
    model = Function(
        lambda parts, x: parts["b"](parts["a"](x) ** 2).sum((2, 3)), a=conv([[1.0]]), b=conv([[1.0], [0.0]])
    )
    return model, torch.tensor(scales).reshape(-1, 1, 1, 1)


@pytest.mark.filterwarnings("ignore:the images lie far outside")
def test_confident_samples_keep_their_place_in_float32() -> None:
    # dL/dZ_a is 2 s (1 - p); in float32 p is 1.0 from s = 4.1 on, and 1 - p underflows from s = 10.2 on.
    scales = [12.0, 4.5, 2.0, 30.0, 0.5]
    model, images = saturated(scales)
    with torch.no_grad():
        assert (model(images).softmax(1)[:, 0] == 1).tolist() == [True, True, False, True, False]
    route = ar.Route({"parts.a": [0], "parts.b": [0, 1]}, {"parts.a": 1, "parts.b": 2})
    found = ar.hardness(model, route, (images, torch.zeros(5).long()))
    s = torch.tensor(scales).double()
    doubt = -(s**2) - torch.log1p(torch.exp(-(s**2)))
    expected = torch.stack([math.log(2) + s.log() + doubt, math.log(2) + doubt], 1)
    torch.testing.assert_close(found.log_gradients, expected, rtol=1e-5, atol=1e-5)
    truth = slow_log_gradients(model, route, images[[1, 2, 4]], torch.zeros(3).long())  # float64 can hold these
    torch.testing.assert_close(found.log_gradients[[1, 2, 4]], truth, rtol=1e-5, atol=1e-5)
    assert found.hardest(5).tolist() == [3, 0, 1, 2, 4]
    model, images = saturated(scales)
    found = ar.hardness(model, route, (images, torch.ones(5).long()))  # confidently wrong: dL/dZ_a is 2 s p
    torch.testing.assert_close(found.log_gradients[3], torch.tensor([60.0, 2.0]).double().log(), rtol=1e-6, atol=1e-6)


def test_loss_and_margin_at_any_confidence() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 500.0, 3.0], [900.0, 0.0, -900.0], [0.0, 0.0, 0.0], [40.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 2, 1, 0])
    log_loss, margin = log_loss_and_margin(logits.double(), labels)
    assert margin.tolist() == [1.0, 497.0, -1800.0, 0.0, 40.0]
    plain = F.cross_entropy(logits.double()[[0, 2, 3]], labels[[0, 2, 3]], reduction="none")
    torch.testing.assert_close(log_loss[[0, 2, 3]], plain.log())
    assert float(log_loss[1]) == pytest.approx(-497 + math.log1p(math.exp(-3)))
    assert float(log_loss[4]) == pytest.approx(-40 + math.log(2), rel=1e-12)


def test_input_gradient_against_autograd(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = case
    leaf = images.clone().requires_grad_()
    F.cross_entropy(model(leaf), labels, reduction="sum").backward()
    assert leaf.grad is not None
    found = GradientReader(model, {"route": every_other(model, images)}).read(images, labels)
    torch.testing.assert_close(found.log_input_gradients, leaf.grad.abs().sum((1, 2, 3)).log(), rtol=1e-9, atol=1e-9)


# invariants


def test_neither_batches_nor_order_matter(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = case
    route = every_other(model, images)
    whole = ar.hardness(model, route, (images, labels))
    for batch_size in (1, 2, 4):
        again = ar.hardness(model, route, DataLoader(TensorDataset(images, labels), batch_size))
        torch.testing.assert_close(again.log_gradients, whole.log_gradients, rtol=1e-9, atol=1e-9)
        assert torch.equal(again.votes, whole.votes)
    order = torch.tensor([4, 0, 8, 2, 6, 1, 3, 5, 7])
    shuffled = ar.hardness(model, route, (images[order], labels[order]), batch_size=4)
    assert torch.equal(shuffled.votes, whole.votes[order])
    assert torch.equal(shuffled.values[shuffled.hardest(9)], whole.values[whole.hardest(9)])


def test_equal_samples_without_a_gradient_have_equal_votes() -> None:
    model, images = saturated([0.0] * 3)  # no gradient at all at the first layer
    route = ar.Route({"parts.a": [0], "parts.b": [0]}, {"parts.a": 1, "parts.b": 2})
    found = ar.hardness(model, route, (images, torch.zeros(3).long()))
    assert torch.equal(found.log_gradients[:, 0], torch.full((3,), -math.inf).double())
    assert torch.equal(found.values, torch.full((3,), 4.0).double())


def test_the_model_comes_back_as_it_was(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = case
    model = copy.deepcopy(model).train()
    before = copy.deepcopy(model.state_dict())
    route = every_other(model, images)
    ar.hardness(model, route, (images, labels))
    with pytest.raises(UserError):
        ar.hardness(model, route, (images, labels + 99))
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# tables


@pytest.fixture
def small() -> Hardness:
    logs = torch.tensor([[0.5, -math.inf], [1.5, 2.0], [-3.0, 2.0]]).double()
    route = ar.Route({"a": [0, 2], "b": [1]}, {"a": 3, "b": 2})
    return Hardness(route, logs, torch.tensor([7, 8, 7]), torch.tensor([7, 7, 7]))


def test_the_table_holds_every_sample(small: Hardness) -> None:
    rows = list(csv.DictReader(small.table.to_csv().splitlines()))
    expected = {"index": "0", "label": "7", "prediction": "7", "V": "5.0", "votes:a": "2.0", "votes:b": "3.0"}
    assert rows[0] == expected and [row["V"] for row in rows] == ["5.0", "2.5", "4.5"]


# bad input


def test_bad_input_is_one_line(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = case
    route = every_other(model, images)
    layer = route.layers[0]
    other = ar.Route({"features.0": [0]}, {"features.0": 4})
    wider = ar.Route({layer: [0]}, {layer: 99})
    empty = route - route
    wrong: list[tuple[ar.Route, object, str]] = [
        (other, (images, labels), "features.0"),
        (wider, (images, labels), "99 channels in the route"),
        (empty, (images, labels), "no neuron"),
        (route, (images[:1], labels[:1]), "one sample"),
        (route, images, "no labels"),
        (route, (images, labels + 4), "outside the model's 5 logits"),
        (route, (images * math.nan, labels), "NaN"),
        (route, [], "no sample"),
    ]
    for chosen, data, message in wrong:
        with pytest.raises(UserError, match=message) as caught:
            ar.hardness(model, chosen, data)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_a_layer_that_does_not_run_is_named() -> None:
    model = Function(lambda parts, x: parts["a"](x).sum((2, 3)), a=conv([[1.0], [2.0]]), idle=conv([[1.0]]))
    route = ar.Route({"parts.a": [0], "parts.idle": [0]}, {"parts.a": 2, "parts.idle": 1})
    with pytest.raises(UserError, match=r"'parts\.idle' of the route did not run"):
        ar.hardness(model, route, (torch.rand(2, 1, 2, 2), torch.tensor([0, 1])))


def test_overflowing_gradients_are_refused() -> None:
    model = Function(lambda parts, x: (parts["a"](x).abs() ** 0.5).sum((2, 3)), a=conv([[1.0], [2.0]]))
    route = ar.Route({"parts.a": [0]}, {"parts.a": 2})
    images = torch.stack([torch.rand(1, 2, 2), torch.zeros(1, 2, 2)])  # the root's slope at zero
    with pytest.raises(UserError, match="not finite"):
        ar.hardness(model, route, (images, torch.tensor([0, 1])))
