"""What a trace computes, whatever the model and the images: one object for every function that traces."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attackroute.core.errors import UserError, require_known

if TYPE_CHECKING:
    from torch import nn

    from attackroute.core.batches import Data
    from attackroute.tracing.deviations import Deviations, Progress

UNIT, NOISE = "unit", "noise"
CARRIERS = (UNIT, NOISE)
"""What is pushed through the segments between layers: ones, which is the paper's influence, or an attack's noise."""

RAW, STD = "raw", "std"
UNITS = (RAW, STD)
"""What neurons are measured in: their own values, which is the paper's way, or their deviation over the data."""

LEAST_SKETCHES = 8  # with fewer draws an estimate says next to nothing


@dataclass(frozen=True)
class TraceConfig:
    """How routes are traced.

    Attributes:
        linear: Whether linear maps are route layers too; their neurons are output features.
        carrier: What is pushed through the segments between layers: ``"unit"``, ones, which is the paper's influence,
            or ``"noise"``, what an attack changes at each layer's input, exact as well; see docs/definitions.md.
        units: In what influence is measured: ``"raw"``, the paper's, which depends on how the network's function is
            written down in parameters, or ``"std"``, each neuron's standard deviation over the data that are traced,
            which does not. Deviations measured elsewhere, ``Deviations.of(model, data)``, can stand for the latter.
        sketches: Estimate edges that have no closed form from so many random products each, such as 32, instead of one
            product per element, which can take thousands of times as long. **Approximate**: such an edge's method is
            ``"sketch"``. None computes these edges exactly.
        seed: Of the sketches. An image's numbers depend on it and the image alone, not on its batch.

    Raises:
        UserError: The carrier or the number of sketches is unknown, or they cannot be combined.
    """

    linear: bool = False
    carrier: str = UNIT
    units: str | Deviations = RAW
    sketches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sketches is not None and (type(self.sketches) is not int or self.sketches < LEAST_SKETCHES):
            raise UserError(
                f"sketches={self.sketches!r}: give {LEAST_SKETCHES} or more, such as 32, or None for exact routes"
            )
        if self.carrier not in CARRIERS:
            raise UserError(f"carrier {self.carrier!r} is unknown; choose from {', '.join(CARRIERS)}")
        if not hasattr(self.units, "power"):
            require_known("units", str(self.units), UNITS)
        if self.carrier == NOISE and self.sketches is not None:
            raise UserError(
                "sketches estimate derivatives, and carrier 'noise' takes none between layers: leave one of the two out"
            )

    @property
    def follows_noise(self) -> bool:
        """Whether routes follow what an attack changes."""
        return self.carrier == NOISE

    def measured(
        self, model: nn.Module, data: Data, batch_size: int = 128, progress: Progress | None = None
    ) -> TraceConfig:
        """The same config with the data's deviations in place of ``units="std"``, from one pass over them."""
        from attackroute.tracing.deviations import Deviations  # which loads torch, as the command line's help must not

        if self.units != STD:
            return self
        return replace(self, units=Deviations.of(model, data, batch_size=batch_size, progress=progress))

    @property
    def deviations(self) -> Deviations | None:
        """The deviations in whose units routes are traced; None for raw ones."""
        if self.units == STD:
            raise UserError("the data's deviations were not measured: call config.measured(model, data)")
        return None if isinstance(self.units, str) else self.units

    @property
    def units_name(self) -> str:
        """``"raw"`` or ``"std"``."""
        return RAW if self.units == RAW else STD

    def check_attack(self, attack: object) -> None:
        """Raise a `UserError` where the carrier needs an attack and there is none."""
        if self.follows_noise and not attack:
            raise UserError(
                "carrier 'noise' follows what an attack changes: pass attack=..., such as ar.parse_attack('pgd') "
                "(--attack pgd)"
            )
