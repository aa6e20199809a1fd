"""A trace that can be interrupted at any moment, and goes on where it was.

The folder of a trace holds ``summary.json`` from the start, with the terms on which the result depends, files of routes
as they are finished (:mod:`attackroute.stored_routes`), and in ``partial.safetensors`` what is done of the one under
way. All of them end where batches end, so a resumed trace sees the same batches and gives the same routes, bit for
bit, as one that was never broken off. A file that is damaged is found by its checksum, and it alone is traced again.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError
from attackroute.core.files import INSTANCE_ROUTES_KIND, expect_mapping, file_errors, printable, read_header
from attackroute.core.journal import require_same_settings
from attackroute.routes import masks
from attackroute.routes.instance_routes import Edge, InstanceRoutes, aggregated, mean_of_most_frequent, sample_rows
from attackroute.routes.layer_map import LayerMap, require_model, require_same
from attackroute.routes.provenance import Provenance
from attackroute.routes.route import Route

ROUTES = "routes"


_NAME = re.compile(r"-(\d{5,})-of-(\d{5,})\.safetensors")


def shard_name(number: int, count: int, stem: str = ROUTES) -> str:
    """Name of one of ``count`` files; a file that is the only one has no number."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05}-of-{count:05}.safetensors"


def has_routes(folder: Path) -> bool:
    """Whether a folder holds instance routes."""
    return bool(_present(folder))


@dataclass(frozen=True)
class Shard:
    """One file of instance routes.

    Attributes:
        path: The file.
        start: Number of its first sample.
        samples: How many it holds.
        checksum: Of all that it holds.
    """

    path: Path
    start: int
    samples: int
    checksum: str

    def load(self) -> InstanceRoutes:
        """Read it.

        Raises:
            UserError: It is missing, damaged, or not the file that was there when the folder was opened.
        """
        routes = InstanceRoutes.load(self.path)
        if read_header(self.path, INSTANCE_ROUTES_KIND)["checksum"] != self.checksum:
            raise UserError(f"{printable(self.path)} is not the file that was there before: open the folder again")
        return routes


@dataclass(frozen=True, eq=False, repr=False)
class StoredRoutes:
    """Instance routes in a folder, as :class:`attackroute.InstanceRoutes` in memory; one file is read at a time.

    Attributes:
        shards: The files.
        channels: For each layer, in forward order, how many channels it has.
        provenance: Where the routes come from.
        methods: For each edge (source layer, target layer), how its influence was computed.
    """

    shards: tuple[Shard, ...]
    channels: Mapping[str, int]
    provenance: Provenance
    methods: Mapping[Edge, str]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], model: nn.Module | None = None) -> StoredRoutes:
        """Look at a folder that ``attackroute trace`` wrote; only the files' headers are read.

        Args:
            folder: The folder.
            model: When given, must have the routes' layers with their channel counts.

        Raises:
            UserError: A file is missing, damaged or something else, or the files do not belong together.
        """
        home = Path(folder)
        names = _present(home)
        if not names:
            raise UserError(f"{printable(home)} holds no instance routes: name a folder that attackroute trace wrote")
        count = len(names) if (match := _NAME.search(names[0])) is None else int(match[2])
        shards: list[Shard] = []
        origins: list[Provenance] = []
        methods: dict[Edge, list[str]] = {}
        channels: Mapping[str, int] = {}
        for name in (shard_name(number, count) for number in range(count)):
            path = home / name
            body = read_header(path, INSTANCE_ROUTES_KIND)
            with file_errors(path):
                origin = Provenance.from_json(body.get("provenance"))
                own = LayerMap(expect_mapping(body, "fingerprint"))
                if shards:
                    require_same(channels, own, printable(path))
                channels = own
                for source, target, method in body["methods"]:
                    methods.setdefault((source, target), []).append(method)
            start = shards[-1].start + shards[-1].samples if shards else 0
            shards.append(Shard(path, start, origin.samples, str(body["checksum"])))
            origins.append(origin)
        if model is not None:
            require_model(channels, model)
        joined = {edge: " + ".join(dict.fromkeys(found)) for edge, found in methods.items()}
        return cls(tuple(shards), channels, Provenance.merge(origins), joined)

    @property
    def layers(self) -> tuple[str, ...]:
        """Route layers' names in forward order."""
        return tuple(self.channels)

    @property
    def width(self) -> float:
        """Share of each layer's channels that is on each sample's route."""
        return self.provenance.width

    def __len__(self) -> int:
        return self.provenance.samples

    def __repr__(self) -> str:
        return f"StoredRoutes({len(self)} samples, {len(self.channels)} layers, {len(self.shards)} files)"

    def parts(self) -> Iterator[InstanceRoutes]:
        """The routes file by file, in the samples' order.

        Raises:
            UserError: A file is damaged.
        """
        for shard in self.shards:
            yield shard.load()

    def load(self) -> InstanceRoutes:
        """All of them in memory: a bit for each channel of each sample."""
        return InstanceRoutes.concatenate(self.parts())

    def select(self, index: slice | Sequence[int] | Tensor) -> InstanceRoutes:
        """The routes of some samples; files that hold none of them are not read.

        Args:
            index: As for :meth:`attackroute.InstanceRoutes.select`.

        Raises:
            UserError: The index selects no sample or is out of range, or a file is damaged.
        """
        rows = sample_rows(index, len(self)).remainder(len(self))  # negative ones count from the end
        starts = torch.tensor([shard.start for shard in self.shards])
        home = torch.searchsorted(starts, rows, right=True) - 1
        found: list[InstanceRoutes] = []
        places: list[Tensor] = []
        for number in home.unique().tolist():
            places.append((home == number).nonzero().flatten())
            found.append(self.shards[number].load().select(rows[places[-1]] - self.shards[number].start))
        order = torch.cat(places).argsort()
        return InstanceRoutes.concatenate(found).select(order)

    def frequency(self) -> dict[str, Tensor]:
        """Share of the samples whose route uses each channel, float64 (C,) for each layer."""
        return frequency_of(self.parts())

    def occurrence(self, share: float = 0.2) -> dict[str, float]:
        """See :meth:`attackroute.InstanceRoutes.occurrence`."""
        return mean_of_most_frequent(self.frequency(), share)

    def aggregate(self, width: float = 0.3) -> Route:
        """See :meth:`attackroute.InstanceRoutes.aggregate`."""
        return aggregated(self.frequency(), width, self.provenance)


