"""Mean influence and what the route view keeps of it, beside obvious slow computations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import attackroute as ar
from architectures import CLOSED, MIXED
from attackroute import oracle
from attackroute.errors import UserError
from attackroute.report import mean_influence as module
from attackroute.report.mean_influence import mean_influence
from attackroute.report.measuring import Measured, measure
from attackroute.report.route_view import Limits, route_view
from attackroute.report.run_folder import RunFolder
from tracing import deviation, ready, small, state, untidy

EVERY = {**CLOSED, **MIXED}


def no_files(tmp_path, **parts: object) -> RunFolder:
    return replace(RunFolder(tmp_path, None, None, None, None, (), None, None, None, ()), **parts)


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
    original = module.record
    monkeypatch.setattr(module, "record", lambda *a, **k: (batches.append(a[1].shape[0]), original(*a, **k))[1])
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
    monkeypatch.setattr(module, "_PRODUCTS", 10)
    found = mean_influence(model, images)
    assert slow and found.unmeasured == tuple(slow)
    assert set(found.matrices) == set(found.methods) - set(slow)


def darker(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return images * 0.25


def test_attacked_images_have_their_own_influence_and_trace(tmp_path) -> None:
    torch.manual_seed(0)
    model, images, labels = small((3, 8, 6)), torch.rand(6, 3, 9, 9), torch.arange(6) % 5
    found = measure(model, (images, labels), no_files(tmp_path), darker, width=0.3)
    assert found.traced == ("clean", "attacked")
    assert found.clean == ar.trace_routes(model, (images, labels), 0.3)
    assert found.attacked == ar.trace_routes(model, (images * 0.25, labels), 0.3)
    assert found.attacked.provenance.attack == "darker" and found.clean.provenance.attack is None
    for influence, shown in ((found.clean_influence, images), (found.attacked_influence, images * 0.25)):
        assert deviation(influence.matrices["0", "2"], ar.influence(model, shown, "0", "2").mean(0)) <= 1e-5
    kept = measure(model, (images, labels), no_files(tmp_path, routes=found.clean, attacked=found.attacked), None)
    assert kept.clean is found.clean and kept.attacked is found.attacked and kept.traced == ()
    assert kept.attacked_influence is None
    with pytest.raises(UserError, match="'0'"):
        measure(small((3, 4, 6)), (images, labels), no_files(tmp_path, routes=found.clean), None)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    torch.manual_seed(0)
    model, images, labels = small((3, 24, 20)), torch.rand(6, 3, 9, 9), torch.arange(6) % 5
    return measure(model, (images, labels), no_files(tmp_path_factory.mktemp("none")), darker, width=0.3)


def test_the_view_has_the_numbers_of_the_routes(measured: Measured) -> None:
    route = measured.clean.aggregate(0.3)
    view = route_view(measured, route, ["a", "b"])
    assert [layer["name"] for layer in view["layers"]] == ["0", "2"] and view["classes"] == ["a", "b"]
    for layer in view["layers"]:
        name = layer["name"]
        assert layer["clean"] == measured.clean.masks[name].double().mean(0).tolist()
        assert layer["attacked"] == measured.attacked.masks[name].double().mean(0).tolist()
        assert layer["route"] == list(route.indices[name])
    for index, sample in enumerate(view["samples"]):
        assert (sample["index"], sample["label"]) == (index, int(measured.clean.labels[index]))
        for kind, routes in (("clean", measured.clean), ("attacked", measured.attacked)):
            assert sample["predictions"][kind] == int(routes.predictions[index])
            own = [routes.masks[name][index].nonzero().flatten().tolist() for name in routes.layers]
            assert sample["routes"][kind] == own


def test_the_view_keeps_the_strongest_pairs_and_each_channels_own(measured: Measured) -> None:
    view = route_view(measured, measured.clean.aggregate(0.3), limits=Limits(channels=12, pairs=1))
    (edge,) = view["edges"]
    assert (edge["source"], edge["target"], edge["method"]) == (0, 1, "closed-form")
    for kind, influence in (("clean", measured.clean_influence), ("attacked", measured.attacked_influence)):
        matrix, kept = influence.matrices["0", "2"], edge[kind]
        pairs = dict(zip(zip(kept["targets"], kept["sources"], strict=True), kept["influence"], strict=True))
        assert len(pairs) == len(kept["influence"]) and sorted(pairs.values(), reverse=True) == kept["influence"]
        assert all(value == pytest.approx(matrix[pair].item(), rel=1e-3) for pair, value in pairs.items())
        assert kept["total"] == pytest.approx(matrix.sum().item(), rel=1e-3)
        assert kept["share_kept"] == pytest.approx(sum(matrix[pair].item() for pair in pairs) / kept["total"], abs=1e-3)
        assert view["layers"][1]["arriving"][kind] == pytest.approx(matrix.sum(1).tolist(), rel=1e-3)
        used = {}
        for layer in ("0", "2"):
            often = torch.maximum(measured.clean.frequency()[layer], measured.attacked.frequency()[layer])
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
    other = Measured(measured.clean, measured.attacked.select([3, 1, 2]))
    assert set(route_view(other, None)["samples"][0]["routes"]) == {"clean"}
    assert len(route_view(measured, None, limits=Limits(samples=2))["samples"]) == 2
    alone = route_view(Measured(None, measured.attacked), None)
    assert set(alone["samples"][0]["routes"]) == {"attacked"} and alone["layers"][0]["clean"] is None
    assert route_view(Measured(None, None), None) is None


def test_a_route_without_samples_is_drawn_from_its_file() -> None:
    plain = ar.Route({"a": [1]}, {"a": 3})
    (layer,) = route_view(Measured(None, None), plain)["layers"]
    assert (layer["route"], layer["clean"], layer["attacked"], layer["arriving"]) == ([1], None, None, {})
    often = ar.Route({"a": [1]}, {"a": 3}, {"a": torch.tensor([0.0, 1.0, 0.5])})
    view = route_view(Measured(None, None), often)
    assert view["layers"][0]["clean"] == [0.0, 1.0, 0.5] and view["edges"] == view["samples"] == []
