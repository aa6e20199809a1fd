"""The routes of many samples in a folder: written while they are traced, read file by file.

The folder holds ``summary.json`` from the start, with the settings on which the result depends, and files of routes,
the last of which may be begun alone. All of them end where batches end, so a resumed trace sees the same batches and
gives the same routes, bit for bit, as one that was never broken off. Each file says which part of which trace it is,
under its checksum: one that is damaged, or another's, is traced again, and it alone. In the end ``route.json`` is the
model's route.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
from attackroute.routes.instance_routes import Edge, InstanceRoutes, SampleRoutes, joined_methods, read_methods
from attackroute.routes.layer_map import channel_counts, require_model, require_same
from attackroute.routes.provenance import Provenance
from attackroute.routes.route import Route

ROUTE = "route.json"
TRACE = "trace"
"""Kind of the document in which a trace is summed up."""

_ROUTES, _SUMMARY = "routes", "summary"
_NUMBERED = re.compile(r"-(\d{5,})-of-(\d{5,})\.safetensors")
_SHARD_SAMPLES = 8192  # some megabytes
_AUTOSAVE_SECONDS = 60.0


def has_routes(folder: Path) -> bool:
    """Whether a folder holds instance routes."""
    return bool(_route_files(folder))


def trace_document(routes: SampleRoutes, route: Route, settings: Mapping[str, Any], **about: Any) -> Document:
    """What is to be said of a trace, with the model's route: the same for every run with the same result."""
    origin, totals = routes.provenance, routes.totals
    occurrence = routes.occurrence(origin.width)
    accuracy = None if "correct" not in totals else int(totals["correct"]) / origin.samples
    layers = [
        {
            "layer": layer,
            "channels": count,
            "route_channels": list(route.indices[layer]),
            "occurrence": occurrence[layer],
            "incoming": {source: how for (source, target), how in routes.methods.items() if target == layer},
            # so many samples have no score but zero, and the first channels for a route
            **({"unranked": unranked} if unranked else {}),
        }
        for (layer, count), unranked in zip(routes.channels.items(), totals["unranked"].tolist(), strict=True)
    ]
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


