"""The page of a reproduction: tables and claims between marks in a Markdown file, whose other text stays as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from attackroute.core.errors import UserError
from attackroute.paper import tables  # noqa: F401  (registers what sections are made of)
from attackroute.paper.claims import JUDGES, TABLES, Claim, Findings, NetworkResults, Results, Row, markdown, percent
from attackroute.paper.hardening_tables import accuracies_table, differences_table, hardening_claims, study_terms

DATA_OF = {"table2": "cifar10", "table3": "svhn"}
"""Tables of hardening studies, and the data that they are about."""

_NETWORKS = "networks"
HEADINGS = {
    _NETWORKS: "The networks",
    "table1": "Table 1: occurrence",
    "fig2": "Fig. 2: sensitivity and gradients",
    "fig3": "Fig. 3: transplants",
    "fig4": "Fig. 4: silenced channels and weakened connections",
    "fig5": "Fig. 5: Grad-CAM",
    "table2": "Table 2: hardening on CIFAR-10",
    "table3": "Table 3: hardening on SVHN",
    "table4": "Table 4: gradients of hard and weak images",
    "fig6": "Fig. 6: hardness",
}
"""The places of a page, by the names of their marks."""


def blocks(results: Results, studies: Mapping[str, Findings]) -> dict[str, str]:
    """The Markdown of every section for which there are results, by its name; hardening studies are by their table."""
    texts = {name: [markdown(claim.cells for claim in claims_of(name, results, studies))] for name in HEADINGS}
    texts[_NETWORKS] = [markdown(map(_network, results))]
    for entry in TABLES:
        if text := markdown({"network": network, **row} for network, row in entry.of(results)):
            texts[entry.section].append(f"{entry.title}\n\n{text}")
    for name, study in studies.items():
        texts[name] += _study(study, DATA_OF[name])
    joined = {name: "\n\n".join(filter(None, parts)) for name, parts in texts.items()}
    return {name: text for name, text in joined.items() if text}


def claims_of(name: str, results: Results, studies: Mapping[str, Findings]) -> list[Claim]:
    """The claims of a table or figure, on every network for which there are results."""
    if name in studies:
        seeds = f"{len(studies[name]['seeds'])} seeds"
        return [replace(claim, network=seeds) for claim in hardening_claims(studies[name], DATA_OF[name])]
    return [
        replace(claim, network=network)
        for entry in JUDGES
        if entry.section == name
        for network, claim in entry.of(results)
    ]


def skeleton() -> str:
    """A page with a heading and empty marks for every section."""
    parts = [f"## {heading}\n\n{_mark(name, '')}" for name, heading in HEADINGS.items()]
    return "# The paper's tables and figures, reproduced\n\n" + "\n\n".join(parts) + "\n"


def fill(page: str, texts: Mapping[str, str]) -> str:
    """Put texts between their marks, and leave the rest of the page as it is.

    Raises:
        UserError: The page has no marks for one of them.
    """
    for name, text in texts.items():
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- end of {name} -->", re.DOTALL)
        mark = _mark(name, text)
        page, count = pattern.subn(lambda _, mark=mark: mark, page)  # type: ignore[misc]
        if count != 1:
            raise UserError(
                f"the page has {count} places for {name}; it needs <!-- {name} --> and <!-- end of {name} --> once"
            )
    return page


def _mark(name: str, text: str) -> str:
    return "\n".join([f"<!-- {name} -->", *(["", text, ""] if text else []), f"<!-- end of {name} -->"])


def _study(study: Findings, data: str) -> list[str]:
    return [
        "Accuracy in percent: mean over seeds (lowest-highest) [paper's].\n\n"
        + markdown(accuracies_table(study, data)),
        "Differences in points; bold where the 95 % intervals over images and over seeds both leave out zero.\n\n"
        + markdown(differences_table(study)),
        study_terms(study),
    ]


def _network(network: NetworkResults) -> Row:
    about = network.about
    return {
        "network": network.name,
        "neurons": f"{about['neurons']:,} in {len(network.layers)} layers",
        "parameters": f"{about['parameters']:,}",
        "clean test accuracy": f"{percent(about['accuracy'])} % of {about['images']:,}",
    }
