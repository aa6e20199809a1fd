"""Batches from tensors, loaders and any other iterable."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from attackroute.core.batches import BatchStream, as_dataset, batches, samples_in
from attackroute.core.errors import UserError
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.data import ImageData
from model_checks import one_line
from tracing import ready, small, worst

MODEL = nn.Conv2d(3, 4, 3)
IMAGES, LABELS = torch.rand(7, 3, 5, 5), torch.arange(7)


def read(data: Any, size: int = 3, model: nn.Module = MODEL) -> list[tuple[Tensor, Tensor | None]]:
    return list(batches(model, data, size))


def joined(data: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    parts = read(data, **options)
    labels = [labels for _, labels in parts if labels is not None]
    return torch.cat([images for images, _ in parts]), torch.cat(labels) if labels else None


class Endless(IterableDataset):
    """A data set without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter(zip(IMAGES, LABELS.tolist(), strict=True))


SOURCES: dict[str, Any] = {
    "pair": lambda: (IMAGES, LABELS),
    "pair in a list": lambda: [IMAGES, LABELS],
    "loader": lambda: DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3),
    "loader of a stream": lambda: DataLoader(Endless(), batch_size=2),
    "generator": lambda: ((IMAGES[i : i + 2], LABELS[i : i + 2]) for i in range(0, 7, 2)),
    "list of batches": lambda: [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])],
    "batches of three": lambda: [(IMAGES, LABELS, torch.rand(7)), [IMAGES[:0], LABELS[:0], torch.rand(0)]],
    "labels of another type": lambda: (IMAGES, LABELS.to(torch.uint8)),
    "data set": lambda: TensorDataset(IMAGES, LABELS),
    "part of a data set": lambda: Subset(TensorDataset(IMAGES.repeat(2, 1, 1, 1), LABELS.repeat(2)), range(7)),
    "images with names": lambda: ImageData(TensorDataset(IMAGES, LABELS), tuple("abcdefg"), (3, 5, 5), "own", "test"),
    "arrays": lambda: (IMAGES.numpy(), LABELS.numpy()),
    "batches of arrays": lambda: [(IMAGES.numpy(), LABELS.numpy())],
    "mappings": lambda: [{"pixel_values": IMAGES, "labels": LABELS}, {"x": IMAGES[:0], "y": LABELS[:0]}],
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_every_sample_once(name: str) -> None:
    images, labels = joined(SOURCES[name]())
    assert torch.equal(images, IMAGES)
    assert labels is not None
    assert torch.equal(labels, LABELS)
    assert samples_in(SOURCES[name]()) in (7, None)


@pytest.mark.parametrize("name", ["loader", "pair", "data set", "part of a data set", "images with names", "arrays"])
def test_training_takes_what_everything_else_takes(name: str) -> None:
    data = as_dataset(SOURCES[name]())
    assert torch.equal(torch.stack([image for image, _ in data]), IMAGES)  # type: ignore[attr-defined]


class Noted(TensorDataset):
    """Notes which images are read."""

    def __init__(self) -> None:
        super().__init__(IMAGES, LABELS)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("name", ["pair", "loader", "generator", "noted"])
def test_some_batches_can_be_worked_on_alone(name: str) -> None:
    data = Noted() if name == "noted" else SOURCES[name]()
    stream = BatchStream(MODEL, data, 3, numbers=[1, 2])
    first = [2, 3] if name == "generator" else [3, 4, 5]
    assert stream.first[1].tolist() == first  # type: ignore[union-attr]
    worked = list(stream.map(lambda _, labels: (stream.number, labels.tolist())))  # type: ignore[union-attr]
    assert worked == [(1, first), (2, [4, 5] if name == "generator" else [6])]
    if isinstance(data, Noted):
        assert data.read == [3, 4, 5, 6]


@pytest.mark.parametrize(
    "data",
    [IMAGES, [IMAGES], iter([IMAGES[:3], IMAGES[3:]]), [(IMAGES,)], DataLoader(TensorDataset(IMAGES), batch_size=2)],
    ids=["tensor", "list of one", "iterator", "list of tuples", "loader"],
)
def test_images_without_labels(data: Any) -> None:
    images, labels = joined(data)
    assert torch.equal(images, IMAGES)
    assert labels is None


def test_a_list_of_two_batches_of_images_is_no_pair() -> None:
    images, labels = joined([IMAGES[:4], IMAGES[:4]])
    assert len(images) == 8
    assert labels is None


def test_tensors_are_cut_into_batches_and_a_loader_brings_its_own() -> None:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    for data, size, expected in (((IMAGES, LABELS), 3, [3, 3, 1]), (IMAGES, 100, [7]), (loader, 1, [4, 3])):
        assert [len(images) for images, _ in read(data, size=size)] == expected


def test_empty_batches_are_passed_over() -> None:
    assert [len(images) for images, _ in read([(IMAGES[:0], LABELS[:0]), (IMAGES, LABELS), IMAGES[:0]])] == [7]
    assert read([]) == read(IMAGES[:0]) == []


