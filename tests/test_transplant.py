"""Transplants against arithmetic done by hand and against a second implementation with module hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import CLOSED, MIXED, Function, Head, Perceptron, Residual, chain, conv, randomised, tokens
from attackroute.analysis.interventions import deactivate, record_outputs, transplant
from attackroute.core.errors import UserError
from attackroute.routes.route import Route
from tracing import every_other, same, state

MODELS = {name: make for name, make in {**CLOSED, **MIXED}.items() if name != "reused"}


pytestmark = pytest.mark.usefixtures("float64")


def pair(samples: int = 3) -> tuple[Tensor, Tensor]:
    return torch.rand(samples, 3, 16, 16), torch.rand(samples, 3, 16, 16)


def hooked(model: nn.Module, x: Tensor, attacked: Tensor, route: Route, dim: int = 1) -> Tensor:
    """Logits of the attacked images with clean channels, by hooks on a copy's modules."""
    model = copy.deepcopy(model)
    modules, clean, handles = dict(model.named_modules()), dict[str, Tensor](), []
    for name in route:
        handles.append(
            modules[name].register_forward_hook(lambda _m, _a, out, name=name: clean.update({name: out.clone()}))
        )
    model(x.clone())
    for handle in handles:
        handle.remove()

    def replace(name: str, output: Tensor) -> Tensor:
        output = output.movedim(dim, 0).clone()
        for channel in route.indices[name]:
            output[channel] = clean[name].movedim(dim, 0)[channel]
        return output.movedim(0, dim)

    for name in route:
        modules[name].register_forward_hook(lambda _m, _a, out, name=name: replace(name, out))
    return model(attacked.clone())


@pytest.mark.parametrize("name", MODELS)
def test_equals_hooks_on_the_modules(name: str) -> None:
    model, (x, attacked) = randomised(MODELS[name]()).eval(), pair()
    route = every_other(model)
    first = route.layers[0]
    with torch.no_grad():
        before = model(attacked.clone())
        for chosen in (route, route.restrict([first]), route.restrict(route.layers[1:])):
            with transplant(model, clean=x, route=route, layers=chosen.layers):
                found = model(attacked.clone())
            same(found, hooked(model, x, attacked, chosen))
        assert torch.equal(model(attacked.clone()), before)
        assert not torch.equal(found, before)


def test_by_hand() -> None:
    # Clean x = 2, attacked 3. a = [x, -x], b = [a0 + 10 a1, a0 - a1] = [-9 x, 2 x].
    model = nn.Sequential(conv([[1.0], [-1.0]]), conv([[1.0, 10.0], [1.0, -1.0]]), nn.Flatten())
    x, attacked = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    assert model(attacked).tolist() == [[-27, 6]]
    with transplant(model, x, Route({"0": [1]}, {"0": 2})):
        assert model(attacked).tolist() == [[3 - 20, 5]]
    with transplant(model, x, Route({"0": [1], "1": [1]}, {"0": 2, "1": 2})):
        assert model(attacked).tolist() == [[3 - 20, 4]]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("at", ["output", "activation"])
def test_a_whole_layer_of_a_chain_gives_the_clean_logits(inplace: bool, at: str) -> None:
    model, (x, attacked) = randomised(chain(inplace=inplace)).eval().float(), pair()
    x, attacked = x.float(), attacked.float()
    whole = Route({"0": range(6), "3": range(8), "8": range(7), "10": range(6)}, {"0": 6, "3": 8, "8": 7, "10": 6})
    clean = model(x)
    for layer in whole:
        with transplant(model, x, whole, [layer], at=at):
            assert torch.equal(model(attacked), clean)
    before = model(attacked)
    with transplant(model, x, Route({"0": []}, {"0": 6}), at=at):
        assert torch.equal(model(attacked), before)
    assert not torch.equal(model(attacked), clean)


def test_kept_outputs_serve_a_sweep() -> None:
    model, (x, attacked) = randomised(Residual()).eval(), pair()
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    route = every_other(model)
    kept = record_outputs(model, x, route)
    assert list(kept) == list(route) and len(passes) == 1
    for layer in route:
        with transplant(model, kept, route, [layer]):
            found = model(attacked)
        with transplant(model, x, route, [layer]):
            assert torch.equal(model(attacked), found)
    assert len(passes) == 1 + 3 * len(route)
    rows = torch.tensor([2, 0])
    with transplant(model, {layer: values[rows] for layer, values in kept.items()}, route):
        selected = model(attacked[rows])
    with transplant(model, kept, route):
        same(selected, model(attacked)[rows])


