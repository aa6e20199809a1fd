from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from attackroute.core.errors import UserError
from attackroute.core.files import INSTANCE_ROUTES_KIND, ROUTE_KIND, write_sealed_json, write_tensors
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.provenance import Provenance
from attackroute.routes.route import Route
from route_samples import CHANNELS, instances, refused


def test_missing_files_and_folders(saved: tuple[Any, Any, Path], tmp_path: Path) -> None:
    kind, _, path = saved
    refused(kind, tmp_path / "nothing", "No such file")
    refused(kind, tmp_path, "cannot be read")
    refused(kind, path / "below", "cannot be read")
    os.mkfifo(tmp_path / "pipe")
    for endless in (tmp_path / "pipe", "/dev/zero"):
        refused(kind, endless, "it is a pipe or a device, not a file")


def test_truncation_at_any_length_and_trailing_bytes(saved: tuple[Any, Any, Path]) -> None:
    kind, _, path = saved
    data = path.read_bytes()
    lengths = {0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 20, len(data) - 2, *range(0, len(data) - 1, 97)}
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        refused(kind, path)
    path.write_bytes(data + b"}")
    refused(kind, path)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_pass_for_another_route(saved: tuple[Any, Any, Path], data: st.DataObject) -> None:
    kind, value, path = saved
    original = path.with_suffix(".original")
    if not original.exists():
        original.write_bytes(path.read_bytes())
    content = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        loaded = kind.load(path)
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
    else:  # white space, for example
        assert loaded == value
        assert loaded.provenance == value.provenance


def test_a_flipped_bit_of_a_mask_is_found(tmp_path: Path) -> None:
    path = tmp_path / "i"
    routes = instances()
    routes.save(path)
    content = bytearray(path.read_bytes())
    for position in range(len(content) - 12 * 8 * 2 - 12 * 6, len(content)):  # the tensors lie at the end
        content[position] ^= 1
        path.write_bytes(content)
        refused(InstanceRoutes, path, "do not match the checksum")
        content[position] ^= 1


def test_the_other_format(tmp_path: Path) -> None:
    instances().save(tmp_path / "i.safetensors")
    instances().aggregate().save(tmp_path / "r.json")
    refused(Route, tmp_path / "i.safetensors", "not an attackroute route file")
    refused(InstanceRoutes, tmp_path / "r.json", "not an attackroute instance routes file")


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for text in ("", "[]", "{}", "null", "1", '"x"', '{"format": 3}', "[" * 100_000, '{"format": NaN}', "\ufeff{}"):
        path.write_text(text, encoding="utf-8")
        refused(Route, path, "not an attackroute route file")
        refused(InstanceRoutes, path, "not an attackroute instance routes file")
    path.write_bytes(b"\xff\xfe\x00\xd8")
    refused(Route, path, "not an attackroute route file")
    torch.save({"conv": torch.zeros(3)}, path)
    refused(Route, path, "not an attackroute route file")
    refused(InstanceRoutes, path, "not an attackroute instance routes file")
    for metadata in (None, {"format": "pt"}):
        save_file({"conv.weight": torch.zeros(3)}, path, metadata=metadata)
        refused(InstanceRoutes, path, "a safetensors file, but not an attackroute")
    for header in ("", "{", "[1]", "{}", "[" * 100_000):
        save_file({"conv.weight": torch.zeros(3)}, path, metadata={"attackroute": header})
        refused(InstanceRoutes, path)


