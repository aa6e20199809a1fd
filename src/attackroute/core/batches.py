"""Batches: of a data set in an order that only the seed and the epoch decide, and of whatever data users pass in."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from itertools import chain, islice
from operator import itemgetter
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler, Subset, TensorDataset

from attackroute.core.checks import images_and_labels
from attackroute.core.distributed import current
from attackroute.core.errors import UserError
from attackroute.core.model_state import placement
from attackroute.core.random import derived_generator

T = TypeVar("T")
Data = Iterable[Any] | Dataset[Any] | Tensor | tuple[Tensor, Tensor]
"""What users have: a data set, such as :func:`attackroute.load_data` gives; a DataLoader or other iterable of batches;
or one batch. Batches are images, ``(images, labels)`` and anything after them, or mappings that name the two."""

Batch = tuple[Tensor, Tensor | None]
"""Images and their labels, None where there are none; on the model's device, the images in its dtype."""

_FAR = 64.0  # beyond what any usual normalisation makes of images in [0, 1]
_OUT_OF_RANGE = (
    "the images lie far outside of [0, 1], as those of 0..255 do: divide them by 255; for a model that wants its input "
    "normalised, trace attackroute.normalised(model, mean, std)"
)
_AT_MOST = 1 << 62  # more batches than there are: as a step, it leaves only the first


def count_samples(data: Dataset[Any], what: str) -> int:
    """The number of samples of a data set, which must not be empty or without a length."""
    if not isinstance(data, Sized):
        raise UserError(f"the {what} has no length; give a data set with __len__ and __getitem__")
    if len(data) == 0:
        raise UserError(f"the {what} is empty; give at least one sample")
    return len(data)


