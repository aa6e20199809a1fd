"""Nested sets of channels by rank, and paired sign tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from math import comb

import pytest
import torch
from torch import nn

from attackroute.analysis.controls import RANDOM, ROUTE, Comparison, Ranking, repeated_layers
from attackroute.analysis.criteria import ChannelScores
from attackroute.analysis.experiments.interventions import leading_groups
from attackroute.core.errors import UserError
from attackroute.core.statistics import sign_test
from attackroute.routes.route import Route
from attackroute.tracing.trace import trace_routes
from route_samples import instances

SHARES = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0)


def test_the_routes_sets_are_those_of_the_aggregate_at_that_width() -> None:
    routes = instances(samples=9)  # few samples, so that frequencies tie
    ranking = Ranking.of_scores(routes.frequency(), ROUTE)
    for share in SHARES:
        assert ranking.route(share, routes.layers) == routes.aggregate(share)
    assert ranking.route(0, ["features.3"]) == Route({"features.3": []}, {"features.3": 8})


def test_sets_of_scores_are_those_of_their_routes() -> None:
    values = {"a": torch.tensor([1.0, 3, 3, 0, 2]).double(), "b": torch.rand(40).double()}
    scores = ChannelScores("weight", values)
    ranking = Ranking.of_scores(values, "weight")
    assert ranking.order["a"] == [1, 2, 4, 0, 3]
    for share in SHARES:
        assert ranking.route(share, values) == scores.route(share)


def test_random_sets_grow_off_the_route_until_it_is_used_up() -> None:
    route = instances().aggregate(0.3)  # one of its layers has a single channel
    ranking = Ranking.off_route(route, 7)
    wide = [layer for layer in route if route.channels[layer] > 1]
    assert ranking.route(0.3, wide) == route.restrict(wide).random_like(7)
    before: set[int] = set()
    for share in (0.1, 0.3, 0.5, 0.65):
        found = ranking.route(share, ["features.8"])
        assert found is not None
        chosen = set(found.indices["features.8"])
        assert before <= chosen and not chosen & set(route.indices["features.8"])
        assert len(chosen) == max(1, round(share * 19))
        before = chosen
    assert ranking.route(0.8, ["features.8"]) is None and ranking.route(0.3, ["classifier#2"]) is None
    assert Ranking.off_route(route, 8).order != ranking.order


def test_depthwise_layers_repeat_the_choice_before_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten())
    images = torch.rand(6, 3, 3, 3)
    route = trace_routes(model, images, 0.4).aggregate(0.4)
    assert repeated_layers(model, route) == {"1": "0"} and route.indices["1"] == route.indices["0"]
    compared = Comparison(model=model, data=(images, torch.zeros(6)), route=route, seeds=range(3), share=0.4)
    for ranking in compared.rankings()[1:]:
        assert ranking.order["1"] == ranking.order["0"] != ranking.order["3"]
    both = Route({"0": [1, 2], "1": [1, 3], "3": [0]}, dict.fromkeys("013", 8))
    assert not repeated_layers(model, both)  # what is not the same choice is none that is repeated
    assert leading_groups("abcdef", "bd") == [tuple("abcd"), tuple("abcde"), tuple("abcdef")]


def rank(
    route: Route,
    baselines: Mapping[str, Route | ChannelScores],
    seeds: Sequence[int],
    layers: Iterable[str] | None = None,
) -> list[Ranking]:
    data = torch.rand(1, 3, 4, 4)
    compared = Comparison(model=nn.Identity(), data=data, route=route, baselines=baselines, seeds=seeds)
    return compared.rankings(layers)


def test_rank_puts_the_route_first_and_refuses_what_does_not_fit() -> None:
    route = instances(channels={"a": 6, "b": 9}).aggregate(0.3)
    other = instances(channels={"a": 6, "b": 9}, seed=4).aggregate(0.3)
    scores = ChannelScores("weight", {"a": torch.rand(6).double(), "b": torch.rand(9).double()})
    found = rank(route, {"mine": other, "weight": scores}, (3, 4), ["b"])
    assert [(each.criterion, each.draw) for each in found] == [
        (ROUTE, None), (RANDOM, 3), (RANDOM, 4), ("mine", None), ("weight", None),
    ]  # fmt: skip
    assert all(list(each.channels) == ["b"] for each in found)
    plain = Route({"a": range(6), "b": [1]}, {"a": 6, "b": 9})
    whole = Route(plain.indices, plain.channels, route.frequency)
    for arguments, message in (
        ((route, {}, (0,), ["c"]), "no layer 'c' in the route"),
        ((whole, {}, (0,)), "all 6 channels of layer 'a' are on the route"),
        ((plain, {}, ()), "the route has no frequencies"),
        ((route, {"mine": other.restrict(["a"])}, (0,)), "layer 'b' .* not in the baseline 'mine'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            rank(*arguments)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    assert len(rank(whole, {}, (), ["a"])) == 1  # no control off the route is asked for


@pytest.mark.parametrize("share", [1.5, -0.1, float("nan")])
def test_shares_outside_the_unit_interval_are_refused(share: float) -> None:
    with pytest.raises(UserError, match=r"outside \(0, 1\]: give the share"):
        rank(instances().aggregate(0.3), {}, ())[0].route(share, ["features.3"])


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (3, 9), (9, 3), (7, 7), (0, 40), (1200, 1100)])
def test_the_sign_test_is_exact(wins: int, losses: int) -> None:
    total = wins + losses
    tail = sum(comb(total, count) for count in range(min(wins, losses) + 1))
    assert sign_test(wins, losses) == pytest.approx(float(min(Fraction(1), Fraction(2 * tail, 2**total))), rel=1e-9)
