"""What each table and figure of the paper needs from one network: experiments on a study, by the names of their files.

The paper's settings (section 4.1): an image's route is a fifth of each layer's channels, the model's three tenths; eps
is 8/255, PGD and MI-FGSM take ten steps of eps / 10. It does not state the spread of its Gaussian noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from attackroute.analysis.controls import ROUTE
from attackroute.analysis.experiment import Experiment, ExperimentResult, all_experiments
from attackroute.analysis.experiments.interventions import deactivate_accuracy, leading_groups, transplant_accuracy
from attackroute.analysis.experiments.occurrence import measure_occurrence
from attackroute.analysis.hardness_experiment import study_hardness
from attackroute.analysis.intervention_table import correct_when_clean
from attackroute.analysis.interventions import record_outputs
from attackroute.analysis.sites import LayerEdits
from attackroute.analysis.study import Study
from attackroute.core.batches import Data, batches, samples_in
from attackroute.core.checks import checked_logits
from attackroute.core.errors import UserError
from attackroute.core.layers import ACTIVATION, OUTPUT
from attackroute.core.model_state import frozen
from attackroute.core.statistics import Accuracy
from attackroute.core.table import Table
from attackroute.hardening.harden import RouteOverlap
from attackroute.robustness.attack import Attack, Perturbation, attacked
from attackroute.robustness.registry import parse_attack
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.masks import kept
from attackroute.tracing.trace import Progress, trace_routes

ATTACKS = ("pgd:eps=8/255", "fgsm:eps=8/255", "step-ll:eps=8/255", "mi-fgsm:eps=8/255", "gaussian-noise:std=0.1")
HARDNESS_ATTACKS = ("fgsm:eps=1/255", "gaussian-noise:std=0.05", "pgd:eps=1/255")
ATTACKED = "route of attacked images"
OWN, OWN_RANDOM = "own route", "own random"
"""Channels of each image's own route, and as many random ones, others for each image."""

SAMPLED_SHARES = (0.01, 0.03, 0.1, 0.3)
_SWEPT = 5


@dataclass(frozen=True)
class PaperResult(ExperimentResult):
    """An experiment's result whose figures bear the names of the page's files; the page has summaries of its own."""

    kind: str
    table: Table
    facts: Mapping[str, Any]
    sentence: str
    pictures: Mapping[str, Figure] = field(default_factory=dict)

    @classmethod
    def of(cls, result: ExperimentResult, figure: str, name: str | None = None) -> PaperResult:
        """A result with one of its figures alone, under a name of its own."""
        pictures = {name or figure: result.figures()[figure]}
        return cls(result.kind, result.table, facts=result.about(), sentence=result.reading(), pictures=pictures)

    def about(self) -> dict[str, Any]:
        return dict(self.facts)

    def reading(self) -> str:
        return self.sentence

    def summary(self) -> Table:
        return Table((), ())

    def figures(self) -> Mapping[str, Figure]:
        return self.pictures


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


def sampling(study: Study, _: Progress) -> ExperimentResult:
    """The route of a tenth of the images beside that of all (section 5.1.3)."""
    return sample_route(study.all_routes[ROUTE], width=study.share, seeds=study.seeds)


