"""Injected and held channels, against one sample at a time, by hand and under attacks that run parts of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures import conv
from attackroute.analysis.controls import RANDOM, ROUTE, Comparison
from attackroute.analysis.experiments.interventions import Holding, Injection, Transplantation, transplant_accuracy
from attackroute.analysis.intervention_table import UNTOUCHED, InterventionTable, Setting
from attackroute.analysis.interventions import record_outputs, transplant
from attackroute.core.errors import UserError
from attackroute.core.table import Table
from attackroute.robustness.gradient_attacks import FGSM, PGD
from attackroute.routes.route import Route
from experiment_samples import Case, make_case
from tracing import state

SINGLE, GROUPS = ["0", "8"], [("0",), ("8",), ("0", "8")]


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(16)


def exchanged(model: nn.Module, other: Tensor, channels: dict[str, tuple[int, ...]]) -> Callable[[Tensor], Tensor]:
    """The chain, module by module, in which channels have the values that they have on another image."""

    def run(x: Tensor) -> Tensor:
        there = other
        for name, module in model.named_children():
            x, there = module(x), module(there).detach()
            if name in channels:
                mask = torch.tensor([channel in channels[name] for channel in range(x.shape[1])])
                x = torch.where(mask[:, None, None], there, x)
        return x

    return run


def nudged(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """One signed gradient step, of all images together."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = nn.functional.cross_entropy(model(leaf), y, reduction="sum")
    return (x + 0.03 * torch.autograd.grad(loss, leaf)[0].sign()).clamp(0, 1)


def injected(model: nn.Module, x: Tensor, y: Tensor, channels: dict[str, tuple[int, ...]]) -> Tensor:
    return exchanged(model, nudged(model, x, y), channels)(x)


def held(model: nn.Module, x: Tensor, y: Tensor, channels: dict[str, tuple[int, ...]]) -> Tensor:
    network = exchanged(model, x, channels)
    return network(nudged(network, x, y))


def held_accuracy(compared: Comparison, attacks: dict[str, Any], layers: list[str]) -> InterventionTable:
    return transplant_accuracy(compared, attacks, result=Holding, layers=layers, shares=())


def compare(case: Case, table: Table, one: Callable[..., Tensor], shares: dict[float, dict[str, Any]]) -> None:
    """Each row against single samples; of some shares the channels are given, else found by another way."""
    right, found = case.right(), set()
    for row in table:
        layers = row["layers"].split("+") if row["layers"] else []
        route = case.route.random_like(row["draw"]) if row["criterion"] == RANDOM else case.routes.aggregate(0.3)
        chosen = shares.get(row["share"], route.indices)
        channels = {layer: chosen[layer] for layer in layers if layer in chosen}
        hits = 0
        for x, y in ((case.images[i : i + 1], case.labels[i : i + 1]) for i in right):
            answer = one if row["criterion"] != UNTOUCHED else held  # without channels, the plain network attacked
            hits += int(answer(case.model, x, y, channels).argmax() == y)
        assert row["accuracy"] == hits / len(right), row
        found.add(hits)
    assert len(found) > 3


def test_every_injection_is_that_of_one_sample_at_a_time(case: Case) -> None:
    compared = case.compared(seeds=(2,), batch_size=6)
    table = transplant_accuracy(compared, {"nudged": nudged}, result=Injection, layers=SINGLE, shares=(0, 1.0))
    whole = {layer: tuple(range(count)) for layer, count in case.route.channels.items()}
    compare(case, table.table, injected, {0.0: {}, 1.0: whole})
    assert {setting.layers for setting in table.settings if setting.share == 0.3} == set(GROUPS)
    # all of the first layer is all of the attack, and nothing is the clean image
    assert table.values(Setting(("0",), 1.0, "nudged"), ROUTE) == [table.untouched("nudged").value]
    assert table.values(Setting(("0",), 0.0, "nudged"), ROUTE) == [1.0]
    assert list(table.figures()) == ["inject-layers", "inject-shares"]


