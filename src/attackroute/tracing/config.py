"""What a trace computes, whatever the model and the images: one object for every function that traces."""

from __future__ import annotations

from dataclasses import dataclass

from attackroute.core.errors import UserError

UNIT, NOISE = "unit", "noise"
CARRIERS = (UNIT, NOISE)
"""What is pushed through the segments between layers: ones, which is the paper's influence, or an attack's noise."""

LEAST_SKETCHES = 8  # with fewer draws an estimate says next to nothing


@dataclass(frozen=True)
class TraceConfig:
    """How routes are traced.

    Attributes:
        linear: Whether linear maps are route layers too; their neurons are output features.
        carrier: What is pushed through the segments between layers: ``"unit"``, ones, which is the paper's influence,
            or ``"noise"``, what an attack changes at each layer's input, exact as well; see docs/definitions.md.
        sketches: Estimate edges that have no closed form from so many random products each, such as 32, instead of one
            product per element, which can take thousands of times as long. **Approximate**: such an edge's method is
            ``"sketch"``. None computes these edges exactly.
        seed: Of the sketches. An image's numbers depend on it and the image alone, not on its batch.

    Raises:
        UserError: The carrier or the number of sketches is unknown, or they cannot be combined.
    """

    linear: bool = False
    carrier: str = UNIT
    sketches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_sketches(self.sketches)
        if self.carrier not in CARRIERS:
            raise UserError(f"carrier {self.carrier!r} is unknown; choose from {', '.join(CARRIERS)}")
        if self.carrier == NOISE and self.sketches is not None:
            raise UserError(
                "sketches estimate derivatives, and carrier 'noise' takes none between layers: leave one of the two out"
            )

    @property
    def follows_noise(self) -> bool:
        """Whether routes follow what an attack changes."""
        return self.carrier == NOISE

    def check_attack(self, attack: object) -> None:
        """Raise a `UserError` where the carrier needs an attack and there is none."""
        if self.follows_noise and not attack:
            raise UserError(
                "carrier 'noise' follows what an attack changes: pass attack=..., such as ar.parse_attack('pgd') "
                "(--attack pgd)"
            )


def check_sketches(sketches: object) -> None:
    """Raise a `UserError` unless ``sketches`` is None or a number of draws that can be used."""
    number = isinstance(sketches, int) and not isinstance(sketches, bool)
    if sketches is not None and (not number or sketches < LEAST_SKETCHES):  # type: ignore[operator]
        raise UserError(f"sketches={sketches!r}: give {LEAST_SKETCHES} or more, such as 32, or None for exact routes")
