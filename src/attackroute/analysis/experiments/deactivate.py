"""Deactivate: what is left with the route's channels set to zero (Fig. 4a of Li et al., 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from attackroute.analysis.controls import Comparison, check_shares
from attackroute.analysis.experiment import experiment
from attackroute.analysis.intervention_table import DEACTIVATE, InterventionTable, Setting
from attackroute.analysis.intervention_trials import CorrectSamples, measure, plan, route_settings
from attackroute.analysis.interventions import deactivate
from attackroute.analysis.study import Study
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress

SHARES = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@experiment(
    "deactivate",
    order=4,
    title="Deactivation: channels set to zero",
    help="accuracy with channels set to zero (Fig. 4a)",
)
def run(study: Study, progress: Progress) -> InterventionTable:
    """The experiment on a study's images, with a picture of the route."""
    model, images = study.settings.get("model", type(study.model).__name__), len(study.halves[0])
    title = f"The critical attacking route of {model} on {images} images"
    return replace(deactivate_accuracy(study.comparison(progress)), route=study.route, title=title)


def deactivate_accuracy(
    compared: Comparison,
    *,
    layers: Iterable[str] | None = None,
    shares: Iterable[float] = SHARES,
    together: Iterable[Sequence[str]] | None = None,
) -> InterventionTable:
    """Accuracy on clean images with channels set to zero: a growing share of each layer alone, and of several together.

    Sets of channels grow by rank, each within the next. Random channels are off the given route, so their sets end
    where those are used up.

    Args:
        compared: The route and its controls; only images that the untouched network gets right count. The reading is
            about its share.
        layers: The layers to change alone; None for all of the route's.
        shares: Shares of a layer's channels, in [0, 1].
        together: Groups of layers to change together; None for all of ``layers``.

    Raises:
        UserError: A layer is not on the route, a share is outside [0, 1], no sample is classified correctly, or a
            layer has no activation of its own, with ``at="activation"``.
    """
    route = compared.route
    levels = check_shares([*shares, compared.share])
    single = tuple(route if layers is None else route.restrict(layers))
    whole = [single] if together is None else [tuple(route.restrict(group)) for group in together]
    groups = list(dict.fromkeys([*((layer,) for layer in single), *whole]))
    rankings = compared.rankings({layer for group in groups for layer in group})

    def intervene(channels: Route, _: float | None, __: CorrectSamples) -> AbstractContextManager[object]:
        return deactivate(compared.model, channels, at=compared.at)

    trials = plan(rankings, [Setting(group, level) for group in groups for level in levels])
    table, counts = measure(compared, trials, intervene)
    return InterventionTable(
        kind=DEACTIVATE, table=table, settings=route_settings(trials), main_share=compared.share, at=compared.at,
        counts=counts,
    )  # fmt: skip
