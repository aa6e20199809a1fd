from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attackroute.core.errors import UserError
from attackroute.routes.provenance import Provenance
from attackroute.routes.route import Route
from route_samples import instances

ROUTE = Route({"conv1": [2, 0], "conv2": [3], "fc": []}, {"conv1": 4, "conv2": 8, "fc": 2})


@st.composite
def route_pairs(draw: st.DrawFn) -> tuple[Route, Route]:
    channels = draw(st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 12), min_size=1, max_size=4))
    pair = [
        Route({layer: draw(st.sets(st.integers(0, count - 1))) for layer, count in channels.items()}, channels)
        for _ in range(2)
    ]
    return pair[0], pair[1]


def chosen(route: Route) -> set[tuple[str, int]]:
    return {(layer, channel) for layer in route for channel in route[layer].tolist()}


def everything(route: Route) -> set[tuple[str, int]]:
    return {(layer, channel) for layer, count in route.channels.items() for channel in range(count)}


def test_a_route_reads_like_a_mapping() -> None:
    assert ROUTE["conv1"].tolist() == [0, 2]
    assert ROUTE["conv1"].dtype == torch.int64
    assert ROUTE["fc"].shape == (0,)
    assert ROUTE["fc"].dtype == torch.int64
    assert ROUTE.layers == tuple(ROUTE) == ("conv1", "conv2", "fc")
    assert ROUTE.channels == {"conv1": 4, "conv2": 8, "fc": 2}
    assert len(ROUTE) == 3
    assert "conv1" in ROUTE
    assert "conv9" not in ROUTE
    assert ROUTE.mask("conv1").tolist() == [True, False, True, False]
    assert ROUTE.mask("fc").tolist() == [False, False]
    assert ROUTE.size == 3
    assert ROUTE.share == 3 / 14


def test_an_unknown_layer_is_a_user_error_and_a_key_error() -> None:
    for call in (ROUTE.__getitem__, ROUTE.mask, ROUTE.restrict):
        with pytest.raises(
            UserError, match=r"^no layer 'conv9' in the route: its layers are conv1, conv2, fc$"
        ) as caught:
            call("conv9")
        assert isinstance(caught.value, KeyError)


def test_a_route_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROUTE.channels = {}  # type: ignore[misc]
    with pytest.raises(TypeError):
        ROUTE.indices["conv1"] = (1,)  # type: ignore[index]
    ROUTE["conv1"].fill_(1)
    assert ROUTE["conv1"].tolist() == [0, 2]
    source = {"conv": [1]}
    route = Route(source, {"conv": 3})
    source["conv"].append(2)
    assert route["conv"].tolist() == [1]


def test_channels_may_come_as_tensors_arrays_or_ranges() -> None:
    expected = Route({"conv": [1, 2]}, {"conv": 4})
    for values in (torch.tensor([2, 1]), np.array([2, 1]), range(1, 3), (2, 1), {2, 1}):
        assert Route({"conv": values}, {"conv": 4}) == expected
    assert Route.from_masks({"conv": torch.tensor([False, True, True, False])}) == expected


