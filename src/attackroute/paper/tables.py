"""Table 1 and Figs. 2 to 5: for each, a table in Markdown and the claims that the paper reads from it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from attackroute.analysis.controls import OFF_ROUTE, RANDOM, ROUTE
from attackroute.analysis.experiments.gradcam import CLEAN, INSIDE, SHIFT
from attackroute.analysis.experiments.occurrence import OCCURRENCE, RANDOM_ROUTES
from attackroute.analysis.intervention_table import UNTOUCHED
from attackroute.paper.claims import Claim, Findings, Results, by_count, having, markdown, percent, verdict
from attackroute.paper.experiments import OWN, OWN_RANDOM
from attackroute.paper.published import OCCURRENCES, SHARED_BY_A_TENTH, TRANSPLANTED_FIRST, TRANSPLANTED_RANDOM

# --- Table 1: occurrence of the most frequent neurons; and how few images give the model's route (section 5.1.3)

_TENTH = 0.1


def occurrence_table(results: Results) -> str:
    """Occurrence in percent, layer by layer, beside the paper's and those of other criteria."""
    lines = []
    for network, findings in having(results, "occurrence"):
        paper = OCCURRENCES.get(network.family, {})
        for layer in findings.distinct("layer"):
            name = network.title(layer)
            values = [_occurrence(findings, layer, of) for of in ("clean", "activation", "gradient", RANDOM_ROUTES)]
            reported = f"{paper[name]:.0f}" if name in paper else ""
            lines.append([network.name, name, reported, *map(percent, values)])
    return markdown(["network", "layer", "paper", "route", "by activation", "by gradient", "random routes"], lines)


def occurrence_claims(results: Results) -> Iterator[Claim]:
    """What the paper reads from Table 1."""
    for network, findings in having(results, "occurrence"):
        layers = findings.distinct("layer")
        ours, chance, *others = (
            [_occurrence(findings, layer, of) for layer in layers]
            for of in ("clean", RANDOM_ROUTES, "activation", "gradient")
        )
        falls, above = ours[0] > ours[-1], all(value > low for value, low in zip(ours, chance, strict=True))
        paper = list(OCCURRENCES.get(network.family, {}).values())
        yield Claim(
            text="images' routes share neurons, more so at the bottom than at the top",
            paper=f"{paper[0]:.0f} to {paper[-1]:.0f} %" if paper else "",
            network=network.name,
            found=f"{percent(ours[0])} to {percent(ours[-1])} %, lowest {percent(min(ours))} % "
            f"(random routes {percent(statistics.fmean(chance))} %)",
            verdict=verdict(falls and above, falls or above),
            equals=tuple(
                of
                for of, values in zip(("activation", "gradient"), others, strict=True)
                if all(value >= route for value, route in zip(values, ours, strict=True))
            ),
        )
    for network, findings in having(results, "sampling"):
        shares = findings.table.select(share=_TENTH).column("share_of_neurons")
        yield Claim(
            text="a tenth of the images gives the same route",
            paper=f"{percent(SHARED_BY_A_TENTH)} %",
            network=network.name,
            found=f"{percent(statistics.fmean(shares))} % of the neurons "
            f"({percent(min(shares))} to {percent(max(shares))}, "
            f"{len(shares)} draws of {round(_TENTH * findings['samples'])} of {findings['samples']})",
            verdict=verdict(statistics.fmean(shares) >= SHARED_BY_A_TENTH, statistics.fmean(shares) >= 0.9),
        )


def _occurrence(findings: Findings, layer: str, of: str) -> float:
    return findings.mean("value", layer=layer, measure=OCCURRENCE, of=of) or 0.0


# --- Fig. 2: are the route's neurons more sensitive, and do they have larger gradients, than the others?

_RESPONSE_CLAIMS = {
    "sensitivity": "route neurons are more sensitive than the others",
    "gradient": "route neurons have larger gradients than the others",
}


@dataclass(frozen=True)
class _Response:
    """A quantity on one network, under an attack or none.

    Attributes:
        quantity: ``"sensitivity"`` or ``"gradient"``.
        attack: Its name, if any.
        factors: By layer, the mean over the route / over all other neurons.
        higher: By control, the number of layers in which the route's mean is above that of every set of it.
    """

    quantity: str
    attack: str | None
    factors: list[float]
    higher: dict[str, int]


