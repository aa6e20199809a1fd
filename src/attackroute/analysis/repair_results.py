"""What a study of repairs found: areas and accuracies of every criterion over networks, and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attackroute.analysis.paired import PairedDifference
from attackroute.analysis.repair import ANY, BUDGETS, EVERY, RULE, SHARES, Repaired
from attackroute.analysis.repair_criteria import ATTRIBUTION, FIRST_LAYERS, INFLUENCE, NOISE_ROUTE, RANDOM, SENSITIVITY
from attackroute.analysis.repair_oracle import ORACLES
from attackroute.analysis.tables import Record

AREA = "mean area"


@dataclass(frozen=True)
class NetworkRepair:
    """One network.

    Attributes:
        selection: From which the variant of the noise route was picked.
        found: By attack, what every criterion repairs.
        moved: By attack, criterion and where the ranks come from: the share of the route's channels that ranks under
            the attack itself keep too, and what they repair.
    """

    selection: Repaired
    found: Mapping[str, Repaired]
    moved: Mapping[tuple[str, str, str], tuple[float, Repaired]]


@dataclass(frozen=True)
class RepairStudy:
    """A finished study.

    Attributes:
        picked: The variant of the noise route that the rule took.
        networks: By name. Each was measured on images of its own.
    """

    picked: str
    networks: Mapping[str, NetworkRepair]

    @property
    def rule(self) -> str:
        """How the variant is picked."""
        return RULE

    @property
    def attacks(self) -> tuple[str, ...]:
        """By name."""
        return tuple(self._first.found)

    @property
    def layers(self) -> tuple[str, ...]:
        """In forward order."""
        return tuple(self._first.found[self.attacks[0]].whole)

    @property
    def _first(self) -> NetworkRepair:
        return next(iter(self.networks.values()))

    def criteria(self, attack: str) -> tuple[str, ...]:
        """What was judged under an attack, layer by layer."""
        return tuple(self._first.found[attack].curves)

    def places(self, attack: str) -> dict[str, tuple[str, ...]]:
        """By criterion, where budgets of it were tried: some compare channels of all layers alone."""
        found = self._first.found[attack]
        return {by: (EVERY, ANY) if by in found.budgets else (ANY,) for by in found.pooled}

    def area(self, attack: str, criterion: str, layer: str | None = None) -> float:
        """Area under the curve of accuracy over the share of a layer, mean over networks; of None, over layers too."""
        return float(
            np.mean(
                [
                    (found.areas(criterion) if layer is None else found.area(criterion, layer)).mean()
                    for found in self._found(attack)
                ]
            )
        )

    def accuracies(self, attack: str, criterion: str, place: str) -> list[float]:
        """With budgets of all channels, in :data:`EVERY` or :data:`ANY` layer, mean over networks."""
        return [
            float(np.mean([_budget(found, place)[criterion][index].mean() for found in self._found(attack)]))
            for index in range(len(BUDGETS))
        ]

    def untouched(self, attack: str) -> float:
        """Accuracy under attack, of images that are right when clean, mean over networks."""
        return float(np.mean([found.untouched.mean() for found in self._found(attack)]))

    def images(self, attack: str) -> int:
        """Images that are right when clean, of all networks together."""
        return sum(len(found.untouched) for found in self._found(attack))

    def gain(self, attack: str, one: str, other: str, what: str = AREA, index: int = 0) -> PairedDifference:
        """How much more one criterion repairs than another.

        Args:
            attack: Under which attack.
            one: A criterion.
            other: Another.
            what: :data:`AREA`, or of a budget where its channels are.
            index: Which budget.
        """

        def value(found: Repaired, by: str) -> np.ndarray[Any, np.dtype[np.float64]]:
            return found.areas(by) if what == AREA else _budget(found, what)[by][index]

        return PairedDifference.across([value(found, one) - value(found, other) for found in self._found(attack)])

    def _found(self, attack: str) -> Iterator[Repaired]:
        return (network.found[attack] for network in self.networks.values())

    def compared(self, attack: str) -> Iterator[tuple[str, str]]:
        """Pairs of criteria whose difference is looked at, apart from :data:`FIRST_LAYERS`."""
        for one in dict.fromkeys([self.picked, NOISE_ROUTE]):
            for other in (INFLUENCE, ATTRIBUTION, SENSITIVITY, RANDOM):
                yield one, other
        yield from ((ATTRIBUTION, INFLUENCE), (SENSITIVITY, INFLUENCE), (INFLUENCE, RANDOM))
        for oracle in ORACLES:
            if oracle in self.criteria(attack):
                yield from ((oracle, other) for other in (self.picked, ATTRIBUTION))

    def records(self) -> list[Record]:
        """See :class:`attackroute.experiments.tables.Result`."""
        rows = []
        for name, network in self.networks.items():
            stages = [("selection", self.attacks[0], network.selection)]
            stages += [("final", attack, found) for attack, found in network.found.items()]
            for stage, attack, found in stages:
                rows += [{"network": name, "stage": stage, **row} for row in found.records(attack)]
            for (attack, _, origin), (_, found) in network.moved.items():
                moved = found.records(attack)
                rows += [{"network": name, "stage": f"ranked by {origin}", **row} for row in moved]
        return rows

    def about(self) -> dict[str, Any]:
        """See :class:`attackroute.experiments.tables.Result`."""
        return {
            "picked": self.picked,
            "rule": RULE,
            "shares": list(SHARES),
            "budgets": list(BUDGETS),
            "untouched": {attack: self.untouched(attack) for attack in self.attacks},
            "images": {attack: self.images(attack) for attack in self.attacks},
            "areas": self._by_criterion(
                lambda attack, by: {layer: self.area(attack, by, layer) for layer in self.layers}
            ),
            "mean_areas": self._by_criterion(self.area),
            "accuracies": {
                attack: {
                    by: {place: self.accuracies(attack, by, place) for place in places}
                    for by, places in self.places(attack).items()
                }
                for attack in self.attacks
            },
            "differences": [
                {
                    "attack": attack, "first": one, "second": other, "what": what, "share": share,
                    "difference": found.value, "over_images": list(found.over_images),
                    "over_networks": None if found.over_seeds is None else list(found.over_seeds),
                    "verdict": found.verdict,
                }
                for attack, one, other, what, share, found in self.differences()
            ],
            "transfers": [
                dict(zip(("attack", "criterion", "ranked_by", "kept", "accuracies"), row, strict=True))
                for row in self.transfers()
            ],
        }  # fmt: skip

    def _by_criterion(self, value: Callable[[str, str], Any]) -> dict[str, dict[str, Any]]:
        return {attack: {by: value(attack, by) for by in self.criteria(attack)} for attack in self.attacks}

    def reading(self) -> str:
        """See :class:`attackroute.experiments.tables.Result`."""
        first = self.attacks[0]
        best = max(self.criteria(first), key=lambda name: self.area(first, name))
        return f"Under {first}, {best} repairs most per channel of a single layer; of the noise routes, {self.picked}."

    def differences(self) -> Iterator[tuple[str, str, str, str, float | None, PairedDifference]]:
        """Attack, two criteria, what is compared, of which budget, and the difference."""
        for attack in self.attacks:
            for one, other in self.compared(attack):
                yield attack, one, other, AREA, None, self.gain(attack, one, other)
                for place in (EVERY, ANY):
                    yield from self._gains(attack, one, other, place)
            for one in (self.picked, ATTRIBUTION):
                yield from self._gains(attack, one, FIRST_LAYERS, ANY)

    def _gains(
        self, attack: str, one: str, other: str, place: str
    ) -> Iterator[tuple[str, str, str, str, float | None, PairedDifference]]:
        for index, share in enumerate(BUDGETS):
            yield attack, one, other, place, share, self.gain(attack, one, other, place, index)

    def transfers(self) -> Iterator[tuple[str, str, str, float, list[float]]]:
        """What ranks from elsewhere repair, in every layer: attack, criterion, origin, share kept, accuracies."""
        for attack, criterion, origin in self._first.moved:
            moved = [network.moved[attack, criterion, origin] for network in self.networks.values()]
            rows = [found.budgets[criterion].mean(1) for _, found in moved]
            yield attack, criterion, origin, float(np.mean([kept for kept, _ in moved])), np.mean(rows, axis=0).tolist()


def _budget(found: Repaired, place: str) -> Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]:
    return {EVERY: found.budgets, ANY: found.pooled}[place]
