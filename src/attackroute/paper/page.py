"""The page of a reproduction: tables and claims between marks in a Markdown file, whose other text stays as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from attackroute.core.errors import UserError
from attackroute.paper.claims import Claim, Findings, Results, claims_table, markdown, percent
from attackroute.paper.hardening_tables import accuracies_table, differences_table, hardening_claims, study_terms
from attackroute.paper.hardness_tables import (
    bins_table,
    gradient_claims,
    gradients_table,
    prediction_claims,
    predictors_table,
)
from attackroute.paper.tables import (
    ACTIVATION_ZEROS,
    OUTPUT_ZEROS,
    attention_claims,
    attention_table,
    deactivation_table,
    occurrence_claims,
    occurrence_table,
    per_image_transplant_table,
    response_claims,
    responses_table,
    silence_claims,
    transplant_claims,
    transplant_layers_table,
    transplant_shares_table,
    weakening_table,
)

DATA_OF = {"table2": "cifar10", "table3": "svhn"}

_TITLES = {
    "networks": "The networks",
    "table1": "Table 1: occurrence, and how few images give a route",
    "fig2": "Fig. 2: sensitivity and gradients",
    "fig3": "Fig. 3: transplants",
    "fig4": "Fig. 4: silenced channels and weakened connections",
    "fig5": "Fig. 5: Grad-CAM",
    "table2": "Table 2: hardening on CIFAR-10",
    "table3": "Table 3: hardening on SVHN",
    "table4": "Table 4: gradients of hard and weak images",
    "fig6": "Fig. 6: hardness",
}

SECTIONS = tuple(_TITLES)
"""Names of the places that a page has."""


def blocks(results: Results, studies: Mapping[str, Findings]) -> dict[str, str]:
    """The Markdown of every section for which there are results, by its name.

    Args:
        results: What was found on networks.
        studies: Hardening studies, by the table that they are for.
    """
    texts = {"networks": _networks(results)} if results else {}
    for section, (tables, _) in _SECTIONS.items():
        filled = [f"{title}\n\n{text}" for title, table in tables.items() if (text := table(results))]
        text = _section(filled, claims_of(section, results, studies))
        if text:
            texts[section] = text
    for section, study in studies.items():
        filled = [
            "Accuracy in percent: mean over seeds (lowest-highest) [paper's].\n\n"
            + accuracies_table(study, DATA_OF[section]),
            "Differences in points; bold where the 95 % intervals over images and over seeds both leave out zero.\n\n"
            + differences_table(study),
            study_terms(study),
        ]
        texts[section] = _section(filled, claims_of(section, results, studies))
    return texts


def claims_of(section: str, results: Results, studies: Mapping[str, Findings]) -> list[Claim]:
    """The claims of a table or figure, on every network for which there are results."""
    if section in DATA_OF:
        return list(hardening_claims(studies[section], DATA_OF[section])) if section in studies else []
    return list(_SECTIONS[section][1](results))


def skeleton() -> str:
    """A page with a heading and empty marks for every section."""
    parts = [f"## {title}\n\n{_mark(name, '')}" for name, title in _TITLES.items()]
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
    return (
        f"<!-- {name} -->\n\n{text}\n\n<!-- end of {name} -->" if text else f"<!-- {name} -->\n<!-- end of {name} -->"
    )


def _section(tables: list[str], claims: list[Claim]) -> str:
    return "\n\n".join([*([claims_table(claims)] if claims else []), *tables])


def _networks(results: Results) -> str:
    lines = [
        [
            network.name,
            f"{network.about['neurons']:,} in {len(network.layers)} layers",
            f"{network.about['parameters']:,}",
            f"{percent(network.about['accuracy'])} % of {network.about['images']:,}",
        ]
        for network in results
    ]
    return markdown(["network", "neurons", "parameters", "clean test accuracy"], lines)


_Tables = Mapping[str, Callable[[Results], str]]
_SECTIONS: Mapping[str, tuple[_Tables, Callable[[Results], Iterator[Claim]]]] = {
    "table1": (
        {"Occurrence in percent: mean frequency of the most frequent fifth of a layer's channels.": occurrence_table},
        occurrence_claims,
    ),
    "fig2": (
        {"Layers in which the mean over the route's neurons is above that of the other sets:": responses_table},
        response_claims,
    ),
    "fig3": (
        {
            "Fig. 3a, accuracy in percent under PGD over the share of one layer's channels:": transplant_shares_table,
            "Fig. 3b, 30 % of the channels of single layers, and of several together:": transplant_layers_table,
            "Each image's own route instead, 30 % of the channels, and random channels for each, under PGD:": (
                per_image_transplant_table
            ),
        },
        transplant_claims,
    ),
    "fig4": (
        {
            "Fig. 4a, accuracy in percent on clean images over the share set to zero:": partial(
                deactivation_table, part=OUTPUT_ZEROS
            ),
            "The same with zeros after the activation, where a layer has its own:": partial(
                deactivation_table, part=ACTIVATION_ZEROS
            ),
            "Fig. 4b, accuracy in percent with connections multiplied by beta:": weakening_table,
        },
        silence_claims,
    ),
    "fig5": (
        {
            "Grad-CAM's energy in the middle half of the image, and how much of it PGD moves, in "
            "percent:": attention_table
        },
        attention_claims,
    ),
    "table4": (
        {
            "Gradients towards the loss, summed over the layer's route neurons; hard images withstand "
            "`fgsm:eps=1/255`, weak ones do not.": gradients_table
        },
        gradient_claims,
    ),
    "fig6": (
        {
            "Images fooled in each tenth by V, hardest first:": bins_table,
            "AUROC for being fooled (0.5: chance), with 95 % bootstrap intervals:": predictors_table,
        },
        prediction_claims,
    ),
}