@pytest.mark.parametrize(
    ("indices", "channels", "message"),
    [
        ({"conv": [4]}, {"conv": 4}, "layer 'conv': channel 4 is out of range, the layer has 4 channels"),
        ({"conv": [-1, 2]}, {"conv": 4}, "channel -1 is out of range"),
        ({"conv": [1, 1]}, {"conv": 4}, "layer 'conv': a channel is named twice"),
        ({"conv": [1.0]}, {"conv": 4}, "layer 'conv': channels must be a list of integers"),
        ({"conv": [True]}, {"conv": 4}, "list of integers"),
        ({"conv": torch.tensor([True, False])}, {"conv": 2}, "list of integers"),
        ({"conv": "12"}, {"conv": 4}, "list of integers"),
        ({"conv": None}, {"conv": 4}, "list of integers"),
        ({"conv": 3}, {"conv": 4}, "list of integers"),
        ({"conv": []}, {"conv": 0}, "layer 'conv' must have a positive number of channels, not 0"),
        ({"conv": []}, {"conv": 2.0}, "positive number"),
        ({3: []}, {3: 2}, "layer names must be strings"),
        ({}, {}, "at least one layer"),
        ({}, {"conv": 4}, "no channels for layer 'conv'"),
        ({"conv": [], "fc": []}, {"conv": 4}, "layer 'fc'"),
    ],
    ids=str,
)
def test_impossible_routes_are_refused(indices: dict[str, object], channels: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Route(indices, channels)


@pytest.mark.parametrize(
    ("frequency", "message"),
    [
        ({"conv": torch.zeros(3)}, r"layer 'conv': the frequency must have shape \(2,\), not \(3,\)"),
        ({"conv": torch.tensor([0.0, 1.1])}, "outside"),
        ({"conv": torch.tensor([0.0, math.nan])}, "outside"),
        ({"conv": torch.tensor([-0.5, 0.0])}, "outside"),
        ({}, "no frequencies for layer 'conv'"),
        ({"conv": torch.zeros(2), "fc": torch.zeros(2)}, "layer 'fc'"),
    ],
    ids=str,
)
def test_impossible_frequencies_are_refused(frequency: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Route({"conv": [0]}, {"conv": 2}, frequency)


@pytest.mark.parametrize("mask", [torch.zeros(3), torch.zeros(2, 3, dtype=torch.bool)], ids=str)
def test_masks_are_bool_vectors(mask: torch.Tensor) -> None:
    with pytest.raises(UserError, match="layer 'conv': a mask must be bool"):
        Route.from_masks({"conv": mask})


def test_repr_is_a_short_table() -> None:
    assert repr(ROUTE).splitlines() == [
        "Route(3 layers, 3 of 14 channels)",
        "  layer  channels  on route  which",
        "  conv1         4         2  0 2",
        "  conv2         8         1  3",
        "  fc            2         0",
    ]
    long = Route({f"c{number}": range(9) for number in range(30)}, {f"c{number}": 9 for number in range(30)})
    assert len(repr(long).splitlines()) == 12
    assert "0 1 2 3 4 5 ..." in repr(long)
    aggregated = repr(instances(samples=12).aggregate(0.3)).splitlines()[0]
    assert aggregated == "Route(4 layers, 11 of 33 channels, influence, width 0.3, 12 samples)"


def test_a_route_is_a_frame_of_channels() -> None:
    pytest.importorskip("pandas")
    frame = Route({"a": [1]}, {"a": 2}, {"a": torch.tensor([0.25, 1.0])}).to_frame()
    assert frame.to_dict("list") == {
        "layer": ["a"] * 2,
        "channel": [0, 1],
        "on_route": [False, True],
        "frequency": [0.25, 1],
    }


def test_equality_and_hash() -> None:
    same = Route({"fc": (), "conv2": [3], "conv1": [0, 2]}, ROUTE.channels, provenance=Provenance(samples=1, width=0.3))
    assert same == ROUTE == copy.deepcopy(ROUTE) == pickle.loads(pickle.dumps(ROUTE))
    assert hash(same) == hash(ROUTE)
    assert len({same, ROUTE}) == 1
    assert Route({"conv1": [0, 3], "conv2": [3], "fc": []}, ROUTE.channels) != ROUTE
    assert Route(dict(ROUTE.indices), {**ROUTE.channels, "fc": 3}) != ROUTE
    assert Route(dict(ROUTE.indices), {layer: ROUTE.channels[layer] for layer in reversed(ROUTE.layers)}) != ROUTE
    assert ROUTE.restrict(["conv1", "conv2"]) != ROUTE
    assert ROUTE != "route"
    with pytest.raises(TypeError):
        ROUTE | {"conv1"}  # type: ignore[operator]


@settings(deadline=None)
@given(route_pairs())
def test_operators_are_those_of_sets(pair: tuple[Route, Route]) -> None:
    left, right = pair
    assert chosen(left | right) == chosen(left) | chosen(right)
    assert chosen(left & right) == chosen(left) & chosen(right)
    assert chosen(left - right) == chosen(left) - chosen(right)
    assert chosen(left.complement()) == everything(left) - chosen(left)
    assert left.complement().complement() == left
    assert (left | right).complement() == left.complement() & right.complement()
    assert left.size == len(chosen(left))
    assert left.share + left.complement().share == pytest.approx(1)
    assert (left - right) | (left & right) == left
    assert all(route.channels == left.channels for route in (left | right, left & right, left - right))
    for layer in left:
        assert left.mask(layer).nonzero().flatten().tolist() == left[layer].tolist() == sorted(left[layer].tolist())


@settings(deadline=None)
@given(route_pairs())
def test_overlap_and_jaccard_against_sets(pair: tuple[Route, Route]) -> None:
    left, right = pair
    assert set(left.overlap(right)) == set(left.jaccard(right)) == set(left.layers)
    for layer in left:
        ours, theirs = set(left[layer].tolist()), set(right[layer].tolist())
        assert left.overlap(right)[layer] == (len(ours & theirs) / len(ours) if ours else 1)
        assert left.jaccard(right)[layer] == (len(ours & theirs) / len(ours | theirs) if ours | theirs else 1)
        assert left.jaccard(right)[layer] == right.jaccard(left)[layer]
        assert left.jaccard(left)[layer] == left.overlap(left)[layer] == 1


@pytest.mark.parametrize("operation", ["__or__", "__and__", "__sub__", "overlap", "jaccard"])
@pytest.mark.parametrize(
    ("channels", "message"),
    [
        (
            {"conv1": 4, "conv2": 9, "fc": 2},
            r"layer 'conv2' \(8 channels\) stands where the other route has layer 'conv2' \(9 channels\)",
        ),
        ({"conv1": 4, "conv2": 8}, "layer 'fc' .* stands where the other route has nothing"),
        ({"conv1": 4, "conv2": 8, "fc": 2, "fc2": 3}, "nothing stands where the other route has layer 'fc2'"),
        ({"conv1": 4, "convX": 8, "fc": 2}, "layer 'conv2' .* stands where the other route has layer 'convX'"),
        ({"conv2": 8, "conv1": 4, "fc": 2}, "layer 'conv1' .* stands where the other route has layer 'conv2'"),
    ],
    ids=str,
)
def test_mismatching_routes_name_the_layer(operation: str, channels: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        getattr(ROUTE, operation)(Route({layer: [] for layer in channels}, channels))


def test_restrict_keeps_the_forward_order() -> None:
    part = ROUTE.restrict(["fc", "conv1"])
    assert part.layers == ("conv1", "fc")
    assert part["conv1"].tolist() == [0, 2]
    assert part.channels == {"conv1": 4, "fc": 2}
    assert ROUTE.restrict("conv2").layers == ("conv2",)
    assert ROUTE.restrict(ROUTE.layers) == ROUTE
    whole = instances().aggregate(0.3)
    part = whole.restrict(["features.3"])
    assert part.frequency is not None
    assert whole.frequency is not None
    assert part.frequency["features.3"].tolist() == whole.frequency["features.3"].tolist()
    assert part.provenance == whole.provenance
    with pytest.raises(UserError, match="at least one layer"):
        ROUTE.restrict([])


HALF = Route(
    {"a": range(0, 40, 2), "b": range(5), "c": []},
    {"a": 40, "b": 30, "c": 1},
    provenance=Provenance(samples=5, width=0.5),
)


@settings(deadline=None, max_examples=30)
@given(st.integers())
def test_random_like_is_disjoint_and_of_the_same_size(seed: int) -> None:
    control = HALF.random_like(seed)
    assert control.channels == HALF.channels
    assert (control & HALF).size == 0
    assert [len(control[layer]) for layer in HALF] == [len(HALF[layer]) for layer in HALF]
    assert control == HALF.random_like(seed)


def test_random_like_depends_on_the_seed_alone() -> None:
    controls = []
    for state in range(3):
        torch.manual_seed(state)
        np.random.seed(state)
        random.seed(state)
        before = torch.get_rng_state()
        controls.append(HALF.random_like(7))
        assert torch.equal(torch.get_rng_state(), before)
    assert controls[0] == controls[1] == controls[2]
    assert HALF.random_like(0)["b"].tolist() == [7, 11, 16, 20, 29]  # in every version
    assert HALF.random_like(8) != controls[0]


def test_random_like_draws_each_layer_for_itself() -> None:
    assert HALF.random_like(3).restrict(["b"]) == HALF.restrict(["b"]).random_like(3)
    twins = Route({"a": range(10), "b": range(10)}, {"a": 60, "b": 60}).random_like(0)
    assert twins["a"].tolist() != twins["b"].tolist()


def test_random_like_reaches_every_channel_about_equally() -> None:
    draws = 600
    counts = sum(HALF.random_like(seed).mask("b").long() for seed in range(draws))
    assert isinstance(counts, torch.Tensor)
    expected = draws * 5 / 25
    spread = math.sqrt(draws * (5 / 25) * (20 / 25))
    assert counts[:5].sum() == 0
    assert (counts[5:] - expected).abs().max() < 5 * spread


def test_random_like_needs_room() -> None:
    route = Route({"a": [0], "b": [0, 1, 2]}, {"a": 4, "b": 5})
    with pytest.raises(UserError, match="layer 'b' has 2 channels off the route and 3 on it"):
        route.random_like(0)
    assert route.restrict(["a"]).random_like(0).size == 1


def test_derived_routes_say_what_they_are() -> None:
    assert HALF.complement().provenance == Provenance(samples=5, width=0.5, criterion="complement of influence")
    assert HALF.random_like(4).provenance == Provenance(samples=5, width=0.5, criterion="random (seed 4) off influence")
    assert (HALF | HALF).provenance is None
    assert ROUTE.complement().provenance is None
