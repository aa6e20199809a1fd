"""Interventions on a stream of images: each distinct one runs once on every batch, and only counts are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from attackroute.analysis.controls import ROUTE, Comparison, Ranking
from attackroute.analysis.intervention_table import UNTOUCHED, Counts, InterventionTable, Setting
from attackroute.analysis.interventions import record_outputs
from attackroute.core.batches import BatchStream, samples_in
from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.layers import OUTPUT
from attackroute.core.model_state import frozen
from attackroute.core.statistics import Accuracy, sign_test
from attackroute.core.table import Record, Table
from attackroute.robustness.attack import Attack, attacked
from attackroute.routes.route import Route

T = TypeVar("T", bound=InterventionTable)


class Change(NamedTuple):
    """An intervention, the same whichever criterion asked for it; no channels for the untouched network."""

    channels: Route | None
    attack: str | None
    beta: float | None


@dataclass(frozen=True)
class Trial:
    """One row to measure: a setting, what chose the channels, and these; no channels for the untouched network."""

    setting: Setting
    criterion: str
    draw: int | None
    channels: Route | None

    @cached_property
    def change(self) -> Change:
        """The intervention that it comes to: none without any channel, or with a factor of 1."""
        setting = self.setting
        if self.channels is None or self.channels.size == 0 or setting.beta == 1:
            return Change(None, setting.attack, None)
        return Change(self.channels, setting.attack, setting.beta)


@dataclass(frozen=True, eq=False)
class CorrectSamples:
    """Samples of a batch that the untouched model gets right when clean, and what layers to record gave for them."""

    images: Tensor
    labels: Tensor
    outputs: Mapping[str, Tensor]


Intervene = Callable[[Route, "float | None", CorrectSamples], AbstractContextManager[object]]
"""``(channels, beta, this batch) -> context`` in which the model is changed."""


def measure(
    result: type[T],
    compared: Comparison,
    rankings: Sequence[Ranking],
    settings: Iterable[Setting],
    intervene: Intervene,
    *,
    attacks: Mapping[str, Attack] | None = None,
    record: Sequence[str] = (),
) -> T:
    """Measure in every setting each ranking that has as many channels, on samples that the model gets right when clean.

    Batches are outermost: each is attacked once per attack and then forgotten. Trials that come to the same
    intervention share one forward pass; a share of 0, or a factor of 1, comes to the untouched network. Progress is in
    images times interventions. The route's ranking comes first; ``attacks`` bear the names that the settings use, and
    ``record`` names the layers whose clean outputs ``intervene`` needs.

    Raises:
        UserError: The data have no labels, or no sample is classified correctly.
    """
    model, progress = compared.model, compared.progress
    trials = _planned(rankings, settings)
    changes = list(dict.fromkeys(trial.change for trial in trials))
    position = {change: index for index, change in enumerate(changes)}
    names = list(dict.fromkeys(change.attack for change in changes))
    columns = torch.tensor([position[trial.change] for trial in trials])
    route = {trial.setting: position[trial.change] for trial in trials if trial.criterion == ROUTE}
    # the route in the same setting; a trial's own column where the route was not measured
    references = torch.tensor([route.get(trial.setting, position[trial.change]) for trial in trials])
    size_of_data = samples_in(compared.data)
    total = None if size_of_data is None else size_of_data * len(changes)
    samples = counted = batches = 0
    ahead = 0  # samples that this process is done with, and that are not among ``samples`` yet

    def count(images: Tensor, labels: Tensor | None) -> tuple[int, int, Tensor]:
        """The batch's samples, those that count, and of these for each trial: right, route alone, control alone."""
        nonlocal ahead
        clean = correct_when_clean(model, images, labels, record, compared.at)
        correct = torch.zeros(len(changes), len(clean.images), dtype=torch.bool)
        done = 0
        for name in names if len(clean.images) else ():
            inputs = clean.images
            if name is not None:
                inputs, _ = attacked(model, (attacks or {})[name], clean.images, clean.labels)
            for change in (change for change in changes if change.attack == name):
                channels = change.channels
                if name is None and channels is None:
                    correct[position[change]] = True  # these are the samples that count
                else:
                    with nullcontext() if channels is None else intervene(channels, change.beta, clean):
                        logits = checked_logits(model(inputs.clone()), len(inputs))
                    correct[position[change]] = (logits.argmax(1) == clean.labels).cpu()
                done += 1
                if progress is not None:
                    progress((samples + ahead) * len(changes) + done * len(images), total)
        ahead += len(images)
        control, with_route = correct[columns], correct[references]
        outcomes = control, with_route & ~control, control & ~with_route
        return len(images), len(clean.images), torch.stack([each.sum(1) for each in outcomes])

    sums = torch.zeros(3, len(trials), dtype=torch.int64)
    with frozen(model), torch.inference_mode(False), torch.no_grad():
        for size, right, sums_of_batch in BatchStream(model, compared.data, compared.batch_size).map(count):
            batches += 1
            samples += size
            counted += right
            ahead = 0
            sums += sums_of_batch
    if not counted:
        raise UserError(
            f"the network gets none of the {samples} samples right when they are clean, so that nothing can be "
            "counted: check its weights and its labels, or give more samples"
        )
    network = sum(compared.route.channels.values())
    rows = [
        accuracy_row(trial, Accuracy(right, counted), route_only, control_only, network=network)
        for trial, (right, route_only, control_only) in zip(trials, sums.T.tolist(), strict=True)
    ]
    return result(
        table=Table.of(rows), settings=tuple(route), main_share=compared.share, at=compared.at,
        counts=Counts(samples, counted, batches),
    )  # fmt: skip