def test_other_versions_and_formats(saved: tuple[Any, Any, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, value, path = saved
    monkeypatch.setattr("attackroute.core.files.VERSION", 2)
    value.save(path)
    monkeypatch.undo()
    refused(kind, path, "has file version 2, this attackroute reads 1")
    if kind is Route:
        write_sealed_json(path, "something else", BODY)
    else:
        write_tensors(path, "something else", HEADER, MASKS)
    refused(kind, path, "holds 'something else', not 'attackroute")


@pytest.mark.parametrize("version", [True, 1.0, "1", None, [1]])
def test_a_version_is_an_integer(version: object, tmp_path: Path) -> None:
    document = {"format": ROUTE_KIND, "version": version}
    (tmp_path / "r").write_text(json.dumps(document))
    refused(Route, tmp_path / "r", "file version")


BODY = {
    "provenance": None,
    "fingerprint": {"conv": 3, "fc": 2},
    "route": {"conv": [0, 2], "fc": []},
    "frequency": {"conv": [1.0, 0, 0.5], "fc": [0.0, 0.0]},
}
GOOD = Provenance(samples=2, width=0.5).to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"route": {"conv": [0, 3], "fc": []}}, "layer 'conv': channel 3 is out of range"),
        ({"route": {"conv": [[0]], "fc": []}}, "list of integers"),
        ({"route": {"conv": {"0": 1}, "fc": []}}, "list of integers"),
        ({"route": {"conv": [10**30], "fc": []}}, "out of range"),
        ({"route": [[0], []]}, "'route' must be a JSON object"),
        ({"route": None}, "'route' must be a JSON object"),
        ({"fingerprint": {"conv": "3", "fc": 2}}, "layer 'conv' must have a positive number of channels"),
        ({"fingerprint": ["conv", "fc"]}, "'fingerprint' must be a JSON object"),
        ({"frequency": {"conv": [1, 0, 2], "fc": [0, 0]}}, "outside"),
        ({"frequency": {"conv": [1, 0, True], "fc": [0, 0]}}, "list of numbers"),
        ({"frequency": {"conv": [1, 0, None], "fc": [0, 0]}}, "list of numbers"),
        ({"frequency": {"conv": "100", "fc": [0, 0]}}, "list of numbers"),
        ({"frequency": {"conv": [10**400, 0, 0], "fc": [0, 0]}}, "cannot be read"),
        ({"frequency": [1, 0, 0]}, "'frequency' must be a JSON object"),
        ({"provenance": {}}, "provenance"),
        ({"provenance": "influence"}, "provenance"),
        ({"provenance": {**GOOD, "author": "me"}}, "provenance"),
        ({"provenance": {**GOOD, "samples": "2"}}, "samples must be a count"),
        ({"provenance": {**GOOD, "width": 2}}, r"outside \(0, 1\]"),
        ({"provenance": {**GOOD, "seed": [1]}}, "seed must be an integer"),
        ({"provenance": {**GOOD, "model": 5}}, "model must be a string"),
    ],
    ids=str,
)
def test_wrong_contents_under_a_right_checksum(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "r"
    write_sealed_json(path, ROUTE_KIND, BODY)
    assert Route.load(path)["conv"].tolist() == [0, 2]
    write_sealed_json(path, ROUTE_KIND, {**BODY, **change})
    refused(Route, path, message)


def test_a_number_too_large_for_json(tmp_path: Path) -> None:
    path = tmp_path / "r"
    write_sealed_json(path, ROUTE_KIND, BODY)
    path.write_text(path.read_text().replace("1.0", "1e999"))
    refused(Route, path)
    path.write_text(path.read_text().replace("1e999", "9" * 5000))
    refused(Route, path)


MASKS = {"masks/conv": torch.tensor([[1], [2]], dtype=torch.uint8), "masks/fc": torch.ones(2, 2, dtype=torch.uint8)}
HEADER = {"provenance": GOOD, "fingerprint": {"conv": 3, "fc": 9}, "methods": [["conv", "fc", "closed-form"]]}


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        ({"fingerprint": {"conv": 9, "fc": 9}}, {}, r"layer 'conv' must have shape \(2, 2\), not \(2, 1\)"),
        ({"provenance": {**GOOD, "samples": 0}}, {}, "at least one sample"),
        ({"provenance": None}, {}, "provenance"),
        ({"methods": None}, {}, "'methods' must be a list"),
        ({"methods": [["conv", "fc"]]}, {}, "'methods' must be a list"),
        ({"methods": [["conv", "fc", 1]]}, {}, "all of them strings"),
        ({"methods": [["conv", ["fc"], "autograd"]]}, {}, "all of them strings"),
        ({}, {"masks/conv": torch.tensor(1, dtype=torch.uint8)}, "layer 'conv' must have shape"),
        ({}, {"labels": torch.zeros(2, dtype=torch.int32)}, "labels must be int64"),
        ({}, {"weights": torch.zeros(2)}, "no part of instance routes"),
    ],
    ids=str,
)
def test_wrong_tensors_under_a_right_checksum(
    header: dict[str, Any], tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "i"
    write_tensors(path, INSTANCE_ROUTES_KIND, HEADER, MASKS)
    assert InstanceRoutes.load(path).masks["conv"].tolist() == [[True, False, False], [False, True, False]]
    write_tensors(path, INSTANCE_ROUTES_KIND, {**HEADER, **header}, {**MASKS, **tensors})
    refused(InstanceRoutes, path, message)


def test_instance_routes_stay_when_their_file_goes(tmp_path: Path) -> None:
    path = tmp_path / "i"
    routes = instances()
    routes.save(path)
    loaded = InstanceRoutes.load(path)
    path.write_bytes(b"")
    assert loaded == routes


def test_the_metadata_is_plain_safetensors(tmp_path: Path) -> None:
    instances().save(tmp_path / "i")
    with safe_open(tmp_path / "i", framework="pt") as file:
        header = json.loads(file.metadata()["attackroute"])
        assert set(file.keys()) == {*(f"masks/{layer}" for layer in CHANNELS), "labels", "predictions"}
    assert header["fingerprint"] == CHANNELS
    assert header["methods"][0] == ["features.0", "features.3", "closed-form"]
