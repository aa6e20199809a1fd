"""What is known of the errors of routes that rest on sketches: kept with the routes, and in their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attackroute.core.errors import UserError
from attackroute.routes.layer_map import LayerMap
from attackroute.routes.masks import packed_width, unpack

_FILE_KEYS = {"draws": "draws", "overlap": "overlap", "packed": "undecided", "errors": "errors"}
"""What each field is called in files."""


@dataclass(frozen=True, eq=False)
class SketchErrors:
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
        for name in _FILE_KEYS:
            values = getattr(self, name)
            if set(values) != set(self.draws) and (name != "errors" or values):
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
        return unpack(self.packed[layer], self.channels[layer])

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The notes as named tensors, a row for each sample."""
        return {
            f"{prefix}{key}/{layer}": tensor
            for name, key in _FILE_KEYS.items()
            for layer, tensor in getattr(self, name).items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], channels: Mapping[str, int]) -> SketchErrors | None:
        """Undo `tensors`, the prefix removed; None where there are none."""
        if not tensors:
            return None
        fields: dict[str, dict[str, Tensor]] = {name: {} for name in _FILE_KEYS}
        names = {key: name for name, key in _FILE_KEYS.items()}
        for path, tensor in tensors.items():
            key, _, layer = path.partition("/")
            if key not in names or layer not in channels:
                raise UserError(f"sketches: {path!r} is no part of them")
            fields[names[key]][layer] = tensor
        return cls(channels, **fields)


def _check(name: str, layer: str, tensor: Tensor, samples: int, channels: Mapping[str, int]) -> None:
    if layer not in channels:
        raise UserError(f"sketches: {name} are given for layer {layer!r}, which is not a layer of the routes")
    count = channels[layer]
    shape = {"packed": (samples, packed_width(count)), "errors": (samples, count)}.get(name, (samples,))
    if tuple(tensor.shape) != shape:
        raise UserError(f"sketches: {name} of layer {layer!r} must have shape {shape}, not {tuple(tensor.shape)}")
