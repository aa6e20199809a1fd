"""Injected and held channels, against one sample at a time, by hand and under attacks that run parts of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from architectures import conv
from attackroute.analysis.controls import RANDOM, ROUTE, Comparison
from attackroute.analysis.experiments.interventions import hold_accuracy, inject_accuracy, transplant_accuracy
from attackroute.analysis.intervention_table import UNTOUCHED, InterventionTable, Setting
from attackroute.analysis.interventions import record_outputs, transplant
from attackroute.core.errors import UserError
from attackroute.core.table import Record, Table
from attackroute.robustness.gradient_attacks import FGSM, PGD
from attackroute.routes.route import Route
from experiment_samples import Case, make_case, shifted
from tracing import state

SINGLE, GROUPS = ["0", "8"], [("0",), ("8",), ("0", "8")]


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(16)


@dataclass
class Exchanged:
    """A chain, module by module, in which channels have the values that they have on another image."""

    model: nn.Module
    other: Tensor  # (1, ...), the image whose values they have
    channels: dict[str, tuple[int, ...]]

    def __call__(self, x: Tensor) -> Tensor:
        there = self.other
        for name, module in self.model.named_children():
            x, there = module(x), module(there).detach()
            for channel in self.channels.get(name, ()):
                mask = torch.zeros(x.shape[1], dtype=torch.bool)
                mask[channel] = True
                x = torch.where(mask[:, None, None], there, x)
        return x


def nudged(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A weaker attack that no batch can change."""
    return x + 0.1 * (shifted(model, x, y) - x)


def channels_of(case: Case, row: Record) -> dict[str, tuple[int, ...]]:
    """The row's channels, by another way than the experiment's."""
    layers = row["layers"].split("+") if row["layers"] else []
    route = case.route.random_like(row["draw"]) if row["criterion"] == RANDOM else case.routes.aggregate(0.3)
    return {layer: route.indices[layer] for layer in layers}


def injected(case: Case, x: Tensor, y: Tensor, channels: dict[str, tuple[int, ...]]) -> int:
    return int(Exchanged(case.model, nudged(case.model, x, y), channels)(x).argmax())


def held(case: Case, x: Tensor, y: Tensor, channels: dict[str, tuple[int, ...]]) -> int:
    network = Exchanged(case.model, x, channels)
    return int(network(nudged(network, x, y)).argmax())  # type: ignore[arg-type]


def test_every_injection_is_that_of_one_sample_at_a_time(case: Case) -> None:
    compared = case.compared(seeds=(2,), batch_size=6)
    table = inject_accuracy(compared, {"nudged": nudged}, layers=SINGLE, shares=(0, 1.0))
    whole = {layer: tuple(range(count)) for layer, count in case.route.channels.items()}
    compare(case, table.table, injected, {0.0: {}, 1.0: whole})
    assert {setting.layers for setting in table.settings if setting.share == 0.3} == set(GROUPS)
    # all of the first layer is all of the attack, and nothing is the clean image
    assert table.values(Setting(("0",), 1.0, "nudged"), ROUTE) == [table.untouched("nudged").value]
    assert table.values(Setting(("0",), 0.0, "nudged"), ROUTE) == [1.0]
    assert list(table.figures()) == ["inject-layers", "inject-shares"]


def test_every_held_network_is_attacked_one_sample_at_a_time(case: Case) -> None:
    before = state(case.model)
    table = hold_accuracy(case.compared(seeds=(2,), batch_size=6), {"nudged": nudged}, layers=SINGLE)
    compare(case, table.table, held, {})
    assert [setting.layers for setting in table.settings] == GROUPS
    assert list(table.figures()) == ["hold"] and state(case.model) == before


def compare(case: Case, table: Table, one: Callable[..., int], shares: dict[float, dict[str, tuple[int, ...]]]) -> None:
    """Each row against single samples; of some shares the channels are given."""
    right, found = case.right(), set()
    pairs = [(case.images[i : i + 1], case.labels[i : i + 1]) for i in right]
    for row in table:
        channels = shares.get(row["share"], channels_of(case, row))
        channels = {layer: channels[layer] for layer in row["layers"].split("+") if layer in channels}
        if row["criterion"] == UNTOUCHED:
            hits = [case.predict(nudged(case.model, x, y)[0]) == y for x, y in pairs]
        else:
            hits = [one(case, x, y, channels) == y for x, y in pairs]
        assert row["accuracy"] == sum(map(int, hits)) / len(right), row
        found.add(row["accuracy"])
    assert len(found) > 3


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


@pytest.mark.parametrize("measure", [transplant_accuracy, inject_accuracy, hold_accuracy])
def test_a_channel_that_carries_all_beats_one_that_carries_nothing(measure: Callable[..., InterventionTable]) -> None:
    # Class 0 above 0.5. Only the first channel sees the image; the attack moves it across.
    model = nn.Sequential(conv([[1.0], [0.0]], [-0.5, 1.0]), conv([[1.0, 0.0], [-1.0, 0.0]]), nn.Flatten()).eval()
    images = torch.tensor([0.4, 0.6] * 10).reshape(-1, 1, 1, 1)
    labels = (images.flatten() < 0.5).long()
    route = Route({"0": [0]}, {"0": 2}, {"0": torch.tensor([1.0, 0.0])})
    compared = Comparison(model=model, data=(images, labels), route=route, share=0.5, seeds=(0,))
    result = measure(compared, {"fgsm": FGSM(eps=0.3)})
    on, off = (0.0, 1.0) if measure is inject_accuracy else (1.0, 0.0)
    setting = Setting(("0",), 0.5, result.attacks[0])
    assert (result.values(setting, ROUTE), result.values(setting, RANDOM)) == ([on], [off])
    text = result.reading()
    assert f"{setting.attack} 0.0%" in text and text.endswith(
        "the route beats every random draw in 1 (loses in 0) of 1."
    )


def test_a_whole_first_layer_held_leaves_the_clean_answer(case: Case) -> None:
    attacks = {str(attack): attack for attack in (PGD(eps=0.3, steps=3, step_size=0.2), FGSM(eps=1.0))}
    table = hold_accuracy(case.compared(seeds=(), share=1.0), attacks, layers=["0"])
    for attack in attacks:
        assert table.values(Setting(("0",), 1.0, attack), ROUTE) == [1.0] > [table.untouched(attack).value]


def test_attacks_on_part_of_a_batch_are_made_image_by_image(case: Case) -> None:
    restarts = PGD(eps=0.03, steps=2, step_size=0.015, restarts=3)
    sizes: list[int] = []

    def noted(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        return restarts(model, x, y)

    together, alone = (
        hold_accuracy(case.compared(seeds=(0,), batch_size=size), {"noted": noted}, layers=["0"]).table
        for size in (16, 1)
    )
    assert together == alone and max(sizes) > 1
    assert 0 < together.one(criterion=ROUTE)["accuracy"] < 1

    def twice(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model(torch.cat([x, x]))
        return x

    before = state(case.model)
    with pytest.raises(UserError, match="twice cannot be made on a network with held channels: layer '0' gives"):
        hold_accuracy(case.compared(seeds=()), {"twice": twice}, layers=["0"])
    assert state(case.model) == before
