"""Weaken: what is left with the connections between the route's channels scaled down (Fig. 4b of Li et al., 2021)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

from attackroute.analysis.controls import Comparison
from attackroute.analysis.experiment import experiment
from attackroute.analysis.figures.accuracy import factors_figure
from attackroute.analysis.intervention_table import CorrectSamples, InterventionTable, Setting, measure
from attackroute.analysis.interventions import weaken
from attackroute.analysis.study import Study
from attackroute.core.errors import UserError
from attackroute.core.table import plural
from attackroute.routes.route import Route
from attackroute.tracing.connections import Connections
from attackroute.tracing.trace import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BETAS = (1.0, 0.75, 0.5, 0.25, 0.0)


class Weakening(InterventionTable):
    """Accuracies with the connections between channels scaled down."""

    kind = "weaken"

    @property
    def opening(self) -> str:
        """How the reading begins."""
        into = "" if self.targets is None else f", into {plural(len(self.targets), 'layer')},"
        return (
            f"Weakening the connections between {self.main_share:.0%} of all layers' channels{into} to "
            f"{self.main_beta:g}; in clear effect:"
        )

    def figures(self) -> dict[str, Figure]:
        """``weaken`` (Fig. 4b)."""
        return {"weaken": factors_figure(self)}


@experiment(
    "weaken",
    order=5,
    title="Weakening the connections along the route",
    help="accuracy with the connections between channels scaled down (Fig. 4b)",
)
def run(study: Study, progress: Progress) -> InterventionTable:
    """The experiment on a study's images."""
    return weaken_accuracy(study.comparison(progress), targets=_joined_layers(study))


def weaken_accuracy(
    compared: Comparison, *, targets: Iterable[str] | None = None, betas: Iterable[float] = BETAS
) -> Weakening:
    """Accuracy on clean images with the connections between chosen channels of adjacent layers multiplied by a factor.

    All layers are changed together, with a falling factor; weakened are the kernels of ``targets``, or of all. The
    reading is about a factor of 0.5, or the one nearest to it.
    """
    factors = sorted(set(betas), reverse=True)
    for beta in factors:
        if not 0 <= beta <= 1:
            raise UserError(f"beta {beta} is outside [0, 1]: give the factor on the connections, such as 0.5")
    if not factors:
        raise UserError("no beta is given: give some in [0, 1], such as 0.5")
    rankings = compared.rankings()
    chosen = None if targets is None else list(targets)
    connections: Connections | None = None  # the same for every batch

    def intervene(channels: Route, beta: float | None, clean: CorrectSamples) -> AbstractContextManager[object]:
        nonlocal connections
        assert beta is not None
        if connections is None:
            connections = Connections.of_route(compared.model, clean.images, channels)
        return weaken(compared.model, channels, beta, chosen, connections=connections)

    settings = [Setting(rankings[0].layers, compared.share, None, beta) for beta in factors]
    result = measure(Weakening, compared, rankings, settings, intervene)
    main = min(factors, key=lambda beta: abs(beta - 0.5))
    return replace(result, main_beta=main, at="weights", targets=chosen)


def _joined_layers(study: Study) -> list[str] | None:
    """The route's layers whose kernels can be weakened, if not all; a note says how many others there are."""
    connections = Connections.of_route(study.model, study.pair, study.route)
    joined = connections.joined(study.route)
    if not joined:
        raise UserError(
            "no kernel slice joins channels of two layers of the route: what stands between them mixes channels or "
            "positions; leave weaken out (--only)"
        )
    mixed = connections.mixed(study.route)
    if not mixed:
        return None
    study.note(
        f"note: weaken leaves {len(mixed)} of {len(study.route)} layers as they are, since what stands before "
        f"them mixes channels or positions: {', '.join(mixed[:3])}{', ...' * (len(mixed) > 3)}"
    )
    return joined