def _responses(findings: Findings) -> Iterator[_Response]:
    for quantity, attack in dict.fromkeys((row["quantity"], row["attack"]) for row in findings.table):
        factors = []
        for layer in findings.distinct("layer"):
            ours, theirs = (
                findings.mean("mean", layer=layer, quantity=quantity, attack=attack, criterion=criterion) or 0.0
                for criterion in (ROUTE, OFF_ROUTE)
            )
            factors.append(ours / theirs if theirs else float("inf"))
        higher = {}
        for control in (OFF_ROUTE, RANDOM, *findings.rivals):
            verdicts = findings.entries("verdicts", quantity=quantity, attack=attack, control=control)
            higher[control] = sum(each["beats"] for each in verdicts)
        yield _Response(quantity, attack, factors, higher)


def responses_table(results: Results) -> str:
    """In how many layers the route's mean is above that of others, and by how much."""
    header: list[str] = []
    lines = []
    for network, findings in having(results, "sensitivity"):
        for response in _responses(findings):
            factors, attack = response.factors, response.attack
            what = f"{response.quantity} to {attack.partition(':')[0]}" if attack else response.quantity
            counts = [f"{count} of {len(factors)}" for count in response.higher.values()]
            lines.append([network.name, what, f"{factors[0]:.2f}", f"{statistics.median(factors):.2f}", *counts])
            header = ["network", "quantity", "route / others, first layer", "median of layers", *response.higher]
    return markdown(header, lines)


def response_claims(results: Results) -> Iterator[Claim]:
    """What the paper reads from Fig. 2."""
    for network, findings in having(results, "sensitivity"):
        for response in _responses(findings):
            quantity, factors = response.quantity, response.factors
            if response.attack not in (None, findings.distinct("attack", quantity=quantity)[0]):
                continue  # the claim is about the first attack
            good = response.higher[OFF_ROUTE]
            controls = [name for name in response.higher if name != OFF_ROUTE]
            yield Claim(
                text=_RESPONSE_CLAIMS[quantity],
                paper="all layers",
                network=network.name,
                found=f"in {good} of {len(factors)} layers, {factors[0]:.2f} times in the first, "
                f"{statistics.median(factors):.2f} in the median",
                verdict=by_count(good, len(factors)),
                equals=tuple(name for name in controls if 2 * response.higher[name] <= len(factors)),
            )


# --- Fig. 3: do clean values in the route's channels bring attacked images back? Accuracies are on images that the
# network gets right when they are clean.


def transplant_shares_table(results: Results) -> str:
    """Fig. 3a: accuracy over the share of the first layer's channels."""
    header: list[str] = []
    lines = []
    for network, findings in having(results, "transplant-shares"):
        header = ["network", "layer", "share", ROUTE, RANDOM, *findings.rivals]
        attack, layer = findings.distinct("attack")[0], _singles(findings)[0]
        for share in sorted(findings.distinct("share", layers=layer)):
            cells = findings.accuracies(header[3:], layers=layer, share=share, attack=attack)
            lines.append([network.name, network.title(layer), f"{share:.0%}", *cells])
    return markdown(header, lines)


def transplant_layers_table(results: Results) -> str:
    """Fig. 3b: single layers and several together at one share, under every attack."""
    header: list[str] = []
    lines = []
    for part in ("transplant-layers", "transplant-attacks"):
        for network, findings in having(results, part):
            header = ["network", "attack", "untouched", "layers", ROUTE, RANDOM, *findings.rivals]
            for attack in findings.distinct("attack"):
                untouched = percent(findings.mean("accuracy", criterion=UNTOUCHED, attack=attack) or 0.0)
                for group in findings.distinct("layers", criterion=ROUTE, attack=attack):
                    cells = findings.accuracies(header[4:], layers=group, attack=attack)
                    lines.append([network.name, attack, untouched, network.group_title(group), *cells])
    return markdown(header, lines)


def per_image_transplant_table(results: Results) -> str:
    """Each image's own route in place of the model's."""
    lines = []
    for network, findings in having(results, "transplant-own"):
        for group in findings.distinct("layers"):
            values = (findings.mean("accuracy", layers=group, criterion=name) or 0.0 for name in (OWN, OWN_RANDOM))
            lines.append([network.name, network.group_title(group), *map(percent, values)])
    return markdown(["network", "layers", OWN, OWN_RANDOM], lines)