def shuffled(samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: every sample once, in an order drawn from the seed and the epoch alone.

    Their sizes differ by no more than one: no sample is dropped, and no tiny last batch upsets batch normalisation.
    """
    order = torch.randperm(samples, generator=derived_generator(seed, "order", epoch))
    return [batch.tolist() for batch in order.tensor_split(-(-samples // batch_size))]


def drawn_over_classes(data: Dataset[Any], count: int, seed: int) -> list[int]:
    """Indices of at most ``count`` samples, as many of each class as there are, drawn by the seed alone; ascending.

    For what is to be computed on a few samples: the first of a data set that lies in class folders are of one class.
    Labels that are not known without reading every sample count as one class: then all samples are drawn alike.
    """
    samples = count_samples(data, "data")
    labels = _known_labels(data) or [0] * samples
    drawn: Counter[int] = Counter()
    turns: list[tuple[int, int]] = []  # the k-th sample of every class comes before the k + 1st of any
    for index in torch.randperm(samples, generator=derived_generator(seed, "classes", 0)).tolist():
        turns.append((drawn[labels[index]], index))
        drawn[labels[index]] += 1
    return sorted(index for _, index in sorted(turns, key=itemgetter(0))[:count])


def _known_labels(data: object) -> list[int] | None:
    """A data set's labels, where it tells them without reading the samples."""
    if isinstance(data, Subset):
        labels = _known_labels(data.dataset)
        return labels and [labels[index] for index in data.indices]
    stored = data.tensors[1] if isinstance(data, TensorDataset) and len(data.tensors) > 1 else None
    for name in ("targets", "labels"):
        stored = getattr(data, name, None) if stored is None else stored
    if not (isinstance(stored, Sized) and len(stored) == len(cast(Sized, data))):
        return None
    try:
        return [int(label) for label in cast("Iterable[Any]", stored)]
    except (TypeError, ValueError):  # several labels an image, or something else of that name
        return None


class BatchStream:
    """The batches of some data, or those of some rising numbers alone, on which processes take turns to work.

    The caller holds the model frozen, whose first parameter decides device and floating dtype. With several processes,
    data that are shuffled are read in the first one's order.

    Attributes:
        number: Number of the batch that this process works on, by the data's order.
        total: How many samples there are, where that is known without reading them.
    """

    def __init__(self, model: nn.Module, data: Data, batch_size: int, numbers: Sequence[int] | None = None) -> None:
        data = opened(data, batch_size)
        self._model, self._data, self._batch_size = model, data, batch_size
        self._numbers = None if numbers is None else frozenset(numbers)
        self._team = current()
        self.number, self.total = 0, samples_in(data)
        self._source: Iterator[tuple[int, Any]] | None = None
        self._loader = _sampled(data)
        # data that can be read only one after the other: every process reads what belongs to the others, too
        self._is_skimmed = self._loader is None and not isinstance(data, Tensor) and not _is_pair(data)
        self._order: Iterable[Any] = () if self._loader is None else self._loader.batch_sampler or ()
        if self._team.count > 1 and _is_shuffled(self._loader):
            self._order = self._team.first(lambda: list(self._order))

    @property
    def first(self) -> Batch:
        """The first batch that is not empty, the same one for every process."""
        belongs_here = self._team.leads or self._is_skimmed
        source = self._read() if belongs_here else self._every(_AT_MOST, start=0)
        read: list[tuple[int, Any]] = []
        for item in source:
            read.append(item)
            batch = _prepared(self._model, *item)
            if batch is not None:
                if belongs_here:  # it is to be worked on, too
                    self._source = chain((read.pop(0) for _ in range(len(read))), source)  # none is held for longer
                return batch
        raise UserError("the data hold no sample: the loader is empty")

    def map(self, work: Callable[[Tensor, Tensor | None], T]) -> Iterator[T]:
        """What ``work(images, labels)`` gives for each batch, in the data's order, whichever process did it.

        Several processes work on one batch each before any of them is passed on. The work must not depend on other
        batches; what it gives is pickled, so it is best small and on the CPU.
        """
        items = self._read()
        if self._is_skimmed:
            items = islice(items, self._team.rank, None, self._team.count)

        def turn() -> tuple[T, ...] | None:
            """What came of this process's next batch, nothing of one that is empty; None where none is left."""
            item = next(items, None)
            if item is None:
                return None
            self.number = item[0]
            batch = _prepared(self._model, *item)
            del item  # nothing holds what was read while the batch is worked on
            return () if batch is None else (work(*batch),)

        yield from self._team.in_turns(turn)

    def _read(self) -> Iterator[tuple[int, Any]]:
        """This process's batches with their numbers; all of them where the data are skimmed."""
        if self._source is None:
            self._source = self._every(1 if self._is_skimmed else self._team.count)
        return self._source

    def _every(self, step: int, start: int | None = None) -> Iterator[tuple[int, Any]]:
        """Every ``step``-th batch of those that are asked for, from this process's own or ``start`` on."""
        start = self._team.rank % step if start is None else start
        if self._numbers is None and step == 1:
            return _numbered(_raw(self._data, self._batch_size))
        items = _numbered(_raw(self._data, self._batch_size) if self._loader is None else self._order)
        if (numbers := self._numbers) is not None:
            items = (item for item in items if item[0] in numbers)
        items = islice(items, start, None, step)
        return items if self._loader is None else _read_alone(self._loader, list(items))


def batches(model: nn.Module, data: Data, batch_size: int) -> Iterator[Batch]:
    """Images and labels, batch by batch, checked, on the frozen model's device and in its dtype."""
    for number, batch in enumerate(_raw(opened(data, batch_size), batch_size)):
        ready = _prepared(model, number, batch)
        if ready is not None:
            yield ready


def samples_in(data: Data) -> int | None:
    """How many samples ``data`` holds, where that is known without reading it."""
    data = opened(data, 1)
    if isinstance(data, Tensor):
        return data.shape[0] if data.ndim else None
    if _is_pair(data):
        return len(data[0])  # type: ignore[index]
    sampler, dropped = getattr(data, "sampler", None), getattr(data, "drop_last", False)
    try:
        return None if sampler is None or dropped else len(sampler)
    except TypeError:
        return None


def batches_in_order(data: Data, batch_size: int) -> tuple[int, int]:
    """How many samples the data hold, and how many are in a batch; a `UserError` if their order or these may change."""
    data = opened(data, batch_size)
    samples = samples_in(data)
    if _is_shuffled(_sampled(data)):
        raise UserError("the loader shuffles the data, or draws from them: results in a folder need a fixed order")
    rows = getattr(data, "batch_size", batch_size)
    if not samples or not isinstance(rows, int):
        raise UserError(
            "the number of samples, or of those in a batch, is not known in advance: results in a folder need tensors, "
            "or a DataLoader of a data set in its order, without drop_last or a batch sampler of its own"
        )
    return samples, rows


def _prepared(model: nn.Module, number: int, batch: Any) -> Batch | None:
    """One batch, checked, on the model's device and in its dtype; None where it holds no image."""
    device, dtype = placement(model)
    if (device.type, dtype) == ("cpu", torch.float16):  # which PyTorch lacks kernels for
        raise UserError("the model is in half precision (float16) on the CPU: use model.float(), or bfloat16 autocast")
    if device.type == "meta":
        raise UserError("the model is on the meta device, without values: load its weights first")
    for module in model.modules():  # reading the data may have switched it, as some attacks do
        if module.training:  # to set what is set takes longer than a small batch
            module.training = False
    images, labels = _split(batch, number)
    if images.shape[0] == 0:
        return None
    images = images.detach().to(device=device, dtype=dtype, non_blocking=True)
    if images.numel():
        lowest, highest = images.aminmax()  # NaN passes through both; several times quicker than a test of every value
        if not math.isfinite(largest := float(torch.maximum(highest, -lowest))):
            row = int((~torch.isfinite(images.flatten(1)).all(1)).nonzero()[0, 0])
            raise UserError(f"image {row} of batch {number} holds NaN or inf: remove or repair it")
        if largest > _FAR:
            warnings.warn(_OUT_OF_RANGE, UserWarning, stacklevel=2)  # shown once, as Python does by default
    return images, None if labels is None else labels.to(device)


def _numbered(items: Iterable[T]) -> Iterator[tuple[int, T]]:
    """``enumerate`` without the tuple that it keeps, and the batch in it, while the next one is read."""
    source, number = iter(items), 0
    while True:
        try:
            item = (number, next(source))
        except StopIteration:
            return
        yield item
        del item
        number += 1


def _sampled(data: object) -> DataLoader[Any] | None:
    """The data as a loader that can be told which samples to read."""
    return data if isinstance(data, DataLoader) and data.batch_sampler is not None else None


def _is_shuffled(loader: DataLoader[Any] | None) -> bool:
    return loader is not None and not isinstance(loader.sampler, SequentialSampler)


def _read_alone(loader: DataLoader[Any], batches: list[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Some batches of a loader, given by their numbers and samples, with the others unread."""
    kept = ("collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator")
    options = {name: getattr(loader, name) for name in kept}
    numbers, samples = [number for number, _ in batches], [rows for _, rows in batches]
    workers = loader.num_workers if len(batches) > 1 else 0
    return zip(numbers, DataLoader(loader.dataset, batch_sampler=samples, num_workers=workers, **options), strict=False)


def opened(data: Any, batch_size: int) -> Data:
    """What users have as tensors or an iterable of batches: a data set gets a loader, arrays become tensors."""
    if isinstance(data, np.ndarray):
        return torch.from_numpy(data)
    if isinstance(data, tuple) and len(data) == 2 and any(isinstance(item, np.ndarray) for item in data):
        return torch.as_tensor(data[0]), torch.as_tensor(data[1])
    if not isinstance(data, Iterable):
        if not isinstance(data, Dataset):
            data = getattr(data, "dataset", data)  # images with their classes' names
        if isinstance(data, Sized) and hasattr(data, "__getitem__"):
            # a generator of its own, since loaders draw from the global one even where nothing is shuffled
            return DataLoader(cast("Dataset[Any]", data), max(1, batch_size), generator=torch.Generator())
    return cast("Data", data)


def as_dataset(data: Any) -> Dataset[Any]:
    """The data set behind what a user has to train on, which must be in reach sample by sample."""
    if isinstance(data := opened(data, 1), DataLoader):
        return data.dataset
    if _is_pair(data):
        images, labels = cast("tuple[Tensor, Tensor]", data)
        if len(images) != len(labels):
            raise UserError(f"there are {len(images)} images but {len(labels)} labels; give one for each")
        return TensorDataset(images, labels)
    raise UserError(f"data to train on is {type(data).__name__}; give a data set, a DataLoader or (images, labels)")


def _is_pair(data: object) -> bool:
    if not (isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(tensor, Tensor) for tensor in data)):
        return False
    labels = data[1]  # a list may also be two batches of images
    return isinstance(data, tuple) or not (labels.is_floating_point() and labels.ndim >= 2)


def _raw(data: Data, batch_size: int) -> Iterable[Any]:
    """The batches as the data give them."""
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is not positive")
    if isinstance(data, Tensor):
        _check_images(data, 0)
        return data.split(batch_size)  # type: ignore[no-any-return]
    if _is_pair(data):
        images, labels = data  # type: ignore[misc]
        _check_counts(images, labels, 0)
        return zip(images.split(batch_size), labels.split(batch_size), strict=True)
    if not isinstance(data, Iterable):
        raise UserError(
            f"data is {type(data).__name__}: pass a data set of known length, a DataLoader, or tensors (images, labels)"
        )
    return data


def _split(batch: Any, number: int) -> tuple[Tensor, Tensor | None]:
    """The images and labels of a batch, whatever else is in it."""
    images, labels = images_and_labels(batch)
    if not isinstance(images, Tensor) or not (labels is None or isinstance(labels, Tensor)):
        kind = type(images if not isinstance(images, Tensor) else labels).__name__
        named = f" (it has {', '.join(map(str, batch))})" if isinstance(batch, Mapping) else ""
        raise UserError(
            f"batch {number} holds {kind} where tensors were expected: (images, labels), images, or a mapping with "
            f"'image' and 'label'{named}"
        )
    _check_images(images, number)
    if labels is not None:
        _check_counts(images, labels, number)
    return images, labels


def _check_images(images: Tensor, number: int) -> None:
    if images.layout != torch.strided or images.is_complex():
        kind = "complex numbers" if images.is_complex() else "a sparse tensor"
        raise UserError(f"batch {number} is {kind}: expected a dense, real tensor of images (N, C, H, W)")
    if images.ndim < 2:
        raise UserError(f"batch {number} has shape {tuple(images.shape)}: expected images (N, C, H, W)")
    if not images.is_floating_point():
        raise UserError(
            f"batch {number} has images of {images.dtype}: give floats in [0, 1] (images.float() / 255); for a model "
            "that wants its input normalised, take attackroute.normalised(model, mean, std)"
        )


def _check_counts(images: Tensor, labels: Tensor, number: int) -> None:
    if labels.ndim == 0 or images.shape[0] != labels.shape[0]:
        raise UserError(
            f"batch {number} has {images.shape[0]} images but labels of shape {tuple(labels.shape)}: give one per image"
        )
