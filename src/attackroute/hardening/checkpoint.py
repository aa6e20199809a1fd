"""The folder of a training run, in which a kill at any moment leaves one consistent checkpoint.

Files:
    ``state.pt``: optimiser, counters, history and settings, and the SHA-256 of the weights that belong to them.
    ``last.safetensors``, ``best.safetensors``: weights alone.
    ``log.jsonl``, ``settings.json``: for readers; written again from the state, never read back.

A checkpoint is saved in three moves. The weights are written beside the old ones as ``*.new``; ``state.pt`` is
replaced, which is the moment at which the checkpoint counts; then the new weights take the place of the old. After a
kill, the sums in ``state.pt`` say which of both files belongs to it, and an interrupted last move is completed.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from attackroute.core.errors import UserError

LAST = "last.safetensors"


BEST = "best.safetensors"


STATE = "state.pt"


LOG = "log.jsonl"


SETTINGS = "settings.json"


_FORMAT = 2


_NEW = ".new"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs in order to go on.

    Attributes:
        weights: The model's state dict, tensors only.
        state: Anything that ``torch.load(weights_only=True)`` reads: tensors, numbers, strings, lists, dicts.
    """

    weights: Mapping[str, Tensor]
    state: Mapping[str, Any]

    def require_fit(self, terms: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> None:
        """Require that a run on these terms, of a model with such weights, is the one in the folder.

        Raises:
            UserError: It is another one, and what is different.
        """
        _check_terms(self.state["terms"], terms, path)
        _check_weights_fit(self.weights, weights, path)


class RunFolder:
    """Reads and writes the files of one training run.

    Args:
        path: The folder. It is made when the run is opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._sums: dict[str, str] = {}

    def open(self, *, resume: bool, space: int) -> Checkpoint | None:
        """Make the folder ready for writing, and read the checkpoint from which to go on.

        Args:
            resume: Go on with the run in the folder, if it holds one.
            space: Bytes that the run's files may take at once.

        Returns:
            The last complete checkpoint; None where the run starts from the beginning.

        Raises:
            UserError: The folder cannot be made, has too little space, holds a run although ``resume`` is false, or
                holds damaged files.
        """
        with _disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            present = [name for name in (STATE, LAST, BEST, LOG, SETTINGS) if (self.path / name).exists()]
            if present and not resume:
                raise UserError(
                    f"{self.path} already holds a run ({present[0]}); pass --resume to go on with it, "
                    "or choose another folder"
                )
            if STATE not in present and (LAST in present or BEST in present):
                raise UserError(f"{self.path / STATE} is missing, so the run cannot go on; choose another folder")
            self._check_space(space)
            checkpoint = self._read() if STATE in present else None
            for left_over in self.path.glob(f"*{_NEW}"):
                left_over.unlink()
            return checkpoint

    def save(self, checkpoint: Checkpoint, *, best: bool) -> None:
        """Replace the checkpoint in the folder, all of it or nothing.

        Args:
            checkpoint: Weights and state of the same moment.
            best: Keep these weights as the best ones, too.

        Raises:
            UserError: The disk is full or the folder cannot be written. The previous checkpoint is intact.
        """
        weights = _packed(checkpoint.weights)
        names = (LAST, BEST) if best else (LAST,)
        with _disk_errors(self.path):
            sums = {**self._sums, **dict.fromkeys(names, _digest(weights))}
            for name in names:
                self._stage(name, weights)
            self._stage(STATE, _serialised({"format": _FORMAT, "sums": sums, "run": dict(checkpoint.state)}))
            self._publish(STATE)
            for name in names:
                self._publish(name)
        self._sums = sums

    def write_text(self, name: str, text: str) -> None:
        """Replace a text file as a whole.

        Raises:
            UserError: The disk is full or the folder cannot be written.
        """
        with _disk_errors(self.path):
            self._stage(name, text.encode())
            self._publish(name)

    def _check_space(self, space: int) -> None:
        held = sum((self.path / name).stat().st_size for name in (STATE, LAST, BEST) if (self.path / name).exists())
        free = shutil.disk_usage(self.path).free
        if free + held < space:
            raise UserError(
                f"{self.path} has {free / 2**20:.0f} MiB free, but the checkpoints of this run need up to "
                f"{(space - held) / 2**20:.0f} MiB more; free some space or choose another folder"
            )

    def _stage(self, name: str, content: bytes) -> None:
        with open(self.path / (name + _NEW), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _publish(self, name: str) -> None:
        os.replace(self.path / (name + _NEW), self.path / name)
        self._sync()

    def _sync(self) -> None:
        """Make renames last through a power cut, in their order; only POSIX systems need it and can do it."""
        if os.name != "posix":
            return
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _read(self) -> Checkpoint:
        stored = _read_state(self.path / STATE)
        self._sums = stored["sums"]
        for name, expected in self._sums.items():
            self._settle(name, expected)
        weights = safetensors.torch.load((self.path / LAST).read_bytes())
        return Checkpoint(weights, stored["run"])

    def _settle(self, name: str, expected: str) -> None:
        """Complete a save that was interrupted after ``state.pt`` had been replaced."""
        path, new = self.path / name, self.path / (name + _NEW)
        if path.exists() and _digest(path.read_bytes()) == expected:
            return
        if not new.exists() or _digest(new.read_bytes()) != expected:
            raise _damaged(path)
        self._publish(name)


def _check_terms(stored: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    for name in dict.fromkeys([*wanted, *stored]):
        value = wanted.get(name)
        if stored.get(name) == value:
            continue
        if name == "processes":
            raise UserError(
                f"the run in {path} is trained by {stored.get(name)} processes and cannot go on with {value}, since "
                f"batches are divided among them: start {stored.get(name)} (torchrun --nproc-per-node), or choose "
                "another folder"
            )
        if name == "trainable":
            raise UserError(f"the run in {path} trains other parameters of the model; choose another folder")
        raise UserError(
            f"the run in {path} has {name} {stored.get(name)!r}, not {value!r}; "
            "give the same value to resume it, or choose another folder"
        )


def _check_weights_fit(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    for name in [*wanted, *stored]:
        kinds = [
            f"{tuple(side[name].shape)} {side[name].dtype}" if name in side else "missing" for side in (stored, wanted)
        ]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"the run in {path} is of another model: {name} is {kinds[0]} there and {kinds[1]} here; "
                "give the same model or choose another folder"
            )


def _read_state(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    try:
        # torch.load itself does not compare the checksums that torch.save leaves in the archive
        intact = zipfile.ZipFile(io.BytesIO(content)).testzip() is None
        stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True) if intact else None
    except Exception as error:  # damaged bytes make both readers raise nearly anything
        raise _damaged(path) from error
    if not (isinstance(stored, dict) and {"format", "sums", "run"} <= stored.keys()):
        raise _damaged(path)
    if stored["format"] != _FORMAT:
        raise UserError(f"{path} has format {stored['format']}, not {_FORMAT}; use the version that wrote it")
    return stored


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is missing, damaged or from another run; put the right file back or start again in another folder"
    )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; free some space or choose another folder") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _packed(weights: Mapping[str, Tensor]) -> bytes:
    # copies, since safetensors refuses tensors that share memory (tied weights)
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}
    return safetensors.torch.save(copies)


def _serialised(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
