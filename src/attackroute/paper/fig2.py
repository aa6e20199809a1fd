"""Fig. 2: are the route's neurons more sensitive, and do they have larger gradients, than the others?"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from attackroute.analysis.rankings import OFF_ROUTE, RANDOM, ROUTE
from attackroute.paper.claims import Claim, by_count, markdown
from attackroute.paper.results import Content, Results, distinct, having, matching, mean, rivals

_CLAIMS = {
    "sensitivity": "route neurons are more sensitive than the others",
    "gradient": "route neurons have larger gradients than the others",
}


def table(results: Results) -> str:
    """In how many layers the route's mean is above that of others, and by how much."""
    header: list[str] = []
    lines = []
    for network, found in having(results, "sensitivity"):
        for quantity, attack in _quantities(found):
            factors = _factors(found, quantity, attack)
            higher = {
                name: f"{_higher(found, quantity, attack, name)} of {len(factors)}"
                for name in (OFF_ROUTE, RANDOM, *rivals(found))
            }
            what = f"{quantity} to {attack.partition(':')[0]}" if attack else quantity
            lines.append(
                [network.name, what, f"{factors[0]:.2f}", f"{statistics.median(factors):.2f}", *higher.values()]
            )
            header = ["network", "quantity", "route / others, first layer", "median of layers", *higher]
    return markdown(header, lines)


def claims(results: Results) -> Iterator[Claim]:
    """What the paper reads from it."""
    for network, found in having(results, "sensitivity"):
        layers = distinct(found, "layer")
        for quantity, attack in _quantities(found):
            if attack is not None and attack != distinct(found, "attack", quantity=quantity)[0]:
                continue  # the claim is about the first attack
            good, factors = _higher(found, quantity, attack, OFF_ROUTE), _factors(found, quantity, attack)
            equals = [
                name for name in (RANDOM, *rivals(found)) if 2 * _higher(found, quantity, attack, name) <= len(layers)
            ]
            yield Claim(
                _CLAIMS[quantity],
                "all layers",
                network.name,
                f"in {good} of {len(layers)} layers, {factors[0]:.2f} times in the first, "
                f"{statistics.median(factors):.2f} in the median",
                by_count(good, len(layers)),
                tuple(equals),
            )


def _quantities(found: Content) -> list[tuple[str, str | None]]:
    return list(dict.fromkeys((row["quantity"], row["attack"]) for row in found["rows"]))


def _factors(found: Content, quantity: str, attack: str | None) -> list[float]:
    """The route's mean over that of all other neurons, by layer."""
    factors = []
    for layer in distinct(found, "layer"):
        ours, theirs = (
            mean(found, "mean", layer=layer, quantity=quantity, attack=attack, criterion=name) or 0.0
            for name in (ROUTE, OFF_ROUTE)
        )
        factors.append(ours / theirs if theirs else float("inf"))
    return factors


def _higher(found: Content, quantity: str, attack: str | None, control: str) -> int:
    """Layers in which the route's mean is above that of every set of a control."""
    verdicts = matching(found["verdicts"], quantity=quantity, attack=attack, control=control)
    return sum(each["beats"] for each in verdicts)
