from __future__ import annotations

import copy
import itertools
import pickle
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from attackroute.core.errors import UserError
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.provenance import Provenance
from route_samples import CHANNELS, instances

MASKS = npst.arrays(np.bool_, st.tuples(st.integers(1, 30), st.integers(1, 40)))


def built(masks: dict[str, torch.Tensor], width: float = 0.5, **notes: Any) -> InstanceRoutes:
    return InstanceRoutes.from_masks(masks, Provenance(len(next(iter(masks.values()))), width), **notes)


def test_public_names() -> None:
    routes = instances(samples=12, width=0.4, keep_scores=True)
    assert routes.layers == tuple(routes.masks) == ("features.0", "features.3", "classifier#2", "features.8")
    assert (len(routes), routes.channels["features.8"], routes.width) == (12, 19, 0.4)
    assert routes.masks["features.0"].shape == routes.scores["features.0"].shape == (12, 5)
    assert routes.masks["features.0"].dtype == torch.bool
    assert routes.methods[("features.0", "features.3")] == "closed-form"
    assert "features.0" in routes.masks and "features.1" not in routes.masks
    assert routes.masks.get("features.1") is None


@pytest.mark.parametrize("view", ["masks", "channels", "packed"])
def test_views_are_read_only_and_name_the_layers_there_are(view: str) -> None:
    mapping = getattr(instances(), view)
    with pytest.raises(TypeError):
        mapping["features.0"] = None
    with pytest.raises(UserError, match=r"no layer 'conv1'.*features\.0") as caught:
        mapping["conv1"]
    assert isinstance(caught.value, KeyError)


def test_scores_not_kept() -> None:
    with pytest.raises(UserError, match="keep_scores=True"):
        instances().scores["features.0"]


def test_repr_is_a_line() -> None:
    channels = {f"features.{number}": 64 for number in range(40)}
    routes = instances(samples=3, channels=channels, width=0.2)
    assert repr(routes) == "InstanceRoutes(3 samples, 40 layers, 2560 channels, width 0.2)"
    single = instances(samples=1, channels={"conv": 1})
    assert repr(single) == "InstanceRoutes(1 sample, 1 layer, 1 channel, width 0.4)"


def test_from_masks_shares_nothing_with_what_it_was_given() -> None:
    mask, labels, scores = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3)
    routes = built({"a": mask}, labels=labels, predictions=labels, scores={"a": scores})
    mask.fill_(False)
    labels.fill_(1)
    scores.fill_(1)
    assert routes.masks["a"].all()
    assert routes.scores["a"].sum() == 0
    assert routes.labels is not None and routes.labels.sum() == 0
    assert routes.predictions is not None and routes.predictions.sum() == 0


def test_from_masks_holds_one_bit_a_neuron() -> None:
    routes = built({"a": torch.ones(500, 16, dtype=torch.bool), "b": torch.ones(500, 9, dtype=torch.bool)})
    assert sum(packed.untyped_storage().nbytes() for packed in routes.packed.values()) == 2000
    assert routes.labels is routes.predictions is routes.kept_scores is None


def test_from_masks_takes_small_integer_labels_and_half_scores() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    scores = {"a": torch.zeros(2, 3, dtype=torch.bfloat16)}
    routes = built({"a": mask}, labels=torch.tensor([1, 2], dtype=torch.uint8), scores=scores)
    assert routes.labels is not None
    assert routes.labels.dtype == torch.int64
    assert routes.scores["a"].dtype == torch.bfloat16


