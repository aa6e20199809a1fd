"""What is known of the errors of routes that rest on sketches: kept with the routes, and in their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attackroute.core.errors import UserError
from attackroute.routes import masks
from attackroute.routes.layer_map import LayerMap

_DRAWS, _OVERLAP, _UNDECIDED, _ERRORS = "draws", "overlap", "undecided", "errors"


@dataclass(frozen=True, eq=False)
class SketchNotes:
    """How far the routes of N samples can be trusted, for each layer with an edge that was sketched.

    What is said of a layer holds for the critical channels of later layers as they were found.

    Attributes:
        channels: Channel count of each layer of the routes.
        draws: Number of draws behind each sample's scores, int32 (N,).
        overlap: Share of a sample's kept channels that exact scores are expected to keep as well, float32 (N,).
        packed: Channels within two standard errors of the cut between kept and dropped, packed as the masks are.
        errors: Standard errors of the scores, float (N, C); empty where scores were not kept.
    """

    channels: Mapping[str, int]
    draws: Mapping[str, Tensor]
    overlap: Mapping[str, Tensor]
    packed: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name in (_DRAWS, _OVERLAP, "packed", _ERRORS):
            values = getattr(self, name)
            if set(values) != set(self.draws) and (name != _ERRORS or values):
                raise UserError(f"sketches: {name} are given for other layers than draws")
            for layer, tensor in values.items():
                _check(name, layer, tensor, len(self), self.channels)
            object.__setattr__(self, name, LayerMap(dict(values)))

    def __len__(self) -> int:
        return len(next(iter(self.draws.values()))) if self.draws else 0

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers, in forward order."""
        return tuple(layer for layer in self.channels if layer in self.draws)

    def undecided(self, layer: str) -> Tensor:
        """Channels of a layer within two standard errors of the cut, bool (N, C)."""
        return masks.unpack(self.packed[layer], self.channels[layer])

    def select(self, rows: Tensor) -> SketchNotes:
        """The notes of some samples."""
        return SketchNotes(self.channels, *({layer: t[rows] for layer, t in part.items()} for part in self._parts()))

    @classmethod
    def concatenate(cls, notes: Sequence[SketchNotes]) -> SketchNotes:
        """The notes of several sets of samples, one after another.

        Raises:
            UserError: They are about different layers.
        """
        first = notes[0]
        if any(set(note.draws) != set(first.draws) or bool(note.errors) != bool(first.errors) for note in notes):
            raise UserError("the parts were sketched in different layers: trace all parts in the same way")
        parts = (
            {layer: torch.cat([part[layer] for part in same]) for layer in same[0]}
            for same in zip(*(note._parts() for note in notes), strict=True)
        )
        return cls(first.channels, *parts)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The notes as named tensors, for a file."""
        return {
            f"{prefix}{name}/{layer}": tensor
            for name, part in zip(_NAMES, self._parts(), strict=True)
            for layer, tensor in part.items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], channels: Mapping[str, int]) -> SketchNotes | None:
        """Undo `tensors`, the prefix removed; None where there are none."""
        if not tensors:
            return None
        found: dict[str, dict[str, Tensor]] = {name: {} for name in _NAMES}
        for key, tensor in tensors.items():
            name, _, layer = key.partition("/")
            if name not in found or layer not in channels:
                raise UserError(f"sketches: {key!r} is no part of them")
            found[name][layer] = tensor
        return cls(channels, *(found[name] for name in _NAMES))

    def _parts(self) -> tuple[Mapping[str, Tensor], ...]:
        return self.draws, self.overlap, self.packed, self.errors


_NAMES = (_DRAWS, _OVERLAP, _UNDECIDED, _ERRORS)


def _check(name: str, layer: str, tensor: Tensor, samples: int, channels: Mapping[str, int]) -> None:
    if layer not in channels:
        raise UserError(f"sketches: {name} are given for layer {layer!r}, which is not a layer of the routes")
    count = channels[layer]
    shape = {"packed": (samples, -(-count // 8)), _ERRORS: (samples, count)}.get(name, (samples,))
    if tuple(tensor.shape) != shape:
        raise UserError(f"sketches: {name} of layer {layer!r} must have shape {shape}, not {tuple(tensor.shape)}")
