"""The one format in which every command writes its result, and from which reports are made.

A document is ``NAME.json`` (settings, what all rows have in common, one sentence, the rows) with the same rows as
``NAME.csv`` beside it. The JSON is written last, so that where it is, all is there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from attackroute.core.errors import UserError
from attackroute.core.files import file_errors, printable, regular_file, replace_file
from attackroute.core.table import Table, plain

_FORMAT, _VERSION = "attackroute document", 1
_LIBRARIES = ("attackroute", "torch", "torchvision", "numpy", "scipy", "safetensors", "pyautoattack")
_FIELDS = {"kind": str, "settings": dict, "reading": str, "about": dict, "rows": list}


@dataclass(frozen=True)
class Document:
    """The result of one command or experiment.

    Attributes:
        kind: What was measured: ``"evaluation"``, ``"transplant"``, ``"hardness"``, ...
        settings: All on which the numbers depend, as JSON values: model, data, split, samples, seed, ...
        reading: One sentence that says what came out.
        table: The measurements.
        about: What all rows have in common: verdicts, costs, checks.
    """

    kind: str
    settings: Mapping[str, Any]
    reading: str = ""
    table: Table = field(default_factory=lambda: Table((), ()))
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values; numbers that are not defined become null."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": self.kind,
            "settings": plain(self.settings),
            "reading": self.reading,
            "about": plain(self.about),
            "rows": self.table.to_json(),
        }

    def save(self, folder: str | os.PathLike[str], name: str | None = None) -> Path:
        """Write ``NAME.csv``, where there are rows, and then ``NAME.json``, whose path comes back; NAME is the kind
        unless it is given.
        """
        path = Path(folder) / f"{name or self.kind}.json"
        if len(self.table):
            replace_file(path.with_suffix(".csv"), self.table.to_csv().encode())
        replace_file(path, (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Document:
        """Read what :meth:`save` wrote."""
        content = read_object(Path(path))
        fault = None
        if (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
            fault = f"not an {_FORMAT} of version {_VERSION}"
        elif wrong := [name for name, kind in _FIELDS.items() if not isinstance(content.get(name), kind)]:
            fault = f"{wrong[0]!r} must be a {_FIELDS[wrong[0]].__name__}"
        elif not all(isinstance(row, dict) for row in content["rows"]):
            fault = "'rows' must be JSON objects"
        if fault is not None:
            raise UserError(f"{printable(path)}: {fault}; write it anew, or move it away")
        table = Table.of(content["rows"])
        return cls(content["kind"], content["settings"], content["reading"], table=table, about=content["about"])

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether a file says that it is a document, whatever else is wrong with it."""
        try:
            if not path.is_file():  # a pipe would be waited for
                return False
            with path.open("rb") as file:
                return _FORMAT.encode() in file.read(200)
        except OSError:
            return False


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a `UserError` says if it cannot be read, or holds something else."""
    with file_errors(path):
        text = regular_file(path).read_bytes()
    try:
        content = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{printable(path)}: not JSON, or damaged ({error}); write it anew, or move it away") from None
    if not isinstance(content, dict):
        raise UserError(f"{printable(path)}: holds no JSON object; write it anew, or move it away")
    return content


def library_versions() -> dict[str, str]:
    """Versions of those libraries on which results depend, as far as they are installed."""
    import torch

    installed = {each.name: each.version for each in metadata.distributions()}
    installed["torch"] = torch.__version__  # with the accelerator that it was built for
    return {name: installed[name] for name in _LIBRARIES if name in installed}


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")