@dataclass(frozen=True, eq=False, repr=False)
class RouteFolder(SampleRoutes):
    """Instance routes in a folder, as :class:`attackroute.InstanceRoutes` in memory; one file is read at a time.

    Attributes:
        files: The files, in the samples' order; for the others see :class:`SampleRoutes`.
    """

    files: tuple[Path, ...]
    channels: Mapping[str, int]
    provenance: Provenance
    methods: Mapping[Edge, str]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> RouteFolder:
        """Look at a folder that a trace has written; only the files' headers are read.

        Raises:
            UserError: A file is missing, damaged or something else, or the files do not belong together.
        """
        path = Path(folder)
        names = _route_files(path)
        if not names:
            raise UserError(f"{printable(path)} holds no instance routes: name a folder that attackroute trace wrote")
        count = len(names) if (match := _NUMBERED.search(names[0])) is None else int(match[2])
        summary = path / f"{_SUMMARY}.json"
        settings = Document.load(summary).settings if summary.exists() else None
        files = [path / _file_name(number, count) for number in range(count)]
        channels: Mapping[str, int] = {}
        origins: list[Provenance] = []
        methods: list[dict[Edge, str]] = []
        for number, file in enumerate(files):
            header = read_header(file, INSTANCE_ROUTES_KIND)
            with file_errors(file):
                counts = channel_counts(expect_mapping(header, "fingerprint"))
                channels = channels or counts
                require_same(channels, counts, printable(file))
                if settings is not None and header.get("part") != _part(number, settings, whole=True):
                    raise UserError("is not this part of the trace, but another file: trace with --resume to mend it")
                methods.append(read_methods(header.get("methods")))
                origins.append(Provenance.from_json(header.get("provenance")))
        return cls(tuple(files), channels, Provenance.merge(origins), joined_methods(methods))

    @property
    def path(self) -> Path:
        """The folder."""
        return self.files[0].parent

    def __repr__(self) -> str:
        return f"RouteFolder({len(self)} samples, {len(self.channels)} layers, {len(self.files)} files)"

    @cached_property
    def totals(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Sums over the samples, see :class:`SampleRoutes`, for which every file is read once."""
        parts = [routes.totals for routes in self.parts()]
        names = [name for name in parts[0] if all(name in part for part in parts)]
        return {name: sum(part[name] for part in parts) for name in names}  # type: ignore[misc]

    def parts(self) -> Iterator[InstanceRoutes]:
        """The routes file by file, in the samples' order; a `UserError` says which file is damaged."""
        for file in self.files:
            yield InstanceRoutes.load(file)

    def load(self) -> InstanceRoutes:
        """All of them in memory: a bit for each channel of each sample."""
        return InstanceRoutes.concatenate(self.parts())

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
        document = trace_document(self, route, settings, finished=True)
        document.save(self.path, _SUMMARY)
        return document


@dataclass(frozen=True)
class Gap:
    """Samples ``start`` to ``stop`` that are to be traced, up to the end of the file of this number.

    ``faults`` says what is wrong with the files that were there, for the user.
    """

    number: int
    start: int
    stop: int
    faults: tuple[str, ...] = ()


class RouteWriter:
    """Puts the routes of a trace, which come batch by batch, into the files of a folder, each as soon as it is whole.

    ``settings`` is all that must be the same for a trace of so many samples to go on, as JSON values.
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

    def begin(self, model: nn.Module, *, resume: bool) -> tuple[Gap, ...]:
        """Make the folder ready for writing, and see what of the trace of a model is to be done, in order.

        With ``resume`` the trace in the folder, if it holds one, goes on, finished or not.

        Raises:
            UserError: The folder cannot be used, holds a trace although ``resume`` is false, or another one.
        """
        made_folder(self._path)
        summary = self._path / f"{_SUMMARY}.json"
        previous = Document.load(summary) if summary.exists() else None
        present = sorted(self._path.glob(f"{_ROUTES}*.safetensors"))
        if resume and previous is not None:
            require_same_settings(f"the trace in {self._path}", previous.settings, self._settings)
            if strays := sorted(set(present) - {self._file(number) for number in range(self._count)}):
                raise UserError(f"{printable(strays[0])} is no part of the trace in that folder: move it away")
            gaps = [self._gap(number, model) for number in range(self._count)]
            self._gaps = [gap for gap in gaps if gap is not None]
            if self._gaps:
                self._summarise_unfinished()
        else:
            if present:
                raise UserError(f"{self._path} holds a trace; resume to go on with it, or choose another folder")
            self._summarise_unfinished()
            self._gaps = [Gap(number, *self._range(number)) for number in range(self._count)]
        self._open_file()
        return tuple(self._gaps)

    def add(self, routes: InstanceRoutes) -> None:
        """Take the next batch."""
        self._pending.append(routes)
        number, (start, stop) = self._gaps[0].number, self._range(self._gaps[0].number)
        if sum(map(len, self._pending)) == stop - start:
            self._save(number, whole=True)
            del self._gaps[0]
            self._open_file()
        elif time.monotonic() - self._saved > _AUTOSAVE_SECONDS:
            self.keep()

    def keep(self) -> None:
        """Write down what is done of the file under way; when this returns, a kill does not lose it."""
        if self._gaps and self._pending:
            self._save(self._gaps[0].number, whole=False)
        self._saved = time.monotonic()

    def finish(self) -> RouteFolder:
        """Write the model's route and the summary, once all files are whole."""
        routes = RouteFolder.open(self._path)
        routes.save_route()
        return routes

    def _summarise_unfinished(self) -> None:
        Document(TRACE, self._settings, about={"finished": False}).save(self._path, _SUMMARY)

    def _open_file(self) -> None:
        """Take up what there is of the next file that is not whole."""
        self._pending = []
        if self._gaps and self._gaps[0].start % self._shard:
            self._pending.append(InstanceRoutes.load(self._file(self._gaps[0].number)))

    def _save(self, number: int, *, whole: bool) -> None:
        self._pending = [InstanceRoutes.concatenate(self._pending)]
        self._pending[0].save(self._file(number), _part(number, self._settings, whole=whole))

    def _gap(self, number: int, model: nn.Module) -> Gap | None:
        """What is to be traced of a file; None where it is whole."""
        start, stop = self._range(number)
        path = self._file(number)
        if not path.exists():
            return Gap(number, start, stop)
        try:
            routes = InstanceRoutes.load(path)
            is_whole = len(routes) == stop - start
            if read_header(path, INSTANCE_ROUTES_KIND).get("part") != _part(number, self._settings, whole=is_whole):
                raise UserError(f"{path} is another part, or of another trace")
        except UserError as error:
            return Gap(number, start, stop, (f"{error}; its samples are traced again",))
        require_model(routes.channels, model)
        return None if is_whole else Gap(number, start + len(routes), stop)

    def _range(self, number: int) -> tuple[int, int]:
        return number * self._shard, min((number + 1) * self._shard, self._samples)

    def _file(self, number: int) -> Path:
        return self._path / _file_name(number, self._count)


def _part(number: int, settings: Mapping[str, Any], *, whole: bool) -> dict[str, Any]:
    """What a file says of its place: its number, a digest of the trace's settings, and if all of its samples are in."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    return {"file": number, "trace": digest.hexdigest(), "whole": whole}


def _file_name(number: int, count: int) -> str:
    """Name of one of ``count`` files; a file that is the only one has no number."""
    return f"{_ROUTES}.safetensors" if count == 1 else f"{_ROUTES}-{number:05}-of-{count:05}.safetensors"


def _route_files(folder: Path) -> list[str]:
    """Names of the files of routes in a folder, which must be those of one trace."""
    numbered = {file.name: _NUMBERED.search(file.name) for file in folder.glob(f"{_ROUTES}-*.safetensors")}
    counts = {name: int(match[2]) for name, match in numbered.items() if match is not None}
    if (folder / _file_name(0, 1)).is_file():
        counts[_file_name(0, 1)] = 1
    names = sorted(counts)
    if len(set(counts.values())) > 1:
        raise UserError(f"{printable(folder)} holds files of two traces ({names[0]}, {names[-1]}): move one set away")
    return names
