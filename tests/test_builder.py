from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attackroute.core.errors import UserError
from attackroute.routes.instance_routes import InstanceRoutesBuilder
from attackroute.routes.masks import kept, top_k
from route_samples import CHANNELS


@settings(deadline=None, max_examples=30)
@given(samples=st.integers(1, 25), batch=st.integers(1, 9), width=st.floats(0.05, 1))
def test_batch_size_does_not_matter(samples: int, batch: int, width: float) -> None:
    generator = torch.Generator().manual_seed(samples)
    scores = {layer: torch.rand(samples, count, generator=generator) for layer, count in CHANNELS.items()}
    masks = {layer: top_k(values, width) for layer, values in scores.items()}
    labels = torch.arange(samples)
    builder = InstanceRoutesBuilder(list(CHANNELS), CHANNELS, width, keep_scores=True)
    for start in range(0, samples, batch):
        rows = slice(start, start + batch)
        builder.add(
            {layer: mask[rows] for layer, mask in masks.items()},
            labels[rows],
            labels[rows] + 1,
            {layer: values[rows] for layer, values in scores.items()},
        )
    routes = builder.build(methods={})
    assert len(builder) == len(routes) == samples
    for layer, count in CHANNELS.items():
        assert torch.equal(routes.masks[layer], masks[layer])
        assert torch.equal(routes.scores[layer], scores[layer])
        assert routes.masks[layer].sum(dim=1).tolist() == [kept(width, count)] * samples
    assert routes.labels is not None
    assert routes.predictions is not None
    assert routes.labels.tolist() == list(range(samples))
    assert routes.predictions.tolist() == list(range(1, samples + 1))


def test_builder_holds_one_bit_a_neuron() -> None:
    builder = InstanceRoutesBuilder(["a", "b"], {"a": 16, "b": 9}, 0.2)
    for _ in range(50):
        masks = {"a": torch.ones(10, 16, dtype=torch.bool), "b": torch.ones(10, 9, dtype=torch.bool)}
        builder.add(masks, None, None, {"a": torch.rand(10, 16), "b": torch.rand(10, 9)})
    assert {layer: len(buffer) for layer, buffer in builder._packed.items()} == {"a": 500 * 2, "b": 500 * 2}
    assert not any(builder._scores.values())
    routes = builder.build(methods={})
    assert sum(packed.untyped_storage().nbytes() for packed in routes.packed.values()) == 2000
    assert routes.labels is None
    assert routes.predictions is None


def test_builder_does_not_alias_what_it_was_given() -> None:
    builder = InstanceRoutesBuilder(["a"], {"a": 3}, 0.5, keep_scores=True)
    mask, labels, scores = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3)
    builder.add({"a": mask}, labels, labels, {"a": scores})
    mask.fill_(False)
    labels.fill_(1)
    scores.fill_(1)
    first = builder.build(methods={})
    assert first.masks["a"].all()
    assert first.scores["a"].sum() == 0
    assert first.labels is not None
    assert first.labels.sum() == 0
    builder.add({"a": mask}, labels, labels, {"a": scores})
    second = builder.build(methods={})
    assert len(first) == 2
    assert first == second.select(slice(0, 2))
    assert second.masks["a"].tolist() == [[True] * 3] * 2 + [[False] * 3] * 2


def test_builder_takes_small_integer_labels_and_half_scores() -> None:
    builder = InstanceRoutesBuilder(["a"], {"a": 3}, 0.5, keep_scores=True)
    mask = {"a": torch.ones(2, 3, dtype=torch.bool)}
    builder.add(mask, torch.tensor([1, 2], dtype=torch.uint8), None, {"a": torch.zeros(2, 3, dtype=torch.bfloat16)})
    routes = builder.build(methods={})
    assert routes.labels is not None
    assert routes.labels.dtype == torch.int64
    assert routes.scores["a"].dtype == torch.bfloat16


BATCH = {"a": torch.ones(2, 3, dtype=torch.bool), "b": torch.ones(2, 4, dtype=torch.bool)}
SCORES = {"a": torch.rand(2, 3), "b": torch.rand(2, 4)}
ONE = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a": BATCH["a"]}, ONE, ONE, SCORES), "no masks for layer 'b'"),
        (({"b": BATCH["b"]}, ONE, ONE, SCORES), "no masks for layer 'a'"),
        (({**BATCH, "c": BATCH["a"]}, ONE, ONE, SCORES), "layer 'c'"),
        (({**BATCH, "b": BATCH["a"]}, ONE, ONE, SCORES), r"layer 'b' must have shape \(2, 4\), not \(2, 3\)"),
        (({**BATCH, "b": BATCH["b"][:1]}, ONE, ONE, SCORES), "layer 'b' must have shape"),
        (({**BATCH, "b": BATCH["b"].float()}, ONE, ONE, SCORES), "layer 'b' must be bool"),
        ((BATCH, None, ONE, SCORES), "labels must come with every batch"),
        ((BATCH, ONE, None, SCORES), "predictions must come with every batch"),
        ((BATCH, ONE[:1], ONE, SCORES), "labels must be 2 integers"),
        ((BATCH, ONE, ONE.float(), SCORES), "predictions must be 2 integers"),
        ((BATCH, ONE, ONE), "needs the scores"),
        ((BATCH, ONE, ONE, {"a": SCORES["a"]}), "no scores for layer 'b'"),
        ((BATCH, ONE, ONE, {**SCORES, "b": SCORES["a"]}), "scores of layer 'b' must have shape"),
    ],
    ids=itertools.count(),
)
def test_a_refused_batch_changes_nothing(arguments: tuple[object, ...], message: str) -> None:
    builder = InstanceRoutesBuilder(["a", "b"], {"a": 3, "b": 4}, 0.5, keep_scores=True)
    builder.add(BATCH, ONE, ONE, SCORES)
    before = builder.build(methods={})
    with pytest.raises(UserError, match=message):
        builder.add(*arguments)
    assert len(builder) == 2
    after = builder.build(methods={})
    assert before == after
    assert torch.equal(before.scores["b"], after.scores["b"])


def test_builder_refuses_labels_after_a_batch_without() -> None:
    builder = InstanceRoutesBuilder(["a", "b"], {"a": 3, "b": 4}, 0.5)
    builder.add(BATCH, None, None)
    with pytest.raises(UserError, match="labels must come with every batch"):
        builder.add(BATCH, ONE, None)


def test_builder_without_samples_or_with_unknown_edges() -> None:
    builder = InstanceRoutesBuilder(["a", "b"], {"a": 3, "b": 4}, 0.5)
    with pytest.raises(UserError, match="no samples"):
        builder.build(methods={})
    builder.add(BATCH, ONE, ONE)
    with pytest.raises(UserError, match="'c'"):
        builder.build(methods={("a", "c"): "closed-form"})
    with pytest.raises(UserError, match="layer 'b'"):
        InstanceRoutesBuilder(["a", "b"], {"a": 3}, 0.5)
    with pytest.raises(UserError, match="at least one layer"):
        InstanceRoutesBuilder([], {}, 0.5)
