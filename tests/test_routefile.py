from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attackroute.core.errors import UserError
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route
from route_samples import CHANNELS, ORIGIN, instances

# -- round trips -------------------------------------------------------------------------------------------------------


def test_round_trip_of_a_route(tmp_path: Path) -> None:
    route = instances(provenance=ORIGIN).aggregate(0.3)
    route.save(str(tmp_path / "r.json"))
    loaded = Route.load(str(tmp_path / "r.json"))
    assert loaded == route
    assert loaded.layers == route.layers
    assert loaded.provenance == route.provenance
    assert loaded.frequency is not None
    assert route.frequency is not None
    for layer in route:
        assert torch.equal(loaded.frequency[layer], route.frequency[layer])


@settings(deadline=None, max_examples=30)
@given(
    samples=st.integers(1, 20),
    channels=st.dictionaries(st.text(min_size=1, max_size=6), st.integers(1, 20), min_size=1, max_size=4),
    width=st.floats(0.01, 1),
    keep_scores=st.booleans(),
)
def test_round_trip_of_any_routes(
    tmp_path_factory: pytest.TempPathFactory, samples: int, channels: dict[str, int], width: float, keep_scores: bool
) -> None:
    folder = tmp_path_factory.mktemp("routes")
    routes = instances(samples, channels, width=width, labelled=samples % 2 == 0, keep_scores=keep_scores)
    routes.save(folder / "i")
    loaded = InstanceRoutes.load(folder / "i")
    assert loaded == routes
    assert loaded.methods == routes.methods
    assert loaded.provenance == routes.provenance
    assert (loaded.kept_scores is None) is not keep_scores
    assert all(torch.equal(loaded.scores[layer], routes.scores[layer]) for layer in (channels if keep_scores else ()))
    routes.aggregate(width).save(folder / "r")
    assert Route.load(folder / "r") == loaded.aggregate(width)


def test_a_route_made_by_hand_has_nothing_else_to_lose(tmp_path: Path) -> None:
    route = Route({"conv": [], "fc": [1]}, {"conv": 3, "fc": 2})
    route.save(tmp_path / "r")
    loaded = Route.load(tmp_path / "r")
    assert loaded == route
    assert loaded.provenance is None
    assert loaded.frequency is None


def test_labels_and_predictions_may_share_memory_and_scores_any_precision(tmp_path: Path) -> None:
    routes = instances(keep_scores=True)
    assert routes.labels is not None
    shared = InstanceRoutes(
        routes.packed,
        routes.channels,
        routes.provenance,
        routes.labels,
        routes.labels,
        kept_scores={layer: values.bfloat16() for layer, values in routes.scores.items()},
    )
    shared.save(tmp_path / "i")
    loaded = InstanceRoutes.load(tmp_path / "i")
    assert loaded == shared
    assert loaded.scores["features.0"].dtype == torch.bfloat16
    assert torch.equal(loaded.scores["features.0"], shared.scores["features.0"])


def test_a_route_file_is_readable(tmp_path: Path) -> None:
    instances(provenance=ORIGIN).aggregate(0.3).save(tmp_path / "r")
    document = json.loads((tmp_path / "r").read_text())
    assert (document["format"], document["version"]) == ("attackroute route", 1)
    assert document["fingerprint"] == CHANNELS
    assert document["provenance"]["attack"] == "PGD (ε = 8/255)"


def test_instance_routes_are_one_bit_a_neuron(tmp_path: Path) -> None:
    instances(samples=4096, channels={"conv": 512}, labelled=False).save(tmp_path / "i")
    assert (tmp_path / "i").stat().st_size < 4096 * 512 / 8 + 2000


# -- writing -----------------------------------------------------------------------------------------------------------


def test_saving_replaces_and_leaves_nothing_else_behind(saved: tuple[Any, Any, Path]) -> None:
    kind, value, path = saved
    path.write_text("something older")
    value.save(path)
    assert kind.load(path) == value
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_saved_files_obey_the_umask(saved: tuple[Any, Any, Path]) -> None:
    _, value, path = saved
    previous = os.umask(0o027)
    try:
        value.save(path)
    finally:
        os.umask(previous)
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(
    saved: tuple[Any, Any, Path], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, value, path = saved
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(UserError, match="cannot be written: No space left on device") as caught:
        value.save(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_data_are_on_disk_before_the_name_is(saved: tuple[Any, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, value, path = saved
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: steps.append("fsync") or fsync(descriptor))
    monkeypatch.setattr(os, "replace", lambda old, new: steps.append("replace") or replace(old, new))
    value.save(path)
    assert steps == ["fsync", "replace"]


@pytest.mark.parametrize("place", ["missing/r", "file/r", ".", "nul\0byte", "x" * 300])
def test_places_that_cannot_be_written(saved: tuple[Any, Any, Path], place: str, tmp_path: Path) -> None:
    _, value, path = saved
    (tmp_path / "file").write_text("a file, not a folder")
    present = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot be written") as caught:
        value.save(tmp_path / place)
    assert "\n" not in str(caught.value)
    assert str(caught.value).isprintable()
    assert sorted(tmp_path.iterdir()) == present
    assert path.exists()
