"""A trace that can be interrupted at any moment, and goes on where it was.

The folder of a trace holds ``summary.json`` from the start, with the terms on which the result depends, and
``partial.safetensors`` with the samples that are done. Pieces end where batches end, so a resumed trace sees the same
batches and gives the same routes, bit for bit, as one that was never broken off.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from attackroute.errors import UserError
from attackroute.files import replace_file
from attackroute.instances import InstanceRoutes
from attackroute.routes import Route
from attackroute.terms import require_same_terms

ROUTES = "routes.safetensors"
ROUTE = "route.json"
SUMMARY = "summary.json"
PARTIAL = "partial.safetensors"

_AUTOSAVE_SECONDS = 60.0
_PIECE_SECONDS = 5.0  # about as much work is lost by an interruption

TracePiece = Callable[[int, int], InstanceRoutes]
"""Traces the samples from start to stop."""


@dataclass(frozen=True)
class TraceFolder:
    """The files of one trace.

    Args:
        path: The folder, which exists.
        terms: All that must be the same for a trace to go on, as JSON values.
        samples: How many samples the whole trace has.
    """

    path: Path
    terms: Mapping[str, Any]
    samples: int

    def open(self, model: nn.Module, *, resume: bool) -> InstanceRoutes | None:
        """Make the folder ready for writing, and read the samples that are done.

        Args:
            model: The network that is traced.
            resume: Go on with the trace in the folder, finished or not, if it holds one.

        Returns:
            The routes of the first samples; None where the trace starts from the beginning.

        Raises:
            UserError: The folder holds an unfinished trace although ``resume`` is false, or one on other terms.
        """
        summary = self._read_summary()
        partial = self.path / PARTIAL
        if resume and summary is not None:
            require_same_terms(f"the trace in {self.path}", summary.get("terms"), self.terms)
            done = self.path / ROUTES if summary.get("finished") is True else partial
            return self._load(done, model) if done.exists() else None
        if partial.exists():
            raise UserError(
                f"{self.path} holds an unfinished trace; pass --resume to go on with it, or choose another folder"
            )
        self._write_summary({"finished": False, "terms": dict(self.terms)})
        for stale in (ROUTES, ROUTE):
            (self.path / stale).unlink(missing_ok=True)
        return None

    def save_partial(self, routes: InstanceRoutes) -> None:
        """Keep the samples that are done."""
        routes.save(self.path / PARTIAL)

    def finish(self, routes: InstanceRoutes, route: Route, result: Mapping[str, Any]) -> None:
        """Write the routes, the model route and the summary, and drop the partial file."""
        routes.save(self.path / ROUTES)
        route.save(self.path / ROUTE)
        self._write_summary({"finished": True, "terms": dict(self.terms), **result})
        (self.path / PARTIAL).unlink(missing_ok=True)

    def _load(self, file: Path, model: nn.Module) -> InstanceRoutes:
        routes = InstanceRoutes.load(file, model=model)
        if len(routes) > self.samples:
            raise UserError(f"{file} has {len(routes)} samples, the data only {self.samples}; choose another folder")
        return routes

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

    def _write_summary(self, content: Mapping[str, Any]) -> None:
        write_json(self.path / SUMMARY, content)


def trace_in_pieces(
    trace_piece: TracePiece,
    samples: int,
    batch_size: int,
    *,
    done: InstanceRoutes | None = None,
    save: Callable[[InstanceRoutes], None] | None = None,
) -> InstanceRoutes:
    """Trace samples from the first that is not done to the last, saving now and then and when it breaks off.

    Args:
        trace_piece: Traces the samples from start to stop; called with multiples of the batch size, or the end.
        samples: How many there are.
        batch_size: Samples per batch.
        done: Routes of the first samples, from an earlier run.
        save: Keeps the routes of the samples that are done; None keeps nothing.

    Returns:
        The routes of all samples.
    """
    parts = [] if done is None else [done]
    position = 0 if done is None else len(done)
    batches = 1
    saved_at = time.monotonic()
    try:
        while position < samples:
            stop = min(position + batches * batch_size, samples)
            started = time.monotonic()
            parts.append(trace_piece(position, stop))
            position = stop
            now = time.monotonic()
            batches = max(1, round(batches * min(2.0, _PIECE_SECONDS / max(now - started, 1e-3))))
            if save is not None and now - saved_at > _AUTOSAVE_SECONDS:
                parts = [InstanceRoutes.concatenate(parts)]
                save(parts[0])
                saved_at = time.monotonic()
    except BaseException:  # an interruption too
        if save is not None and parts:
            save(InstanceRoutes.concatenate(parts))
        raise
    return InstanceRoutes.concatenate(parts)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step, so that no reader ever sees half of it.

    Raises:
        UserError: The file cannot be written.
    """
    replace_file(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