def test_images_take_the_dtype_of_the_model_and_leave_gradients_behind() -> None:
    assert not read(IMAGES.clone().requires_grad_())[0][0].requires_grad
    assert read(IMAGES, model=nn.Conv2d(3, 4, 3).double())[0][0].dtype == torch.float64
    assert read(IMAGES, model=nn.Conv2d(3, 4, 3).bfloat16())[0][0].dtype == torch.bfloat16
    assert read(IMAGES, model=nn.ReLU())[0][0].dtype == torch.float32


def test_images_of_0_to_255_are_noticed() -> None:
    with pytest.raises(UserError, match=r"torch\.uint8: give floats in \[0, 1\] .* attackroute\.normalised"):
        read((IMAGES * 255).byte())
    with pytest.warns(UserWarning, match=r"outside of \[0, 1\].*attackroute\.normalised\(model, mean, std\)") as caught:
        read(IMAGES * 255)
    assert len({str(warning.message) for warning in caught}) == 1
    read(IMAGES * 5 - 2.5)  # as normalised for a model that wants that


def test_batches_are_read_one_at_a_time() -> None:
    read_so_far = []

    def source() -> Iterator[Tensor]:
        for index in range(3):
            read_so_far.append(index)
            yield IMAGES

    stream = batches(MODEL, source(), 1)
    next(stream)
    assert read_so_far == [0]
    next(stream)
    assert read_so_far == [0, 1]


def test_how_many_samples_there_are() -> None:
    data = TensorDataset(IMAGES, LABELS)
    assert samples_in(IMAGES) == samples_in((IMAGES, LABELS)) == samples_in([IMAGES, LABELS]) == 7
    assert samples_in(DataLoader(data, batch_size=3)) == 7
    assert samples_in(DataLoader(data, batch_size=3, drop_last=True)) is None
    assert samples_in(DataLoader(data, sampler=[1, 2, 3])) == 3
    assert samples_in(DataLoader(Endless(), batch_size=3)) is None
    assert samples_in(iter([IMAGES])) is None


def test_progress_is_told_after_every_batch() -> None:
    model, images, labels = ready(small, samples=5)
    heard: list[tuple[int, int | None]] = []
    trace_routes(model, (images, labels), batch_size=2, progress=lambda *step: heard.append(step))
    assert heard == [(2, 5), (4, 5), (5, 5)]
    heard.clear()
    trace_routes(model, iter([images, images]), progress=lambda *step: heard.append(step))
    assert heard == [(5, None), (10, None)]


def test_streaming_is_the_same_as_one_batch() -> None:
    model, images, labels = ready(small, samples=5)
    whole = trace_routes(model, (images, labels), keep_scores=True)
    loader = DataLoader(TensorDataset(images, labels), batch_size=2)
    for data in (loader, ((images[i : i + 1], labels[i : i + 1]) for i in range(5))):
        found = trace_routes(model, data, keep_scores=True)
        assert found == whole
        assert worst(found, whole) <= 1e-12
        assert found.provenance.samples == 5


def test_batches_of_several_sizes() -> None:
    model, images, _ = ready(small, samples=4)
    mixed = [images, images[:, :, :9, :9], images[:, :, 2:, :7]]
    found = trace_routes(model, iter(mixed), keep_scores=True)
    single = [trace_routes(model, part, keep_scores=True) for part in mixed]
    for layer in found.layers:
        torch.testing.assert_close(found.scores[layer], torch.cat([part.scores[layer] for part in single]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, r"data is int: pass a data set of known length, a DataLoader, or tensors"),
        (None, r"data is NoneType"),
        (["abc"], r"batch 0 holds str where tensors were expected"),
        ([{"picture": IMAGES}], r"batch 0 holds NoneType .* a mapping with 'image' and 'label' \(it has picture\)"),
        ([IMAGES, LABELS, "x"], r"batch 1 has shape \(7,\)"),
        ([()], r"batch 0 holds NoneType"),
        ([(IMAGES, LABELS.tolist())], r"batch 0 holds list"),
        ((IMAGES, LABELS[:5]), r"batch 0 has 7 images but labels of shape \(5,\)"),
        ([(IMAGES, LABELS), (IMAGES, LABELS[:1])], r"batch 1 has 7 images but labels of shape \(1,\)"),
        ((IMAGES, torch.tensor(3)), r"labels of shape \(\)"),
        ([IMAGES, IMAGES / 0, IMAGES], r"image 0 of batch 1 holds NaN or inf"),
        (torch.cat([IMAGES[:4], IMAGES[:1] * torch.nan]), r"image 1 of batch 1 holds NaN or inf"),
    ],
)
def test_errors_name_the_batch(data: Any, message: str) -> None:
    with one_line(match=message):
        read(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "batch size 0 is not positive"),
        ({"size": -3}, "batch size -3 is not positive"),
        ({"model": nn.Conv2d(3, 4, 3, device="meta")}, "meta device"),
        ({"model": nn.Conv2d(3, 4, 3).half()}, r"half precision \(float16\) on the CPU: use model\.float\(\)"),
    ],
    ids=itertools.count(),
)
def test_what_images_cannot_be_read_for(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(IMAGES, **options)
