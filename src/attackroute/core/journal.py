"""Results of a long computation, written down one by one as they come, so that a broken one goes on where it was.

The file holds one JSON object a line: first the settings on which all results depend, then one measurement a line. A
line is only ever added. A process that is killed leaves at most one torn line at the end, which the next one cuts off.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attackroute.core.distributed import leading
from attackroute.core.errors import UserError
from attackroute.core.files import file_errors, printable, regular_file, replace_file

MEASUREMENTS = "measurements.jsonl"

_FORMAT = {"format": "attackroute measurements", "version": 2}

Key = tuple[str | int, ...]


class Journal:
    """Measurements under keys, in memory and, where there is a path, in a file.

    Args:
        path: The file; None keeps nothing beyond this process.
        settings: All on which the measurements depend, as JSON values.
        stale: Files beside it that say what older measurements came to; the first new one removes them.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], stale: Sequence[Path] = ()) -> None:
        self._path, self._settings, self._stale = path, dict(settings), stale
        self._records: dict[Key, dict[str, Any]] = {}
        self._started = False

    def resume(self) -> None:
        """Take over what the file holds, if there is one that was made with the same settings."""
        if self._path is None or not self._path.exists():
            return
        with file_errors(self._path):
            content = regular_file(self._path).read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if lines:
            header = _parsed(self._path, 1, lines[0], "format")
            if any(header.get(name) != value for name, value in _FORMAT.items()):
                raise UserError(
                    f"{self} is no file of measurements (version {_FORMAT['version']}); choose another folder"
                )
            require_same_settings(f"the evaluation in {self}", header.get("settings"), self._settings)
            for number, line in enumerate(lines[1:], start=2):
                record = _parsed(self._path, number, line, "key", "samples")
                self._records[tuple(record.pop("key"))] = record
            self._started = True
            if len(whole) < len(content):
                os.truncate(self._path, len(whole))

    def recall(self, key: Key, samples: str) -> dict[str, Any] | None:
        """The measurement under a key, or None; it must be of the samples of this digest."""
        record = self._records.get(key)
        if record is not None and record["samples"] != samples:
            raise UserError(
                f"{self} has {' / '.join(map(str, key))} of other images or labels than the data give "
                "now: give the same data in the same order to resume, or choose another folder"
            )
        return record

    def keep(self, key: Key, samples: str, **values: Any) -> dict[str, Any]:
        """Write a measurement down; when this returns in the first process, a kill does not lose it."""
        record = {"samples": samples, **values}
        self._records[key] = record
        if self._path is not None and leading():
            if not self._started:
                for file in self._stale:
                    file.unlink(missing_ok=True)
                replace_file(self._path, _line({**_FORMAT, "settings": self._settings}))
                self._started = True
            _append(self._path, _line({"key": list(key), **record}))
        return record

    def __str__(self) -> str:
        return "memory" if self._path is None else printable(self._path)


def require_same_settings(what: str, stored: object, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with ``what``, if a setting that its file holds is not that of this run."""
    before = stored if isinstance(stored, dict) else {}
    for name in dict.fromkeys([*settings, *before]):
        if before.get(name) != settings.get(name):
            raise UserError(
                f"{what} has {name} {before.get(name)!r}, not {settings.get(name)!r}; "
                "give the same to resume it, or choose another folder"
            )


def samples_digest(images: Tensor, labels: Tensor | None) -> str:
    """What tells a batch of samples from others."""
    answers = None if labels is None else labels.tolist()
    digest = hashlib.sha256(f"{images.dtype}:{tuple(images.shape)}:{answers}".encode())
    digest.update(images.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _append(path: Path, line: bytes) -> None:
    try:
        with path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{printable(path)}: cannot be written: {reason}; choose another folder") from None


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n").encode()


def _parsed(path: Path, number: int, line: bytes, *required: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if not isinstance(record, dict) or not all(name in record for name in required):
            raise ValueError
    except (ValueError, RecursionError):
        raise UserError(
            f"{printable(path)}: line {number} is damaged: remove this line and all after it, or choose another folder"
        ) from None
    return record
