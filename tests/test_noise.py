"""Routes that follow the noise: against the oracle, by hand, and what must not matter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

import attackroute as ar
from architectures import CLOSED, Head, Residual, Shuffled, conv, dynamic, tokens
from attackroute.core.errors import UserError
from attackroute.tracing import oracle
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.trace import trace_routes
from benchmarks import small_networks
from hard_models import HARD, HARD_LINEAR, two
from random_networks import networks, segments, steady, thorough
from tracing import agree_up_to_ties, check, ready, shaken, small, state, untidy, worst

NOISE = TraceConfig(carrier="noise")
check_noise = partial(check, noise=True, tolerance=1e-12)
trace_noise = partial(trace_routes, config=NOISE, attack=shaken, keep_scores=True)


@pytest.mark.parametrize("name", CLOSED)
def test_networks_with_a_closed_form(name: str) -> None:
    found = check_noise(*ready(CLOSED[name], size=17))
    assert set(found.methods.values()) == {"closed-form"}


@pytest.mark.parametrize("name", [*HARD, *HARD_LINEAR])
def test_hard_models(name: str) -> None:
    check_noise(*ready({**HARD, **HARD_LINEAR}[name]), linear=name in HARD_LINEAR)


@pytest.mark.parametrize(("build", "linear"), [(Shuffled, False), (tokens, True)], ids=["shuffled", "tokens"])
def test_networks_without_a_closed_form(build: Callable[[], nn.Module], linear: bool) -> None:
    assert "replay" in check_noise(*ready(build), linear=linear).methods.values()


@pytest.mark.parametrize(
    ("build", "linear"),
    [(small_networks.vit, True), (small_networks.convnext, False), (small_networks.regnet, False)],
    ids=["vit", "convnext", "regnet"],
)
def test_blocks_of_well_known_architectures(build: Callable[[], nn.Module], linear: bool) -> None:
    check_noise(*ready(build, samples=2, size=16 if linear else 32), width=0.2, linear=linear)


def check_random(network: tuple[nn.Module, Tensor]) -> None:
    model, images = network
    labels = torch.tensor([0, 2])
    expected = oracle.trace(model, shaken(model, images, labels), labels, clean=images, width=0.4)
    found = trace_noise(model, (images, labels), 0.4)
    agree_up_to_ties(found, expected, floor=1e-6)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("drawn", "how"),
    [
        (networks(), settings(steady, max_examples=20)),
        (segments(), settings(steady, max_examples=60)),
        pytest.param(networks(), thorough, marks=pytest.mark.slow),
        pytest.param(segments(), thorough, marks=pytest.mark.slow),
    ],
    ids=["networks", "segments", "many networks", "many segments"],
)
def test_random_architectures(drawn: SearchStrategy[tuple[nn.Module, Tensor]], how: settings) -> None:
    how(given(drawn)(check_random))()


# By hand


class Given(nn.Module):
    """Layers of one position whose weights are given: ``b`` reads ``relu(a)``, or ``relu(relu(a) + c)``."""

    def __init__(self, *, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.a, self.b = conv([[1.0, 0.0], [0.0, 2.0]]), conv([[4.0, -1.0], [-0.5, 4.0]])
        self.c = conv([[-1.0, 0.0], [0.0, 1.0]])

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.a(x))
        if self.skip:
            first = F.relu(first + self.c(first))
        return self.b(first).flatten(1)


def traced_by_hand(label: int, *, skip: bool) -> ar.InstanceRoutes:
    """One image of one position, that the attack changes."""
    clean, attacked = (torch.tensor(values).view(1, 2, 1, 1) for values in ([0.5, 0.1], [0.7, 0.4]))
    return trace_noise(Given(skip=skip), (clean, torch.tensor([label])), 0.5, attack=lambda *_: attacked)


def test_a_chain_by_hand() -> None:
    found = traced_by_hand(0, skip=False)
    # relu(a): (0.5, 0.2) and (0.7, 0.8); the noise at b's input is (0.2, 0.6). b: (1.8, 0.55) and (2.0, 2.85).
    # q - onehot is (-1, 1), so the seeds are 0.2 * -1 and 2.3 * 1: neuron 1 is critical, with |W| = (0.5, 4).
    assert found.scores["b"].tolist() == [pytest.approx([-0.2, 2.3], abs=1e-6)]
    assert found.masks["b"].tolist() == [[False, True]]
    assert found.scores["a"].tolist() == [pytest.approx([0.1, 2.4], abs=1e-6)]
    lowered = traced_by_hand(1, skip=False)  # noise that lowers the loss ranks last
    assert lowered.scores["b"].tolist() == [pytest.approx([0.2, -2.3], abs=1e-6)]
    assert lowered.masks["b"].tolist() == [[True, False]]


def test_a_skip_by_hand() -> None:
    found = traced_by_hand(1, skip=True)
    # a = (0.5, 0.2) and (0.7, 0.8); c = (-a_0, a_1). b reads relu(a + c): (0, 0.4), and under attack (0, 1.6).
    # With a clean and c as under attack: relu(0.5 - 0.7) = 0 and 0.2 + 0.8 = 1; with c clean: 0.2 and 0.8 + 0.2 = 1.
    # Noise of a at b's input: (0, 0.6); of c: (0.2, 0.6), since clean values of c alone would let channel 0 pass.
    # b: (-0.4, 1.6) and (-1.6, 6.4); times (1, -1) for label 1: (-1.2, -4.8): neuron 0 is critical, |W| = (4, 1).
    assert found.scores["b"].tolist() == [pytest.approx([-1.2, -4.8], abs=1e-6)]
    assert found.scores["c"].tolist() == [pytest.approx([0.8, 0.6], abs=1e-6)]
    # c keeps neuron 0, |W| = (1, 0); the noise at c's input is (0.2, 0.6): a gets (0.2, 0) from c, (0, 0.6) from b
    assert found.scores["a"].tolist() == [pytest.approx([0.2, 0.6], abs=1e-6)]


# What must not matter


def test_without_an_effect_there_is_no_noise() -> None:
    model, images, labels = ready(Residual)
    found = trace_noise(model, (images, labels), 0.3, attack=lambda _, x, __: x)
    for layer in found.layers:
        assert not found.scores[layer].any()
        kept = int(found.masks[layer][0].sum())
        assert found.masks[layer][:, :kept].all()  # ties go to the lower index


def test_a_loss_of_ones_own() -> None:
    model, images, labels = ready(Residual)
    check_noise(model, images, labels, loss=lambda logits, y: -logits.gather(1, y[:, None]).squeeze(1))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_low_precision_is_near(precision: torch.dtype) -> None:
    model, images, labels = ready(small, samples=5)
    changed = shaken(model, images, labels)

    def routes(**options: Any) -> ar.InstanceRoutes:
        attack = lambda _, x, __: changed.to(x)  # noqa: E731
        return trace_noise(model, (images, labels), 1.0, attack=attack, **options)

    exact = routes()
    model, images = model.float(), images.float()
    rough = routes(autocast=None if precision is torch.float32 else precision)
    assert worst(rough, exact) <= (1e-5 if precision is torch.float32 else 0.1)


@pytest.mark.parametrize("fails", ["attack", "model"])
def test_the_model_comes_back_as_it_was(fails: str) -> None:
    model = untidy()
    images, labels = torch.rand(2, 3, 9, 9), torch.tensor([0, 1])
    before = state(model)
    trace_routes(model, (images, labels), config=NOISE, attack=shaken)
    assert state(model) == before

    def broken(_: nn.Module, x: Tensor, __: Tensor) -> Tensor:
        raise KeyboardInterrupt

    if fails == "attack":
        with pytest.raises(KeyboardInterrupt):
            trace_routes(model, (images, labels), config=NOISE, attack=broken)
    else:
        with pytest.raises(UserError, match="cannot run"):
            trace_routes(model, torch.rand(2, 4, 9, 9), config=NOISE, attack=shaken)
    assert state(model) == before


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"carrier": "nose"}, "carrier 'nose' is unknown; choose from unit, noise"),
        ({"carrier": "noise", "sketches": 32}, "leave one of the two out"),
    ],
)
def test_what_cannot_be_followed_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TraceConfig(**options)


def test_noise_needs_an_attack() -> None:
    model, images, labels = ready(small)
    with pytest.raises(UserError, match="follows what an attack changes: pass attack="):
        trace_routes(model, (images, labels), config=NOISE)


def test_noise_in_a_kernel_is_refused() -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        z = F.relu(parts["a"](x))
        kernel = z[0].mean((1, 2)).view(1, 4, 1, 1) * x.new_ones(3, 4, 3, 3)
        return parts["head"](F.conv2d(z, kernel))

    model, images, labels = ready(dynamic)
    model.run = forward
    model.parts["head"] = Head(3).double()
    with pytest.raises(UserError, match=r"kernel of layer 'model' is itself computed|depends on another image"):
        trace_routes(model, (images, labels), config=NOISE, attack=shaken)


def test_unit_routes_are_as_before_beside_noise() -> None:
    model, images, labels = ready(two(F.relu))
    plain = trace_routes(model, (images, labels), keep_scores=True)
    named = trace_routes(model, (images, labels), config=TraceConfig(carrier="unit"), keep_scores=True)
    assert worst(named, plain) == 0
    assert plain.provenance.criterion == "influence"
