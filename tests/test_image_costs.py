"""What an image costs beside its trace: what is counted, and by how many images it is divided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from attackroute.benchmark import image_costs, timing
from attackroute.benchmark.cases import Case
from attackroute.benchmark.image_costs import (
    EXCHANGING,
    FILE_SAMPLES,
    FORWARD,
    IN_FILE,
    JPEG,
    LOADING,
    PACKING,
    PARTS,
    READING,
    SENT,
    SIZES,
    TRACE,
    UNPACKING,
    WRITING,
    ImageCosts,
    measure_costs,
)
from attackroute.benchmark.timing import Runs
from attackroute.core.distributed import Processes
from attackroute.routes import folder

SMALL = Case("small", "vgg_small", 32, 2, 3, 1.0)


def measured(case: Case = SMALL, repeats: int = 1) -> ImageCosts:
    found = measure_costs(Processes(), case, 3, 2, repeats=repeats, seed=0)
    assert found is not None
    return found


def test_bytes_are_those_of_the_masks_and_little_more() -> None:
    found = measured()
    masks = found.channels / 8  # of layers with multiples of 8 channels
    assert masks + 16 <= found.sizes[IN_FILE] < masks + 16 + 2  # label and prediction; the header is that of a file
    assert masks + 16 < found.sizes[SENT] < 4096  # the header is that of a batch
    assert set(found.sizes) == {IN_FILE, SENT}
    assert set(found.seconds) == {*PARTS} - {READING}


def test_files_are_those_of_a_trace() -> None:
    assert FILE_SAMPLES == folder._SHARD_SAMPLES


def test_each_part_is_divided_by_the_images_that_it_was_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def a_second(measurements: Mapping[str, Any], repeats: int) -> dict[str, Runs]:
        for measure in measurements.values():
            measure()
        return {name: Runs(({"all": 1.0},) * repeats) for name in measurements}

    monkeypatch.setattr(timing, "interleaved", a_second)
    found = measured(repeats=2)
    whole = -(-FILE_SAMPLES // 3) * 3
    expected = dict.fromkeys((FORWARD, TRACE, PACKING, UNPACKING, EXCHANGING), 1 / 6)
    assert found.seconds == {name: (value,) * 2 for name, value in expected.items()} | {
        WRITING: (1 / whole,) * 2,
        LOADING: (1 / whole,) * 2,
    }


def test_large_images_are_read_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_costs, "FILE_SAMPLES", 6)
    found = measured(replace(SMALL, image_size=224))
    assert set(found.seconds) == {*PARTS} and set(found.sizes) == {*SIZES}
    assert found.of(READING).median > 0  # type: ignore[union-attr]
    assert 20_000 < found.sizes[JPEG] < 100_000


def test_the_others_send_and_receive_as_often_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is not the first one takes part in all exchanges, and in nothing else."""
    sent = []

    class Team(Processes):
        def all(self, value: Any) -> list[Any]:
            sent.append(value)
            return [value] * self.count

    assert measure_costs(Team(rank=1, count=2), SMALL, 3, 2, repeats=2, seed=0) is None
    others = len(sent)
    found = measure_costs(Team(rank=0, count=2), SMALL, 3, 2, repeats=2, seed=0)
    assert len(sent) == 2 * others == 12  # two batches; one of three times is for warming up
    assert found is not None and torch.tensor(found.seconds[EXCHANGING]).isfinite().all()
