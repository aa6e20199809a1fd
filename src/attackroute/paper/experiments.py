"""What each table and figure of the paper needs from one network: experiments on a study, by the names of their files.

The paper's settings (section 4.1): an image's route is a fifth of each layer's channels, the model's three tenths; eps
is 8/255, PGD and MI-FGSM take ten steps of eps / 10. It does not state the spread of its Gaussian noise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from attackroute.analysis.controls import ROUTE
from attackroute.analysis.experiment import Experiment, ExperimentResult, all_experiments
from attackroute.analysis.experiments.deactivate import deactivate_accuracy
from attackroute.analysis.experiments.occurrence import measure_occurrence
from attackroute.analysis.experiments.transplant import leading_groups, transplant_accuracy
from attackroute.analysis.hardness_experiment import study_hardness
from attackroute.analysis.intervention_trials import CorrectSamples, correct_when_clean
from attackroute.analysis.interventions import record_outputs, transplant
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
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress, trace_routes

NOISE = "gaussian-noise:std=0.1"
ATTACKS = ("pgd:eps=8/255", "fgsm:eps=8/255", "step-ll:eps=8/255", "mi-fgsm:eps=8/255", NOISE)
HARDNESS_ATTACKS = ("fgsm:eps=1/255", "gaussian-noise:std=0.05", "pgd:eps=1/255")
ATTACKED = "route of attacked images"
OWN, OWN_RANDOM = "own route", "own random"
"""Channels of each image's own route, and as many random ones, others for each image."""

SAMPLED_SHARES = (0.01, 0.03, 0.1, 0.3)
_SWEPT = 5


class Measured(ExperimentResult):
    """An experiment's result, or one under another name with its figures under others.

    Args:
        table: The measurements.
        about: What they have in common, as plain values.
        reading: What was found.
        figures: By file name.
    """

    def __init__(
        self, table: Table, about: Mapping[str, Any], reading: str, figures: Mapping[str, Figure] | None = None
    ) -> None:
        self.kind = str(about["experiment"])
        self.table = table
        self._about, self._reading, self._figures = about, reading, figures or {}

    @classmethod
    def renamed(cls, result: ExperimentResult, name: str, figure: str | None = None) -> Measured:
        """A result with one of its figures, the first unless it is named, under the name of a file of the page."""
        figures = result.figures()
        picture = figures[figure] if figure is not None else next(iter(figures.values()))
        about = {"experiment": result.kind, **result.about()}
        return cls(result.table, about, result.reading(), {name: picture})

    def about(self) -> dict[str, Any]:
        """What the measurements have in common."""
        return dict(self._about)

    def reading(self) -> str:
        """One sentence that says what was found."""
        return self._reading

    def summary(self) -> Table:
        """Nothing: the page has tables of its own."""
        return Table((), ())

    def figures(self) -> Mapping[str, Figure]:
        """Pictures by file name."""
        return self._figures


def paper_attacks() -> dict[str, Perturbation]:
    """The attacks of section 4.1 by name, PGD first."""
    return {attack.name: attack for attack in map(parse_attack, ATTACKS)}


def swept_layers(layers: Sequence[str]) -> list[str]:
    """Five layers spread over the network, the first and the last among them: of VGG-16's, the paper's own five."""
    if len(layers) <= _SWEPT:
        return list(layers)
    last = len(layers) - 1
    return [layers[round(place * last / (_SWEPT - 1))] for place in range(_SWEPT)]


def occurrence(study: Study, _: Progress) -> ExperimentResult:
    """Occurrence over all images, beside simple criteria and random routes."""
    routes = {"clean" if by == ROUTE else by: each for by, each in study.all_routes.items()}
    return measure_occurrence(routes, width=study.share, seeds=study.seeds)


def sampling(study: Study, _: Progress) -> ExperimentResult:
    """The route of a tenth of the images beside that of all (section 5.1.3)."""
    return sample_route(study.all_routes[ROUTE], width=study.share, seeds=study.seeds)