def test_recorded_outputs() -> None:
    model, (x, _) = randomised(chain(inplace=True)).train(), pair()
    before = state(model)
    kept = record_outputs(model.eval(), x, ["3", "0", "8"])
    same(kept["0"], model[0](x))
    same(kept["3"], model[:4](x))
    same(kept["8"], model[:9](x))  # what follows works on it in place
    same(record_outputs(model, x, "3", at="activation")["3"], model[:6](x))
    assert not any(values.requires_grad for values in kept.values())
    assert state(model.train()) == before
    x.requires_grad_()
    in_training = record_outputs(model, x, ["3"])["3"]
    assert state(model) == before and model.training and x.grad is None
    same(in_training, copy.deepcopy(model)[:4](x).detach())


def test_linear_maps_are_replaced_too() -> None:
    model, (x, attacked) = Perceptron(), pair()
    model(x)
    route = every_other(model.eval(), (nn.Conv2d, nn.Linear))  # 2 of 4, 3 of 7, 3 of 6, 2 of 5
    with transplant(model, x, route):
        same(model(attacked), hooked(model, x, attacked, route))
    mixer = tokens().eval()  # channels stand last
    route = every_other(mixer, (nn.Linear,)).restrict(["parts.fc1", "parts.fc2"])
    with transplant(mixer, x, route):
        same(mixer(attacked), hooked(mixer, x, attacked, route, dim=-1))
    kept = record_outputs(mixer, x, route)
    with transplant(mixer, kept, route):
        same(mixer(attacked), hooked(mixer, x, attacked, route, dim=-1))


def test_one_call_of_a_reused_layer() -> None:
    model, (x, attacked) = CLOSED["reused"]().eval(), pair()

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.conv2d(x, model.kernel, stride=2)
        y = F.relu(model.conv(y)) + y
        return y, model.conv(y)

    y, second = halves(attacked)
    second[:, [1, 3]] = halves(x)[1][:, [1, 3]]
    y = F.relu(second) + y
    y = F.relu(model.conv(y)) + y
    with transplant(model, x, Route({"conv#2": [1, 3]}, {"conv#2": 4})):
        same(model(attacked), model.head(y))


def test_after_the_activation() -> None:
    model, (x, attacked) = randomised(chain(inplace=True)).eval(), pair()
    clean, hidden = model[:3](x), model[:3](attacked)
    hidden[:, [1, 4]] = clean[:, [1, 4]]
    route = Route({"0": [1, 4]}, {"0": 6})
    expected = model[3:](hidden.clone())
    with transplant(model, x, route, at="activation"):
        same(model(attacked), expected)
    with transplant(model, record_outputs(model, x, ["0"], at="activation"), route, at="activation"):
        same(model(attacked), expected)


def test_contexts_nest() -> None:
    # x = 2, 3 attacked: a = [x, 10 x], b = a0 + a1.
    model = nn.Sequential(conv([[1.0], [10.0]]), nn.ReLU(), conv([[1.0, 1.0]]), nn.Flatten())
    x, attacked = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    one, two = Route({"0": [0]}, {"0": 2}), Route({"0": [1]}, {"0": 2})
    with transplant(model, x, one), transplant(model, x * 2, two):
        assert model(attacked).item() == 2 + 40
    twice = record_outputs(model, x * 2, ["0"])
    with transplant(model, x, two), transplant(model, twice, two):  # the last word
        assert model(attacked).item() == 3 + 40
    with transplant(model, x, one), deactivate(model, two):
        assert model(attacked).item() == 2
    with transplant(model, x, one), deactivate(model, one):
        assert model(attacked).item() == 30
    with deactivate(model, one), transplant(model, x, two):
        assert model(attacked).item() == 20
    kept = record_outputs(model, x, ["0"])
    with deactivate(model, one), transplant(model, kept, one):
        assert model(attacked).item() == 32
    with deactivate(model, one), transplant(model, x, one):  # the clean images meet the silence as well
        assert model(attacked).item() == 30
    with deactivate(model, one, at="activation"), transplant(model, kept, two):
        assert model(attacked).item() == 20
    with transplant(model, kept, two), deactivate(model, one, at="activation"):
        assert model(attacked).item() == 20
    with transplant(model, kept, one, at="activation"), transplant(model, kept, two):
        assert model(attacked).item() == 22
    assert model(attacked).item() == 33


