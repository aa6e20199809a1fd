"""What each table and figure of the paper needs from one network: experiments on a study, by the names of their files.

The paper's settings (section 4.1): an image's route is a fifth of each layer's channels, the model's three tenths; eps
is 8/255, PGD and MI-FGSM take ten steps of eps / 10. It does not state the spread of its Gaussian noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attackroute.analysis.deactivation import deactivation_accuracy
from attackroute.analysis.figures.accuracy_curves import accuracy_figures
from attackroute.analysis.figures.hardness_bars import hardness_figure
from attackroute.analysis.figures.occurrence_lines import occurrence_figure
from attackroute.analysis.hardness_study import HardnessStudy, study_hardness
from attackroute.analysis.interventions import record_outputs
from attackroute.analysis.occurrence import tabulate_occurrence
from attackroute.analysis.own_routes import own_transplant_accuracy
from attackroute.analysis.rankings import ROUTE
from attackroute.analysis.route_sampling import sample_route
from attackroute.analysis.study import EXPERIMENTS, Experiment, Figures, Study
from attackroute.analysis.tables import Record, Result
from attackroute.analysis.transplanting import leading_groups, transplant_accuracy
from attackroute.cli.console import Progress
from attackroute.core.errors import UserError
from attackroute.core.layers import ACTIVATION, OUTPUT
from attackroute.core.model_state import frozen
from attackroute.robustness.contract import Perturbation
from attackroute.robustness.registry import parse_attack

NOISE = "gaussian-noise:std=0.1"
ATTACKS = ("pgd:eps=8/255", "fgsm:eps=8/255", "step-ll:eps=8/255", "mi-fgsm:eps=8/255", NOISE)
HARDNESS_ATTACKS = ("fgsm:eps=1/255", "gaussian-noise:std=0.05", "pgd:eps=1/255")
ATTACKED = "route of attacked images"
_SWEPT = 5


def paper_attacks() -> dict[str, Perturbation]:
    """The attacks of section 4.1 by name, PGD first."""
    return {attack.name: attack for attack in map(parse_attack, ATTACKS)}


def swept_layers(layers: Sequence[str]) -> list[str]:
    """Five layers spread over the network, the first and the last among them: of VGG-16's, the paper's own five."""
    if len(layers) <= _SWEPT:
        return list(layers)
    last = len(layers) - 1
    return [layers[round(place * last / (_SWEPT - 1))] for place in range(_SWEPT)]


def table1(study: Study, _: Progress) -> tuple[Result, Figures]:
    """Occurrence over all images, beside simple criteria and random routes."""
    found = {"clean" if by == ROUTE else by: routes for by, routes in study.all_routes.items()}
    result = tabulate_occurrence(found, width=study.share, seeds=range(study.draws))
    return result, {"occurrence": occurrence_figure(result)}


def sampling(study: Study, _: Progress) -> tuple[Result, Figures]:
    """The route of a tenth of the images beside that of all (section 5.1.3)."""
    return sample_route(study.all_routes[ROUTE], width=study.share, seeds=range(study.draws)), {}


def transplant_shares(study: Study, progress: Progress) -> tuple[Result, Figures]:
    """Fig. 3a: growing shares of single layers, under PGD."""
    name = next(iter(study.attacks))
    result = transplant_accuracy(
        study.network, study.measured, study.route, {name: study.attacks[name]}, study.rivals,
        seeds=range(study.draws), layers=swept_layers(study.route.layers), share=study.share, together=(),
        progress=progress,
    )  # fmt: skip
    return result, {"transplant-shares": accuracy_figures(result)["transplant-shares"]}


def transplant_layers(study: Study, progress: Progress) -> tuple[Result, Figures]:
    """Fig. 3b: every layer alone and several together, at one share, under PGD."""
    name = next(iter(study.attacks))
    return _transplanted(study, progress, {name: study.attacks[name]}, study.route.layers)


def transplant_attacks(study: Study, progress: Progress) -> tuple[Result, Figures]:
    """Fig. 3b under the other attacks and noise: the first layer, and several together."""
    _, *others = study.attacks
    layers = study.route.layers
    return _transplanted(study, progress, {name: study.attacks[name] for name in others}, layers[:1])


def _transplanted(
    study: Study, progress: Progress, attacks: Mapping[str, Perturbation], layers: Sequence[str]
) -> tuple[Result, Figures]:
    rivals: Mapping[str, Any] = {**study.rivals, ATTACKED: study.attacked_route}
    result = transplant_accuracy(
        study.network, study.measured, study.route, attacks, rivals, seeds=range(study.draws), layers=layers,
        shares=[study.share], share=study.share, together=leading_groups(study.route.layers), progress=progress,
    )  # fmt: skip
    name = "transplant-layers" if len(layers) > 1 else "transplant-attacks"
    return result, {name: accuracy_figures(result)["transplant-layers"]}


def transplant_own(study: Study, progress: Progress) -> tuple[Result, Figures]:
    """Fig. 3 in another reading: each image's own route, in the first layer and in the first three."""
    name = next(iter(study.attacks))
    layers = study.route.layers
    result = own_transplant_accuracy(
        study.network, study.measured, study.attacks[name], [layers[:1], layers[:3]], name=name, width=study.share,
        progress=progress,
    )  # fmt: skip
    return result, {}


