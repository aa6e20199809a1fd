"""Weaken: what is left with the connections between the route's channels scaled down (Fig. 4b of Li et al., 2021)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

from attackroute.analysis.controls import Comparison
from attackroute.analysis.experiment import experiment
from attackroute.analysis.intervention_table import WEAKEN, InterventionTable, Setting
from attackroute.analysis.intervention_trials import CorrectSamples, measure, plan, route_settings
from attackroute.analysis.interventions import weaken
from attackroute.analysis.study import Study
from attackroute.core.errors import UserError
from attackroute.core.model_state import placement
from attackroute.routes.route import Route
from attackroute.tracing.connections import Connections
from attackroute.tracing.trace import Progress

BETAS = (1.0, 0.75, 0.5, 0.25, 0.0)
WEIGHTS = "weights"
_NAMED = 3  # layers at most in a note


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
    compared: Comparison,
    *,
    layers: Iterable[str] | None = None,
    targets: Iterable[str] | None = None,
    betas: Iterable[float] = BETAS,
) -> InterventionTable:
    """Accuracy on clean images with the connections between chosen channels of adjacent layers multiplied by a factor.

    All layers are changed together, with a falling factor. The reading is about a factor of 0.5, or the one nearest
    to it.

    Args:
        compared: The route and its controls; only images that the untouched network gets right count.
        layers: Some of the route's layers; None for all.
        targets: Those of them whose kernels are weakened, as for :func:`attackroute.weaken`; None for all.
        betas: Factors in [0, 1].

    Raises:
        UserError: A layer is not on the route, a factor is outside [0, 1], or no sample is classified correctly.
    """
    factors = sorted(set(betas), reverse=True)
    for beta in factors:
        if not 0 <= beta <= 1:
            raise UserError(f"beta {beta} is outside [0, 1]: give the factor on the connections, such as 0.5")
    if not factors:
        raise UserError("no beta is given: give some in [0, 1], such as 0.5")
    rankings = compared.rankings(layers)
    chosen = None if targets is None else list(targets)
    connections: Connections | None = None  # the same for every batch

    def intervene(channels: Route, beta: float | None, clean: CorrectSamples) -> AbstractContextManager[object]:
        nonlocal connections
        assert beta is not None
        if connections is None:
            connections = Connections.of_route(compared.model, clean.images, channels)
        return weaken(compared.model, channels, beta, chosen, connections=connections)

    trials = plan(rankings, [Setting(rankings[0].layers, compared.share, None, beta) for beta in factors])
    table, counts = measure(compared, trials, intervene)
    main = min(factors, key=lambda beta: abs(beta - 0.5))
    return InterventionTable(
        kind=WEAKEN, table=table, settings=route_settings(trials), main_share=compared.share, main_beta=main,
        at=WEIGHTS, counts=counts, targets=chosen,
    )  # fmt: skip


def _joined_layers(study: Study) -> list[str] | None:
    """The route's layers whose kernels can be weakened, if not all; a note says how many others there are.

    Raises:
        UserError: There is none.
    """
    images, _ = next(iter(study.reference))
    connections = Connections.of_route(study.model, images.to(*placement(study.model)), study.route)
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
        f"them mixes channels or positions: {', '.join(mixed[:_NAMED])}{', ...' * (len(mixed) > _NAMED)}"
    )
    return joined