@dataclass(frozen=True)
class _Repair:
    """Accuracies under one attack: untouched, and with clean values in the route's channels or in random ones."""

    before: float
    ours: float
    random: float
    equals: tuple[str, ...]

    @classmethod
    def of(cls, findings: Findings, attack: str, group: str) -> _Repair:
        """Of some layers that are changed together."""
        before = findings.mean("accuracy", criterion=UNTOUCHED, attack=attack) or 0.0
        ours, random = (
            findings.mean("accuracy", criterion=criterion, layers=group, attack=attack) or 0.0
            for criterion in (ROUTE, RANDOM)
        )
        return cls(before, ours, random, findings.unbeaten(layers=group, attack=attack))

    @property
    def clear(self) -> bool:
        """Whether the route clearly repairs more than random channels."""
        return RANDOM not in self.equals

    def __str__(self) -> str:
        return f"{percent(self.before)} to {percent(self.ours)} %; random {percent(self.random)} %"


def transplant_claims(results: Results) -> Iterator[Claim]:
    """What the paper reads from Fig. 3."""
    for network, findings in having(results, "transplant-layers"):
        (attack,) = findings.distinct("attack")
        first = _Repair.of(findings, attack, _singles(findings)[0])
        yield Claim(
            text="30 % of the first layer's route neurons, transplanted, repair most PGD examples; random ones do not",
            paper=f"0 to {percent(TRANSPLANTED_FIRST)} %; random at most {percent(TRANSPLANTED_RANDOM)} %",
            network=network.name,
            found=str(first),
            verdict=verdict(first.ours >= 0.5 and first.random - first.before <= TRANSPLANTED_RANDOM, first.clear),
            equals=first.equals,
        )
        groups = findings.distinct("layers", criterion=ROUTE, attack=attack)
        for group in [group for group in groups if len(group.split("+")) == 3][:1]:
            three = _Repair.of(findings, attack, group)
            yield Claim(
                text="30 % of the first three layers' route neurons repair nearly all",
                paper="basically all",
                network=network.name,
                found=f"{percent(three.ours)} %; random {percent(three.random)} %",
                verdict=verdict(three.ours >= 0.9 and three.clear, three.clear),
                equals=three.equals,
            )
    for network, findings in having(results, "transplant-attacks"):
        for attack in findings.distinct("attack"):
            repair = _Repair.of(findings, attack, _singles(findings)[0])
            yield Claim(
                text=f"the same under {attack}: the first layer's route repairs more than random neurons",
                paper="yes",
                network=network.name,
                found=str(repair),
                verdict=verdict(
                    repair.clear and repair.ours > repair.before, repair.clear or repair.ours > repair.random
                ),
                equals=repair.equals,
            )


def _singles(findings: Findings) -> list[str]:
    return [group for group in findings.distinct("layers", criterion=ROUTE) if "+" not in group]


# --- Fig. 4: what is left with the route's channels silenced, or the connections between them weakened?

OUTPUT_ZEROS, ACTIVATION_ZEROS = "deactivate", "deactivate-activation"


def deactivation_table(results: Results, part: str) -> str:
    """Fig. 4a: accuracy over the share of channels set to zero, at :data:`OUTPUT_ZEROS` or :data:`ACTIVATION_ZEROS`."""
    header: list[str] = []
    lines = []
    for network, findings in having(results, part):
        header = ["network", "layers", "share", ROUTE, RANDOM, *findings.rivals]
        for group in findings.distinct("layers", criterion=ROUTE):
            for share in sorted(findings.distinct("share", layers=group)):
                cells = findings.accuracies(header[3:], layers=group, share=share)
                lines.append([network.name, network.group_title(group), f"{share:.0%}", *cells])
    return markdown(header, lines)


def weakening_table(results: Results) -> str:
    """Fig. 4b: accuracy over the factor on the connections."""
    header: list[str] = []
    lines = []
    for network, findings in having(results, "weaken"):
        header = ["network", "beta", ROUTE, RANDOM, *findings.rivals]
        for beta in findings.distinct("beta", criterion=ROUTE):
            lines.append([network.name, f"{beta:g}", *findings.accuracies(header[2:], beta=beta)])
    return markdown(header, lines)