def test_every_held_network_is_attacked_one_sample_at_a_time(case: Case) -> None:
    before = state(case.model)
    table = held_accuracy(case.compared(seeds=(2,), batch_size=6), {"nudged": nudged}, layers=SINGLE)
    compare(case, table.table, held, {})
    assert [setting.layers for setting in table.settings] == GROUPS
    assert list(table.figures()) == ["hold"] and state(case.model) == before


def test_injected_values_by_hand() -> None:
    # Clean x = 2, attacked 3. a = [x, -x], b = [a0 + 10 a1, a0 - a1].
    model = nn.Sequential(conv([[1.0], [-1.0]]), conv([[1.0, 10.0], [1.0, -1.0]]), nn.Flatten())
    x, attacked = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    values = record_outputs(model, attacked, ["0"])
    with transplant(model, values, Route({"0": [1]}, {"0": 2})):
        assert model(x).tolist() == [[2 - 30, 2 + 3]]
    with transplant(model, x, Route({"0": [0]}, {"0": 2})):  # clean values in the layer's other channel
        assert model(attacked).tolist() == [[2 - 30, 2 + 3]]
    with transplant(model, values, Route({"0": [0, 1]}, {"0": 2})):
        assert torch.equal(model(x), model(attacked)) and model(x).tolist() == [[-27, 6]]


@pytest.mark.parametrize("kind", [Transplantation, Injection, Holding])
def test_a_channel_that_carries_all_beats_one_that_carries_nothing(kind: type[InterventionTable]) -> None:
    # Class 0 above 0.5. Only the first channel sees the image; the attack moves it across.
    model = nn.Sequential(conv([[1.0], [0.0]], [-0.5, 1.0]), conv([[1.0, 0.0], [-1.0, 0.0]]), nn.Flatten()).eval()
    images = torch.tensor([0.4, 0.6] * 10).reshape(-1, 1, 1, 1)
    labels = (images.flatten() < 0.5).long()
    route = Route({"0": [0]}, {"0": 2}, {"0": torch.tensor([1.0, 0.0])})
    compared = Comparison(model=model, data=(images, labels), route=route, share=0.5, seeds=(0,))
    result = transplant_accuracy(compared, {"fgsm": FGSM(eps=0.3)}, result=kind)
    on, off = (0.0, 1.0) if kind is Injection else (1.0, 0.0)
    setting = Setting(("0",), 0.5, result.attacks[0])
    assert (result.values(setting, ROUTE), result.values(setting, RANDOM)) == ([on], [off])
    assert f"{setting.attack} 0.0%" in result.reading()
    assert result.reading().endswith("the route beats every random draw in 1 (loses in 0) of 1.")


def test_a_whole_first_layer_held_leaves_the_clean_answer(case: Case) -> None:
    table = held_accuracy(case.compared(seeds=(), share=1.0), {"fgsm": FGSM(eps=1.0)}, layers=["0"])
    (attack,) = table.attacks
    assert table.values(Setting(("0",), 1.0, attack), ROUTE) == [1.0] > [table.untouched(attack).value]


def test_attacks_on_part_of_a_batch_are_made_image_by_image(case: Case) -> None:
    attacks = {"restarts": PGD(eps=0.03, steps=2, step_size=0.015, restarts=3)}
    together, alone = (
        held_accuracy(case.compared(seeds=(0,), batch_size=size), attacks, layers=["0"]).table for size in (16, 1)
    )
    assert together == alone and 0 < together.one(criterion=ROUTE)["accuracy"] < 1

    def twice(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model(torch.cat([x, x]))
        return x

    before = state(case.model)
    with pytest.raises(UserError, match="twice cannot be made on a network with held channels: layer '0' gives"):
        held_accuracy(case.compared(seeds=()), {"twice": twice}, layers=["0"])
    assert state(case.model) == before