def transplant_shares(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 3a: growing shares of single layers, under PGD."""
    name = next(iter(study.attacks))
    layers = swept_layers(study.route.layers)
    result = transplant_accuracy(study.comparison(progress), {name: study.attacks[name]}, layers=layers, together=())
    return Measured.renamed(result, "transplant-shares", "transplant-shares")


def transplant_layers(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 3b: every layer alone and several together, at one share, under PGD."""
    name = next(iter(study.attacks))
    return _transplanted(study, progress, {name: study.attacks[name]}, study.route.layers)


def transplant_attacks(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 3b under the other attacks and noise: the first layer, and several together."""
    _, *others = study.attacks
    layers = study.route.layers
    return _transplanted(study, progress, {name: study.attacks[name] for name in others}, layers[:1])


def _transplanted(
    study: Study, progress: Progress, attacks: Mapping[str, Perturbation], layers: Sequence[str]
) -> ExperimentResult:
    compared = study.comparison(progress)
    compared = replace(compared, baselines={**compared.baselines, ATTACKED: study.attacked_route})
    result = transplant_accuracy(
        compared, attacks, layers=layers, shares=[study.share], together=leading_groups(study.route.layers)
    )
    name = "transplant-layers" if len(layers) > 1 else "transplant-attacks"
    return Measured.renamed(result, name, "transplant-layers")


def transplant_own(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 3 in another reading: each image's own route, in the first layer and in the first three."""
    name = next(iter(study.attacks))
    layers = study.route.layers
    return per_image_transplant(
        study.model, study.measured, study.attacks[name], [layers[:1], layers[:3]], name=name, width=study.share,
        progress=progress,
    )  # fmt: skip


def deactivate(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 4a: growing shares of the layers' own outputs set to zero."""
    return _deactivated(study, progress, list(study.route.layers), OUTPUT)


def deactivate_activation(study: Study, progress: Progress) -> ExperimentResult:
    """Fig. 4a in another reading: zeros after the activation; before batch norm, a zero may become any constant."""
    return _deactivated(study, progress, _activated(study), ACTIVATION)


def _deactivated(study: Study, progress: Progress, layers: list[str], at: str) -> ExperimentResult:
    """The first of the layers, the last one, and all together."""
    compared = replace(study.comparison(progress), at=at)
    result = deactivate_accuracy(compared, layers=[layers[0], layers[-1]], together=[layers])
    return Measured.renamed(result, "deactivate" if at == OUTPUT else "deactivate-activation")


def hardness(study: Study, progress: Progress) -> ExperimentResult:
    """Table 4 and Fig. 6, on images that did not decide on the route."""
    attacks = [parse_attack(text) for text in HARDNESS_ATTACKS]
    return study_hardness(study.model, study.route, study.measured, attacks, seed=study.seed, progress=progress)


def _part(name: str, run: Callable[[Study, Progress], ExperimentResult]) -> Experiment:
    return Experiment(name, order=0, title=name, help=(run.__doc__ or "").partition("\n")[0], run=run)


_EXPERIMENTS = all_experiments()
PARTS: Mapping[str, Mapping[str, Experiment]] = {
    "table1": {"occurrence": _part("occurrence", occurrence), "sampling": _part("sampling", sampling)},
    "fig2": {"sensitivity": _EXPERIMENTS["sensitivity"]},
    "fig3": {
        "transplant-shares": _part("transplant-shares", transplant_shares),
        "transplant-layers": _part("transplant-layers", transplant_layers),
        "transplant-attacks": _part("transplant-attacks", transplant_attacks),
        "transplant-own": _part("transplant-own", transplant_own),
    },
    "fig4": {
        "deactivate": _part("deactivate", deactivate),
        "deactivate-activation": _part("deactivate-activation", deactivate_activation),
        "weaken": _EXPERIMENTS["weaken"],
    },
    "fig5": {"gradcam": _EXPERIMENTS["gradcam"]},
    "table4": {"hardness": _part("hardness", hardness)},
    "fig6": {"hardness": _part("hardness", hardness)},
}
"""For each table and figure that takes trained networks, its experiments."""


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


def sample_route(
    routes: InstanceRoutes,
    shares: Sequence[float] = SAMPLED_SHARES,
    *,
    width: float = 0.3,
    seeds: Sequence[int] = range(5),
) -> Measured:
    """How few samples give a model's route: model routes of random parts of the samples beside that of all.

    Args:
        routes: Routes of all samples.
        shares: Shares of the samples, in (0, 1].
        width: Width of the model routes.
        seeds: One random part of each size for each.

    Raises:
        UserError: There are no routes, or a share is out of range.
    """
    if not len(routes) or not seeds:
        raise UserError("no routes, or no seeds, so there is nothing to compare")
    full = routes.aggregate(width)
    rows = []
    for share in shares:
        if not 0 < share <= 1:
            raise UserError(f"a share of {share} of the samples is outside (0, 1]")
        count = max(1, round(share * len(routes)))
        for seed in seeds:
            order = torch.randperm(len(routes), generator=torch.Generator().manual_seed(seed))
            part = routes.select(order[:count].sort().values).aggregate(width)
            overlap = RouteOverlap.between(part, full)
            rows.append(
                {
                    "share": share, "draw": seed, "samples": count, "shared": overlap.shared, "neurons": overlap.size,
                    "share_of_neurons": overlap.share, "least_in_a_layer": overlap.least,
                }
            )  # fmt: skip
    table = Table.of(rows)
    means = [
        f"{share:.0%} of them {statistics.fmean(table.select(share=share).column('share_of_neurons')):.1%}"
        for share in table.distinct("share")
    ]
    sentence = f"Of the route of {len(routes)} samples, the route of {', '.join(means)} has the same neurons."
    return Measured(table, {"experiment": "route sampling", "width": width, "samples": len(routes)}, sentence)


def per_image_transplant(
    model: nn.Module,
    data: Data,
    attack: Attack,
    groups: Iterable[Sequence[str]],
    *,
    name: str = "attack",
    width: float = 0.3,
    seed: int = 0,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> Measured:
    """Accuracy on attacked images, each with clean values in the channels of its own route, or in random ones.

    Only images that the network gets right when clean count.

    Args:
        model: The network.
        data: Labelled images in [0, 1].
        attack: What attacks them.
        groups: Layers to change together, in forward order.
        name: The attack's name.
        width: Share of each layer's channels on an image's route, which is traced from the clean image.
        seed: Of the random channels.
        batch_size: Rows per forward pass when ``data`` is tensors.
        progress: Called with (images done, in all or None) after every batch.

    Raises:
        UserError: The data have no labels, a layer is not among the traced ones, or no sample is classified correctly.
    """
    groups = [tuple(group) for group in groups]
    generator = torch.Generator().manual_seed(seed)
    hits = {(group, criterion): 0 for group in groups for criterion in (OWN, OWN_RANDOM)}
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
                        answers = _mended(model, clean, moved, masks).argmax(1)
                        hits[group, criterion] += int((answers == clean.labels).sum())
            if progress is not None:
                progress(samples, samples_in(data))
    if not counted:
        raise UserError(f"the network gets none of the {samples} samples right when they are clean; check its weights")
    accuracies = {key: Accuracy(right, counted) for key, right in hits.items()}
    table = Table.of(
        {
            "layers": "+".join(group), "criterion": criterion, "accuracy": accuracy.value,
            "accuracy_low": accuracy.interval[0], "accuracy_high": accuracy.interval[1], "samples": accuracy.total,
        }
        for (group, criterion), accuracy in accuracies.items()
    )  # fmt: skip
    parts = [
        f"{criterion} in {len(group)} of the layers {accuracy.value:.1%}"
        for (group, criterion), accuracy in accuracies.items()
    ]
    return Measured(
        table,
        {"experiment": "own routes", "width": width, "attack": name, "images": samples},
        f"Accuracy under {name} with {width:.0%} of the channels as on clean images: {'; '.join(parts)}.",
    )


def _mended(model: nn.Module, clean: CorrectSamples, moved: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    """Logits of attacked images with clean values where each image's own mask (N, C) says so.

    Layer after layer: what a layer would give is recorded under the transplants before it, mixed with what it gives
    for the clean images, and put in its place as a whole.
    """
    mixed: dict[str, Tensor] = {}
    for layer, mask in masks.items():
        with _in_place(model, mixed):
            values = record_outputs(model, moved, [layer])[layer]
        mixed[layer] = torch.where(mask.to(values.device)[:, :, None, None], clean.outputs[layer], values)
    with _in_place(model, mixed):
        return checked_logits(model(moved.clone()), len(moved))


def _in_place(model: nn.Module, outputs: Mapping[str, Tensor]) -> AbstractContextManager[object]:
    """Context in which these layers give this, in all their channels."""
    if not outputs:
        return nullcontext()
    channels = {layer: values.shape[1] for layer, values in outputs.items()}
    return transplant(model, outputs, Route({layer: range(count) for layer, count in channels.items()}, channels))


def _random_mask(like: Tensor, width: float, generator: torch.Generator) -> Tensor:
    """As many channels in every row, at random."""
    rows, channels = like.shape
    chosen = torch.rand(rows, channels, generator=generator).topk(kept(width, channels), dim=1).indices
    return torch.zeros(rows, channels, dtype=torch.bool).scatter_(1, chosen, True)
