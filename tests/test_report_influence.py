"""Mean influence and what the route view keeps of it, beside obvious slow computations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attackroute as ar
from architectures import CLOSED, MIXED
from attackroute.core.errors import UserError
from attackroute.report.measuring import Condition, Measured, measure, unmeasured
from attackroute.report.route_view import Limits, route_view, run_setup, spread
from attackroute.robustness.registry import by_radius
from attackroute.tracing import influence, oracle
from attackroute.tracing.influence import mean_influence
from tracing import deviation, ready, small, state, untidy

EVERY = {**CLOSED, **MIXED}


@pytest.mark.parametrize("name", ["residual", "dense", min(MIXED)])
def test_it_is_the_mean_of_the_oracle_at_any_batch_size(name: str) -> None:
    model, images, labels = ready(EVERY[name], size=11)
    expected = oracle.trace(model, images, labels, width=0.3)
    for batch_size in (1, 2, 128):
        found = mean_influence(model, images, batch_size=batch_size)
        assert set(found.matrices) == set(expected.edges) == set(found.methods) and found.unmeasured == ()
        assert found.samples == len(images) and tuple(found.channels) == tuple(expected.layers)
        for edge in expected.edges:
            assert deviation(found.matrices[edge], expected.influence[edge].mean(0)) <= 1e-9, edge


def test_overlapping_pooling_is_averaged_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.LazyLinear(3)
    ).double()  # fmt: skip
    images = torch.rand(3, 3, 13, 13).double()
    model(images)
    found = mean_influence(model, images)
    assert found.methods == {("0", "3"): "closed-form"}
    assert deviation(found.matrices["0", "3"], ar.influence(model, images, "0", "3").mean(0)) <= 1e-9


def test_the_model_runs_once_a_batch_and_comes_back_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = untidy()
    before = state(model)
    batches: list[int] = []
    original = influence.record
    monkeypatch.setattr(influence, "record", lambda *a, **k: (batches.append(a[1].shape[0]), original(*a, **k))[1])
    mean_influence(model, torch.rand(5, 3, 9, 9), batch_size=2)
    assert batches == [2, 2, 1] and state(model) == before
    with pytest.raises(UserError, match="no sample"):
        mean_influence(model, [])
    with pytest.raises(UserError):
        mean_influence(model, torch.full((2, 3, 9, 9), torch.nan))
    assert state(model) == before


def test_edges_that_would_take_too_long_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, _ = ready(EVERY["residual"])
    assert mean_influence(model, images).unmeasured == ()
    model = untidy()
    images = torch.rand(2, 3, 9, 9)
    slow = [edge for edge, method in mean_influence(model, images).methods.items() if method == "autograd"]
    monkeypatch.setattr(influence, "_PRODUCTS", 10)
    found = mean_influence(model, images)
    assert slow and found.unmeasured == tuple(slow)
    assert set(found.matrices) == set(found.methods) - set(slow)


def darker(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return images * 0.25


def measured_on(model: nn.Module, data: object, known: Measured | None = None, **options: object) -> Measured:
    return measure(model, data, unmeasured(None) if known is None else known, {"darker": darker}, **options)


def test_attacked_images_have_their_own_influence_and_trace() -> None:
    torch.manual_seed(0)
    model, images, labels = small((3, 8, 6)), torch.rand(6, 3, 9, 9), torch.arange(6) % 5
    found = measured_on(model, (images, labels), width=0.3)
    (attacked,) = found.attacked
    assert found.clean.traced and attacked.traced and attacked.name == "images after darker"
    assert found.clean.routes == ar.trace_routes(model, (images, labels), 0.3)
    assert attacked.routes == ar.trace_routes(model, (images * 0.25, labels), 0.3)
    assert attacked.routes.provenance.attack == "darker" and found.clean.routes.provenance.attack is None
    for condition, shown in ((found.clean, images), (attacked, images * 0.25)):
        matrix = condition.influence.matrices["0", "2"]
        assert deviation(matrix, ar.influence(model, shown, "0", "2").mean(0)) <= 1e-5
        expected = ar.loss_gradient(model, (shown, labels))
        assert all(torch.equal(condition.gradient[layer], expected[layer]) for layer in expected)
    moved = ar.sensitivity(model, images, images * 0.25)
    assert found.clean.sensitivity is None
    assert all(torch.equal(attacked.sensitivity[layer], moved[layer]) for layer in moved)
    known = unmeasured(found.clean.routes, [attacked.routes])
    kept = measure(model, (images, labels), known, {}, rows=range(6))
    assert kept.clean.routes is found.clean.routes and kept.attacked[0].routes is attacked.routes
    assert not kept.clean.traced and kept.attacked[0].influence is None
    with pytest.raises(UserError, match="'0'"):
        measure(small((3, 4, 6)), (images, labels), unmeasured(found.clean.routes), {})


def test_batches_of_a_loader_give_the_same() -> None:
    torch.manual_seed(0)
    model, images, labels = small((3, 8, 6)), torch.rand(6, 3, 9, 9), torch.arange(6) % 5
    whole = measured_on(model, (images, labels))
    parts = measured_on(model, DataLoader(TensorDataset(images, labels), 2))
    for ours, theirs in zip(whole.conditions, parts.conditions, strict=True):
        assert ours.routes == theirs.routes
        assert deviation(theirs.influence.matrices["0", "2"], ours.influence.matrices["0", "2"]) <= 1e-6
    for layer, values in whole.attacked[0].sensitivity.items():
        assert deviation(parts.attacked[0].sensitivity[layer], values) <= 1e-6


@pytest.fixture(scope="module")
def measured() -> Measured:
    torch.manual_seed(0)
    model, images, labels = small((3, 24, 20)), torch.rand(6, 3, 9, 9), torch.arange(6) % 5
    return measured_on(model, (images, labels), width=0.3, shown=4)


def viewed(measured: Measured, limits: Limits | None = None, classes: tuple[str, ...] = ()) -> dict[str, object] | None:
    return route_view({"": measured}, classes, limits)


def test_the_view_has_the_numbers_of_the_routes(measured: Measured) -> None:
    route = measured.clean.routes.aggregate(0.3)
    with_route = replace(measured, clean=replace(measured.clean, route=route))
    view = viewed(with_route, classes=("a", "b"))
    assert [layer["name"] for layer in view["layers"]] == ["0", "2"] and view["classes"] == ["a", "b"]
    assert [condition["name"] for condition in view["conditions"]] == ["clean images", "images after darker"]
    for layer in view["layers"]:
        name = layer["name"]
        for at, condition in enumerate(measured.conditions):
            assert layer["frequency"][at] == condition.routes.masks[name].double().mean(0).tolist()
            assert layer["gradient"][at] == pytest.approx(condition.gradient[name].tolist(), rel=1e-3)
        assert layer["sensitivity"][0] is None
        assert layer["sensitivity"][1] == pytest.approx(measured.attacked[0].sensitivity[name].tolist(), rel=1e-3)
        assert layer["route"] == [list(route.indices[name]), None]
    assert len(view["samples"]) == 6
    for index, sample in enumerate(view["samples"]):
        assert (sample["row"], sample["label"]) == (index, int(measured.clean.routes.labels[index]))
        for at, condition in enumerate(measured.conditions):
            routes = condition.routes
            assert sample["predictions"][at] == int(routes.predictions[index])
            assert sample["routes"][at] == [routes.masks[x][index].nonzero().flatten().tolist() for x in routes.layers]


def test_the_view_keeps_the_strongest_pairs_and_each_channels_own(measured: Measured) -> None:
    view = viewed(measured, Limits(channels=12, pairs=1))
    (edge,) = view["edges"]
    assert (edge["source"], edge["target"], edge["method"]) == (0, 1, "closed-form")
    for at, condition in enumerate(measured.conditions):
        matrix, kept = condition.influence.matrices["0", "2"], edge["influence"][at]
        pairs = dict(zip(zip(kept["targets"], kept["sources"], strict=True), kept["influence"], strict=True))
        assert len(pairs) == len(kept["influence"]) and sorted(pairs.values(), reverse=True) == kept["influence"]
        assert all(value == pytest.approx(matrix[pair].item(), rel=1e-3) for pair, value in pairs.items())
        assert kept["total"] == pytest.approx(matrix.sum().item(), rel=1e-3)
        assert kept["share_kept"] == pytest.approx(sum(matrix[pair].item() for pair in pairs) / kept["total"], abs=1e-3)
        assert view["layers"][1]["arriving"][at] == pytest.approx(matrix.sum(1).tolist(), rel=1e-3)
        used = {}
        for layer in ("0", "2"):
            often = torch.maximum(*(item.routes.frequency()[layer] for item in measured.conditions))
            ranked = sorted(range(len(often)), key=lambda channel: (-often[channel], channel))[:12]
            used[layer] = [channel for channel in ranked if often[channel] > 0]
        assert {target for target, _ in pairs} <= set(used["2"]) and {source for _, source in pairs} <= set(used["0"])
        for target in used["2"]:  # each one's five strongest sources among those that count
            best = sorted(used["0"], key=lambda source: -matrix[target, source])[:5]
            assert {(target, source) for source in best if matrix[target, source] > 0} <= set(pairs)
        for source in used["0"]:
            best = sorted(used["2"], key=lambda target: -matrix[target, source])[:5]
            assert {(target, source) for target in best if matrix[target, source] > 0} <= set(pairs)


def test_other_samples_are_not_shown_as_the_same(measured: Measured) -> None:
    clean, attacked = (condition.routes for condition in measured.conditions)
    other = viewed(unmeasured(clean, [attacked.select([3, 1, 2])]))
    assert [found is None for found in other["samples"][0]["routes"]] == [False, True]
    few = viewed(unmeasured(clean, [attacked]), Limits(samples=2))
    assert [sample["row"] for sample in few["samples"]] == [0, 3] and few["samples"][1]["label"] == int(clean.labels[3])
    assert few["samples"][1]["picture"] is None
    alone = viewed(unmeasured(None, [attacked]))
    assert alone["samples"][0]["routes"][0] is None and alone["layers"][0]["frequency"][0] is None
    assert viewed(unmeasured(None)) is None


def test_rows_of_a_longer_trace_are_the_samples_of_the_pictures() -> None:
    torch.manual_seed(0)
    model, images, labels = small((3, 8, 6)), torch.rand(9, 3, 9, 9), torch.arange(9) % 5
    whole = ar.trace_routes(model, (images, labels), 0.3)
    rows = spread(9, 4)
    assert rows == [0, 2, 4, 6] and spread(3, 9) == [0, 1, 2]
    found = measured_on(model, (images[rows], labels[rows]), unmeasured(whole), rows=rows, shown=4, width=0.3)
    view = viewed(found)
    assert [(item["row"], item["picture"]) for item in view["samples"]] == [(0, 0), (2, 1), (4, 2), (6, 3)]
    for item in view["samples"]:
        row = item["row"]
        assert item["label"] == int(labels[row])
        attacked = ar.trace_routes(model, (images[[row]] * 0.25, labels[[row]]), 0.3)
        for routes, index, own in ((whole, row, item["routes"][0]), (attacked, 0, item["routes"][1])):
            assert own == [routes.masks[layer][index].nonzero().flatten().tolist() for layer in routes.layers]


def test_a_route_without_samples_is_drawn_from_its_file() -> None:
    plain = ar.Route({"a": [1]}, {"a": 3})
    (layer,) = viewed(unmeasured(None, route=plain))["layers"]
    assert (layer["route"], layer["frequency"], layer["arriving"]) == ([[1]], [None], [None])
    often = ar.Route({"a": [1]}, {"a": 3}, {"a": torch.tensor([0.0, 1.0, 0.5])})
    view = viewed(unmeasured(None, route=often))
    assert view["layers"][0]["frequency"] == [[0.0, 1.0, 0.5]] and view["edges"] == view["samples"] == []


def test_attacks_of_one_kind_differ_by_their_radius() -> None:
    def control(*attacks: str) -> tuple[str, list[str]]:
        setup = run_setup([Condition(None), *map(Condition, attacks)])
        return setup["control"], [pair["label"] for pair in setup["pairs"]]

    assert control("pgd:eps=2/255", "pgd:eps=8/255,step_size=1/255") == ("eps", ["2/255", "8/255"])
    assert control("pgd:eps=0.5", "pgd:eps=0.75") == ("eps", ["0.5", "0.75"])
    assert control("pgd:eps=2/255", "fgsm:eps=8/255")[0] == "attack"
    assert control("pgd:eps=2/255", "pgd:eps=2/255,steps=50") == ("attack", ["pgd:eps=2/255", "pgd:eps=2/255,steps=50"])
    assert control("mine", "gaussian-noise:std=0.1")[0] == "attack" and control() == ("attack", [""])
    assert sorted(["pgd:eps=8/255", "fgsm:eps=1/255", "pgd:eps=16/255", "pgd:eps=2/255"], key=by_radius) == [
        "fgsm:eps=1/255", "pgd:eps=2/255", "pgd:eps=8/255", "pgd:eps=16/255",
    ]  # fmt: skip
