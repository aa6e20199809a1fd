"""Table 1: occurrence of the most frequent neurons; and how few images give the model's route (section 5.1.3)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from attackroute.analysis.occurrence import OCCURRENCE, RANDOM_ROUTES
from attackroute.paper.claims import Claim, markdown, percent, verdict
from attackroute.paper.published import OCCURRENCES, SHARED_BY_A_TENTH
from attackroute.paper.results import Results, distinct, having, mean, rows

_CRITERIA = ("clean", "activation", "gradient", RANDOM_ROUTES)


_PART = 0.9


_TENTH = 0.1


def table(results: Results) -> str:
    """Occurrence in percent, layer by layer, beside the paper's and those of other criteria."""
    lines = []
    for network, found in having(results, "occurrence"):
        layers = distinct(found, "layer")
        paper = OCCURRENCES.get(network.family, {})
        for layer in layers:
            name = network.title(layer)
            own = [mean(found, "value", layer=layer, measure=OCCURRENCE, of=of) or 0.0 for of in _CRITERIA]
            there = f"{paper[name]:.0f}" if name in paper else ""
            lines.append([network.name, name, there, *(percent(value) for value in own)])
    return markdown(["network", "layer", "paper", "route", "by activation", "by gradient", "random routes"], lines)


def claims(results: Results) -> Iterator[Claim]:
    """What the paper reads from it."""
    for network, found in having(results, "occurrence"):
        layers = distinct(found, "layer")
        ours = [mean(found, "value", layer=layer, measure=OCCURRENCE, of="clean") or 0.0 for layer in layers]
        chance = [mean(found, "value", layer=layer, measure=OCCURRENCE, of=RANDOM_ROUTES) or 0.0 for layer in layers]
        falls, above = ours[0] > ours[-1], all(own > low for own, low in zip(ours, chance, strict=True))
        paper = list(OCCURRENCES.get(network.family, {}).values())
        yield Claim(
            "images' routes share neurons, more so at the bottom than at the top",
            f"{paper[0]:.0f} to {paper[-1]:.0f} %" if paper else "",
            network.name,
            f"{percent(ours[0])} to {percent(ours[-1])} %, lowest {percent(min(ours))} % "
            f"(random routes {percent(statistics.fmean(chance))} %)",
            verdict(falls and above, falls or above),
            tuple(
                of
                for of in ("activation", "gradient")
                if all(
                    (mean(found, "value", layer=layer, measure=OCCURRENCE, of=of) or 0.0) >= own
                    for layer, own in zip(layers, ours, strict=True)
                )
            ),
        )
    for network, found in having(results, "sampling"):
        shares = [row["share_of_neurons"] for row in rows(found, share=_TENTH)]
        yield Claim(
            "a tenth of the images gives the same route",
            f"{percent(SHARED_BY_A_TENTH)} %",
            network.name,
            f"{percent(statistics.fmean(shares))} % of the neurons ({percent(min(shares))} to {percent(max(shares))}, "
            f"{len(shares)} draws of {round(_TENTH * found['samples'])} of {found['samples']})",
            verdict(statistics.fmean(shares) >= SHARED_BY_A_TENTH, statistics.fmean(shares) >= _PART),
        )
