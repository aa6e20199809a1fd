"""Interventions on a stream of images: each distinct one runs once on every batch, and only counts are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attackroute.analysis.controls import ROUTE, Comparison, Ranking
from attackroute.analysis.intervention_table import UNTOUCHED, Counts, Setting
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


@dataclass(frozen=True)
class Change:
    """An intervention, the same whichever criterion asked for it.

    Attributes:
        channels: The channels to change; None for the untouched network.
        attack: Name of the attack on the images.
        beta: Factor on the connections, where they are weakened.
    """

    channels: Route | None
    attack: str | None
    beta: float | None


@dataclass(frozen=True)
class Trial:
    """One row to measure: a setting, what chose the channels, and the intervention that it comes to."""

    setting: Setting
    criterion: str
    draw: int | None
    change: Change
    neurons: int
    channels: int


@dataclass(frozen=True, eq=False)
class CorrectSamples:
    """Samples of a batch that the untouched model gets right when they are clean.

    Attributes:
        images: ``(n, C, H, W)``.
        labels: ``(n,)``.
        outputs: What the layers to record gave for them, by name.
    """

    images: Tensor
    labels: Tensor
    outputs: Mapping[str, Tensor]


Intervene = Callable[[Route, "float | None", CorrectSamples], AbstractContextManager[object]]
"""``(channels, beta, this batch) -> context`` in which the model is changed."""


def plan(rankings: Sequence[Ranking], settings: Iterable[Setting]) -> list[Trial]:
    """What to measure: in every setting each ranking that has as many channels; first the untouched network.

    Args:
        rankings: The route's first.
        settings: What to do; one with a share of 0, or with a factor of 1, comes to the untouched network.
    """
    settings = list(dict.fromkeys(settings))
    attacks = dict.fromkeys(setting.attack for setting in settings)
    trials = [Trial(Setting((), 0.0, at), UNTOUCHED, None, Change(None, at, None), 0, 0) for at in attacks]
    for setting in settings:
        for ranking in rankings:
            route = ranking.route(setting.share, setting.layers)
            if route is None:
                continue
            nothing = route.size == 0 or setting.beta == 1
            change = Change(None if nothing else route, setting.attack, None if nothing else setting.beta)
            sizes = route.size, sum(route.channels.values())
            trials.append(Trial(setting, ranking.criterion, ranking.draw, change, *sizes))
    return trials


def measure(
    compared: Comparison,
    trials: Sequence[Trial],
    intervene: Intervene,
    *,
    attacks: Mapping[str, Attack] | None = None,
    record: Sequence[str] = (),
) -> tuple[Table, Counts]:
    """Measure trials on the samples that the untouched model gets right when they are clean.

    Batches are outermost: each is attacked once per attack and then forgotten. Trials that come to the same
    intervention share one forward pass.

    Args:
        compared: The network and its images; progress is in images times interventions.
        trials: What to measure, from :func:`plan`.
        intervene: Makes an intervention.
        attacks: Attacks by the names that the settings use.
        record: Layers whose clean outputs ``intervene`` needs.

    Returns:
        The table, a row for each trial, and how many samples it is about.

    Raises:
        UserError: The data have no labels, or no sample is classified correctly.
    """
    model, progress = compared.model, compared.progress
    changes = list(dict.fromkeys(trial.change for trial in trials))
    position = {change: index for index, change in enumerate(changes)}
    names = list(dict.fromkeys(change.attack for change in changes))
    columns = torch.tensor([position[trial.change] for trial in trials])
    route = {trial.setting: position[trial.change] for trial in trials if trial.criterion == ROUTE}
    # the route in the same setting; a trial's own column where the route was not measured
    references = torch.tensor([route.get(trial.setting, position[trial.change]) for trial in trials])
    total = samples_in(compared.data)
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
                inputs, _ = attacked(model, _attack(attacks, name), clean.images, clean.labels)
            for change in (change for change in changes if change.attack == name):
                if name is None and change.channels is None:
                    correct[position[change]] = True  # these are the samples that count
                else:
                    channels = change.channels
                    with nullcontext() if channels is None else intervene(channels, change.beta, clean):
                        logits = checked_logits(model(inputs.clone()), len(inputs))
                    correct[position[change]] = (logits.argmax(1) == clean.labels).cpu()
                done += 1
                if progress is not None:
                    whole = None if total is None else total * len(changes)
                    progress((samples + ahead) * len(changes) + done * len(images), whole)
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
    table = Table.of(
        accuracy_row(trial, Accuracy(right, counted), route_only, control_only, network=network)
        for trial, (right, route_only, control_only) in zip(trials, sums.T.tolist(), strict=True)
    )
    return table, Counts(samples, counted, batches)


def route_settings(trials: Sequence[Trial]) -> tuple[Setting, ...]:
    """The settings in which the route is measured."""
    return tuple(dict.fromkeys(trial.setting for trial in trials if trial.criterion == ROUTE))


def correct_when_clean(
    model: nn.Module, images: Tensor, labels: Tensor | None, record: Sequence[str] = (), at: str = OUTPUT
) -> CorrectSamples:
    """The images of a batch that the model gets right, with the outputs of some layers, from one forward pass.

    The model is held frozen, and gradients are off.

    Args:
        model: The network.
        images: The batch.
        labels: Its labels.
        record: The layers.
        at: Whether these are the layers' ``"output"`` or that of their ``"activation"``.

    Raises:
        UserError: There are no labels, or they or the logits are not what they should be.
    """
    if labels is None:
        raise UserError("the data have no labels: give (images, labels), since accuracy is measured")
    answers: list[object] = []
    outputs: Mapping[str, Tensor] = {}
    if record:
        handle = model.register_forward_hook(lambda module, _, output: answers.append(output))
        try:
            outputs = record_outputs(model, images, record, at=at)
        finally:
            handle.remove()
    else:
        answers.append(model(images.clone()))  # a copy, since the model may work in place
    logits = checked_logits(answers[-1], len(images))
    labels = checked_labels(labels, logits.shape[1], len(images))
    right = (logits.argmax(1) == labels).nonzero().flatten()
    if len(right) == len(images):
        return CorrectSamples(images, labels, outputs)
    return CorrectSamples(images[right], labels[right], {layer: values[right] for layer, values in outputs.items()})


def _attack(attacks: Mapping[str, Attack] | None, name: str) -> Attack:
    if attacks is None or name not in attacks:
        raise UserError(f"no attack {name!r} is given; there are {', '.join(attacks or ()) or 'none'}")
    return attacks[name]


def accuracy_row(trial: Trial, accuracy: Accuracy, route_only: int, control_only: int, *, network: int) -> Record:
    """What was measured of one trial, as a row of an :class:`InterventionTable`."""
    low, high = accuracy.interval
    return {
        **trial.setting.cells,
        "criterion": trial.criterion,
        "draw": trial.draw,
        "neurons": trial.neurons,
        "channels": trial.channels,
        "share_of_network": trial.neurons / network,
        "accuracy": accuracy.value,
        "accuracy_low": low,
        "accuracy_high": high,
        "samples": accuracy.total,
        "route_only": route_only,
        "control_only": control_only,
        "p": sign_test(route_only, control_only),
    }
