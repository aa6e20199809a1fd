"""Batches of a data set in an order that only the seed and the epoch decide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from itertools import chain, islice
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from attackroute.core.distributed import current
from attackroute.core.errors import UserError
from attackroute.core.random import derived_generator


def count_samples(data: Dataset[Any], what: str) -> int:
    """The number of samples of a data set.

    Raises:
        UserError: The data set is empty or has no length.
    """
    if not isinstance(data, Sized):
        raise UserError(f"the {what} has no length; give a data set with __len__ and __getitem__")
    if len(data) == 0:
        raise UserError(f"the {what} is empty; give at least one sample")
    return len(data)


def count_steps(samples: int, batch_size: int) -> int:
    """Batches in an epoch, the smaller last one of :func:`split_evenly` included."""
    return -(-samples // batch_size)


def split_evenly(order: Tensor, batch_size: int) -> list[list[int]]:
    """Split sample indices into batches of at most ``batch_size`` whose sizes differ by no more than one.

    No sample is dropped, and no tiny last batch upsets batch normalisation.
    """
    return [batch.tolist() for batch in order.tensor_split(count_steps(len(order), batch_size))]


def shuffled(samples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: every sample once, in an order drawn from the seed and the epoch alone."""
    order = torch.randperm(samples, generator=derived_generator(seed, "order", epoch))
    return split_evenly(order, batch_size)


def in_order(samples: int, batch_size: int) -> list[list[int]]:
    """Every sample once, in the data set's own order."""
    return [list(range(start, min(start + batch_size, samples))) for start in range(0, samples, batch_size)]


