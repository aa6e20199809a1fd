"""The folder of a training run, in which a kill at any moment leaves one consistent checkpoint, that of an epoch's end.

Files:
    ``state.pt``: the checkpoint; weights, optimiser, history and settings in one file, which is replaced as a whole.
    ``last.safetensors``, ``best.safetensors``: weights alone, for other commands.
    ``log.jsonl``, ``settings.json``: for readers.

All but the first are written after it and from it, and written again when a run goes on, so that a kill between two of
them does no harm.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from attackroute.core.errors import UserError
from attackroute.core.files import printable, replace_file
from attackroute.zoo.weights import BEST, LAST

STATE = "state.pt"
LOG = "log.jsonl"
SETTINGS = "settings.json"

_FORMAT = 3
_LEFT_OVER = "." + "[0-9a-f]" * 16 + ".tmp"  # what a kill leaves of a file that was to be replaced


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run needs in order to go on: anything that ``torch.load(weights_only=True)`` reads.

    Attributes:
        settings: All that must be the same for the run to go on, as plain values.
        weights: The model's state dict, tensors only.
        optimiser: Its state dict.
        scaler: That of the scale of the loss; empty where it is not scaled.
        history: The epochs so far, as plain values.
        objective: What the objective holds, as plain values.
    """

    settings: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    optimiser: Mapping[str, Any]
    scaler: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    objective: Mapping[str, Any]

    def require_fit(self, settings: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> None:
        """Require that a run with these settings, of a model with such weights, is the one in the folder.

        Raises:
            UserError: It is another one, and what is different.
        """
        _check_settings(self.settings, settings, path)
        _check_weights_fit(self.weights, weights, path)


class RunFolder:
    """Reads and writes the files of one training run.

    Args:
        path: The folder. It is made when the run is opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def open(self, *, resume: bool) -> Checkpoint | None:
        """Make the folder ready for writing, and read the checkpoint from which to go on.

        Args:
            resume: Go on with the run in the folder, if it holds one.

        Returns:
            The last checkpoint; None where the run starts from the beginning.

        Raises:
            UserError: The folder cannot be made, holds a run although ``resume`` is false, or holds a damaged
                checkpoint.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            present = [name for name in (STATE, LAST, BEST, LOG, SETTINGS) if (self.path / name).exists()]
        except OSError as error:
            raise UserError(f"{printable(self.path)}: {error.strerror or error}; choose another folder") from None
        if present and not resume:
            raise UserError(
                f"{self.path} already holds a run ({present[0]}); pass --resume to go on with it, or choose another "
                "folder"
            )
        if STATE not in present and (LAST in present or BEST in present):
            raise UserError(f"{self.path / STATE} is missing, so the run cannot go on; choose another folder")
        for left_over in self.path.glob(_LEFT_OVER):
            left_over.unlink(missing_ok=True)
        return _read(self.path / STATE) if STATE in present else None

    def save(self, checkpoint: Checkpoint, *, best: bool, log: str) -> None:
        """Replace the checkpoint, and then what is made from it.

        Args:
            checkpoint: All of one moment.
            best: Whether its weights are the best ones so far.
            log: What ``log.jsonl`` is to say.

        Raises:
            UserError: A file cannot be written. If it is the first one, the previous checkpoint is intact.
        """
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, **vars(checkpoint)}, buffer)
        replace_file(self.path / STATE, buffer.getvalue())
        self.publish(checkpoint, best=best, log=log)

    def publish(self, checkpoint: Checkpoint, *, best: bool, log: str) -> None:
        """Write what is made from a checkpoint; arguments and errors as for :meth:`save`."""
        # copies, since safetensors refuses tensors that share memory (tied weights)
        copies = {
            name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in checkpoint.weights.items()
        }
        weights = safetensors.torch.save(copies)
        for name in (LAST, BEST) if best else (LAST,):
            replace_file(self.path / name, weights)
        replace_file(self.path / LOG, log.encode())
        replace_file(self.path / SETTINGS, (json.dumps(checkpoint.settings, indent=2) + "\n").encode())


def _check_settings(stored: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> None:
    for name in dict.fromkeys([*given, *stored]):
        value = given.get(name)
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


def _check_weights_fit(stored: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path) -> None:
    for name in [*given, *stored]:
        kinds = [
            f"{tuple(side[name].shape)} {side[name].dtype}" if name in side else "missing" for side in (stored, given)
        ]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"the run in {path} is of another model: {name} is {kinds[0]} there and {kinds[1]} here; "
                "give the same model or choose another folder"
            )


def _read(path: Path) -> Checkpoint:
    damaged = UserError(f"{path} is damaged or no checkpoint; put the right file back or start again in another folder")
    try:
        content = path.read_bytes()
        # torch.load itself does not compare the checksums that torch.save leaves in the archive
        intact = zipfile.ZipFile(io.BytesIO(content)).testzip() is None
        stored = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True) if intact else None
    except Exception as error:  # damaged bytes make both readers raise nearly anything
        raise damaged from error
    if not (isinstance(stored, dict) and "format" in stored):
        raise damaged
    version = stored.pop("format")
    if version != _FORMAT:
        raise UserError(f"{path} has format {version}, not {_FORMAT}; use the version that wrote it")
    if stored.keys() != {field.name for field in fields(Checkpoint)}:
        raise damaged
    return Checkpoint(**stored)
