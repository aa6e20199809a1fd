"""A trace into a folder: the same routes as in memory, whatever breaks it off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attackroute as ar
from attackroute.core.document import Document
from attackroute.routes import folder as folder_module
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route
from tracing import small

IMAGES, LABELS = torch.rand(11, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(11) % 5
NAMES = [f"routes-0000{number}-of-00003.safetensors" for number in range(3)]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    monkeypatch.setattr(folder_module, "_SHARD_SAMPLES", 3)  # rounded up to a batch of 4
    torch.manual_seed(1)
    return small()


def traced(model: nn.Module, folder: Path, data: Any = (IMAGES, LABELS), **options: Any) -> ar.RouteFolder:
    return ar.trace_routes(model, data, 0.4, batch_size=4, folder=folder, **options)


def breaking(after: int, error: BaseException) -> Callable[[int, int | None], None]:
    """A progress that breaks a trace off when so many samples are done."""

    def progress(done: int, _: int | None) -> None:
        if done >= after:
            raise error

    return progress


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["tensors", "loader", "images alone"])
def test_a_folder_holds_what_memory_would(model: nn.Module, tmp_path: Path, kind: str) -> None:
    data: Any = {
        "tensors": (IMAGES, LABELS),
        "loader": DataLoader(TensorDataset(IMAGES, LABELS), 4),
        "images alone": IMAGES,
    }[kind]
    expected = ar.trace_routes(model, data, 0.4, batch_size=4)
    routes = traced(model, tmp_path / "deep" / "down", data)
    assert sorted(contents(tmp_path / "deep" / "down")) == ["route.json", *NAMES, "summary.json"]
    assert routes.load() == expected
    assert (routes.methods, routes.provenance) == (expected.methods, expected.provenance)
    assert routes.aggregate() == expected.aggregate() == Route.load(routes.path / "route.json")
    opened = ar.RouteFolder.open(routes.path)
    assert (opened.files, opened.channels, opened.methods) == (routes.files, routes.channels, routes.methods)
    assert opened.provenance == routes.provenance
    assert opened.aggregate(0.6) == routes.aggregate(0.6)
    about = Document.load(routes.path / "summary.json").about
    assert about["finished"] is True
    labelled = expected.labels is not None and expected.predictions is not None
    accuracy = (expected.labels == expected.predictions).double().mean().item() if labelled else None
    assert about["accuracy"] == accuracy
    for layer, values in expected.frequency().items():
        assert torch.equal(routes.frequency()[layer], values)
    assert routes.occurrence(0.3) == expected.occurrence(0.3)
    routes.save_route(0.7)
    assert Route.load(routes.path / "route.json") == expected.aggregate(0.7)
    assert Document.load(routes.path / "summary.json").about["route_width"] == 0.7


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a crash")])
@pytest.mark.parametrize("after", [4, 8])
@pytest.mark.parametrize("sketches", [None, 32])
def test_a_trace_goes_on_to_the_same_files(
    model: nn.Module, tmp_path: Path, error: BaseException, after: int, sketches: int | None
) -> None:
    config = ar.TraceConfig(linear=True, sketches=sketches)
    options = {
        "config": config,
        "keep_scores": True,
        "settings": {"model": "m", "data": "d", "split": "test", "seed": 3},
    }
    whole = traced(model, tmp_path / "whole", **options)
    assert (whole.provenance.model, whole.provenance.data, whole.provenance.seed) == ("m", "d test", 3)
    broken = tmp_path / "broken"
    with pytest.raises(type(error)):
        traced(model, broken, progress=breaking(after, error), **options)
    assert sorted(contents(broken)) == [*NAMES[: after // 4], "summary.json"]
    with pytest.raises(ar.UserError, match="holds a trace"):
        traced(model, broken, **options)
    calls: list[tuple[int, int | None]] = []
    notes: list[str] = []
    resumed = traced(
        model, broken, resume=True, progress=lambda *call: calls.append(call), note=notes.append, **options
    )
    assert [done for done, _ in calls] == [done for done in (4, 8, 11) if done >= after]
    assert notes == [f"{after} of 11 samples are done already"]
    assert resumed.load() == whole.load()
    assert contents(broken) == contents(tmp_path / "whole")


def test_what_is_done_of_a_file_is_kept(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "_SHARD_SAMPLES", 12)
    traced(model, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        traced(model, tmp_path / "broken", progress=breaking(8, KeyboardInterrupt()))
    assert len(InstanceRoutes.load(tmp_path / "broken" / "routes.safetensors")) == 8
    with pytest.raises(ar.UserError, match=r"routes\.safetensors: is not this part of the trace.*--resume"):
        ar.RouteFolder.open(tmp_path / "broken")
    traced(model, tmp_path / "broken", resume=True)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


def test_samples_are_saved_now_and_then(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    original = folder_module.RouteWriter.keep

    def keep(writer: folder_module.RouteWriter) -> None:
        original(writer)
        saved.append(len(InstanceRoutes.load(tmp_path / "routes.safetensors")))

    monkeypatch.setattr(folder_module.RouteWriter, "keep", keep)
    monkeypatch.setattr(folder_module, "_AUTOSAVE_SECONDS", 0.0)
    monkeypatch.setattr(folder_module, "_SHARD_SAMPLES", 12)
    traced(model, tmp_path)
    assert saved == [4, 8]  # and the eleven as a whole
    assert len(InstanceRoutes.load(tmp_path / "routes.safetensors")) == 11


def test_files_that_do_not_belong_are_named(model: nn.Module, tmp_path: Path) -> None:
    routes = traced(model, tmp_path)
    files = contents(tmp_path)
    flipped = bytearray(files[NAMES[2]])
    flipped[-1] ^= 1
    (tmp_path / NAMES[2]).write_bytes(flipped)
    parts = routes.parts()
    assert [len(next(parts)), len(next(parts))] == [4, 4]
    with pytest.raises(ar.UserError, match=NAMES[2]):
        next(parts)
    (tmp_path / NAMES[1]).write_bytes(files[NAMES[1]][:-1])
    with pytest.raises(ar.UserError, match=NAMES[1]):
        ar.RouteFolder.open(tmp_path)
    (tmp_path / NAMES[1]).unlink()
    with pytest.raises(ar.UserError, match=NAMES[1]):
        ar.RouteFolder.open(tmp_path)
    with pytest.raises(ar.UserError, match="holds no instance routes"):
        ar.RouteFolder.open(tmp_path.parent)


@pytest.mark.parametrize("change", ["swapped", "copied", "of another trace"])
def test_a_file_in_anothers_place_is_noticed(model: nn.Module, tmp_path: Path, change: str) -> None:
    traced(model, tmp_path / "a")
    before, paths = contents(tmp_path / "a"), [tmp_path / "a" / name for name in NAMES]
    if change == "of another trace":
        traced(model, tmp_path / "b", (IMAGES.flip(0), LABELS))
        paths[1].write_bytes((tmp_path / "b" / NAMES[1]).read_bytes())
    else:
        paths[1].write_bytes(before[NAMES[0]])
        if change == "swapped":
            paths[0].write_bytes(before[NAMES[1]])
    with pytest.raises(ar.UserError, match=r"routes-0000[01].*is not this part of the trace"):
        ar.RouteFolder.open(tmp_path / "a")
    notes: list[str] = []
    traced(model, tmp_path / "a", resume=True, note=notes.append)
    assert sum("is another part, or of another trace" in note for note in notes) == 1 + (change == "swapped")
    assert contents(tmp_path / "a") == before


def test_a_finished_trace_is_not_replaced_and_a_stray_file_hides_nothing(model: nn.Module, tmp_path: Path) -> None:
    traced(model, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ar.UserError, match="holds a trace"):
        traced(model, tmp_path, keep_scores=True)
    assert contents(tmp_path) == before
    (tmp_path / "routes.safetensors").write_bytes((tmp_path / NAMES[0]).read_bytes())
    with pytest.raises(ar.UserError, match="files of two traces"):
        ar.RouteFolder.open(tmp_path)
    with pytest.raises(ar.UserError, match=r"routes\.safetensors is no part of the trace"):
        traced(model, tmp_path, resume=True)


@pytest.mark.parametrize("change", ["flipped", "cut", "missing"])
def test_a_damaged_file_is_traced_again_and_it_alone(model: nn.Module, tmp_path: Path, change: str) -> None:
    traced(model, tmp_path)
    before = contents(tmp_path)
    damaged = bytearray(before[NAMES[1]])
    damaged[-1] ^= 1
    if change == "missing":
        (tmp_path / NAMES[1]).unlink()
    else:
        (tmp_path / NAMES[1]).write_bytes(damaged if change == "flipped" else damaged[:-1])
    done: list[int] = []
    notes: list[str] = []
    traced(model, tmp_path, resume=True, progress=lambda count, _: done.append(count), note=notes.append)
    assert done == [7, 11]
    assert any(NAMES[1] in note for note in notes) == (change != "missing")
    assert contents(tmp_path) == before
    if change == "cut":
        (tmp_path / NAMES[2]).write_bytes(b"")
        with pytest.warns(UserWarning, match=NAMES[2]):
            traced(model, tmp_path, resume=True)


def test_what_is_resumed_must_be_the_same(model: nn.Module, tmp_path: Path) -> None:
    traced(model, tmp_path)
    other: Tensor = IMAGES.clone()
    other[0, 0, 0, 0] += 0.1
    for data, options, message in [
        ((IMAGES, LABELS), {"config": ar.TraceConfig(linear=True)}, "linear False, not True"),
        ((IMAGES, LABELS), {"keep_scores": True}, "keep-scores"),
        ((IMAGES, LABELS), {"attack": ar.parse_attack("fgsm")}, "attack None, not 'fgsm"),
        ((IMAGES, LABELS), {"settings": {"model": "other"}}, "model None, not 'other'"),
        ((IMAGES[:9], LABELS[:9]), {}, "images"),
        ((other, LABELS), {}, "first-image"),
        (DataLoader(TensorDataset(IMAGES, LABELS), 5), {}, "batch-size 4, not 5"),
    ]:
        with pytest.raises(ar.UserError, match=message):
            traced(model, tmp_path, data, resume=True, **options)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1e-3  # type: ignore[index,operator]
    with pytest.raises(ar.UserError, match="weights"):
        traced(model, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(TensorDataset(IMAGES, LABELS), 4, shuffle=True), "shuffles"),
        (DataLoader(TensorDataset(IMAGES, LABELS), 4, drop_last=True), "not known in advance"),
        (DataLoader(TensorDataset(IMAGES, LABELS), batch_sampler=[[0, 1], [2]]), "not known in advance"),
        ([(IMAGES, LABELS)], "not known in advance"),
    ],
)
def test_data_without_a_fixed_order_are_refused(model: nn.Module, tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(ar.UserError, match=message):
        traced(model, tmp_path, data)
    assert not contents(tmp_path)


def test_the_folder_must_be_one(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ar.UserError, match="cannot be a folder"):
        traced(model, tmp_path / "file")
    with pytest.raises(ar.UserError, match="give folder="):
        ar.trace_routes(model, IMAGES, resume=True)
