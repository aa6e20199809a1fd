"""Transplant: do clean values in the route's channels bring attacked images back (Fig. 3 of Li et al., 2021)?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from attackroute.analysis.controls import Comparison, check_shares
from attackroute.analysis.experiment import experiment
from attackroute.analysis.figures.accuracy import layers_figure, shares_figure
from attackroute.analysis.intervention_table import InterventionTable, Setting, measure
from attackroute.analysis.interventions import transplant
from attackroute.analysis.study import Study
from attackroute.core.errors import UserError
from attackroute.robustness.attack import Attack
from attackroute.tracing.trace import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


class Transplantation(InterventionTable):
    """Accuracies on attacked images with clean values in some channels."""

    kind = "transplant"
    helps: ClassVar[bool] = True

    @property
    def opening(self) -> str:
        """How the reading begins."""
        cases = "layers" if len(self.attacks) == 1 else "layers and attacks"
        share = f"{self.main_share:.0%}"
        return f"Transplanting {share} of one layer's clean channels at its {self.at}; in clear effect, by {cases}:"

    def figures(self) -> dict[str, Figure]:
        """``transplant-shares`` (Fig. 3a) and ``transplant-layers`` (Fig. 3b)."""
        return {"transplant-shares": shares_figure(self, self.attacks[0]), "transplant-layers": layers_figure(self)}


@experiment(
    "transplant",
    order=3,
    title="Transplant: clean values in attacked images' channels",
    help="accuracy on attacked images with clean values in some channels (Fig. 3)",
)
def run(study: Study, progress: Progress) -> InterventionTable:
    """The experiment on a study's images."""
    return transplant_accuracy(study.comparison(progress), study.attacks)


def transplant_accuracy(
    compared: Comparison,
    attacks: Mapping[str, Attack],
    *,
    layers: Iterable[str] | None = None,
    shares: Iterable[float] = SHARES,
    together: Iterable[Sequence[str]] | None = None,
) -> Transplantation:
    """Accuracy on attacked images with clean values in some channels: the route's, and controls of the same size.

    Every layer alone at a growing share (Fig. 3a), and single layers and several together at one share (Fig. 3b), that
    of ``compared``, at which all attacks are tried. Sets of channels grow by rank, each within the next. Random
    channels are off the given route, so their sets end where those are used up. Each attack is made once per image;
    ``shares`` grow for the first. Changed alone are ``layers``, or all of the route's; together the groups in
    ``together``, or the first two, three, ... half, and all of ``layers``.
    """
    if not attacks:
        raise UserError("no attack is given: pass one by name, such as pgd")
    levels, share, route = check_shares(shares), compared.share, compared.route
    single = tuple(route if layers is None else route.restrict(layers))
    groups = leading_groups(single) if together is None else [tuple(route.restrict(group)) for group in together]
    first, *_ = attacks
    settings = []
    for attack in attacks:
        used = sorted({*levels, share}) if attack == first else [share]
        settings += [Setting((layer,), level, attack) for layer in single for level in used]
        settings += [Setting(group, share, attack) for group in groups]

    rankings = compared.rankings({*single, *(layer for group in groups for layer in group)})
    return measure(
        Transplantation,
        compared,
        rankings,
        settings,
        lambda channels, _, clean: transplant(compared.model, clean.outputs, channels, at=compared.at),
        attacks=attacks,
        record=rankings[0].layers,
    )


def leading_groups(layers: Sequence[str]) -> list[tuple[str, ...]]:
    """The first two, the first three, the first half, and all of the layers; each once."""
    sizes = sorted({2, 3, len(layers) // 2, len(layers)})
    return [tuple(layers[:size]) for size in sizes if 2 <= size <= len(layers)]
