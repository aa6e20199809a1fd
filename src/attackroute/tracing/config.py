"""What a trace computes, whatever the model and the images: one object for every function that traces."""

from __future__ import annotations

from dataclasses import dataclass

from attackroute.core.errors import UserError

UNIT, NOISE = "unit", "noise"
CARRIERS = (UNIT, NOISE)
"""What is pushed through the segments between layers: ones, which is the paper's influence, or an attack's noise."""

AUTO = "auto"
FIRST_SKETCHES = 32
"""Draws that ``"auto"`` begins with."""
SKETCH_GROUPS = 8
"""Groups of draws, of which the jackknife leaves out one at a time."""

Sketches = int | str | None


@dataclass(frozen=True)
class TraceConfig:
    """How routes are traced.

    Attributes:
        linear: Whether linear maps are route layers too; their neurons are output features.
        carrier: What is pushed through the segments between layers: ``"unit"``, ones, which is the paper's influence,
            or ``"noise"``, what an attack changes at each layer's input, exact as well; see docs/definitions.md.
        sketches: Estimate edges that have no closed form from so many random products each instead of one product per
            element, which can take thousands of times as long. **Approximate**: such an edge's method is ``"sketch"``,
            and ``routes.sketched`` says how far each layer can be trusted. A multiple of 8, such as 32, or ``"auto"``:
            32, doubled per layer and sample until 95 % of the kept channels are expected to be the exact ones, or at
            most 512. None computes these edges exactly.
        seed: Of the sketches. An image's numbers depend on it and the image alone, not on its batch.
        freeze_gates: Take normaliser statistics, attention weights and squeeze-excite gates as constants when
            differentiating, as propagation rules do. **Approximate**, but group and layer norm between convolutions
            then have a closed form.

    Raises:
        UserError: The carrier or the number of sketches is unknown, or they cannot be combined.
    """

    linear: bool = False
    carrier: str = UNIT
    sketches: Sketches = None
    seed: int = 0
    freeze_gates: bool = False

    def __post_init__(self) -> None:
        check_sketches(self.sketches)
        if self.carrier not in CARRIERS:
            raise UserError(f"carrier {self.carrier!r} is unknown; choose from {', '.join(CARRIERS)}")
        if self.carrier == NOISE and (self.sketches is not None or self.freeze_gates):
            which = "sketches estimate" if self.sketches is not None else "frozen gates concern"
            raise UserError(
                f"{which} derivatives, and carrier 'noise' takes none between layers: leave one of the two out"
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
    """Raise a `UserError` unless ``sketches`` is None, ``"auto"`` or a number of draws that can be used."""
    if sketches is None or sketches == AUTO:
        return
    number = isinstance(sketches, int) and not isinstance(sketches, bool)
    if not number or sketches < 2 * SKETCH_GROUPS or sketches % SKETCH_GROUPS:  # type: ignore[operator]
        raise UserError(
            f"sketches={sketches!r}: give a multiple of {SKETCH_GROUPS} from {2 * SKETCH_GROUPS} on, such as "
            f"{FIRST_SKETCHES}, or {AUTO!r}, or None for exact routes"
        )
