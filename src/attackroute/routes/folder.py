"""The routes of many samples in a folder: written while they are traced, read file by file.

The folder holds ``summary.json`` from the start, with the settings on which the result depends, files of routes as they
are finished, and in ``partial*.safetensors`` what is done of the one under way. All of them end where batches end, so
a resumed trace sees the same batches and gives the same routes, bit for bit, as one that was never broken off. A file
that is damaged is found by its checksum, and it alone is traced again. In the end ``route.json`` is the model's route.
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

from attackroute.core.document import Document
from attackroute.core.errors import UserError
from attackroute.core.files import (
    INSTANCE_ROUTES_KIND,
    expect_mapping,
    file_errors,
    made_folder,
    printable,
    read_header,
)
from attackroute.core.journal import require_same_settings
from attackroute.routes.instance_routes import Edge, InstanceRoutes, SampleRoutes, joined_methods
from attackroute.routes.layer_map import LayerMap, require_model, require_same
from attackroute.routes.masks import sample_rows, usage_counts
from attackroute.routes.provenance import Provenance
from attackroute.routes.route import Route

ROUTE = "route.json"
TRACE = "trace"
"""Kind of the document in which a trace is summed up."""

_ROUTES, _PARTIAL, _SUMMARY = "routes", "partial", "summary"
_NUMBERED = re.compile(r"-(\d{5,})-of-(\d{5,})\.safetensors")
_SHARD_SAMPLES = 8192  # some megabytes
_AUTOSAVE_SECONDS = 60.0


def has_routes(folder: Path) -> bool:
    """Whether a folder holds instance routes."""
    return bool(_shard_files(folder))


@dataclass(frozen=True, eq=False)
class RouteTotals(SampleRoutes):
    """What the routes of many samples come to together: sums that add up exactly, whichever files they are in.

    Attributes:
        channels: Channel count of each layer, in forward order.
        provenance: Where the routes come from.
        methods: For each edge (source, target), how its influence was computed.
        usage: For each layer, how many samples' routes use each channel, int64 (C,).
        correct: Samples whose prediction is their label; None where there are no labels.
        sketches: For each layer with sketched edges the sums over the samples of their draws, of their expected overlap
            and of the share of their channels that is undecided.
    """

    channels: Mapping[str, int]
    provenance: Provenance
    methods: Mapping[Edge, str]
    usage: Mapping[str, Tensor]
    correct: int | None
    sketches: Mapping[str, tuple[float, ...]]

    @classmethod
    def of(cls, routes: InstanceRoutes) -> RouteTotals:
        """The totals of routes in memory."""
        sketches: dict[str, tuple[float, ...]] = {}
        if (errors := routes.sketched) is not None:
            for layer in errors.layers:
                values = (errors.draws[layer], errors.overlap[layer], errors.undecided(layer).double().mean(1))
                sketches[layer] = tuple(value.double().sum().item() for value in values)
        labels, predictions = routes.labels, routes.predictions
        return cls(
            routes.channels,
            routes.provenance,
            routes.methods,
            usage={layer: usage_counts(routes.packed[layer], count) for layer, count in routes.channels.items()},
            correct=None if labels is None or predictions is None else int((labels == predictions).sum()),
            sketches=sketches,
        )

    @classmethod
    def sum(cls, parts: Sequence[RouteTotals]) -> RouteTotals:
        """The totals of several sets of samples together, in their order.

        Raises:
            UserError: They have different layers.
        """
        first = parts[0]
        for number, totals in enumerate(parts[1:], start=2):
            require_same(first.channels, totals.channels, f"part {number}")
        correct = [totals.correct for totals in parts if totals.correct is not None]
        return cls(
            first.channels,
            Provenance.merge([totals.provenance for totals in parts]),
            joined_methods([totals.methods for totals in parts]),
            usage={layer: sum(totals.usage[layer] for totals in parts) for layer in first.channels},  # type: ignore[misc]
            correct=sum(correct) if len(correct) == len(parts) else None,
            sketches={
                layer: tuple(map(sum, zip(*(totals.sketches[layer] for totals in parts), strict=True)))
                for layer in first.sketches
            },
        )

    def frequency(self) -> dict[str, Tensor]:
        """Share of the samples whose route uses each channel, float64 (C,) for each layer."""
        return {layer: counts.double() / len(self) for layer, counts in self.usage.items()}

    def document(self, route: Route, settings: Mapping[str, Any], **about: Any) -> Document:
        """What is to be said of a trace, with the model's route: the same for every run with the same result."""
        origin = self.provenance
        occurrence = self.occurrence(origin.width)
        accuracy = None if self.correct is None else self.correct / origin.samples
        layers: list[dict[str, Any]] = []
        for layer, count in self.channels.items():
            layers.append(
                {
                    "layer": layer,
                    "channels": count,
                    "route_channels": list(route.indices[layer]),
                    "occurrence": occurrence[layer],
                    "incoming": {source: how for (source, target), how in self.methods.items() if target == layer},
                }
            )
            if layer in self.sketches:  # how far the layer's routes can be trusted: means over the samples
                means = [total / origin.samples for total in self.sketches[layer]]
                layers[-1] |= zip(("sketches", "expected_overlap", "undecided"), means, strict=True)
        about |= {
            "samples": origin.samples,
            "accuracy": accuracy,
            "attack": origin.attack,
            "criterion": origin.criterion,
            "width": origin.width,
            "route_width": None if route.provenance is None else route.provenance.width,
            "layers": layers,
        }
        reading = "" if accuracy is None else f"The network is right on {accuracy:.1%} of {origin.samples} samples."
        return Document(TRACE, settings, reading, about=about)


