"""Fig. 4: what is left with the route's channels silenced, or the connections between them weakened?"""

from __future__ import annotations

from collections.abc import Iterator

from attackroute.analysis.rankings import RANDOM, ROUTE
from attackroute.paper.claims import Claim, markdown, percent, verdict
from attackroute.paper.results import Content, Results, accuracies, distinct, having, mean, rivals, unbeaten

_OUTPUT, _ACTIVATION = "deactivate", "deactivate-activation"


_DESTROYED, _HARDLY = 0.5, 0.9  # of the accuracy that was


def output_table(results: Results) -> str:
    """Fig. 4a: accuracy over the share of channels set to zero."""
    return _deactivation_table(results, _OUTPUT)


def activation_table(results: Results) -> str:
    """The same with zeros after the activation."""
    return _deactivation_table(results, _ACTIVATION)


def _deactivation_table(results: Results, part: str) -> str:
    header: list[str] = []
    lines = []
    for network, found in having(results, part):
        header = ["network", "layers", "share", ROUTE, RANDOM, *rivals(found)]
        for group in distinct(found, "layers", criterion=ROUTE):
            for share in sorted(distinct(found, "share", layers=group)):
                cells = accuracies(found, header[3:], layers=group, share=share)
                lines.append([network.name, network.group_title(group), f"{share:.0%}", *cells])
    return markdown(header, lines)


def weakening_table(results: Results) -> str:
    """Fig. 4b: accuracy over the factor on the connections."""
    header: list[str] = []
    lines = []
    for network, found in having(results, "weaken"):
        header = ["network", "beta", ROUTE, RANDOM, *rivals(found)]
        for beta in distinct(found, "beta", criterion=ROUTE):
            lines.append([network.name, f"{beta:g}", *accuracies(found, header[2:], beta=beta)])
    return markdown(header, lines)


def claims(results: Results) -> Iterator[Claim]:
    """What the paper reads from it."""
    for part, after in ((_OUTPUT, ""), (_ACTIVATION, " after the activation")):
        for network, found in having(results, part):
            for group in distinct(found, "layers", criterion=ROUTE):
                where = {"layers": group, "share": found["main_share"]}
                name = network.group_title(group)
                text = f"30 % of the route of {name}, set to zero{after}, destroy accuracy; random neurons hardly"
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