def deactivate(study: Study, progress: Progress) -> tuple[Result, Figures]:
    """Fig. 4a: growing shares of the layers' own outputs set to zero."""
    return _deactivated(study, progress, list(study.route.layers), OUTPUT)


def deactivate_activation(study: Study, progress: Progress) -> tuple[Result, Figures]:
    """Fig. 4a in another reading: zeros after the activation; before batch norm, a zero may become any constant."""
    return _deactivated(study, progress, _activated(study), ACTIVATION)


def _deactivated(study: Study, progress: Progress, layers: list[str], at: str) -> tuple[Result, Figures]:
    """The first of the layers, the last one, and all together."""
    result = deactivation_accuracy(
        study.network, study.measured, study.route, study.rivals, seeds=range(study.draws),
        layers=[layers[0], layers[-1]], together=[layers], share=study.share, at=at, progress=progress,
    )  # fmt: skip
    name = "deactivate" if at == OUTPUT else "deactivate-activation"
    (figure,) = accuracy_figures(result).values()
    return result, {name: figure}


@dataclass(frozen=True)
class HardnessResult:
    """A hardness study as the other experiments give theirs."""

    study: HardnessStudy

    def records(self) -> list[Record]:
        """Every predictor's associations."""
        return [
            {
                "target": target,
                "predictor": item.predictor,
                "statistic": item.statistic,
                "value": item.estimate.value,
                "low": None if item.estimate.interval is None else item.estimate.interval[0],
                "high": None if item.estimate.interval is None else item.estimate.interval[1],
            }
            for target, found in self.study.judgements.items()
            for item in found
        ]

    def about(self) -> dict[str, Any]:
        """All of it."""
        return self.study.to_json()

    def reading(self) -> str:
        """One sentence for each attack."""
        return self.study.reading()


def hardness(study: Study, progress: Progress) -> tuple[Result, Figures]:
    """Table 4 and Fig. 6, on images that did not decide on the route."""
    attacks = [parse_attack(text) for text in HARDNESS_ATTACKS]
    found = study_hardness(study.network, study.route, study.measured, attacks, seed=study.seed, progress=progress)
    title = f"How hard the model is to fool on each of {len(found.hardness)} images"
    return HardnessResult(found), {"hardness": hardness_figure(found, title)}


PARTS: Mapping[str, Mapping[str, Experiment]] = {
    "table1": {"occurrence": table1, "sampling": sampling},
    "fig2": {"sensitivity": EXPERIMENTS["sensitivity"]},
    "fig3": {
        "transplant-shares": transplant_shares,
        "transplant-layers": transplant_layers,
        "transplant-attacks": transplant_attacks,
        "transplant-own": transplant_own,
    },
    "fig4": {
        "deactivate": deactivate,
        "deactivate-activation": deactivate_activation,
        "weaken": EXPERIMENTS["weaken"],
    },
    "fig5": {"gradcam": EXPERIMENTS["gradcam"]},
    "table4": {"hardness": hardness},
    "fig6": {"hardness": hardness},
}
"""For each table and figure that takes trained networks, its experiments."""


def _activated(study: Study) -> list[str]:
    """The layers that have an activation of their own: where they go into a sum first, they have none."""
    found = []
    for layer in study.route.layers:
        try:
            with frozen(study.network), torch.no_grad():
                record_outputs(study.network, study.pair, [layer], at=ACTIVATION)
        except UserError:
            continue
        found.append(layer)
    return found