BATCH = {"a": torch.ones(2, 3, dtype=torch.bool), "b": torch.ones(2, 4, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("masks", "notes", "message"),
    [
        ({**BATCH, "b": BATCH["b"][:1]}, {}, r"layer 'b' must have shape \(2, 1\), not \(1, 1\)"),
        ({**BATCH, "b": BATCH["b"].float()}, {}, "layer 'b' must be bool"),
        ({**BATCH, "b": BATCH["b"][0]}, {}, "layer 'b' must be bool"),
        ({}, {}, "at least one layer"),
        ({"a": BATCH["a"][:0]}, {}, "at least one sample"),
        (BATCH, {"predictions": torch.zeros(2)}, "predictions must be integers"),
    ],
    ids=itertools.count(),
)
def test_from_masks_refuses(masks: dict[str, torch.Tensor], notes: dict[str, Any], message: str) -> None:
    samples = len(next(iter(masks.values()), [0, 0]))
    with pytest.raises(UserError, match=message):
        InstanceRoutes.from_masks(masks, Provenance(samples, 0.5), **notes)


@settings(deadline=None)
@given(mask=MASKS, share=st.floats(0.01, 1))
def test_frequency_and_occurrence_against_a_naive_count(mask: np.ndarray, share: float) -> None:
    routes = built({"conv": torch.from_numpy(mask)})
    naive = [sum(bool(value) for value in column) / len(mask) for column in mask.T]
    frequency = routes.frequency()["conv"]
    assert frequency.dtype == torch.float64
    assert frequency.tolist() == naive
    most = sorted(naive, reverse=True)[: max(1, round(share * len(naive)))]
    assert routes.occurrence(share)["conv"] == pytest.approx(sum(most) / len(most), rel=1e-12)


def test_hand_worked_aggregate_with_ties() -> None:
    mask = torch.tensor(
        [[1, 0, 0, 1, 0, 1], [0, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 1, 0]], dtype=torch.bool
    )  # counts 2 2 0 4 2 2
    routes = built({"conv": mask})
    assert routes.aggregate(width=0.5)["conv"].tolist() == [0, 1, 3]
    assert routes.aggregate(width=0.01)["conv"].tolist() == [3]
    assert routes.occurrence(0.5)["conv"] == pytest.approx((4 + 2 + 2) / 12)


def test_aggregate_remembers_where_it_comes_from() -> None:
    origin = Provenance(samples=99, width=0.9, model="vgg16", data="cifar10", attack="pgd", seed=3)
    routes = instances(samples=12, width=0.4, provenance=origin)
    assert routes.provenance == replace(origin, samples=12, width=0.4)
    route = routes.aggregate(0.3)
    assert route.provenance == replace(origin, samples=12, width=0.3, instance_width=0.4)
    assert route.frequency is not None
    assert route.frequency["features.8"].tolist() == routes.frequency()["features.8"].tolist()


def test_by_label_is_the_aggregate_of_each_labels_samples() -> None:
    routes = instances(samples=13, provenance=Provenance(samples=13, width=0.4, data="digits"))
    by_label = routes.by_label(width=0.3)
    assert list(by_label) == [0, 1, 2]
    for label, route in by_label.items():
        rows = [row for row in range(13) if row % 3 == label]
        assert route == routes.select(rows).aggregate(0.3)
        assert route.provenance is not None
        assert (route.provenance.samples, route.provenance.data) == (len(rows), f"digits, label {label}")

    with pytest.raises(UserError, match="no labels"):
        instances(labelled=False).by_label()


@pytest.mark.parametrize("width", [0, 1.5, float("nan")])
def test_bad_widths_are_refused(width: float) -> None:
    routes = instances()
    for call in (routes.aggregate, routes.by_label, routes.occurrence):
        with pytest.raises(UserError, match=r"outside \(0, 1\]"):
            call(width)
    with pytest.raises(UserError, match=r"outside \(0, 1\]"):
        built({"conv": torch.ones(1, 3, dtype=torch.bool)}, width)


@pytest.mark.parametrize(
    "index",
    [
        slice(None),
        slice(2, 9, 3),
        slice(None, None, -1),
        slice(-3, None),
        [0, -1, 4, 4],
        torch.tensor([3, 1, -12]),
        np.array([5, 2]),
        torch.arange(12) % 5 == 1,
        torch.tensor([1, 2], dtype=torch.uint8),
    ],
    ids=str,
)
def test_select_is_numpy_indexing(index: object) -> None:
    routes = instances(samples=12, keep_scores=True)
    part = routes.select(index)
    plain = index.numpy() if isinstance(index, torch.Tensor) else index
    for layer in routes.layers:
        assert np.array_equal(part.masks[layer].numpy(), routes.masks[layer].numpy()[plain])
        assert np.array_equal(part.scores[layer].numpy(), routes.scores[layer].numpy()[plain])
    assert routes.labels is not None
    assert part.labels is not None
    assert part.labels.tolist() == routes.labels.numpy()[plain].tolist()
    assert len(part) == part.provenance.samples == len(part.labels)
    assert part.methods == routes.methods


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (slice(5, 5), "selects none"),
        ([], "does not fit 12 samples"),
        (torch.zeros(12, dtype=torch.bool), "selects none"),
        ([0, 12], "does not fit 12 samples: index 12 is out of bounds"),
        ([-13], "index -13 is out of bounds"),
        (torch.ones(11, dtype=torch.bool), "does not fit 12 samples: boolean index did not match"),
        ([0.0, 1.0], "must be of integer"),
        (torch.zeros(2, 2, dtype=torch.int64), "list of integers"),
        (torch.tensor(3), "list of integers"),
    ],
    ids=str,
)
def test_select_refuses(index: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        instances(samples=12).select(index)


@settings(deadline=None, max_examples=40)
@given(samples=st.integers(1, 20), cuts=st.lists(st.integers(0, 20), max_size=3), scored=st.booleans())
def test_cutting_and_concatenating_is_the_identity(samples: int, cuts: list[int], scored: bool) -> None:
    routes = instances(samples=samples, keep_scores=scored)
    edges = sorted({0, samples, *(cut for cut in cuts if cut < samples)})
    parts = [routes.select(slice(start, stop)) for start, stop in pairwise(edges)]
    whole = InstanceRoutes.concatenate(parts)
    assert whole == routes
    assert whole.provenance == routes.provenance
    assert whole.methods == routes.methods
    if scored:
        assert all(torch.equal(whole.scores[layer], routes.scores[layer]) for layer in routes.layers)
    else:
        assert whole.kept_scores is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"channels": {**CHANNELS, "features.3": 9}},
            "layer 'features.3' .8 channels. stands where part 2 has layer 'features.3' .9",
        ),
        ({"channels": dict(list(CHANNELS.items())[:3])}, "layer 'features.8' .* stands where part 2 has nothing"),
        ({"channels": {**CHANNELS, "fc": 4}}, "nothing stands where part 2 has layer 'fc'"),
        (
            {"channels": dict(reversed(CHANNELS.items()))},
            "layer 'features.0' .* stands where part 2 has layer 'features.8'",
        ),
        ({"width": 0.5}, r"part 2 has width 0\.5 .*'features\.0'.* 0\.4"),
        ({"labelled": False}, "part 2 has no labels"),
    ],
    ids=str,
)
def test_concatenate_names_what_differs(other: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        InstanceRoutes.concatenate([instances(), instances(**other)])


def test_concatenate_refuses_scores_in_some_parts_and_nothing_at_all() -> None:
    with pytest.raises(UserError, match="part 1 has no scores"):
        InstanceRoutes.concatenate([instances(), instances(keep_scores=True)])
    with pytest.raises(UserError, match="nothing to concatenate"):
        InstanceRoutes.concatenate([])


def test_concatenate_keeps_what_the_parts_agree_on() -> None:
    left = instances(samples=3, provenance=Provenance(samples=3, width=0.4, model="m", data="a", seed=1))
    right = instances(samples=4, provenance=Provenance(samples=4, width=0.4, model="m", data="b", seed=1))
    edge = ("features.0", "features.3")
    right = replace(right, methods={**right.methods, edge: "autograd"})
    whole = InstanceRoutes.concatenate([left, right])
    assert whole.provenance == Provenance(samples=7, width=0.4, model="m", data=None, seed=1)
    assert whole.methods[edge] == "closed-form + autograd"
    assert whole.methods[("features.3", "classifier#2")] == "closed-form"


def test_equality_looks_at_routes_and_not_at_notes() -> None:
    routes = instances(keep_scores=True)
    assert routes == instances() == copy.deepcopy(routes) == pickle.loads(pickle.dumps(routes))
    assert routes == replace(routes, methods={}, provenance=replace(routes.provenance, model="other"))
    assert routes != instances(seed=1)
    assert routes != instances(labelled=False)
    assert routes != instances(samples=11)
    assert routes != replace(routes, provenance=replace(routes.provenance, width=0.39))
    assert routes != replace(routes, labels=routes.predictions)
    assert routes != "routes"
    with pytest.raises(TypeError, match="unhashable"):
        hash(routes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": {"a": torch.zeros(2, 2, dtype=torch.uint8)}}, r"'a' must have shape \(2, 1\), not \(2, 2\)"),
        ({"packed": {"a": torch.zeros(3, 1, dtype=torch.uint8)}}, r"'a' must have shape \(2, 1\), not \(3, 1\)"),
        ({"packed": {"a": torch.zeros(2, 1)}}, "'a' must be uint8"),
        ({"packed": {"a": torch.full((2, 1), 8, dtype=torch.uint8)}}, "beyond the last of its 3 channels"),
        ({"packed": {}}, "no masks for layer 'a'"),
        ({"packed": {"a": torch.zeros(2, 1, dtype=torch.uint8), "b": torch.zeros(2, 1)}}, "no channel count"),
        ({"channels": {"a": 0}}, "'a' must have a positive number"),
        ({"channels": {"a": True}}, "'a' must have a positive number"),
        ({"channels": {}}, "at least one layer"),
        ({"provenance": Provenance(samples=0, width=0.5)}, "at least one sample"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels must have shape"),
        ({"predictions": torch.zeros(2)}, "predictions must be int64"),
        ({"methods": {("a", "b"): "closed-form"}}, "layer 'b'"),
        ({"kept_scores": {}}, "no scores for layer 'a'"),
        ({"kept_scores": {"a": torch.zeros(2, 4)}}, "scores of layer 'a' must have shape"),
        ({"kept_scores": {"a": torch.zeros(2, 3, dtype=torch.int64)}}, "floating point"),
    ],
    ids=str,
)
def test_mismatching_parts_are_refused(change: dict[str, object], message: str) -> None:
    good = {
        "packed": {"a": torch.zeros(2, 1, dtype=torch.uint8)},
        "channels": {"a": 3},
        "provenance": Provenance(samples=2, width=0.5),
    }
    InstanceRoutes(**good)
    with pytest.raises(UserError, match=message):
        InstanceRoutes(**{**good, **change})
