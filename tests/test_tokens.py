"""Interventions and measurements on attention, gates and tokens, against other ways of computing them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attackroute as ar
from attackroute.analysis.channel_statistics import gradients, loss_gradient, sensitivity
from attackroute.analysis.criteria import NEED_ATTACK, channel_scores
from attackroute.analysis.interventions import deactivate, record_outputs, transplant
from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall, LayerCalls
from token_networks import GATED, TOKENS, Attentive, Encoder, PositionsFirst, every_output, made, readings
from tracing import state

ALL = {**TOKENS, **GATED}


@pytest.fixture(autouse=True)
def _global_state_comes_back() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()
    yield
    assert (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()) == before
    assert torch.overrides._len_torch_function_stack() == 0


def halves(model: nn.Module, x: Tensor) -> ar.Route:
    """About half of every layer's channels, no two layers alike."""
    return ar.rank_channels(model, x, "kernel", 0.5, linear=True)


def attacked(x: Tensor) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)


def edited(model: nn.Module, x: Tensor, change: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The model's answers, one image at a time, with changed outputs of layers."""
    rows = []
    for image in x:
        with torch.enable_grad(), every_output(change):  # with gradients, so that no attention is fused
            rows.append(model(image[None]).detach())
    return torch.cat(rows)


# how layers are called


def test_the_layers_of_multi_head_attention_have_names_in_every_mode() -> None:
    model, x, _ = made(Encoder)
    parts = [
        f"encoder.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "self_attn#2", "linear1", "linear2")
    ]
    expected = {"embed": (3, 8, 4, 4), **{name: (3, 16, 8) for name in parts}, "head": (3, 5)}
    for i in (0, 1):
        expected |= {f"encoder.layers.{i}.self_attn": (3, 16, 24), f"encoder.layers.{i}.linear1": (3, 16, 12)}
    for training in (False, True):
        for grad in (False, True):
            model.train(training)
            seen: dict[str, tuple[int, ...]] = {}

            def visit(call: LayerCall, seen: dict[str, tuple[int, ...]] = seen) -> Tensor:
                output = call.run()
                seen[call.name] = tuple(output.shape)
                return output

            with torch.set_grad_enabled(grad), LayerCalls(model, visit, linear=True):
                model(x)
            assert seen == expected


# interventions


def operated(model: nn.Module, route: ar.Route) -> nn.Module:
    """A copy with the route's kernel rows and biases set to zero; the k-th call of attention is one of its parts."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer in route:
            name, _, call = layer.partition("#")
            module = model.get_submodule(name)
            if isinstance(module, nn.MultiheadAttention):
                parts = (
                    (module.out_proj.weight, module.out_proj.bias)
                    if call
                    else (module.in_proj_weight, module.in_proj_bias)
                )
            elif hasattr(module, "qkv") and name:  # Swin's
                part = module.proj if call else module.qkv
                parts = (part.weight, part.bias)
            else:
                parts = (module.weight, module.bias)
            for parameter in parts:
                if parameter is not None:
                    parameter[route[layer]] = 0
    return model


@pytest.mark.parametrize("name", ALL)
def test_deactivation_is_surgery_on_the_weights(name: str) -> None:
    model, x, _ = made(ALL[name])
    route, before = halves(model, x), state(model)
    with torch.no_grad():
        with deactivate(model, route):
            silent = model(x)
        torch.testing.assert_close(silent, operated(model, route)(x))
        assert not torch.allclose(silent, model(x))
        for layer in route:
            alone = route.restrict([layer])
            with deactivate(model, alone):
                torch.testing.assert_close(model(x), operated(model, alone)(x))
    assert state(model) == before


@pytest.mark.parametrize("name", ALL)
def test_transplants_give_what_copied_outputs_give(name: str) -> None:
    model, x, _ = made(ALL[name])
    route, other, before = halves(model, x), attacked(x), state(model)
    kept: list[list[Tensor]] = []
    for image in x:
        outputs: list[Tensor] = []
        edited(model, image[None], lambda _, output, outputs=outputs: outputs.append(output.detach().clone()) or output)
        kept.append(outputs)
    expected = []
    for image, outputs in zip(other, kept, strict=True):

        def change(index: int, output: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
            mask = route.mask(route.layers[index])
            return torch.where(mask, outputs[index], output)

        expected.append(edited(model, image[None], change))
    with torch.no_grad():
        with transplant(model, x, route):
            found = model(other)
        with transplant(model, record_outputs(model, x, route), route):
            torch.testing.assert_close(model(other), found)
        with transplant(model, x, ar.Route({layer: range(c) for layer, c in route.channels.items()}, route.channels)):
            torch.testing.assert_close(model(other), model(x))
    torch.testing.assert_close(found, torch.cat(expected))
    assert not torch.allclose(found, model(other))
    assert state(model) == before


@pytest.mark.parametrize("name", TOKENS)
def test_recorded_outputs_have_a_row_for_each_image(name: str) -> None:
    model, x, _ = made(TOKENS[name])
    route = halves(model, x)
    whole = record_outputs(model, x, route)
    alone = record_outputs(model, x[1:2], route)
    for layer in route:
        assert len(whole[layer]) == len(x)
        torch.testing.assert_close(whole[layer][1:2], alone[layer])
    rows = {layer: values[[2, 0]] for layer, values in whole.items()}
    with torch.no_grad():
        with transplant(model, rows, route):
            found = model(attacked(x)[[2, 0]])
        with transplant(model, x, route):
            torch.testing.assert_close(model(attacked(x))[[2, 0]], found)


def test_an_error_inside_attention_leaves_nothing_behind() -> None:
    model, x, _ = made(Encoder)
    before = state(model)
    route = ar.Route({"encoder.layers.1.self_attn": [0]}, {"encoder.layers.1.self_attn": 23})
    for _ in range(2):
        with pytest.raises(UserError, match="has 23 channels in the route but 24"), deactivate(model, route):
            model(x)
    assert state(model) == before


def test_after_the_activation_of_tokens_and_behind_normalisation() -> None:
    model, x, _ = made(Attentive)
    route = ar.Route({"embed": [1, 2], "fc1": [0, 7]}, {"embed": 8, "fc1": 12})
    other = copy.deepcopy(model)

    def silent(index: list[int], dim: int) -> Callable[..., Tensor]:
        return lambda _module, _args, output: F.relu(output).index_fill(dim, torch.tensor(index), 0)

    other.group.register_forward_hook(silent([1, 2], 1))  # zeros pass the ReLU that follows as zeros
    other.fc2.weight.data[:, [0, 7]] = 0  # what reads the activation of fc1
    with torch.no_grad():
        with deactivate(model, route, at="activation"):
            found = model(x)
        torch.testing.assert_close(found, other(x))
        assert not torch.allclose(found, model(x))
    for layer, count in (("attn", 24), ("attn#2", 8), ("fc2", 8), ("qkv", 24)):
        lone = ar.Route({layer: [0]}, {layer: count})
        with (
            pytest.raises(UserError, match=r'before any activation.*use at="output".*leave the layer out') as error,
            deactivate(model, lone, at="activation"),
        ):
            model(x)
        assert "\n" not in str(error.value)


# measurements


@pytest.mark.parametrize("name", ALL)
def test_measurements_agree_with_one_image_at_a_time(name: str) -> None:
    model, x, y = made(ALL[name])
    before, other = state(model), attacked(x)
    clean = [readings(model, *each) for each in zip(x, y, strict=True)]
    moved = [readings(model, *each) for each in zip(other, y, strict=True)]
    slopes = loss_gradient(model, (x, y), linear=True, batch_size=2)
    changes = sensitivity(model, x, other, linear=True)
    activations = channel_scores(model, x, "activation", linear=True).values
    attributed = channel_scores(model, (x, y), "attribution", attack=lambda _m, _x, _y: other, linear=True).values
    for index, layer in enumerate(slopes):
        own, theirs = [each[index] for each in clean], [each[index] for each in moved]
        torch.testing.assert_close(slopes[layer], torch.stack([slope.abs().sum(0) for _, slope in own]).mean(0))
        gaps = [(z - moved_z).abs().mean(0) for (z, _), (moved_z, _) in zip(own, theirs, strict=True)]
        torch.testing.assert_close(changes[layer], torch.stack(gaps).mean(0))
        torch.testing.assert_close(activations[layer], torch.stack([z.abs().mean(0) for z, _ in own]).mean(0))
        terms = [-((z - moved_z) * slope).sum(0) for (z, _), (moved_z, slope) in zip(own, theirs, strict=True)]
        torch.testing.assert_close(attributed[layer], torch.stack(terms).mean(0))
    assert state(model) == before


@pytest.mark.parametrize("name", ALL)
def test_hardness_is_eq_16_of_one_image_at_a_time(name: str) -> None:
    model, x, y = made(ALL[name])
    route = ar.rank_channels(model, (x, y), "gradient", 0.3, linear=True)
    rows = [readings(model, *each) for each in zip(x, y, strict=True)]
    sums = [[slope[:, route[layer]].abs().sum() for layer, (_, slope) in zip(route, row, strict=True)] for row in rows]
    expected = torch.tensor(sums)
    found = ar.hardness(model, route, (x, y))
    torch.testing.assert_close(found.log_gradients, expected.log())
    votes = (expected[:, None] < expected[None]).sum(1) + 1  # Eq. (17): the lower, the more
    torch.testing.assert_close(found.values, votes.sum(1).double())


@pytest.mark.parametrize("by", ["activation", "gradient", "sensitivity", "attribution", "path", "kernel"])
def test_routes_by_every_criterion_have_all_layers(by: str) -> None:
    model, x, y = made(Attentive)
    attack = ar.parse_attack("fgsm") if by in NEED_ATTACK else None
    route = ar.rank_channels(model, (x, y), by, attack=attack, linear=True)
    assert route.layers == ("embed", "squeeze", "excite", "qkv", "proj", "attn", "attn#2", "fc1", "fc2", "head")


def test_outgoing_weights_say_where_channels_mix() -> None:
    model, x, y = made(TOKENS["vit"])
    with pytest.raises(UserError, match=r"no weight norm .* mixes channels or positions; choose another criterion"):
        ar.rank_channels(model, (x, y), "weight", linear=True)


@pytest.mark.parametrize("samples", [1, 3, 4, 16])
def test_positions_before_samples_are_an_error(samples: int) -> None:
    model, x, y = made(PositionsFirst, samples)
    before = state(model)
    route = ar.Route({"fc": [0]}, {"fc": 6})
    calls: list[Callable[[], object]] = [
        lambda: ar.loss_gradient(model, (x, y), linear=True),
        lambda: ar.sensitivity(model, x, attacked(x), linear=True),
        lambda: ar.rank_channels(model, x, "activation", linear=True),
    ]
    if samples > 1:
        calls.append(lambda: ar.hardness(model, route, (x, y)))
    for call in calls:
        with pytest.raises(UserError, match=r"layer 'fc' .*per image.*batch_first=True") as error:
            call()
        assert "\n" not in str(error.value)
    ar.loss_gradient(model, (x, y))  # convolutions alone have their samples first
    assert state(model) == before


@pytest.mark.parametrize("samples", [3, 4, 16])  # of 16 tokens
@pytest.mark.parametrize("linear", [False, True])
def test_contexts_nest_around_attention(samples: int, linear: bool) -> None:
    model, x, _ = made(Encoder, samples)
    route, other = halves(model, x), attacked(x)
    silenced = ar.Route({"encoder.layers.1.self_attn": [1, 9]}, {"encoder.layers.1.self_attn": 24})
    names: list[str] = []

    def visit(call: LayerCall) -> Tensor:
        names.append(call.name)
        return call.run()

    with torch.no_grad(), transplant(model, x, route):
        expected = model(other)
        with LayerCalls(model, visit, linear=linear):
            torch.testing.assert_close(model(other), expected)
        with deactivate(model, silenced):
            both = model(other)
        assert not torch.allclose(both, expected)
    assert names == [layer for layer in route if linear or layer == "embed"]
    with deactivate(model, silenced):
        torch.testing.assert_close(
            gradients(model, other[:1], None, linear=True).values["embed"],
            gradients(model, other, None, linear=True).values["embed"][:1],
        )
