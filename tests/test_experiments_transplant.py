"""Transplants and weakened connections, against one sample and one set at a time."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from attackroute.analysis.controls import RANDOM, ROUTE
from attackroute.analysis.experiments.interventions import BETAS, leading_groups, transplant_accuracy, weaken_accuracy
from attackroute.analysis.intervention_table import UNTOUCHED, Setting
from attackroute.core.errors import UserError
from attackroute.core.table import Record
from attackroute.routes.route import Route
from experiment_samples import Case, counting, make_case, shifted


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(16)


def chosen(case: Case, row: Record) -> Route | None:
    """The row's channels, by another way than the experiment's."""
    share = row["share"]
    if row["criterion"] == RANDOM:
        return None if share != 0.3 or row["draw"] is None else case.route.random_like(row["draw"])
    return case.weight.route(share) if row["criterion"] == "weight" else case.routes.aggregate(share)


def grafted(case: Case, clean: torch.Tensor, attacked: torch.Tensor, route: Route, layers: tuple[str, ...]) -> int:
    """The network's class for one attacked image with clean channels: modules one by one, no hooks."""
    kept = {}
    with torch.no_grad():
        x = clean[None]
        for name, module in case.model.named_children():
            x = module(x)
            kept[name] = x
        x = attacked[None]
        for name, module in case.model.named_children():
            x = module(x)
            if name in layers:
                x = x.clone()
                for channel in route.indices[name]:
                    x[0, channel] = kept[name][0, channel]
    return int(x.argmax())


def noisy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x + 0.25 * torch.sin(40 * x)).clamp(0, 1)


def test_every_transplant_is_that_of_one_sample_at_a_time(case: Case) -> None:
    attacks = {"shifted": shifted, "noisy": noisy}
    compared = case.compared(baselines={"weight": case.weight}, seeds=(2,), batch_size=6)
    result = transplant_accuracy(compared, attacks, shares=(0, 0.6, 1.0))
    right = case.right()
    attacked = {
        name: {int(i): attack(case.model, case.images[i : i + 1], case.labels[i : i + 1])[0] for i in right}
        for name, attack in attacks.items()
    }
    assert result.counted == len(right) < result.samples == 16
    seen = set()
    for row in result.table:
        name, layers = row["attack"], tuple(row["layers"].split("+")) if row["layers"] else ()
        assert name is not None
        if row["criterion"] == UNTOUCHED or row["share"] == 0:
            route: Route | None = Route(dict.fromkeys(case.route, ()), case.route.channels)
        else:
            route = chosen(case, row)
        if route is None:
            continue
        hits = [grafted(case, case.images[i], attacked[name][int(i)], route, layers) == case.labels[i] for i in right]
        assert row["accuracy"] == sum(map(int, hits)) / len(right) and row["samples"] == len(right), row
        assert row["neurons"] == sum(len(route.indices[layer]) for layer in layers)
        seen.add((name, layers, row["share"]))
    groups = [(layer,) for layer in case.route] + [("0", "3"), ("0", "3", "8"), ("0", "3", "8", "10")]
    swept = {("shifted", (layer,), share) for layer in case.route for share in (0.0, 0.6, 1.0)}
    fixed = {(name, group, 0.3) for name in attacks for group in groups}
    assert seen == swept | fixed | {(name, (), 0.0) for name in attacks}
    assert len(set(result.table.column("accuracy"))) > 3
    without = {name: f"{result.untouched(name).value:.1%}" for name in attacks}
    assert f"(accuracy without: shifted {without['shifted']}, noisy {without['noisy']})" in result.reading()
    assert list(result.figures()) == ["transplant-shares", "transplant-layers"]


def test_an_attack_is_made_once_a_batch_and_a_pass_is_never_repeated(case: Case) -> None:
    made: list[int] = []

    def attack(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        made.append(len(x))
        return noisy(model, x, y)

    with counting(case.model) as sizes:
        compared = case.compared(seeds=(0, 1), batch_size=8)
        table = transplant_accuracy(compared, {"noisy": attack}, shares=(0, 1.0), together=[])
    assert len(made) == 2 and sum(made) == table.counted
    random = [{case.route.random_like(seed).restrict([layer]) for seed in (0, 1)} for layer in case.route]
    # a clean pass; the attacked one, which is also that of share 0; each layer's route at 0.3, its draws, and share 1
    expected = 1 + 1 + sum(1 + len(draws) + 1 for draws in random)
    assert len(sizes) == 2 * expected


def test_all_of_the_first_layer_brings_the_clean_answer_back(case: Case) -> None:
    table = transplant_accuracy(case.compared(seeds=()), {"shifted": shifted}, layers=["0"], shares=(0.3, 1.0))
    assert table.values(Setting(("0",), 1.0, "shifted"), ROUTE) == [1.0]
    assert table.untouched("shifted").value < 1


def test_transplants_after_the_activation(case: Case) -> None:
    compared = case.compared(seeds=(), at="activation")
    table = transplant_accuracy(compared, {"shifted": shifted}, layers=["0"], shares=(1.0,))
    assert table.at == "activation" and table.values(Setting(("0",), 1.0, "shifted"), ROUTE) == [1.0]


def test_weakened_connections_are_those_of_a_copy_with_smaller_kernels(case: Case) -> None:
    import copy

    with counting(case.model) as sizes:
        compared = case.compared(baselines={"weight": case.weight}, seeds=(3,), batch_size=16)
        table = weaken_accuracy(compared, case.images[:2])
    right = case.right()
    routes = {ROUTE: case.route, RANDOM: case.route.random_like(3), "weight": case.weight.route(0.3)}
    for row in list(table.table)[1:]:
        model = copy.deepcopy(case.model)
        beta, route = row["beta"], routes[row["criterion"]]
        assert beta is not None
        with torch.no_grad():
            for before, after in pairwise(route):
                for j in route.indices[after]:
                    for i in route.indices[before]:
                        model.get_submodule(after).weight[j, i] *= beta
            hits = sum(int(model(case.images[i][None]).argmax()) == int(case.labels[i]) for i in right)
        assert row["accuracy"] == hits / len(right) and row["neurons"] == route.size
    assert table.table.select(criterion=ROUTE).column("beta") == list(BETAS)
    assert table.main_beta == 0.5 and "to 0.5" in table.reading()
    distinct = len(BETAS[1:]) * len(set(routes.values()))
    probes = len([size for size in sizes if size == 2])  # the look at which kernel slices connect neurons
    assert len(sizes) == 1 + distinct + probes and 0 < probes < 6


def test_leading_groups() -> None:
    assert leading_groups("abcdefgh") == [tuple("ab"), tuple("abc"), tuple("abcd"), tuple("abcdefgh")]
    assert leading_groups("abc") == [tuple("ab"), tuple("abc")] and leading_groups("a") == []


def test_bad_input_is_one_line(case: Case) -> None:
    attempts = [
        (lambda: transplant_accuracy(case.compared(), {}), "no attack"),
        (lambda: transplant_accuracy(case.compared(share=1.5), {"n": noisy}), "1.5 is outside"),
        (lambda: transplant_accuracy(case.compared(), {"n": noisy}, layers=["1"]), "no layer '1'"),
        (lambda: transplant_accuracy(case.compared(), {"n": noisy}, together=[["1"]]), "no layer"),
        (lambda: transplant_accuracy(case.compared(at="out"), {"n": noisy}), "output"),
    ]
    for attempt, message in attempts:
        with pytest.raises(UserError, match=message) as error:
            attempt()
        assert "\n" not in str(error.value)
