"""Attacks as text, as callables and as objects of other libraries, wherever an attack is taken."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attackroute as ar
from attack_samples import images, network
from attackroute.core.errors import UserError
from attackroute.hardening.settings import TrainSettings
from attackroute.hardening.training import train
from attackroute.robustness.gradient_attacks import FGSM, PGD
from attackroute.robustness.registry import as_attack, named_attacks
from attackroute.tracing.oracle_check import verify

QUICK = TrainSettings(epochs=1, batch_size=8, lr=0.01)


def routes(model: nn.Module, data: tuple[Tensor, Tensor], attack: Any, carrier: str = "unit") -> Any:
    masks = ar.trace_routes(model, data, attack=attack, config=ar.TraceConfig(carrier=carrier)).masks
    return {layer: values.tolist() for layer, values in masks.items()}


USES: dict[str, Callable[[nn.Module, tuple[Tensor, Tensor], Any], Any]] = {
    "trace": routes,
    "trace along the noise": lambda model, data, attack: routes(model, data, attack, carrier="noise"),
    "verify": lambda model, data, attack: verify(model, *data, attack=attack).deviation,
    "evaluate": lambda model, data, attack: list(ar.evaluate(model, data, attack, checks=0).right.values())[1],
    "train": lambda model, data, attack: train(model, data, data, QUICK, attack=attack).last.robust,
    "harden": lambda model, data, attack: (
        ar.harden(model, data, lam=0.01, attack=attack, train=QUICK).training.last.penalties
    ),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_a_text_a_callable_and_an_attack_are_alike(use: str) -> None:
    x, y = images(16)
    attack = FGSM(4 / 255)
    expected = USES[use](network(), (x, y), attack)
    assert USES[use](network(), (x, y), "fgsm:eps=4/255") == expected

    def own(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attack(model, x, y)

    assert USES[use](network(), (x, y), own) == expected


def test_a_callable_may_differentiate_and_leaves_nothing_behind() -> None:
    model, (x, y) = network().train(), images(8)

    def own(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x.requires_grad_()
        nn.functional.cross_entropy(model(x), y).backward()
        return x + 0.01 * x.grad.sign()

    with torch.inference_mode():
        changed = as_attack(own)(model, x, y)
    assert str(as_attack(own)) == "own"
    own.__name__ = "fgsm"  # which is another attack's name
    assert str(as_attack(own)) == "own fgsm" and list(named_attacks({"pgd:eps=0.1": own})) == ["own pgd:eps=0.1"]
    assert not changed.requires_grad and not changed.is_inference() and (changed - x).abs().max() <= 0.011
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    generator = torch.Generator().manual_seed(1)
    noise = as_attack(lambda _, x, __: x + torch.rand_like(x))
    state = torch.get_rng_state()
    first, second = (noise(model, x, y, generator=generator) for _ in range(2))
    assert not torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(noise(model, x, y, generator=generator.manual_seed(1)), first)


def test_objects_of_torchattack() -> None:
    torchattack = pytest.importorskip("torchattack")
    model, (x, y) = network().double(), images(16)
    x, cpu = x.double(), torch.device("cpu")
    other = torchattack.PGD(model, device=cpu, eps=4 / 255, steps=3, alpha=1 / 255, random_start=False)
    ours = PGD(4 / 255, steps=3, step_size=1 / 255, random_start=False)
    assert routes(model, (x, y), other) == routes(model, (x, y), ours)
    assert ar.trace_routes(model, (x, y), attack=other).provenance.attack == "torchattack.PGD"
    evaluation = ar.evaluate(model, (x, y), [other, ours], checks=0)
    assert evaluation.accuracy("torchattack.PGD") == evaluation.accuracy(str(ours))
    with pytest.raises(UserError, match=r"torchattack.PGD was made for another network"):
        ar.evaluate({"one": model, "two": network().double()}, (x, y), [other], checks=0)
    weak = torchattack.PGD(model, device=cpu, eps=1 / 255)
    with pytest.raises(UserError, match=r"two attacks are called 'torchattack.PGD'; give names"):
        ar.evaluate(model, (x, y), [other, weak], checks=0)
    assert list(ar.evaluate(model, (x, y), {"weak": weak, "strong": other}, checks=0).right)[1:] == [
        ("model", "weak"), ("model", "strong")
    ]  # fmt: skip


def library(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of that name, for a library that need not be installed."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_objects_of_torchattacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class PGD:
        """As of torchattacks: it holds the model, and takes images and labels."""

        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
            return FGSM(4 / 255)(self.model, inputs, labels)

    PGD.__module__ = library("torchattacks", monkeypatch).__name__ + ".attacks.pgd"
    model, data = network(), images(16)
    assert routes(model, data, PGD(model)) == routes(model, data, "fgsm:eps=4/255")
    assert str(as_attack(PGD(model))) == "torchattacks.PGD"
    with pytest.raises(UserError, match="another network"):
        routes(network(), data, PGD(model))


def test_objects_of_foolbox(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def __init__(self, model: nn.Module, bounds: tuple[float, float], device: torch.device) -> None:
            assert bounds == (0, 1) and not model.training
            self.inner = model

    class LinfPGD:
        """As of foolbox: it takes its model, and gives three things for one radius."""

        def __call__(self, model: Any, inputs: Tensor, criterion: Tensor, *, epsilons: float | None) -> Any:
            if epsilons is None:
                raise NotImplementedError("FixedEpsilonAttack subclasses do not yet support None in epsilons")
            changed = FGSM(epsilons)(model.inner, inputs, criterion)
            return inputs, changed, changed

    LinfPGD.__module__ = "foolbox.attacks.projected_gradient_descent"
    library("foolbox", monkeypatch).PyTorchModel = Model  # type: ignore[attr-defined]
    model, data = network(), images(16)
    attack = functools.partial(LinfPGD(), epsilons=4 / 255)
    assert routes(model, data, attack) == routes(model, data, "fgsm:eps=4/255")
    assert str(as_attack(attack)) == "foolbox.LinfPGD"
    with pytest.raises(UserError, match="give a radius"):
        routes(model, data, LinfPGD())


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (PGD, "the class PGD"),
        (3, "an object of type int"),
        (None, "NoneType"),
        ("pdg", "did you mean pgd"),
        ([], "no attack"),
    ],
)
def test_what_is_no_attack_is_named(attack: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        named_attacks(attack)


def test_what_a_callable_returns_is_checked() -> None:
    model, (x, y) = network(), images(8)
    for change, message in ((lambda _, x, __: x[:2], "returns"), (lambda _, x, __: x * float("nan"), "(?i)nan")):
        for use in ("trace", "evaluate", "train"):
            with pytest.raises(UserError, match=message):
                USES[use](model, (x, y), change)
