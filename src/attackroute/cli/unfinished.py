"""A trace that can be interrupted at any moment, and goes on where it was.

The folder of a trace holds ``summary.json`` from the start, with the terms on which the result depends, files of routes
as they are finished (:mod:`attackroute.stored_routes`), and in ``partial.safetensors`` what is done of the one under
way. All of them end where batches end, so a resumed trace sees the same batches and gives the same routes, bit for
bit, as one that was never broken off. A file that is damaged is found by its checksum, and it alone is traced again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from attackroute import routefile
from attackroute.errors import UserError
from attackroute.files import replace_file
from attackroute.fingerprint import require_model
from attackroute.instances import InstanceRoutes
from attackroute.routes import Route
from attackroute.stored_routes import ROUTES, shard_name
from attackroute.terms import require_same_terms

ROUTE = "route.json"
SUMMARY = "summary.json"

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
        terms = {**self.terms, "file-samples": self.shard}
        if resume and summary is not None:
            require_same_terms(f"the trace in {self.path}", summary.get("terms"), terms)
            return tuple(found for number in range(self.count) if (found := self._missing(number, model)) is not None)
        held = sorted({*self.path.glob(f"{ROUTES}*.safetensors"), *self.path.glob(f"{_PARTIAL}*.safetensors")})
        if held and summary is not None and summary.get("finished") is False:
            raise UserError(
                f"{self.path} holds an unfinished trace; pass --resume to go on with it, or choose another folder"
            )
        write_json(self.path / SUMMARY, {"finished": False, "terms": terms})
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

    def finish(self, route: Route, result: Mapping[str, Any]) -> None:
        """Write the model route, and the summary with the checksums of all files."""
        route.save(self.path / ROUTE)
        names = [shard_name(number, self.count) for number in range(self.count)]
        sums = {name: routefile.read_header(self.path / name, routefile.INSTANCE_ROUTES)["checksum"] for name in names}
        terms = {**self.terms, "file-samples": self.shard}
        write_json(self.path / SUMMARY, {"finished": True, "terms": terms, "files": sums, **result})

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

    def _read_summary(self) -> dict[str, Any] | None:
        path = self.path / SUMMARY
        try:
            summary = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}); remove it or choose another folder") from error
        if not isinstance(summary, dict):
            raise UserError(f"{path} is not the summary of a trace; choose another folder")
        return summary


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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step, so that no reader ever sees half of it.

    Raises:
        UserError: The file cannot be written.
    """
    replace_file(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
