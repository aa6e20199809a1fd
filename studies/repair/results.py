"""What a study of repairs found: areas and accuracies of every criterion over networks, and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attackroute.analysis.intervention_table import BEATS, LOSES, UNDECIDED
from attackroute.core.document import Document
from attackroute.core.table import Table
from studies.paired import PairedDifference
from studies.repair.criteria import (
    ATTRIBUTION,
    EQUAL_COMPUTE,
    FIRST_LAYERS,
    INFLUENCE,
    INFLUENCE_STD,
    NOISE_ROUTE,
    PATH,
    RANDOM,
    SENSITIVITY,
)
from studies.repair.oracle import ORACLES
from studies.repair.repair import ANY, BUDGETS, EVERY, PATH_RULE, RULE, SHARES, Repaired, Values

AREA = "mean area"


@dataclass(frozen=True)
class NetworkRepair:
    """One network.

    Attributes:
        selection: From which the variant of the noise route was picked.
        judged: By attack, what every criterion repairs.
        moved: By attack, criterion and where the ranks come from: the share of the route's channels that ranks under
            the attack itself keep too, and what they repair.
    """

    selection: Repaired
    judged: Mapping[str, Repaired]
    moved: Mapping[tuple[str, str, str], tuple[float, Repaired]]


@dataclass(frozen=True)
class RepairStudy:
    """A finished study.

    Attributes:
        picked: The variant of the noise route that the rule took.
        networks: By name. Each was measured on images of its own.
        terms: On what all depends, as JSON values.
    """

    picked: str
    networks: Mapping[str, NetworkRepair]
    terms: Mapping[str, Any]

    @property
    def attacks(self) -> tuple[str, ...]:
        """By name."""
        return tuple(self._first.judged)

    @property
    def layers(self) -> tuple[str, ...]:
        """In forward order."""
        return tuple(self._first.judged[self.attacks[0]].whole)

    @property
    def _first(self) -> NetworkRepair:
        return next(iter(self.networks.values()))

    def criteria(self, attack: str) -> tuple[str, ...]:
        """What was judged under an attack, layer by layer."""
        return tuple(self._first.judged[attack].curves)

    def places(self, attack: str) -> dict[str, tuple[str, ...]]:
        """By criterion, where budgets of it were tried: some compare channels of all layers alone."""
        repaired = self._first.judged[attack]
        return {by: (EVERY, ANY) if by in repaired.budgets else (ANY,) for by in repaired.pooled}

    def area(self, attack: str, criterion: str, layer: str | None = None) -> float:
        """Area under the curve of accuracy over the share of a layer, mean over networks; of None, over layers too."""
        return float(
            np.mean(
                [
                    (repaired.areas(criterion) if layer is None else repaired.area(criterion, layer)).mean()
                    for repaired in self._networks(attack)
                ]
            )
        )

    def accuracies(self, attack: str, criterion: str, place: str) -> list[float]:
        """With budgets of all channels, in :data:`EVERY` or :data:`ANY` layer, mean over networks."""
        return [
            float(np.mean([_budget(repaired, place)[criterion][index].mean() for repaired in self._networks(attack)]))
            for index in range(len(BUDGETS))
        ]

    def untouched(self, attack: str) -> float:
        """Accuracy under attack, of images that are right when clean, mean over networks."""
        return float(np.mean([repaired.untouched.mean() for repaired in self._networks(attack)]))

    def images(self, attack: str) -> int:
        """Images that are right when clean, of all networks together."""
        return sum(len(repaired.untouched) for repaired in self._networks(attack))

    def gain(self, attack: str, one: str, other: str, what: str = AREA, index: int = 0) -> PairedDifference:
        """How much more one criterion repairs than another.

        Args:
            attack: Under which attack.
            one: A criterion.
            other: Another.
            what: :data:`AREA`, or of a budget where its channels are.
            index: Which budget.
        """

        def value(repaired: Repaired, by: str) -> Values:
            return repaired.areas(by) if what == AREA else _budget(repaired, what)[by][index]

        return PairedDifference.across(
            [value(repaired, one) - value(repaired, other) for repaired in self._networks(attack)]
        )

    def _networks(self, attack: str) -> Iterator[Repaired]:
        return (network.judged[attack] for network in self.networks.values())

    def compared(self, attack: str) -> Iterator[tuple[str, str]]:
        """Pairs of criteria whose difference is looked at, apart from :data:`FIRST_LAYERS`, where both were judged."""
        rivals = (INFLUENCE, ATTRIBUTION, SENSITIVITY, RANDOM)
        pairs = [(one, other) for one in dict.fromkeys([self.picked, NOISE_ROUTE]) for other in rivals]
        pairs += [(INFLUENCE_STD, other) for other in (INFLUENCE, NOISE_ROUTE, ATTRIBUTION, RANDOM)]
        pairs += [(ATTRIBUTION, INFLUENCE), (SENSITIVITY, INFLUENCE), (INFLUENCE, RANDOM)]
        pairs += [(PATH, other) for other in self._against_path()] + [(EQUAL_COMPUTE, ATTRIBUTION)]
        pairs += [(oracle, other) for oracle in ORACLES for other in (self.picked, ATTRIBUTION)]
        return (pair for pair in pairs if set(pair) <= set(self.criteria(attack)))

    def _against_path(self) -> list[str]:
        return list(dict.fromkeys([ATTRIBUTION, EQUAL_COMPUTE, self.picked, NOISE_ROUTE, INFLUENCE, RANDOM]))

    def path_verdicts(self) -> Iterator[tuple[str, str, str, list[PairedDifference]]]:
        """What :data:`PATH_RULE` says: attack, verdict, criterion, and the difference of mean areas on each network."""
        for attack in self.attacks:
            for other in self._against_path():
                if {PATH, other} <= set(self.criteria(attack)):
                    gains = [
                        PairedDifference.across([repaired.areas(PATH) - repaired.areas(other)])
                        for repaired in self._networks(attack)
                    ]
                    above = all(gain.over_images[0] > 0 for gain in gains)
                    below = all(gain.over_images[1] < 0 for gain in gains)
                    yield attack, BEATS if above else LOSES if below else UNDECIDED, other, gains

    def document(self) -> Document:
        """All of it."""
        first = self.attacks[0]
        best = max(self.criteria(first), key=lambda name: self.area(first, name))
        reading = (
            f"Under {first}, {best} repairs most per channel of a single layer; of the noise routes, {self.picked}."
        )
        return Document("repair study", self.terms, reading, Table.of(self._rows()), self._about())

    def _rows(self) -> Iterator[dict[str, Any]]:
        for name, network in self.networks.items():
            stages = [("selection", self.attacks[0], network.selection)]
            stages += [("final", attack, repaired) for attack, repaired in network.judged.items()]
            stages += [
                (f"ranked by {origin}", attack, repaired)
                for (attack, _, origin), (_, repaired) in network.moved.items()
            ]
            for stage, attack, repaired in stages:
                for row in repaired.records(attack):
                    yield {"network": name, "stage": stage, **row}

    def _about(self) -> dict[str, Any]:
        return {
            "picked": self.picked,
            "rule": RULE,
            "path_rule": PATH_RULE,
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
                    **difference.to_json("over_networks"),
                }
                for attack, one, other, what, share, difference in self.differences()
            ],
            "path": [
                {
                    "attack": attack, "second": other, "verdict": verdict,
                    "networks": {
                        name: {"difference": gain.value, "over_images": list(gain.over_images)}
                        for name, gain in zip(self.networks, gains, strict=True)
                    },
                }
                for attack, verdict, other, gains in self.path_verdicts()
            ],
            "transfers": [
                dict(zip(("attack", "criterion", "ranked_by", "kept", "accuracies"), row, strict=True))
                for row in self.transfers()
            ],
        }  # fmt: skip

    def _by_criterion(self, value: Callable[[str, str], Any]) -> dict[str, dict[str, Any]]:
        return {attack: {by: value(attack, by) for by in self.criteria(attack)} for attack in self.attacks}

    def differences(self) -> Iterator[tuple[str, str, str, str, float | None, PairedDifference]]:
        """Attack, two criteria, what is compared, of which budget, and the difference."""
        for attack in self.attacks:
            for one, other in self.compared(attack):
                yield attack, one, other, AREA, None, self.gain(attack, one, other)
                for place in (EVERY, ANY):
                    yield from self._gains(attack, one, other, place)
            for one in (self.picked, ATTRIBUTION):
                if one in self.criteria(attack):
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
            rows = [repaired.budgets[criterion].mean(1) for _, repaired in moved]
            yield attack, criterion, origin, float(np.mean([kept for kept, _ in moved])), np.mean(rows, axis=0).tolist()


def _budget(repaired: Repaired, place: str) -> Mapping[str, Values]:
    return {EVERY: repaired.budgets, ANY: repaired.pooled}[place]