@dataclass(frozen=True)
class Shard:
    """One file of instance routes.

    Attributes:
        path: The file.
        start: Number of its first sample.
        checksum: Of all that it holds.
    """

    path: Path
    start: int
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
class RouteFolder(SampleRoutes):
    """Instance routes in a folder, as :class:`attackroute.InstanceRoutes` in memory; one file is read at a time.

    Attributes:
        shards: The files.
        channels: For each layer, in forward order, how many channels it has.
        provenance: Where the routes come from.
        methods: For each edge (source layer, target layer), how its influence was computed.
        totals: What all samples come to, where it was counted while they were traced; None reads the files for it.
    """

    shards: tuple[Shard, ...]
    channels: Mapping[str, int]
    provenance: Provenance
    methods: Mapping[Edge, str]
    totals: RouteTotals | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str], model: nn.Module | None = None) -> RouteFolder:
        """Look at a folder that a trace has written; only the files' headers are read.

        Args:
            folder: The folder.
            model: When given, must have the routes' layers with their channel counts.

        Raises:
            UserError: A file is missing, damaged or something else, or the files do not belong together.
        """
        path = Path(folder)
        names = _shard_files(path)
        if not names:
            raise UserError(f"{printable(path)} holds no instance routes: name a folder that attackroute trace wrote")
        count = len(names) if (match := _NUMBERED.search(names[0])) is None else int(match[2])
        shards: list[Shard] = []
        origins: list[Provenance] = []
        methods: list[dict[Edge, str]] = []
        channels: Mapping[str, int] = {}
        for file in (path / _file_name(number, count) for number in range(count)):
            header = read_header(file, INSTANCE_ROUTES_KIND)
            with file_errors(file):
                layers = LayerMap(expect_mapping(header, "fingerprint"))
                if shards:
                    require_same(channels, layers, printable(file))
                channels = layers
                methods.append({(source, target): method for source, target, method in header["methods"]})
                shards.append(Shard(file, sum(origin.samples for origin in origins), str(header["checksum"])))
                origins.append(Provenance.from_json(header.get("provenance")))
        if model is not None:
            require_model(channels, model)
        return cls(tuple(shards), channels, Provenance.merge(origins), joined_methods(methods))

    @property
    def path(self) -> Path:
        """The folder."""
        return self.shards[0].path.parent

    def __repr__(self) -> str:
        return f"RouteFolder({len(self)} samples, {len(self.channels)} layers, {len(self.shards)} files)"

    def parts(self) -> Iterator[InstanceRoutes]:
        """The routes file by file, in the samples' order; a `UserError` says which file is damaged."""
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
        numbers = torch.searchsorted(starts, rows, right=True) - 1
        selected: list[InstanceRoutes] = []
        positions: list[Tensor] = []
        for number in numbers.unique().tolist():
            positions.append((numbers == number).nonzero().flatten())
            shard = self.shards[number]
            selected.append(shard.load().select(rows[positions[-1]] - shard.start))
        return InstanceRoutes.concatenate(selected).select(torch.cat(positions).argsort())

    def frequency(self) -> dict[str, Tensor]:
        """Share of the samples whose route uses each channel, float64 (C,) for each layer."""
        return self._counted().frequency()

    def save_route(self, width: float = 0.3) -> Document:
        """Write the model's route as ``route.json``, and what there is to say of it and of all samples.

        Returns:
            What ``summary.json`` then holds.

        Raises:
            UserError: A file cannot be written, or is damaged.
        """
        settings = Document.load(self.path / f"{_SUMMARY}.json").settings
        route = self.aggregate(width)
        route.save(self.path / ROUTE)
        checksums = {shard.path.name: shard.checksum for shard in self.shards}
        document = self._counted().document(route, settings, finished=True, files=checksums)
        document.save(self.path, _SUMMARY)
        return document

    def _counted(self) -> RouteTotals:
        return self.totals or RouteTotals.sum([RouteTotals.of(routes) for routes in self.parts()])


