"""The naive way that the benchmark times in part: that it gives the same scores, and the arithmetic of its parts."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from torch import nn

from attackroute.tracing import oracle
from attackroute.zoo.networks import ChainNet
from attackroute.zoo.spec import CIFAR
from benchmarks import naive
from benchmarks.cases import Case, Plan, adapt_batch_norms
from benchmarks.naive import measure_naive, naive_measurements, sampled
from benchmarks.timing import Spread, Stopclock

TINY = Case("tiny", "vgg_small", 1.25, image_size=32, classes=10, batch_size=3)


def tiny_chain() -> ChainNet:
    """Three convolutions with pooling that overlaps, batch norms with gains of both signs, in-place ReLU."""
    features = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 7, 2, stride=2), nn.BatchNorm2d(7), nn.ReLU(inplace=True),
    )  # fmt: skip
    model = ChainNet(CIFAR, features, nn.AdaptiveAvgPool2d(1), nn.Linear(7, 4))
    adapt_batch_norms(model, torch.rand(8, 3, 9, 9))
    for norm in features[1::3]:
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data[::2] *= -1
    return model.double().eval()


@pytest.mark.parametrize("way", [naive.by_autograd, naive.by_jacrev])
def test_the_naive_ways_give_the_scores_of_the_oracle(way, monkeypatch):
    monkeypatch.setattr(naive, "_ROWS", 5)  # so that there are several chunks, the last one smaller
    torch.manual_seed(0)
    model, image = tiny_chain(), torch.rand(1, 3, 9, 9).double()
    truth = oracle.trace(model, image, width=0.4)
    segments = naive.chain_segments(model, image)
    assert [(segment.source, segment.target) for segment in segments] == list(truth.edges)
    for segment in segments:
        elements = segment.elements(truth.masks[segment.target][0])
        assert len(elements) == truth.masks[segment.target].sum() * segment.end[0, 0].numel()
        score = way(segment, elements)
        assert score.abs().max() > 0
        torch.testing.assert_close(score, truth.scores[segment.source][0], rtol=1e-9, atol=0)
        # Parts of the elements give parts of the score, which is what makes extrapolation meaningful.
        shuffled = elements[torch.randperm(len(elements))]
        torch.testing.assert_close(way(segment, shuffled[:2]) + way(segment, shuffled[2:]), score)


def test_chunks_of_a_jacobian_are_bounded():
    def segment(*shape: int) -> naive.Segment:
        return naive.Segment("a", "b", nn.Identity(), torch.empty(1, *shape, device="meta"), torch.empty(0))

    assert naive.chunk_rows(segment(64, 32, 32)) == 64
    assert naive.chunk_rows(segment(512, 2, 2)) == 256
    assert naive.chunk_rows(segment(64, 512, 512)) == 1


def test_parts_are_extrapolated_in_proportion():
    torch.manual_seed(0)
    model, image = tiny_chain(), torch.rand(1, 3, 9, 9).double()
    segments = naive.chain_segments(model, image)
    wanted = {segments[0].target: torch.arange(100, 140), segments[1].target: torch.arange(9)}
    pace = {segments[0].target: 0.5, segments[1].target: 3.0}
    now, drawn = [0.0], []

    def way(segment: naive.Segment, elements: torch.Tensor) -> torch.Tensor:
        drawn.append(elements.tolist())
        now[0] += pace[segment.target] * len(elements)
        return torch.zeros(())

    measure = sampled(segments, wanted, [4, 9], way, Stopclock(clock=lambda: now[0]))
    assert measure() == 0.5 * 40 + 3.0 * 9
    warm, chosen, _, everything = drawn
    assert warm == chosen[:1]
    assert len(set(chosen)) == 4 and set(chosen) <= set(range(100, 140))
    assert sorted(everything) == list(range(9))
    measure()
    assert drawn[5] != chosen


def test_arithmetic_of_the_naive_way() -> None:
    runs = {"trace": Spread((0.01, 0.02)), "autograd": Spread((20.0, 60.0)), "jacrev": Spread((10.0, 10.0))}
    found = {each.quantity: each for each in naive_measurements(runs, {"autograd": 8, "jacrev": 114}, 1100)}
    assert found["autograd / trace"].spread.values == pytest.approx((2000, 3000))
    assert found["jacrev / trace"].spread.values == pytest.approx((1000, 500))
    assert found["jacrev, one image, extrapolated from 114 of 1,100 products"].spread == runs["jacrev"]
    paper = found["trace, 10,000 images, extrapolated"]
    assert paper.spread.values == (100.0, 200.0) and "7.4 hours" in paper.bound


def test_products_are_those_of_critical_neurons_and_times_those_of_one_image(monkeypatch) -> None:
    monkeypatch.setattr(naive, "SPEED_CASES", (TINY,))
    every_job_takes_a_second = Stopclock(clock=count().__next__)
    monkeypatch.setattr(Stopclock, "of", lambda device: every_job_takes_a_second)
    found = {each.quantity: each.spread.values for each in measure_naive(Plan(repeats=1, quick=True))}
    # vgg_small at 32x32: the neurons kept (of 16, 32, 32, 64, 64 channels) times the positions.
    products = [3 * 1024, 6 * 256, 6 * 256, 13 * 64, 13 * 64]
    assert found["trace, one image"] == (1 / 6,)  # two batches of three
    of = f"of {sum(products):,} products"
    assert found[f"autograd, one image, extrapolated from {4 * 5} {of}"] == (sum(products) / 4,)
    assert found[f"jacrev, one image, extrapolated from {256 * 5:,} {of}"] == (sum(products) / 256,)
