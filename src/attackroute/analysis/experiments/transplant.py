"""Transplant: do clean values in the route's channels bring attacked images back (Fig. 3 of Li et al., 2021)?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

from attackroute.analysis.controls import Comparison, check_shares
from attackroute.analysis.experiment import experiment
from attackroute.analysis.intervention_table import TRANSPLANT, InterventionTable, Setting
from attackroute.analysis.intervention_trials import CorrectSamples, measure, plan, route_settings
from attackroute.analysis.interventions import transplant
from attackroute.analysis.study import Study
from attackroute.core.errors import UserError
from attackroute.robustness.attack import Attack
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress

SHARES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


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
    swept: Iterable[str] | None = None,
) -> InterventionTable:
    """Accuracy on attacked images with clean values in some channels: the route's, and controls of the same size.

    Every layer alone at a growing share (Fig. 3a), and single layers and several together at one share (Fig. 3b).
    Sets of channels grow by rank, each within the next. Random channels are off the given route, so their sets end
    where those are used up.

    Args:
        compared: The route and its controls; only images that the network gets right when clean count. Its share is
            the one at which all attacks and several layers are tried, and which the reading is about.
        attacks: Attacks and corruptions by name, each made once per image.
        layers: The layers to change alone; None for all of the route's.
        shares: Shares of one layer's channels, in [0, 1].
        together: Groups of layers to change together; None for the first two, three, ... half, and all of ``layers``.
        swept: Attacks with which the shares grow; None for the first one.

    Raises:
        UserError: There is no attack, a layer is not on the route, a share is outside [0, 1], no sample is classified
            correctly, or an input does not fit the model.
    """
    if not attacks:
        raise UserError("no attack is given: pass one by name, such as pgd")
    levels, share, route = check_shares(shares), compared.share, compared.route
    single = tuple(route if layers is None else route.restrict(layers))
    groups = leading_groups(single) if together is None else [tuple(route.restrict(group)) for group in together]
    rankings = compared.rankings({*single, *(layer for group in groups for layer in group)})
    growing = set(list(attacks)[:1] if swept is None else swept)
    settings = []
    for attack in attacks:
        for layer in single:
            used = sorted({*levels, share}) if attack in growing else [share]
            settings += [Setting((layer,), level, attack) for level in used]
        settings += [Setting(group, share, attack) for group in groups]

    def intervene(channels: Route, _: float | None, clean: CorrectSamples) -> AbstractContextManager[object]:
        return transplant(compared.model, clean.outputs, channels, at=compared.at)

    trials = plan(rankings, settings)
    table, counts = measure(compared, trials, intervene, attacks=attacks, record=rankings[0].layers)
    return InterventionTable(
        kind=TRANSPLANT, table=table, settings=route_settings(trials), main_share=share, at=compared.at, counts=counts
    )


def leading_groups(layers: Sequence[str]) -> list[tuple[str, ...]]:
    """The first two, the first three, the first half, and all of the layers; each once."""
    sizes = sorted({2, 3, len(layers) // 2, len(layers)})
    return [tuple(layers[:size]) for size in sizes if 2 <= size <= len(layers)]
