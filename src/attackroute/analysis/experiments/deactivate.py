"""Deactivate: what is left with the route's channels set to zero (Fig. 4a of Li et al., 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from attackroute.analysis.controls import Comparison, check_shares
from attackroute.analysis.experiment import experiment
from attackroute.analysis.figures.accuracy import route_figure, shares_figure
from attackroute.analysis.intervention_table import InterventionTable, Setting, measure
from attackroute.analysis.interventions import deactivate
from attackroute.analysis.study import Study
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, kw_only=True)
class Deactivation(InterventionTable):
    """Accuracies with channels set to zero."""

    kind = "deactivate"
    route: Route | None = None  # with its frequencies, to draw beside what its deactivation costs
    title: str = ""  # of that picture

    @property
    def opening(self) -> str:
        """How the reading begins."""
        share = f"{self.main_share:.0%}"
        return f"Setting {share} of one layer's channels to zero at its {self.at}; in clear effect, by layers:"

    def figures(self) -> dict[str, Figure]:
        """``deactivate`` (Fig. 4a), and with a route also ``deactivate-route``."""
        picture = {} if self.route is None else {"deactivate-route": route_figure(self.route, self, self.title)}
        return {"deactivate": shares_figure(self, None), **picture}


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
) -> Deactivation:
    """Accuracy on clean images with channels set to zero: a growing share of each layer alone, and of several together.

    Sets of channels grow by rank, each within the next. Random channels are off the given route, so their sets end
    where those are used up. The reading is about the share of ``compared``. Changed alone are ``layers``, or all of the
    route's; together the groups in ``together``, or all of ``layers``.
    """
    route = compared.route
    levels = check_shares([*shares, compared.share])
    single = tuple(route if layers is None else route.restrict(layers))
    whole = [single] if together is None else [tuple(route.restrict(group)) for group in together]
    groups = list(dict.fromkeys([*((layer,) for layer in single), *whole]))
    return measure(
        Deactivation,
        compared,
        compared.rankings({layer for group in groups for layer in group}),
        [Setting(group, level) for group in groups for level in levels],
        lambda channels, _, __: deactivate(compared.model, channels, at=compared.at),
    )
