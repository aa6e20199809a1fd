"""Which calls are route layers, and what they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import Function, Head
from attackroute.core.layers import LayerCall, LayerCalls
from attackroute.core.model_state import frozen
from tracing import state, untidy

IMAGES = torch.rand(2, 3, 9, 9)


def calls(model: nn.Module, images: Tensor = IMAGES, *, linear: bool = False, times: int = 1) -> list[LayerCall]:
    """The calls of the last of some forward passes."""
    seen: list[LayerCall] = []

    def visit(call: LayerCall) -> Tensor:
        seen.append(call)
        return call.run()

    with frozen(model), LayerCalls(model, visit, linear=linear):
        for _ in range(times):
            seen.clear()
            model(images)
    return seen


def names(model: nn.Module, images: Tensor = IMAGES, **options: Any) -> list[str]:
    return [call.name for call in calls(model, images, **options)]


def test_names_are_those_of_named_modules() -> None:
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)))
    model = nn.Sequential(block, nn.Conv2d(4, 2, 1))
    assert names(model) == ["0.0", "0.1.1", "1"]
    assert set(names(model)) <= set(dict(model.named_modules()))
    assert names(nn.Conv2d(3, 4, 3)) == ["model"]


def test_calls_of_one_module_are_counted() -> None:
    conv = nn.Conv2d(3, 3, 1)
    for times in (1, 3):  # from one in every forward pass
        assert names(nn.Sequential(conv, nn.ReLU(), conv, conv), times=times) == ["0", "0#2", "0#3"]


def test_a_module_with_two_names_bears_the_first() -> None:
    shared = nn.Conv2d(3, 3, 1)
    model = Function(lambda p, x: p["a"](p["b"](x)), b=shared, a=shared)
    assert names(model) == ["parts.b", "parts.b#2"]


def test_functional_calls_bear_the_name_of_the_running_module() -> None:
    kernel = torch.rand(3, 3, 1, 1)
    inner = Function(lambda _, x: F.conv2d(F.conv2d(x, kernel), kernel))
    model = Function(lambda p, x: F.conv2d(p["inner"](F.conv2d(x, kernel)), kernel), inner=inner)
    assert names(model) == ["model", "parts.inner", "parts.inner#2", "model#2"]


def test_a_child_named_model_and_the_model_itself_are_told_apart() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.model(x), self.model.weight)

    found = names(Wrapper())
    assert len(set(found)) == 2


def test_subclasses_and_parametrisations() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    found = calls(nn.Sequential(Standardised(3, 4, 3), normed))
    assert [call.name for call in found] == ["0", "1"]
    assert torch.equal(found[1].weight, normed.weight)
    assert found[0].weight.mean((1, 2, 3)).abs().max() < 1e-6


def test_a_forward_that_is_called_directly_belongs_to_the_caller() -> None:
    model = Function(lambda p, x: p["b"](p["a"].forward(x)), a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 1))
    assert names(model) == ["model", "parts.b"]


@pytest.mark.parametrize(
    "call",
    [
        F.conv2d,
        lambda x, w: torch.conv2d(input=x, weight=w),
        lambda x, w: F.conv2d(weight=w, input=x, padding="same"),
        lambda x, w: torch.convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        lambda x, w: torch.ops.aten.convolution.default(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        torch.ops.aten.conv2d.default,
    ],
)
def test_every_way_to_call_a_convolution(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight = torch.rand(3, 3, 3, 3)
    (found,) = calls(Function(lambda _, x: call(x, weight)))
    assert (found.name, found.kind) == ("model", "conv2d")
    assert found.weight is weight
    assert found.input is IMAGES


def test_other_operations_are_no_route_layers() -> None:
    def run(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = parts["up"](x)
        x = torch.convolution(x, torch.rand(3, 3, 2, 2), None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1)
        x = parts["line"](x.flatten(2)).unflatten(2, (10, -1))
        x = torch.convolution(x.flatten(2), torch.rand(3, 3, 1), None, [1], [0], [1], False, [0], 1)
        return parts["volume"](x[:, None, :, None])

    model = Function(run, up=nn.ConvTranspose2d(3, 3, 1), line=nn.Conv1d(3, 3, 1), volume=nn.Conv3d(1, 1, 1))
    assert names(model) == []


def test_linear_maps_only_when_asked() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Head(4))
    assert names(model) == ["0"]
    found = calls(model, linear=True)
    assert [(call.name, call.kind) for call in found] == [("0", "conv2d"), ("1.fc", "linear")]
    assert found[1].input.shape == (2, 4)


def test_names_do_not_depend_on_linear() -> None:
    kernel = torch.rand(3, 3, 1, 1)
    model = Function(lambda _, x: F.conv2d(F.linear(x, torch.eye(9)), kernel))
    assert set(names(model)) < set(names(model, linear=True))


def test_calls_outside_the_model_are_left_alone() -> None:
    model, other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    seen = []

    def visit(call: LayerCall) -> Tensor:
        seen.append(call.name)
        return call.run()

    with LayerCalls(model, visit):
        other(IMAGES)
        F.conv2d(IMAGES, other.weight)
        assert seen == []
        model(IMAGES)
        other(IMAGES)
    model(IMAGES)
    assert seen == ["model"]


def test_contexts_of_two_models_nest() -> None:
    first, second = nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 3, 1))
    seen = []

    def note(who: str) -> Callable[[LayerCall], Tensor]:
        return lambda call: seen.append((who, call.name)) or call.run()

    with LayerCalls(first, note("first")), LayerCalls(second, note("second")):
        second(first(IMAGES))
    assert seen == [("first", "model"), ("second", "0")]


def test_what_visit_returns_flows_on() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False))
    with LayerCalls(model, lambda call: torch.zeros_like(call.run())):
        assert model(IMAGES).eq(0).all()
    with LayerCalls(model, lambda call: call.run()):
        changed = model(IMAGES)
    assert torch.equal(changed, model(IMAGES))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_error(error: type[BaseException]) -> None:
    model = untidy()
    before = state(model)

    def visit(_: LayerCall) -> Tensor:
        raise error("stop")

    with pytest.raises(error, match="stop"), frozen(model), LayerCalls(model, visit):
        model(IMAGES)
    assert state(model) == before
    assert torch.overrides._get_current_function_mode() is None


def test_names_survive_an_exception_that_the_model_handles() -> None:
    def fail(_: nn.ModuleDict, __: Tensor) -> Tensor:
        raise RuntimeError("handled")

    def run(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        try:
            parts["fails"](x)
        except RuntimeError:
            return F.conv2d(x, torch.ones(2, 3, 1, 1))
        raise AssertionError

    assert names(Function(run, fails=nn.Sequential(Function(fail)))) == ["model"]


def test_frozen_holds_and_gives_back_every_flag() -> None:
    model = untidy()
    before = state(model)
    with frozen(model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert state(model) == before
    assert model.training
    assert not model[4].training
    assert not model[0].weight.requires_grad
