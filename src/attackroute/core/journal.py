"""Results of a long computation, written down one by one as they come, so that a broken one goes on where it was.

The file holds one JSON object a line: first the terms on which all results depend, then one measurement a line. A line
is only ever added. A process that is killed leaves at most one torn line at the end, which the next one cuts off.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attackroute.core.errors import UserError
from attackroute.core.files import replace_file, shown


def require_same_terms(what: str, stored: object, terms: Mapping[str, Any]) -> None:
    """Compare what a file holds with the terms of this run.

    Args:
        what: What is to go on, and where it is, for the message.
        stored: The terms that were written down, as JSON gives them back.
        terms: Those of this run, as JSON values.

    Raises:
        UserError: One of them differs, and which.
    """
    known = stored if isinstance(stored, dict) else {}
    for name in dict.fromkeys([*terms, *known]):
        if known.get(name) != terms.get(name):
            raise UserError(
                f"{what} has {name} {known.get(name)!r}, not {terms.get(name)!r}; "
                "give the same to resume it, or choose another folder"
            )


MEASUREMENTS = "measurements.jsonl"


_FORMAT = "attackroute measurements"


_VERSION = 1


_DIGITS = 16  # of the checksum; damage is to be found, not forgery


Key = tuple[str | int, ...]


class Journal:
    """Measurements under keys, in memory and, where there is a path, in a file.

    Args:
        path: The file; None keeps nothing beyond this process.
        terms: All on which the measurements depend, as JSON values.
        stale: Files beside it that say what older measurements came to; the first new one removes them.
    """

    def __init__(self, path: Path | None, terms: Mapping[str, Any], stale: Sequence[Path] = ()) -> None:
        self._path = path
        self._terms = dict(terms)
        self._stale = stale
        self._known: dict[Key, dict[str, Any]] = {}
        self._started = False

    def __len__(self) -> int:
        return len(self._known)

    def in_memory(self) -> Journal:
        """The same measurements, with new ones kept in this process alone."""
        copy = Journal(None, self._terms)
        copy._known = dict(self._known)
        return copy

    def resume(self) -> None:
        """Take over what the file holds, if there is one.

        Raises:
            UserError: The file is damaged or something else, or its measurements were made on other terms.
        """
        if self._path is None or not self._path.exists():
            return
        content = _read(self._path)
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if lines:
            self._check_header(_unsealed(self._path, 1, lines[0]))
            for number, line in enumerate(lines[1:], start=2):
                record = _unsealed(self._path, number, line)
                self._known[tuple(record.pop("key"))] = record
            self._started = True
            if len(whole) < len(content):
                os.truncate(self._path, len(whole))

    def begin(self, folder: Path, *, resume: bool) -> None:
        """Begin a study in a folder, or go on with the one that is there.

        Raises:
            UserError: There is one although ``resume`` is false; or as :meth:`resume`.
        """
        if resume:
            self.resume()
        elif self._path is not None and self._path.exists():
            raise UserError(f"{folder} already holds a study; pass --resume to go on with it, or choose another folder")
        else:
            self.keep(("begun",), "")

    def recall(self, key: Key, samples: str) -> dict[str, Any] | None:
        """The measurement under a key, or None.

        Args:
            key: Names the measurement.
            samples: Digest of what it was measured on.

        Raises:
            UserError: It was measured on other samples.
        """
        record = self._known.get(key)
        if record is not None and record["samples"] != samples:
            raise UserError(
                f"{_named(self._path)} has {' / '.join(map(str, key))} of other images or labels than the data give "
                "now: give the same data in the same order to resume, or choose another folder"
            )
        return record

    def keep(self, key: Key, samples: str, **values: Any) -> dict[str, Any]:
        """Write a measurement down; when this returns, a kill does not lose it.

        Raises:
            UserError: The file cannot be written.
        """
        record = {"samples": samples, **values}
        self._known[key] = record
        if self._path is not None:
            if not self._started:
                for file in self._stale:
                    file.unlink(missing_ok=True)
                header = {"format": _FORMAT, "version": _VERSION, "terms": self._terms}
                replace_file(self._path, _sealed(header))
                self._started = True
            _append(self._path, _sealed({"key": list(key), **record}))
        return record

    def _check_header(self, header: Mapping[str, Any]) -> None:
        if (header.get("format"), header.get("version")) != (_FORMAT, _VERSION):
            raise UserError(
                f"{_named(self._path)} is no file of measurements (version {_VERSION}); choose another folder"
            )
        require_same_terms(f"the evaluation in {_named(self._path)}", header.get("terms"), self._terms)


def _append(path: Path, line: bytes) -> None:
    try:
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be written: {error.strerror or error}; choose another folder") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{shown(path)}: cannot be read: {error.strerror or error}; choose another folder") from None


def _sealed(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    return f'{{"checksum":"{_checksum(text)}",{text[1:]}\n'.encode()


def _unsealed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
        checksum = record.pop("checksum")
        if checksum != _checksum(json.dumps(record, separators=(",", ":"))):
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(
            f"{shown(path)}: line {number} is damaged: remove this line and all after it, or choose another folder"
        ) from None
    return dict(record)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def _named(path: Path | None) -> str:
    return "memory" if path is None else shown(path)
