"""Where a route comes from: samples, width, model, data, attack, seed, criterion, version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import NoneType
from typing import Any

from attackroute.core import __version__
from attackroute.core.errors import UserError

_OPTIONAL_TEXT = ("model", "data", "attack")
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "samples": ((int,), "a count"),
    "width": ((int, float), "a number"),
    "instance_width": ((int, float, NoneType), "a number or None"),
    **dict.fromkeys(_OPTIONAL_TEXT, ((str, NoneType), "a string or None")),
    "seed": ((int, NoneType), "an integer or None"),
    **dict.fromkeys(("criterion", "version"), ((str,), "a string")),
}
"""Types of the fields, which also come from files."""


@dataclass(frozen=True)
class Provenance:
    """Where a route comes from.

    Attributes:
        samples: number of samples that it was computed from; 0 for a criterion that needs none.
        width: share of each layer's channels that was kept, per sample for instance routes, overall for a route.
        instance_width: width of the instance routes that a model route was aggregated from.
        model: name of the network.
        data: name of the data set.
        attack: name of the attack on the samples, None for clean ones.
        seed: seed of the run.
        criterion: what ranked the channels.
        version: version of the package that made the route.
    """

    samples: int
    width: float
    instance_width: float | None = None
    model: str | None = None
    data: str | None = None
    attack: str | None = None
    seed: int | None = None
    criterion: str = "influence"
    version: str = __version__

    def __post_init__(self) -> None:
        for name, (kinds, words) in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise UserError(f"provenance: {name} must be {words}, not {value!r}")
        if self.samples < 0:
            raise UserError(f"provenance: samples must be a count, not {self.samples}")
        for name in ("width", "instance_width"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise UserError(f"provenance: {name} {share} is outside (0, 1]")

    def to_json(self) -> dict[str, Any]:
        """The fields as plain values, for a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: object) -> Provenance:
        """Undo `to_json`; a `UserError` says which field is missing, unknown, or of the wrong type."""
        names = [item.name for item in fields(cls)]
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise UserError(f"provenance: expected the fields {', '.join(names)}")
        return cls(**values)

    @classmethod
    def merge(cls, parts: Sequence[Provenance]) -> Provenance:
        """Provenance of several sets of samples of one width taken together.

        Samples add up. An optional field on which the parts differ becomes None; differing criteria and versions
        are joined with " + ".
        """
        merged: dict[str, Any] = {}
        for name in ("instance_width", *_OPTIONAL_TEXT, "seed"):
            values = {getattr(part, name) for part in parts}
            merged[name] = values.pop() if len(values) == 1 else None
        for name in ("criterion", "version"):
            merged[name] = " + ".join(dict.fromkeys(getattr(part, name) for part in parts))
        return replace(parts[0], samples=sum(part.samples for part in parts), **merged)