def load(
    data: Dataset[Any],
    batches: Sequence[list[int]],
    *,
    generator: torch.Generator,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """A loader of the given batches that leaves the global random generators alone.

    Workers are started afresh for every pass: a worker that lived on would carry its random state from epoch to
    epoch, and a resumed run could not get it back.
    """
    return DataLoader(data, batch_sampler=batches, num_workers=workers, generator=generator, pin_memory=pin_memory)


Data = Iterable[Any] | Tensor | tuple[Tensor, Tensor]
"""A DataLoader or other iterable of ``(images, labels)`` or images; or one such pair or batch of tensors."""


T = TypeVar("T")


_PAIR = 2


_AT_MOST = 1 << 62  # more batches than there are: as a step, it leaves only the first


@runtime_checkable
class NumberedBatches(Protocol):
    """Data any of whose batches can be read alone, so that no process reads what belongs to another."""

    def __iter__(self) -> Iterator[Any]:
        """Every batch."""

    def __len__(self) -> int:
        """Number of batches."""

    def numbered(self, numbers: Sequence[int]) -> Iterator[Any]:
        """The batches of these numbers."""


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


def _handed_over(items: list[T]) -> Iterator[T]:
    """The items, none of which is held any longer than it takes to pass it on."""
    while items:
        yield items.pop(0)


class BatchStream:
    """The batches of some data, on which processes take turns to work.

    The caller holds the model frozen. With several processes, data that are shuffled are read in the first one's order.

    Args:
        model: Decides device and floating dtype, by its first parameter.
        data: See :data:`Data`.
        batch_size: Rows per batch when ``data`` is tensors.
        numbers: Only the batches of these numbers, rising; None for all.

    Attributes:
        number: Number of the batch that this process works on, by the data's order.
    """

    def __init__(self, model: nn.Module, data: Data, batch_size: int, numbers: Sequence[int] | None = None) -> None:
        self._model, self._data, self._batch_size, self._numbers = model, data, batch_size, numbers
        self._chosen = None if numbers is None else frozenset(numbers)
        self._team = current()
        self.number = 0
        self._source: Iterator[tuple[int, Any]] | None = None
        self._order: list[Any] | None = None
        loader = _sampled(data)
        if self._team.count > 1 and loader is not None and not isinstance(loader.sampler, SequentialSampler):
            self._order = self._team.first(lambda: list(loader.batch_sampler or ()))

    @property
    def total(self) -> int | None:
        """How many samples there are, where that is known without reading them."""
        return samples_in(self._data)

    @property
    def first(self) -> tuple[Tensor, Tensor | None]:
        """The first batch that is not empty, the same one for every process.

        Raises:
            UserError: As for :func:`batches`; or there is no sample.
        """
        belongs_here = self._team.leads or self._is_skimmed
        source = self._read() if belongs_here else self._raw(0, _AT_MOST)
        read: list[tuple[int, Any]] = []
        for item in source:
            read.append(item)
            batch = _prepared(self._model, *item)
            if batch is not None:
                if belongs_here:  # it is to be worked on, too
                    self._source = chain(_handed_over(read), source)
                return batch
        raise UserError("the data hold no sample: the loader is empty")

    def map(self, work: Callable[[Tensor, Tensor | None], T]) -> Iterator[T]:
        """What ``work(images, labels)`` gives for each batch, in the data's order, whichever process did it.

        Several processes work on one batch each before any of them is passed on.

        Args:
            work: Must not depend on other batches. With several processes its result is pickled, so it is best small
                and on the CPU.

        Raises:
            UserError: As for :func:`batches`.
            LostProcessError: A process is gone, as one is whose ``work`` raised an error.
        """
        items = self._read()
        if self._is_skimmed:
            items = islice(items, self._team.rank, None, self._team.count)
        if self._team.count > 1:
            yield from self._team.in_turns(lambda: self._turn(items, work))
            return
        for item in items:
            self.number = item[0]
            batch = _prepared(self._model, *item)
            del item  # nothing holds what was read while the batch is worked on
            if batch is not None:
                yield work(*batch)

    def _turn(
        self, items: Iterator[tuple[int, Any]], work: Callable[[Tensor, Tensor | None], T]
    ) -> tuple[T, ...] | None:
        """What came of this process's next batch, nothing of one that is empty; None where none is left."""
        item = next(items, None)
        if item is None:
            return None
        self.number = item[0]
        batch = _prepared(self._model, *item)
        return () if batch is None else (work(*batch),)

    @property
    def _is_skimmed(self) -> bool:
        """Whether processes read what belongs to others, too, since the data can be read only one after the other."""
        tensors = isinstance(self._data, Tensor) or _is_pair(self._data)
        return not (tensors or isinstance(self._data, NumberedBatches) or _sampled(self._data) is not None)

    def _read(self) -> Iterator[tuple[int, Any]]:
        """This process's batches with their numbers; all of them where the data are skimmed."""
        if self._source is None:
            self._source = self._raw(0, 1) if self._is_skimmed else self._raw(self._team.rank, self._team.count)
        return self._source

    def _raw(self, start: int, step: int) -> Iterator[tuple[int, Any]]:
        """Every ``step``-th batch from ``start`` on, of those that are asked for."""
        loader = _sampled(self._data)
        if self._numbers is None and step == 1:
            return islice(_numbered(_raw(self._data, self._batch_size)), start, None)
        if isinstance(self._data, NumberedBatches):
            numbers = (range(len(self._data)) if self._numbers is None else self._numbers)[start::step]
            return zip(numbers, self._data.numbered(numbers), strict=False)
        if loader is not None:
            samples = enumerate(self._order if self._order is not None else loader.batch_sampler or ())
            chosen = list(islice((item for item in samples if self._asks_for(item[0])), start, None, step))
            workers = 0 if step == _AT_MOST else loader.num_workers
            return zip(
                (number for number, _ in chosen), _reader(loader, [rows for _, rows in chosen], workers), strict=False
            )
        items = _numbered(_raw(self._data, self._batch_size))
        return islice((item for item in items if self._asks_for(item[0])), start, None, step)

    def _asks_for(self, number: int) -> bool:
        return self._chosen is None or number in self._chosen


def batches(model: nn.Module, data: Data, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images and labels, batch by batch, checked, on the model's device and in its dtype.

    The caller holds the model frozen.

    Args:
        model: Decides device and floating dtype, by its first parameter.
        data: See :data:`Data`.
        batch_size: Rows per batch when ``data`` is tensors.

    Yields:
        ``(images, labels)``, labels None where there are none.

    Raises:
        UserError: A batch is not images and labels, their numbers differ, a value is not finite, or the model holds
            half-precision weights on a CPU.
    """
    for number, batch in enumerate(_raw(data, batch_size)):
        ready = _prepared(model, number, batch)
        if ready is not None:
            yield ready


def _prepared(model: nn.Module, number: int, batch: Any) -> tuple[Tensor, Tensor | None] | None:
    """One batch, checked, on the model's device and in its dtype; None where it holds no image."""
    device, dtype = _placement(model)
    for module in model.modules():  # reading the data may have switched it, as some attacks do
        module.training = False
    images, labels = _split(batch, number)
    if images.shape[0] == 0:
        return None
    if dtype is None or not images.is_floating_point():
        dtype = dtype or torch.get_default_dtype()
    images = images.detach().to(device=device, dtype=dtype, non_blocking=True)
    if not _finite(images):
        row = int((~torch.isfinite(images.flatten(1)).all(1)).nonzero()[0, 0])
        raise UserError(f"image {row} of batch {number} holds NaN or inf: remove or repair it")
    return images, None if labels is None else labels.to(device)


def _finite(images: Tensor) -> bool:
    if images.numel() == 0:
        return True
    lowest, highest = images.aminmax()  # NaN passes through both; several times quicker than a test of every value
    return bool(lowest.isfinite() & highest.isfinite())


def samples_in(data: Data) -> int | None:
    """How many samples ``data`` holds, where that is known without reading it."""
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
    """How many samples ``data`` holds, and how many are in a batch, where neither its order nor these change.

    Args:
        data: See :data:`Data`.
        batch_size: Rows per batch when ``data`` is tensors.

    Raises:
        UserError: That is not known of the data, or they are shuffled.
    """
    samples, loader = samples_in(data), _sampled(data)
    if loader is not None and not isinstance(loader.sampler, SequentialSampler):
        raise UserError("the loader shuffles the data, or draws from them: results in a folder need a fixed order")
    rows = getattr(data, "batch_size", batch_size)
    if not samples or not isinstance(rows, int):
        raise UserError(
            "the number of samples, or of those in a batch, is not known in advance: results in a folder need tensors, "
            "or a DataLoader of a data set in its order, without drop_last or a batch sampler of its own"
        )
    return samples, rows


def _sampled(data: object) -> DataLoader[Any] | None:
    """The data as a loader that can be told which samples to read."""
    return data if isinstance(data, DataLoader) and data.batch_sampler is not None else None


def _reader(loader: DataLoader[Any], batches: list[Any], workers: int) -> Iterator[Any]:
    """Some batches of a loader, given by their samples, with the others unread."""
    return iter(
        DataLoader(
            loader.dataset,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            generator=loader.generator,
        )
    )


def _is_pair(data: object) -> bool:
    if not (
        isinstance(data, (tuple, list)) and len(data) == _PAIR and all(isinstance(tensor, Tensor) for tensor in data)
    ):
        return False
    labels = data[1]  # a list may also be two batches of images
    return isinstance(data, tuple) or not (labels.is_floating_point() and labels.ndim >= _PAIR)


def _raw(data: Data, batch_size: int) -> Iterable[Any]:
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
        raise UserError(f"data is {type(data).__name__}: pass a DataLoader, or tensors (images, labels)")
    return data


def _split(batch: Any, number: int) -> tuple[Tensor, Tensor | None]:
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    images, labels = parts[0] if parts else None, parts[1] if len(parts) > 1 else None
    if not isinstance(images, Tensor) or not (labels is None or isinstance(labels, Tensor)):
        kind = type(images if not isinstance(images, Tensor) else labels).__name__
        raise UserError(f"batch {number} holds {kind} where tensors were expected: (images, labels) or images")
    _check_images(images, number)
    if labels is not None:
        _check_counts(images, labels, number)
    return images, labels


def _check_images(images: Tensor, number: int) -> None:
    if images.layout != torch.strided or images.is_complex():
        kind = "complex numbers" if images.is_complex() else "a sparse tensor"
        raise UserError(f"batch {number} is {kind}: expected a dense, real tensor of images (N, C, H, W)")
    if images.ndim < _PAIR:
        raise UserError(f"batch {number} has shape {tuple(images.shape)}: expected images (N, C, H, W)")


def _check_counts(images: Tensor, labels: Tensor, number: int) -> None:
    if labels.ndim == 0 or images.shape[0] != labels.shape[0]:
        raise UserError(
            f"batch {number} has {images.shape[0]} images but labels of shape {tuple(labels.shape)}: give one per image"
        )


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return torch.device("cpu"), None
    if parameter.device.type == "cpu" and parameter.dtype == torch.float16:
        raise UserError("the model is in half precision (float16) on the CPU: use model.float(), or bfloat16 autocast")
    return parameter.device, parameter.dtype
