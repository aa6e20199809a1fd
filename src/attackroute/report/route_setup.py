"""What a route view compares: pairs of conditions, the words for them, and the control that moves between pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attackroute.report.measuring import Condition
from attackroute.robustness.attack_order import brief, radii


@dataclass(frozen=True)
class Pair:
    """Two conditions whose routes are laid over one another.

    Attributes:
        first: Number of the condition drawn as the first.
        second: Number of the other; None draws one alone.
        label: What tells this pair from the others.
    """

    first: int
    second: int | None
    label: str


@dataclass(frozen=True)
class RouteSetup:
    """One route view.

    Attributes:
        data: Number of its data set.
        pairs: What it can show, one at a time.
        control: What moves between pairs: ``"eps"`` is a slider, anything else a list of that name.
        first: Words for a channel on the first route only.
        second: For one on the second only.
        both: For one on both.
        linked: Whether the view before it sets its width and choices.
    """

    data: int
    pairs: tuple[Pair, ...]
    control: str
    first: str = "clean images only"
    second: str = "attacked images only"
    both: str = "clean and attacked images"
    linked: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain values, for the page."""
        return asdict(self)


def run_setup(conditions: Sequence[Condition], data: int = 0, start: int = 0, *, linked: bool = False) -> RouteSetup:
    """Clean images beside those after each attack.

    Args:
        conditions: Clean images, then those after attacks.
        data: Number of the data set.
        start: Number of the first of these conditions in it.
        linked: As in :class:`RouteSetup`.
    """
    attacks = [item.attack or "" for item in conditions[1:]]
    labels = radii(attacks)
    names = labels if labels is not None else [brief(attack) for attack in attacks]
    pairs = [Pair(start, start + number, name) for number, name in enumerate(names, start=1)]
    return RouteSetup(
        data, tuple(pairs) or (Pair(start, None, ""),), "attack" if labels is None else "eps", linked=linked
    )
