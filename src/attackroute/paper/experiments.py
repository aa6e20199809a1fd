"""What each table and figure of the paper needs from one network: experiments on a study, by the names of their files.

The paper's settings (section 4.1): an image's route is a fifth of each layer's channels, the model's three tenths; eps
is 8/255, PGD and MI-FGSM take ten steps of eps / 10. It does not state the spread of its Gaussian noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from matplotlib.figure import Figure

from attackroute.analysis.controls import ROUTE
from attackroute.analysis.experiment import Experiment, ExperimentResult, all_experiments
from attackroute.analysis.experiments.interventions import (
    Transplantation,
    deactivate_accuracy,
    leading_groups,
    transplant_accuracy,
)
from attackroute.analysis.experiments.occurrence import measure_occurrence
from attackroute.analysis.hardness_experiment import study_hardness
from attackroute.analysis.study import Study
from attackroute.robustness.attack import Perturbation
from attackroute.robustness.registry import parse_attack
from attackroute.tracing.trace import Progress

ATTACKS = ("pgd:eps=8/255", "fgsm:eps=8/255", "step-ll:eps=8/255", "mi-fgsm:eps=8/255", "gaussian-noise:std=0.1")
HARDNESS_ATTACKS = ("fgsm:eps=1/255", "gaussian-noise:std=0.05", "pgd:eps=1/255")
ATTACKED = "route of attacked images"
_SWEPT = 5


@dataclass(frozen=True, kw_only=True)
class PaperTransplant(Transplantation):
    """A transplant with one of its figures alone, under the name of a file of the page's."""

    figure: str
    name: str

    def figures(self) -> dict[str, Figure]:
        return {self.name: super().figures()[self.figure]}


def paper_attacks() -> dict[str, Perturbation]:
    """The attacks of section 4.1, PGD first."""
    return {str(attack): attack for attack in map(parse_attack, ATTACKS)}


def swept_layers(layers: Sequence[str]) -> list[str]:
    """Five layers spread over the network, the first and the last among them: of VGG-16's, the paper's own five."""
    last = len(layers) - 1
    return list(dict.fromkeys(layers[round(place * last / (_SWEPT - 1))] for place in range(_SWEPT)))


def occurrence(study: Study, _: Progress) -> ExperimentResult:
    """Occurrence over all images, beside simple criteria and random routes."""
    routes = {"clean" if by == ROUTE else by: each for by, each in study.all_routes.items()}
    return measure_occurrence(routes, seeds=study.seeds)


def transplant_shares(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 3a: growing shares of single layers, under PGD."""
    layers = swept_layers(study.route.layers)
    first = dict([next(iter(study.named_attacks.items()))])
    result = transplant_accuracy(study.comparison(progress), first, layers=layers, together=())
    return PaperTransplant(**vars(result), figure="transplant-shares", name="transplant-shares")


def transplant_layers(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 3b: every layer alone and several together, at one share, under PGD."""
    return _transplanted(study, progress, slice(1), study.route.layers, "transplant-layers")


def transplant_attacks(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 3b under the other attacks and noise: the first layer, and several together."""
    return _transplanted(study, progress, slice(1, None), study.route.layers[:1], "transplant-attacks")


def _transplanted(study: Study, progress: Progress, tried: slice, layers: Sequence[str], name: str) -> ExperimentResult:
    """Of single layers, and of several together, under some of the attacks."""
    attacks = dict(list(study.named_attacks.items())[tried])
    compared = study.comparison(progress)
    compared = replace(compared, baselines={**compared.baselines, ATTACKED: study.attacked_route})
    result = transplant_accuracy(
        compared, attacks, layers=layers, shares=[study.share], together=leading_groups(study.route.layers)
    )
    return PaperTransplant(**vars(result), figure="transplant-layers", name=name)


def deactivate(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 4a: growing shares set to zero of the first of the layers, the last one, and all together."""
    layers = study.route.layers
    return deactivate_accuracy(study.comparison(progress), layers=[layers[0], layers[-1]], together=[layers])


def hardness(study: Study, progress: Progress) -> ExperimentResult:
    """Table 4 and Fig. 6, on images that did not decide on the route."""
    attacks = [parse_attack(text) for text in HARDNESS_ATTACKS]
    return study_hardness(study.model, study.route, study.measured, attacks, seed=study.seed, progress=progress)


def _experiments(*runs: Callable[[Study, Progress], ExperimentResult]) -> dict[str, Experiment]:
    named = {run.__name__.replace("_", "-"): run for run in runs}
    return {name: Experiment(name, order=0, title=name, run=run) for name, run in named.items()}


_ALL = all_experiments()
PARTS: Mapping[str, Mapping[str, Experiment]] = {
    "table1": _experiments(occurrence),
    "fig2": {"sensitivity": _ALL["sensitivity"]},
    "fig3": _experiments(transplant_shares, transplant_layers, transplant_attacks),
    "fig4": {**_experiments(deactivate), "weaken": _ALL["weaken"]},
    "fig5": {"gradcam": _ALL["gradcam"]},
    "table4": _experiments(hardness),
    "fig6": _experiments(hardness),
}
"""For each table and figure that takes trained networks, its experiments by the names of their files."""