def frequency_of(parts: Iterator[InstanceRoutes]) -> dict[str, Tensor]:
    """Share of all parts' samples whose route uses each channel: counts are added, which is exact."""
    counts: dict[str, Tensor] = {}
    samples = 0
    for part in parts:
        samples += len(part)
        for layer, channels in part.channels.items():
            own = masks.count(part.packed[layer], channels)
            counts[layer] = own if layer not in counts else counts[layer] + own
    return {layer: count.double() / samples for layer, count in counts.items()}


def _present(folder: Path) -> list[str]:
    if (folder / shard_name(0, 1)).is_file():
        return [shard_name(0, 1)]
    return sorted(path.name for path in folder.glob(f"{ROUTES}-*.safetensors") if _NAME.search(path.name))


ROUTE = "route.json"


TRACE = "trace"
"""Kind of the summary."""


_SUMMARY = "summary"


_PARTIAL = "partial"


_SHARD_SAMPLES = 8192  # some megabytes


_AUTOSAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Missing:
    """Samples that are to be traced, all of one file.

    Attributes:
        number: Number of the file.
        start: First of the samples.
        stop: End of the samples, and of the file.
        notes: What was found to be wrong with the file, for the user.
    """

    number: int
    start: int
    stop: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TraceFolder:
    """The files of one trace.

    Args:
        path: The folder, which exists.
        terms: All that must be the same for a trace to go on, as JSON values.
        samples: How many samples the whole trace has.
        batch_size: Samples in a batch.
    """

    path: Path
    terms: Mapping[str, Any]
    samples: int
    batch_size: int

    @property
    def shard(self) -> int:
        """How many samples there are in every file but the last."""
        return self.batch_size * -(-_SHARD_SAMPLES // self.batch_size)

    @property
    def count(self) -> int:
        """How many files there are in the end."""
        return -(-self.samples // self.shard)

    def open(self, model: nn.Module, *, resume: bool) -> tuple[Missing, ...]:
        """Make the folder ready for writing, and see what is done.

        Args:
            model: The network that is traced.
            resume: Go on with the trace in the folder, finished or not, if it holds one.

        Returns:
            What is to be traced, in order.

        Raises:
            UserError: The folder holds an unfinished trace although ``resume`` is false, or one on other terms.
        """
        summary = self._read_summary()
        if resume and summary is not None:
            require_same_settings(f"the trace in {self.path}", summary.get("terms"), terms)
            return tuple(found for number in range(self.count) if (found := self._missing(number, model)) is not None)
        held = sorted({*self.path.glob(f"{ROUTES}*.safetensors"), *self.path.glob(f"{_PARTIAL}*.safetensors")})
        if held and summary is not None and summary.about.get("finished") is False:
            raise UserError(
                f"{self.path} holds an unfinished trace; pass --resume to go on with it, or choose another folder"
            )
        self._summary("", {"finished": False}).save(self.path, _SUMMARY)
        for stale in (*held, self.path / ROUTE):
            stale.unlink(missing_ok=True)
        return tuple(Missing(number, *self._range(number)) for number in range(self.count))

    def save(self, number: int, routes: InstanceRoutes) -> None:
        """Write a whole file of routes; when this returns, no crash loses it."""
        routes.save(self.path / shard_name(number, self.count))
        self._partial(number).unlink(missing_ok=True)

    def save_partial(self, number: int, routes: InstanceRoutes) -> None:
        """Keep the samples of a file that are done."""
        routes.save(self._partial(number))

    def held(self, missing: Missing) -> list[InstanceRoutes]:
        """The routes of a file's samples before those that are missing; none, or all in one."""
        return [InstanceRoutes.load(self._partial(missing.number))] if missing.start % self.shard else []

    @property
    def settings(self) -> dict[str, Any]:
        """The terms, and how many samples are in a file."""
        return {**self.terms, "file-samples": self.shard}

    def finish(self, route: Route, reading: str, result: Mapping[str, Any]) -> Document:
        """Write the model route, and the summary with the checksums of all files."""
        route.save(self.path / ROUTE)
        names = [shard_name(number, self.count) for number in range(self.count)]
        sums = {name: files.read_header(self.path / name, files.INSTANCE_ROUTES)["checksum"] for name in names}
        document = self._summary(reading, {"finished": True, "files": sums, **result})
        document.save(self.path, _SUMMARY)
        return document

    def _summary(self, reading: str, about: Mapping[str, Any]) -> Document:
        return Document(TRACE, self.settings, reading, about=about)

    def _missing(self, number: int, model: nn.Module) -> Missing | None:
        """What is to be traced of a file; None where it is whole."""
        start, stop = self._range(number)
        notes: list[str] = []
        for path in (self.path / shard_name(number, self.count), self._partial(number)):
            if not path.exists():
                continue
            try:
                routes = InstanceRoutes.load(path)
            except UserError as error:
                notes.append(f"{error}; its samples are traced again")
                continue
            whole = len(routes) == stop - start
            if len(routes) > stop - start or (path != self._partial(number) and not whole):
                notes.append(f"{path} has {len(routes)} samples, not {stop - start}; they are traced again")
                continue
            require_model(routes.channels, model)
            if whole and path == self._partial(number):  # the disk was full when it was to be written as a whole
                self.save(number, routes)
            start += len(routes)
            break
        return None if start >= stop else Missing(number, start, stop, tuple(notes))

    def _range(self, number: int) -> tuple[int, int]:
        return number * self.shard, min((number + 1) * self.shard, self.samples)

    def _partial(self, number: int) -> Path:
        return self.path / shard_name(number, self.count, _PARTIAL)

    def _read_summary(self) -> Document | None:
        path = self.path / f"{_SUMMARY}.json"
        return Document.load(path) if path.exists() else None


class RouteWriter:
    """Puts routes that come batch by batch into files, each as soon as it is whole.

    Args:
        folder: Where; None keeps all in memory.
        missing: What comes, in order.
    """

    def __init__(self, folder: TraceFolder | None, missing: Sequence[Missing]) -> None:
        self._folder, self._missing = folder, list(missing)
        self._parts: list[InstanceRoutes] = []
        self._saved = time.monotonic()
        self._begin()

    @property
    def routes(self) -> InstanceRoutes:
        """What is in memory."""
        return InstanceRoutes.concatenate(self._parts)

    def add(self, part: InstanceRoutes) -> None:
        """Take the next batch."""
        self._parts.append(part)
        if self._folder is None:
            return
        number, size = self._missing[0].number, self._missing[0].stop % self._folder.shard or self._folder.shard
        if sum(map(len, self._parts)) == size:
            self._folder.save(number, self.routes)
            del self._missing[0]
            self._begin()
        elif time.monotonic() - self._saved > _AUTOSAVE_SECONDS:
            self._parts = [self.routes]
            self.keep()

    def keep(self) -> None:
        """Write down what is done of the file under way."""
        if self._folder is not None and self._missing and self._parts:
            self._folder.save_partial(self._missing[0].number, self.routes)
        self._saved = time.monotonic()

    def _begin(self) -> None:
        if self._folder is not None:
            self._parts = self._folder.held(self._missing[0]) if self._missing else []
