"""Fig. 3: do clean values in the route's channels bring attacked images back?

Accuracies are on images that the network gets right when they are clean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attackroute.analysis.accuracy_table import UNTOUCHED
from attackroute.analysis.own_routes import OWN
from attackroute.analysis.own_routes import RANDOM as OWN_RANDOM
from attackroute.analysis.rankings import RANDOM, ROUTE
from attackroute.paper.claims import Claim, markdown, percent, verdict
from attackroute.paper.published import TRANSPLANTED_FIRST, TRANSPLANTED_RANDOM
from attackroute.paper.results import (
    Content,
    NetworkResults,
    Results,
    accuracies,
    distinct,
    having,
    mean,
    rivals,
    unbeaten,
)

_NEARLY_ALL = 0.9


_FIRST_THREE = 3


def shares_table(results: Results) -> str:
    """Fig. 3a: accuracy over the share of the first layer's channels."""
    header: list[str] = []
    lines = []
    for network, found in having(results, "transplant-shares"):
        header = ["network", "layer", "share", ROUTE, RANDOM, *rivals(found)]
        attack = _attacks(found)[0]
        layer = _singles(found)[0]
        for share in sorted(distinct(found, "share", layers=layer)):
            cells = accuracies(found, header[3:], layers=layer, share=share, attack=attack)
            lines.append([network.name, network.title(layer), f"{share:.0%}", *cells])
    return markdown(header, lines)


def layers_table(results: Results) -> str:
    """Fig. 3b: single layers and several together at one share, under every attack."""
    header: list[str] = []
    lines = []
    for part in ("transplant-layers", "transplant-attacks"):
        for network, found in having(results, part):
            header = ["network", "attack", "untouched", "layers", ROUTE, RANDOM, *rivals(found)]
            for attack in _attacks(found):
                untouched = percent(mean(found, "accuracy", criterion=UNTOUCHED, attack=attack) or 0.0)
                for group in distinct(found, "layers", criterion=ROUTE, attack=attack):
                    cells = accuracies(found, header[4:], layers=group, attack=attack)
                    lines.append([network.name, attack, untouched, network.group_title(group), *cells])
    return markdown(header, lines)


def own_table(results: Results) -> str:
    """Each image's own route in place of the model's."""
    lines = []
    for network, found in having(results, "transplant-own"):
        for group in distinct(found, "layers"):
            values = (mean(found, "accuracy", layers=group, criterion=name) or 0.0 for name in (OWN, OWN_RANDOM))
            lines.append([network.name, network.group_title(group), *(percent(value) for value in values)])
    return markdown(["network", "layers", OWN, OWN_RANDOM], lines)


def claims(results: Results) -> Iterator[Claim]:
    """What the paper reads from it."""
    for network, found in having(results, "transplant-layers"):
        (attack,) = _attacks(found)
        yield _first(network, found, attack)
        three = _group(found, attack, _FIRST_THREE)
        if three is not None:
            yield _together(network, found, attack, three)
    for network, found in having(results, "transplant-attacks"):
        for attack in _attacks(found):
            yield _other_attack(network, found, attack)


@dataclass(frozen=True)
class _Repair:
    """Accuracies under one attack: untouched, and with clean values in the route's channels or in random ones."""

    before: float
    ours: float
    random: float
    equals: tuple[str, ...]

    @classmethod
    def of(cls, found: Content, attack: str, group: str) -> _Repair:
        """Of some layers that are changed together."""
        before = mean(found, "accuracy", criterion=UNTOUCHED, attack=attack) or 0.0
        ours, random = (
            mean(found, "accuracy", criterion=name, layers=group, attack=attack) or 0.0 for name in (ROUTE, RANDOM)
        )
        return cls(before, ours, random, unbeaten(found, layers=group, attack=attack))

    @property
    def clear(self) -> bool:
        """Whether the route clearly repairs more than random channels."""
        return RANDOM not in self.equals

    def __str__(self) -> str:
        return f"{percent(self.before)} to {percent(self.ours)} %; random {percent(self.random)} %"


def _first(network: NetworkResults, found: Content, attack: str) -> Claim:
    repair = _Repair.of(found, attack, _singles(found)[0])
    return Claim(
        "30 % of the first layer's route neurons, transplanted, repair most PGD examples; random ones do not",
        f"0 to {percent(TRANSPLANTED_FIRST)} %; random at most {percent(TRANSPLANTED_RANDOM)} %",
        network.name,
        str(repair),
        verdict(repair.ours >= 0.5 and repair.random - repair.before <= TRANSPLANTED_RANDOM, repair.clear),
        repair.equals,
    )


def _together(network: NetworkResults, found: Content, attack: str, group: str) -> Claim:
    repair = _Repair.of(found, attack, group)
    return Claim(
        "30 % of the first three layers' route neurons repair nearly all",
        "basically all",
        network.name,
        f"{percent(repair.ours)} %; random {percent(repair.random)} %",
        verdict(repair.ours >= _NEARLY_ALL and repair.clear, repair.clear),
        repair.equals,
    )


def _other_attack(network: NetworkResults, found: Content, attack: str) -> Claim:
    """Under another attack the route of the first layer should repair more than random channels."""
    repair = _Repair.of(found, attack, _singles(found)[0])
    return Claim(
        f"the same under {attack}: the first layer's route repairs more than random neurons",
        "yes",
        network.name,
        str(repair),
        verdict(repair.clear and repair.ours > repair.before, repair.clear or repair.ours > repair.random),
        repair.equals,
    )


def _attacks(found: Content) -> list[str]:
    return distinct(found, "attack")


def _singles(found: Content) -> list[str]:
    return [group for group in distinct(found, "layers", criterion=ROUTE) if "+" not in group]


def _group(found: Content, attack: str, size: int) -> str | None:
    groups = distinct(found, "layers", criterion=ROUTE, attack=attack)
    return next((group for group in groups if len(group.split("+")) == size), None)
