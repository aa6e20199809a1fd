"""Fig. 4: what is left with the route's channels silenced, or the connections between them weakened?"""

from __future__ import annotations

from collections.abc import Iterator

from attackroute.experiments.rankings import RANDOM, ROUTE
from attackroute.reproduction.claims import Claim, markdown, percent, verdict
from attackroute.reproduction.results import Content, Results, distinct, having, mean, rivals, unbeaten

_DESTROYED, _HARDLY = 0.5, 0.9  # of the accuracy that was


def deactivation_table(results: Results) -> str:
    """Fig. 4a: accuracy over the share of channels set to zero."""
    header: list[str] = []
    lines = []
    for network, found in having(results, "deactivate"):
        header = ["network", "layers", "share", ROUTE, RANDOM, *rivals(found)]
        for group in _ends(found):
            for share in sorted(distinct(found, "share", layers=group)):
                cells = _cells(found, header[3:], layers=group, share=share)
                lines.append([network.name, network.group_title(group), f"{share:.0%}", *cells])
    return markdown(header, lines) if lines else ""


def weakening_table(results: Results) -> str:
    """Fig. 4b: accuracy over the factor on the connections."""
    header: list[str] = []
    lines = []
    for network, found in having(results, "weaken"):
        header = ["network", "beta", ROUTE, RANDOM, *rivals(found)]
        for beta in distinct(found, "beta", criterion=ROUTE):
            lines.append([network.name, f"{beta:g}", *_cells(found, header[2:], beta=beta)])
    return markdown(header, lines) if lines else ""


def claims(results: Results) -> Iterator[Claim]:
    """What the paper reads from it."""
    for network, found in having(results, "deactivate"):
        share = found["main_share"]
        for group in _ends(found):
            where = {"layers": group, "share": share}
            text = f"30 % of the route of {network.group_title(group)} set to zero destroys accuracy; random, hardly"
            yield _claim(text, network.name, found, where)
    for network, found in having(results, "weaken"):
        beta = found["main_beta"]
        text = f"connections of the route weakened to {beta:g} destroy accuracy; of random neurons, hardly"
        yield _claim(text, network.name, found, {"beta": beta})


def _claim(text: str, network: str, found: Content, where: dict[str, object]) -> Claim:
    ours = mean(found, "accuracy", criterion=ROUTE, **where) or 0.0
    random = mean(found, "accuracy", criterion=RANDOM, **where)
    equals = unbeaten(found, **where)
    beaten = random is not None and RANDOM not in equals
    return Claim(
        text,
        "yes",
        network,
        f"100 to {percent(ours)} %; random {'' if random is None else percent(random)} %",
        verdict(ours <= _DESTROYED and random is not None and random >= _HARDLY, beaten),
        equals,
    )


def _ends(found: Content) -> list[str]:
    """The first layer, the last one, and all together."""
    groups = distinct(found, "layers", criterion=ROUTE)
    single = [group for group in groups if "+" not in group]
    return list(dict.fromkeys([single[0], single[-1], *(group for group in groups if "+" in group)]))


def _cells(found: Content, criteria: list[str], **conditions: object) -> list[str]:
    values = (mean(found, "accuracy", criterion=name, **conditions) for name in criteria)
    return ["" if value is None else percent(value) for value in values]