def silence_claims(results: Results) -> Iterator[Claim]:
    """What the paper reads from Fig. 4."""
    for part, after in ((OUTPUT_ZEROS, ""), (ACTIVATION_ZEROS, " after the activation")):
        for network, findings in having(results, part):
            for group in findings.distinct("layers", criterion=ROUTE):
                name = network.group_title(group)
                text = f"30 % of the route of {name}, set to zero{after}, destroy accuracy; random neurons hardly"
                yield _silence_claim(text, network.name, findings, layers=group, share=findings["main_share"])
    for network, findings in having(results, "weaken"):
        beta = findings["main_beta"]
        text = f"connections of the route weakened to {beta:g} destroy accuracy; of random neurons, hardly"
        yield _silence_claim(text, network.name, findings, beta=beta)


def _silence_claim(text: str, network: str, findings: Findings, **cells: Any) -> Claim:
    ours = findings.mean("accuracy", criterion=ROUTE, **cells) or 0.0
    random = findings.mean("accuracy", criterion=RANDOM, **cells)
    equals = findings.unbeaten(**cells)
    return Claim(
        text=text,
        paper="yes",
        network=network,
        found=f"100 to {percent(ours)} %; random {'' if random is None else percent(random)} %",
        verdict=verdict(
            ours <= 0.5 and random is not None and random >= 0.9, random is not None and RANDOM not in equals
        ),
        equals=equals,
    )


# --- Fig. 5: does the Grad-CAM of the route's channels sit on the object, and does an attack move it more than others'?
# CIFAR-10 has no boxes of objects; its objects fill the middle of the image, so the middle half stands for them.

_MIDDLE = 0.25  # of the area


def attention_table(results: Results) -> str:
    """Energy inside the middle half, and shifts under attack."""
    lines = []
    for network, findings in having(results, "gradcam"):
        pgd = _attack(findings)
        for criterion in (ROUTE, OFF_ROUTE, RANDOM, *findings.rivals):
            values = [
                findings.mean("mean", images=images, criterion=criterion, measure=measure)
                for images, measure in ((CLEAN, INSIDE), (pgd, INSIDE), (pgd, SHIFT))
            ]
            cells = ["" if value is None else percent(value) for value in values]
            lines.append([network.name, network.title(findings["layer"]), criterion, *cells])
    return markdown(["network", "layer", "channels", "inside, clean", "inside, PGD", "shift under PGD"], lines)


def attention_claims(results: Results) -> Iterator[Claim]:
    """What the paper reads from Fig. 5."""
    for network, findings in having(results, "gradcam"):
        texts = {
            (CLEAN, INSIDE): "on clean images the route's Grad-CAM is on the object, more than the other channels'",
            (_attack(findings), SHIFT): "an attack moves the route's Grad-CAM more than that of the other channels",
        }
        for (images, measure), text in texts.items():
            ours, theirs = (
                findings.mean("mean", images=images, criterion=criterion, measure=measure) or 0.0
                for criterion in (ROUTE, OFF_ROUTE)
            )
            more = {
                control: _clearly_more(findings, images, measure, control)
                for control in (OFF_ROUTE, RANDOM, *findings.rivals)
            }
            area = f" ({percent(_MIDDLE)} % of the area)" if measure == INSIDE else ""
            yield Claim(
                text=text,
                paper="yes",
                network=network.name,
                found=f"{percent(ours)} %; others {percent(theirs)} %{area}",
                verdict=verdict(more[OFF_ROUTE] and (measure != INSIDE or ours > _MIDDLE), ours > theirs),
                equals=tuple(control for control, clear in more.items() if control != OFF_ROUTE and not clear),
            )


def _attack(findings: Findings) -> str:
    return str(next(name for name in findings.distinct("images") if name != CLEAN))


def _clearly_more(findings: Findings, images: str, measure: str, control: str) -> bool:
    """Whether the route has clearly more than every set of a control, by the paired 95 % interval."""
    sets = findings.table.select(images=images, measure=measure, criterion=control)
    return all(low > 0 for low in sets.column("route_minus_this_low"))