@dataclass(frozen=True)
class Gap:
    """Samples that are to be traced, all of one file.

    Attributes:
        number: Number of the file.
        start: First of the samples.
        stop: End of the samples, and of the file.
        faults: What is wrong with the files that were there, for the user.
    """

    number: int
    start: int
    stop: int
    faults: tuple[str, ...] = ()


class RouteWriter:
    """Puts the routes of a trace, which come batch by batch, into the files of a folder, each as soon as it is whole.

    Args:
        folder: The folder; it is created where it is missing.
        settings: All that must be the same for a trace to go on, as JSON values.
        samples: How many samples the whole trace has.
        batch_size: Samples in a batch.
    """

    def __init__(
        self, folder: str | os.PathLike[str], settings: Mapping[str, Any], samples: int, batch_size: int
    ) -> None:
        self._path, self._samples, self._batch_size = Path(folder), samples, batch_size
        self._shard = batch_size * -(-_SHARD_SAMPLES // batch_size)  # samples in every file but the last
        self._count = -(-samples // self._shard)
        self._settings = {**settings, "file-samples": self._shard}
        self._gaps: list[Gap] = []
        self._pending: list[InstanceRoutes] = []  # of the file under way
        self._saved = time.monotonic()
        self._shards: dict[int, Shard] = {}
        self._totals: dict[int, RouteTotals] = {}

    def begin(self, model: nn.Module, *, resume: bool) -> tuple[Gap, ...]:
        """Make the folder ready for writing, and see what of the trace of a model is to be done, in order.

        With ``resume`` the trace in the folder, if it holds one, goes on, finished or not.

        Raises:
            UserError: The folder cannot be used, holds a trace although ``resume`` is false, or another one.
        """
        made_folder(self._path)
        summary = self._path / f"{_SUMMARY}.json"
        previous = Document.load(summary) if summary.exists() else None
        if resume and previous is not None:
            require_same_settings(f"the trace in {self._path}", previous.settings, self._settings)
            gaps = [self._gap(number, model) for number in range(self._count)]
            self._gaps = [gap for gap in gaps if gap is not None]
        else:
            if any(file for stem in (_ROUTES, _PARTIAL) for file in self._path.glob(f"{stem}*.safetensors")):
                raise UserError(f"{self._path} holds a trace; resume to go on with it, or choose another folder")
            Document(TRACE, self._settings, about={"finished": False}).save(self._path, _SUMMARY)
            self._gaps = [Gap(number, *self._range(number)) for number in range(self._count)]
        self._open_file()
        return tuple(self._gaps)

    def add(self, routes: InstanceRoutes) -> None:
        """Take the next batch."""
        self._pending.append(routes)
        number, (start, stop) = self._gaps[0].number, self._range(self._gaps[0].number)
        if sum(map(len, self._pending)) == stop - start:
            self._save(number, InstanceRoutes.concatenate(self._pending))
            del self._gaps[0]
            self._open_file()
        elif time.monotonic() - self._saved > _AUTOSAVE_SECONDS:
            self.keep()

    def keep(self) -> None:
        """Write down what is done of the file under way; when this returns, no crash loses it."""
        if self._gaps and self._pending:
            self._pending = [InstanceRoutes.concatenate(self._pending)]
            self._pending[0].save(self._file(self._gaps[0].number, _PARTIAL))
        self._saved = time.monotonic()

    def finish(self) -> RouteFolder:
        """Write the model's route and the summary, once all files are whole."""
        totals = RouteTotals.sum([self._totals[number] for number in range(self._count)])
        shards = tuple(self._shards[number] for number in range(self._count))
        routes = RouteFolder(shards, totals.channels, totals.provenance, methods=totals.methods, totals=totals)
        routes.save_route()
        return routes

    def _open_file(self) -> None:
        """Take up what there is of the next file that is not whole."""
        self._pending = []
        if self._gaps and self._gaps[0].start % self._shard:
            self._pending.append(InstanceRoutes.load(self._file(self._gaps[0].number, _PARTIAL)))

    def _save(self, number: int, routes: InstanceRoutes) -> None:
        checksum = routes.save(self._file(number))
        self._file(number, _PARTIAL).unlink(missing_ok=True)
        self._note(number, routes, checksum)

    def _note(self, number: int, routes: InstanceRoutes, checksum: str) -> None:
        self._shards[number] = Shard(self._file(number), self._range(number)[0], checksum)
        self._totals[number] = RouteTotals.of(routes)

    def _gap(self, number: int, model: nn.Module) -> Gap | None:
        """What is to be traced of a file; None where it is whole."""
        start, stop = self._range(number)
        faults: list[str] = []
        for path in (self._file(number), self._file(number, _PARTIAL)):
            if not path.exists():
                continue
            try:
                routes = InstanceRoutes.load(path)
            except UserError as error:
                faults.append(f"{error}; its samples are traced again")
                continue
            is_partial = path == self._file(number, _PARTIAL)
            is_whole = len(routes) == stop - start
            if not is_whole and (not is_partial or len(routes) > stop - start or len(routes) % self._batch_size):
                faults.append(f"{path} has {len(routes)} samples, not {stop - start}; they are traced again")
                continue
            require_model(routes.channels, model)
            if not is_whole:
                start += len(routes)
                break
            if is_partial:  # the disk was full when it was to be written as a whole
                self._save(number, routes)
            else:
                self._note(number, routes, str(read_header(path, INSTANCE_ROUTES_KIND)["checksum"]))
            return None
        return Gap(number, start, stop, tuple(faults))

    def _range(self, number: int) -> tuple[int, int]:
        return number * self._shard, min((number + 1) * self._shard, self._samples)

    def _file(self, number: int, stem: str = _ROUTES) -> Path:
        return self._path / _file_name(number, self._count, stem)


def _file_name(number: int, count: int, stem: str = _ROUTES) -> str:
    """Name of one of ``count`` files; a file that is the only one has no number."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05}-of-{count:05}.safetensors"


def _shard_files(folder: Path) -> list[str]:
    """Names of the files of routes in a folder."""
    if (folder / _file_name(0, 1)).is_file():
        return [_file_name(0, 1)]
    return sorted(file.name for file in folder.glob(f"{_ROUTES}-*.safetensors") if _NUMBERED.search(file.name))