def test_gradients_flow_through_what_is_left() -> None:
    model, (x, attacked) = randomised(chain(inplace=True)).eval(), pair()
    x.requires_grad_(), attacked.requires_grad_()
    route = every_other(model)
    with torch.inference_mode():
        kept = record_outputs(model, x, route)
    for clean in (x, kept):
        attacked.grad = None
        with transplant(model, clean, route):
            model(attacked).square().sum().backward()
        found, attacked.grad = attacked.grad, None
        hooked(model, x.detach(), attacked, route).square().sum().backward()
        same(found, attacked.grad)
        assert x.grad is None and found.any()
    with transplant(model, x, Route({"3": range(8)}, {"3": 8})):
        (slope,) = torch.autograd.grad(model(attacked).sum(), attacked)
    assert not slope.any()


def test_autocast_and_other_dtypes() -> None:
    model, (x, attacked) = randomised(chain()).eval().float(), pair()
    x, attacked = x.float(), attacked.float()
    route = every_other(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = hooked(model, x, attacked, route)
        with transplant(model, x, route):
            assert torch.equal(model(attacked), expected)
    with transplant(model, x, route), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(attacked), expected, rtol=0.05, atol=0.05)


def test_memory_format_is_kept() -> None:
    seen = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Function(lambda _, x: (seen.append(x), x)[1]))
    model = model.to(memory_format=torch.channels_last)
    x, attacked = (images.contiguous(memory_format=torch.channels_last) for images in pair())
    with transplant(model, x, Route({"0": [1]}, {"0": 4})):
        model(attacked)
    assert seen[1].is_contiguous(memory_format=torch.channels_last)


def test_infinite_values_are_replaced() -> None:
    model = nn.Sequential(conv([[1.0], [1.0]]), conv([[1.0, 1.0]]), nn.Flatten())
    with transplant(model, torch.full((1, 1, 1, 1), 2.0), Route({"0": [0, 1]}, {"0": 2})):
        assert model(torch.full((1, 1, 1, 1), torch.inf)).tolist() == [[4]]


def test_the_images_stay() -> None:
    model = nn.Sequential(nn.ReLU(True), nn.Conv2d(3, 4, 1), Head(4)).eval()
    x = torch.randn(2, 3, 4, 4)
    before = x.clone()
    with transplant(model, x, Route({"1": [0]}, {"1": 4})):
        pass
    assert torch.equal(x, before)


@pytest.mark.parametrize("at", ["output", "activation"])
def test_the_model_is_left_as_it_was(at: str) -> None:
    model, (x, attacked) = randomised(chain(inplace=True)).train(), pair()
    model[1].eval()
    next(model.parameters()).requires_grad_(False)
    before, route = state(model), every_other(model)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), transplant(model, x, route, at=at):
            raise ZeroDivisionError
        with pytest.raises(RuntimeError), transplant(model, x, route, at=at):
            model(torch.rand(2, 4, 16, 16))
        with pytest.raises(UserError, match="cannot run on a batch"), transplant(model, x[:, :2], route, at=at):
            pass
        assert state(model) == before
    model.eval()
    with transplant(model, x, route, at=at):
        copied = copy.deepcopy(model)
        assert torch.equal(copied(attacked), copy.deepcopy(model)(attacked))
        assert not torch.equal(model(attacked), copied(attacked))


def test_batches_that_do_not_fit() -> None:
    model, (x, attacked) = chain().eval(), pair()
    route = every_other(model)
    kept = record_outputs(model, x, route)
    for clean in (x, kept):
        with transplant(model, clean, route):
            model(attacked)
            with pytest.raises(UserError, match=r"layer '0' gives \(2, .*\) here but \(3, .*\) for the clean images"):
                model(attacked[:2])
            model(attacked)  # an error spoils nothing
            with pytest.raises(UserError, match="both batches must have the same images"):
                model(torch.rand(3, 3, 18, 16))


def test_bad_arguments() -> None:
    model, (x, attacked) = chain().eval(), pair()
    route = every_other(model)

    def enter(*args: Any, **options: Any) -> None:
        with transplant(model, *args, **options):
            model(attacked)

    for arguments, options, message in (
        ((x, route, ["9"]), {}, "no layer '9' in the route"),
        ((x, Route({"0#2": [1]}, {"0#2": 6})), {}, "layer '0#2' did not run"),
        ((x, route), {"at": "outptu"}, "at='outptu'; did you mean output"),
        ((record_outputs(model, x, ["0"]), route), {}, "no clean outputs of layer '3'"),
        (([1], route), {}, "clean is list, neither images nor clean outputs"),
    ):
        with pytest.raises(UserError, match=message):
            enter(*arguments, **options)
    with pytest.raises(UserError, match=r"layer 'a2\.0' meets 'add_?' before any activation"):
        record_outputs(Residual().eval(), x, ["a2.0"], at="activation")
    with pytest.raises(UserError, match="layer 'nothing' did not run"):
        record_outputs(model, x, ["nothing"])
