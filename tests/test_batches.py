"""Order and sizes of batches."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

from attackroute.core.batches import drawn_over_classes, shuffled
from attackroute.core.random import derived_seed


@given(st.integers(1, 400), st.integers(1, 150), st.integers(0, 2**63 - 1), st.integers(1, 1000))
def test_an_epoch_holds_every_sample_once_in_even_batches(samples: int, size: int, seed: int, epoch: int) -> None:
    batches = shuffled(samples, size, seed, epoch)
    sizes = [len(batch) for batch in batches]
    assert sorted(index for batch in batches for index in batch) == list(range(samples))
    assert len(batches) == -(-samples // size)
    assert max(sizes) <= size
    assert max(sizes) - min(sizes) <= 1


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first = shuffled(100, 8, seed=1, epoch=1)
    torch.manual_seed(5)
    assert shuffled(100, 8, seed=1, epoch=1) == first
    assert shuffled(100, 8, seed=1, epoch=2) != first
    assert shuffled(100, 8, seed=2, epoch=1) != first


def test_derived_seeds_differ_and_fit_a_generator() -> None:
    seeds = {
        derived_seed(seed, purpose, epoch)
        for seed in range(20)
        for purpose in ("order", "augment", "model")
        for epoch in range(20)
    }
    assert len(seeds) == 20 * 3 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_samples_are_drawn_over_the_classes_by_the_seed_alone() -> None:
    labels = torch.arange(4).repeat_interleave(50)  # in the order of class folders
    data = Subset(TensorDataset(torch.zeros(250, 1), torch.cat([torch.full((50,), 9), labels])), range(50, 250))
    chosen = drawn_over_classes(data, 10, seed=3)
    assert chosen == sorted(set(chosen)) == drawn_over_classes(data, 10, seed=3) != drawn_over_classes(data, 10, seed=4)
    assert sorted(labels[chosen].bincount().tolist()) == [2, 2, 3, 3]
    assert drawn_over_classes(data, 500, seed=3) == list(range(200))
    unlabelled = drawn_over_classes(TensorDataset(torch.zeros(200)), 10, seed=3)
    assert len(set(unlabelled)) == 10
    assert max(unlabelled) > 50
