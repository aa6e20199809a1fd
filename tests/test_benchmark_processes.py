"""What an image costs beside its trace: what is counted, and by how many images it is divided."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from attackroute.core.distributed import Processes
from attackroute.routes import folder
from benchmarks import processes
from benchmarks.cases import Case, workload
from benchmarks.processes import (
    EXCHANGING,
    FILE_SAMPLES,
    FORWARD,
    IN_FILE,
    JPEG,
    LOADING,
    PACKING,
    READING,
    SENT,
    TRACE,
    UNPACKING,
    WRITING,
    measure_costs,
    throughput_measurements,
)
from benchmarks.timing import SECONDS, Measurement, Spread, Stopclock

SMALL = Case("small", "vgg_small", 1.0, image_size=32, classes=2, batch_size=3)
PARTS = {FORWARD, TRACE, PACKING, EXCHANGING, UNPACKING, WRITING, LOADING}


def measured(case: Case = SMALL, team: Processes | None = None, repeats: int = 1) -> dict[str, Measurement]:
    found = measure_costs(team or Processes(), case, workload(case, 3, 2), repeats=repeats, seed=0)
    return {each.quantity: each for each in found}


def test_bytes_are_those_of_the_masks_and_little_more() -> None:
    found = measured()
    masks = found["channels of route layers"].spread.median / 8  # of layers with multiples of 8 channels
    assert masks + 16 <= found[IN_FILE].spread.median < masks + 16 + 2  # label and prediction; the header is a file's
    assert masks + 16 < found[SENT].spread.median < 4096  # the header is that of a batch
    assert JPEG not in found
    assert {name for name, each in found.items() if each.unit == SECONDS} == PARTS


def test_files_are_those_of_a_trace() -> None:
    assert FILE_SAMPLES == folder._SHARD_SAMPLES


def test_each_part_is_divided_by_the_images_that_it_was_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Stopclock(clock=count().__next__)
    monkeypatch.setattr(processes, "Stopclock", lambda _: ticks)
    found = measured(repeats=2)
    whole = -(-FILE_SAMPLES // 3) * 3
    expected = dict.fromkeys(PARTS, 1 / 6) | dict.fromkeys((WRITING, LOADING), 1 / whole)
    assert {name: found[name].spread.values for name in PARTS} == {name: (it, it) for name, it in expected.items()}


def test_large_images_are_read_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "FILE_SAMPLES", 6)
    found = measured(replace(SMALL, image_size=224))
    assert found[READING].spread.median > 0
    assert 20_000 < found[JPEG].spread.median < 100_000


def test_the_others_send_and_receive_as_often_as_the_first() -> None:
    """A process that is not the first one takes part in all exchanges, and in nothing else."""
    sent = []

    class Team(Processes):
        def all(self, value: Any) -> list[Any]:
            sent.append(value)
            return [value] * self.count

    assert not measured(team=Team(rank=1, count=2), repeats=2)
    others = len(sent)
    assert EXCHANGING in measured(team=Team(rank=0, count=2), repeats=2)
    assert len(sent) == 2 * others == 6  # one of three is for warming up


def test_the_gain_by_a_second_process() -> None:
    runs = {"alone": Spread((3.0, 4.0, 8.0)), "together": Spread((2.0, 2.0, 5.0))}
    gain, one, two = throughput_measurements(runs, 100)
    assert gain.spread.values == (1.5, 2, 1.6)
    assert (one.spread.median, two.spread.median) == (0.04, 0.02)