def _planned(rankings: Sequence[Ranking], settings: Iterable[Setting]) -> list[Trial]:
    """The untouched network first, under every attack."""
    settings = list(dict.fromkeys(settings))
    attacks = dict.fromkeys(setting.attack for setting in settings)
    trials = [Trial(Setting((), 0.0, attack), UNTOUCHED, None, None) for attack in attacks]
    for setting in settings:
        for ranking in rankings:
            channels = ranking.route(setting.share, setting.layers)
            if channels is not None:
                trials.append(Trial(setting, ranking.criterion, ranking.draw, channels))
    return trials


def correct_when_clean(
    model: nn.Module, images: Tensor, labels: Tensor | None, record: Sequence[str] = (), at: str = OUTPUT
) -> CorrectSamples:
    """The images of a batch that the model gets right, with the outputs of the layers to record, from one forward pass.

    The model is held frozen, and gradients are off.

    Raises:
        UserError: There are no labels, or they or the logits are not what they should be.
    """
    if labels is None:
        raise UserError("the data have no labels: give (images, labels), since accuracy is measured")
    answers: list[object] = []
    handle = model.register_forward_hook(lambda module, _, output: answers.append(output))
    try:
        outputs = record_outputs(model, images, record, at=at)
    finally:
        handle.remove()
    logits = checked_logits(answers[-1], len(images))
    labels = checked_labels(labels, logits.shape[1], len(images))
    right = (logits.argmax(1) == labels).nonzero().flatten()
    if len(right) == len(images):
        return CorrectSamples(images, labels, outputs)
    return CorrectSamples(images[right], labels[right], {layer: values[right] for layer, values in outputs.items()})


def accuracy_row(trial: Trial, accuracy: Accuracy, route_only: int, control_only: int, *, network: int) -> Record:
    """What was measured of one trial, as a row of an :class:`InterventionTable`."""
    low, high = accuracy.interval
    neurons, channels = (
        (0, 0) if trial.channels is None else (trial.channels.size, sum(trial.channels.channels.values()))
    )
    return {
        **trial.setting.cells,
        "criterion": trial.criterion,
        "draw": trial.draw,
        "neurons": neurons,
        "channels": channels,
        "share_of_network": neurons / network,
        "accuracy": accuracy.value,
        "accuracy_low": low,
        "accuracy_high": high,
        "samples": accuracy.total,
        "route_only": route_only,
        "control_only": control_only,
        "p": sign_test(route_only, control_only),
    }