def transplant_shares(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 3a: growing shares of single layers, under PGD."""
    layers = swept_layers(study.route.layers)
    first = dict([next(iter(study.named_attacks.items()))])
    result = transplant_accuracy(study.comparison(progress), first, layers=layers, together=())
    return PaperResult.of(result, "transplant-shares")


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
    return PaperResult.of(result, "transplant-layers", name)


def transplant_own(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 3 in another reading: each image's own route, in the first layer and in the first three."""
    name, attack = next(iter(study.named_attacks.items()))
    layers = study.route.layers
    return per_image_transplant(
        study.model, study.measured, attack, [layers[:1], layers[:3]], name=name, width=study.share, progress=progress
    )


def deactivate(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 4a: growing shares of the layers' own outputs set to zero."""
    return _deactivated(study, progress, study.route.layers, OUTPUT, "deactivate")


def deactivate_activation(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 4a in another reading: zeros after the activation; before batch norm, a zero may become any constant."""
    return _deactivated(study, progress, _activated(study), ACTIVATION, "deactivate-activation")


def _deactivated(study: Study, progress: Progress, layers: Sequence[str], at: str, name: str) -> ExperimentResult:
    """The first of the layers, the last one, and all together."""
    compared = replace(study.comparison(progress), at=at)
    result = deactivate_accuracy(compared, layers=[layers[0], layers[-1]], together=[layers])
    return PaperResult.of(result, "deactivate", name)


def _activated(study: Study) -> list[str]:
    """The layers that have an activation of their own: where they go into a sum first, they have none."""
    layers = []
    for layer in study.route.layers:
        try:
            with frozen(study.model), torch.no_grad():
                record_outputs(study.model, study.pair, [layer], at=ACTIVATION)
        except UserError:
            continue
        layers.append(layer)
    return layers


def hardness(study: Study, progress: Progress) -> ExperimentResult:
    """Table 4 and Fig. 6, on images that did not decide on the route."""
    attacks = [parse_attack(text) for text in HARDNESS_ATTACKS]
    return study_hardness(study.model, study.route, study.measured, attacks, seed=study.seed, progress=progress)


def _experiments(*runs: Callable[[Study, Progress], ExperimentResult]) -> dict[str, Experiment]:
    named = {run.__name__.replace("_", "-"): run for run in runs}
    return {name: Experiment(name, order=0, title=name, run=run) for name, run in named.items()}


_ALL = all_experiments()
PARTS: Mapping[str, Mapping[str, Experiment]] = {
    "table1": _experiments(occurrence, sampling),
    "fig2": {"sensitivity": _ALL["sensitivity"]},
    "fig3": _experiments(transplant_shares, transplant_layers, transplant_attacks, transplant_own),
    "fig4": {**_experiments(deactivate, deactivate_activation), "weaken": _ALL["weaken"]},
    "fig5": {"gradcam": _ALL["gradcam"]},
    "table4": _experiments(hardness),
    "fig6": _experiments(hardness),
}
"""For each table and figure that takes trained networks, its experiments by the names of their files."""


def sample_route(
    routes: InstanceRoutes, shares: Sequence[float] = SAMPLED_SHARES, *, width: float, seeds: Sequence[int]
) -> PaperResult:
    """How few samples give a model's route: routes of random shares of the samples, one a seed, beside that of all."""
    full = routes.aggregate(width)
    rows = []
    for share in shares:
        count = max(1, round(share * len(routes)))
        for seed in seeds:
            order = torch.randperm(len(routes), generator=torch.Generator().manual_seed(seed))
            overlap = RouteOverlap.between(routes.select(order[:count].sort().values).aggregate(width), full)
            rows.append(
                {
                    "share": share, "draw": seed, "samples": count, "shared": overlap.shared, "neurons": overlap.size,
                    "share_of_neurons": overlap.share, "least_in_a_layer": overlap.least,
                }
            )  # fmt: skip
    table = Table.of(rows)
    shared = {share: table.select(share=share).mean("share_of_neurons") for share in shares}
    means = ", ".join(f"{share:.0%} of them {mean:.1%}" for share, mean in shared.items())
    sentence = f"Of the route of {len(routes)} samples, the route of {means} has the same neurons."
    return PaperResult("route sampling", table, {"width": width, "samples": len(routes)}, sentence)


def per_image_transplant(
    model: nn.Module,
    data: Data,
    attack: Attack,
    groups: Sequence[Sequence[str]],
    *,
    name: str = "attack",
    width: float,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> PaperResult:
    """Accuracy on attacked images, each with clean values in the channels of its own route, or in random ones.

    Only images that the network gets right when clean count. They are traced clean, and have the chosen share ``width``
    of the channels of a group's layers changed together; groups are in forward order.
    """
    generator = torch.Generator().manual_seed(0)
    right = {("+".join(group), criterion): 0 for group in groups for criterion in (OWN, OWN_RANDOM)}
    samples = counted = 0
    layers = list(dict.fromkeys(layer for group in groups for layer in group))
    with frozen(model), torch.no_grad():
        for images, labels in batches(model, data, batch_size):
            samples += len(images)
            clean = correct_when_clean(model, images, labels, layers)
            counted += len(clean.images)
            if len(clean.images):
                moved, _ = attacked(model, attack, clean.images, clean.labels)
                routes = trace_routes(model, (clean.images, clean.labels), width).masks
                for group in groups:
                    chosen = {layer: routes[layer] for layer in group}
                    drawn = {layer: _random_mask(mask, width, generator) for layer, mask in chosen.items()}
                    for criterion, masks in ((OWN, chosen), (OWN_RANDOM, drawn)):
                        with _transplanted_into(masks, clean.outputs).applied_to(model):
                            logits = checked_logits(model(moved.clone()), len(moved))
                        right["+".join(group), criterion] += int((logits.argmax(1) == clean.labels).sum())
            if progress is not None:
                progress(samples, samples_in(data))
    if not counted:
        raise UserError(f"the network gets none of the {samples} samples right when they are clean; check its weights")
    rows, clauses = [], []
    for (group, criterion), correct in right.items():
        accuracy = Accuracy(correct, counted)
        low, high = accuracy.interval
        ends = {"accuracy": accuracy.value, "accuracy_low": low, "accuracy_high": high, "samples": counted}
        rows.append({"layers": group, "criterion": criterion, **ends})
        clauses.append(f"{criterion} in {group.count('+') + 1} of the layers {accuracy.value:.1%}")
    facts = {"width": width, "attack": name, "images": samples}
    sentence = f"Accuracy under {name} with {width:.0%} of the channels as on clean images: {'; '.join(clauses)}."
    return PaperResult("own routes", Table.of(rows), facts, sentence)


def _transplanted_into(masks: Mapping[str, Tensor], clean: Mapping[str, Tensor]) -> LayerEdits:
    """Gives attacked images clean values where each image's own mask ``(N, C)`` says so."""

    def mixed(layer: str, _: int, values: Tensor) -> Tensor:
        return torch.where(masks[layer].to(values.device)[:, :, None, None], clean[layer], values)

    return LayerEdits({layer: mask.shape[1] for layer, mask in masks.items()}, mixed)


def _random_mask(like: Tensor, width: float, generator: torch.Generator) -> Tensor:
    """As many channels in every row, at random."""
    rows, channels = like.shape
    chosen = torch.rand(rows, channels, generator=generator).topk(kept(width, channels), dim=1).indices
    return torch.zeros(rows, channels, dtype=torch.bool).scatter_(1, chosen, True)
