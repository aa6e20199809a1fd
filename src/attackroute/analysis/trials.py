"""Interventions on a stream of images: each distinct one runs once on every batch, and only counts are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attackroute.analysis.accuracy_table import UNTOUCHED, Cost, Row, Setting
from attackroute.analysis.interventions import record_outputs
from attackroute.analysis.passes import counted_passes
from attackroute.analysis.rankings import ROUTE, Ranking
from attackroute.core.accuracy import Accuracy
from attackroute.core.batches import BatchStream, Data, samples_in
from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.layers import OUTPUT
from attackroute.core.model_state import frozen
from attackroute.robustness.attack import Attack, attacked
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress


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
class Clean:
    """Samples of a batch that the untouched model gets right.

    Attributes:
        images: ``(n, C, H, W)``.
        labels: ``(n,)``.
        outputs: What the layers to record gave for them, by name.
    """

    images: Tensor
    labels: Tensor
    outputs: Mapping[str, Tensor]


Intervene = Callable[[Change, Clean], AbstractContextManager[object]]
"""``(change, this batch) -> context`` in which the model is changed."""


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
            chosen = ranking.route(setting.share, setting.layers)
            if chosen is None:
                continue
            nothing = chosen.size == 0 or setting.beta == 1
            change = Change(None if nothing else chosen, setting.attack, None if nothing else setting.beta)
            sizes = chosen.size, sum(chosen.channels.values())
            trials.append(Trial(setting, ranking.criterion, ranking.draw, change, *sizes))
    return trials


def run(
    model: nn.Module,
    data: Data,
    trials: Sequence[Trial],
    intervene: Intervene,
    *,
    attacks: Mapping[str, Attack] | None = None,
    record: Sequence[str] = (),
    at: str = OUTPUT,
    look: Callable[[Tensor], object] | None = None,
    batch_size: int = 128,
    progress: Progress | None = None,
) -> tuple[tuple[Row, ...], Cost]:
    """Measure trials on the samples that the untouched model gets right when they are clean.

    Batches are outermost: each is attacked once per attack and then forgotten. Trials that come to the same
    intervention share one forward pass.

    Args:
        model: The network; runs in eval mode and comes back as it was.
        data: Labelled images.
        trials: What to measure, from :func:`plan`.
        intervene: Makes an intervention.
        attacks: Attacks by the names that the settings use.
        record: Layers whose clean outputs ``intervene`` needs.
        at: Whether these are the layers' ``"output"`` or that of their ``"activation"``.
        look: Called with the first batch's images before all else; its forward passes count.
        batch_size: Rows per forward pass when ``data`` is tensors.
        progress: Called with (images times interventions done, in all or None).

    Raises:
        UserError: The data have no labels, or no sample is classified correctly.
    """
    changes = list(dict.fromkeys(trial.change for trial in trials))
    position = {change: index for index, change in enumerate(changes)}
    columns = torch.tensor([position[trial.change] for trial in trials])
    references = _references(trials, position)
    names = list(dict.fromkeys(change.attack for change in changes))
    tally = _Tally(columns, references)
    total = samples_in(data)
    samples = counted = number = 0
    ahead = 0  # samples that this process is done with, and that are not among ``samples`` yet

    def once(images: Tensor, labels: Tensor | None) -> tuple[int, Tensor]:
        nonlocal ahead
        clean = right_when_clean(model, images, labels, record, at)
        correct = torch.zeros(len(changes), len(clean.images), dtype=torch.bool)
        done = 0
        for name in names if len(clean.images) else ():
            images_then = clean.images
            if name is not None:
                images_then, _ = attacked(model, _attack(attacks, name), clean.images, clean.labels)
            for change in (change for change in changes if change.attack == name):
                if name is None and change.channels is None:
                    correct[position[change]] = True  # these are the samples that count
                else:
                    with nullcontext() if change.channels is None else intervene(change, clean):
                        logits = checked_logits(model(images_then.clone()), len(images_then))
                    correct[position[change]] = (logits.argmax(1) == clean.labels).cpu()
                done += 1
                if progress is not None:
                    whole = None if total is None else total * len(changes)
                    progress((samples + ahead) * len(changes) + done * len(images), whole)
        ahead += len(images)
        return len(images), correct

    with frozen(model), torch.inference_mode(False), torch.no_grad(), counted_passes(model) as count:
        stream = BatchStream(model, data, batch_size)
        if look is not None:
            look(stream.first[0])
        for read, correct in count.map(stream, once):
            number += 1
            counted += correct.shape[1]
            samples += read
            ahead = 0
            tally.add(correct)
    if not counted:
        raise UserError(
            f"the network gets none of the {samples} samples right when they are clean, so that nothing can be "
            "counted: check its weights and its labels, or give more samples"
        )
    rows = tally.rows(trials, counted)
    return rows, Cost(samples, counted, number, count.passes)


def right_when_clean(
    model: nn.Module, images: Tensor, labels: Tensor | None, record: Sequence[str] = (), at: str = OUTPUT
) -> Clean:
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
        return Clean(images, labels, outputs)
    return Clean(images[right], labels[right], {layer: values[right] for layer, values in outputs.items()})


def _attack(attacks: Mapping[str, Attack] | None, name: str) -> Attack:
    if attacks is None or name not in attacks:
        raise UserError(f"no attack {name!r} is given; there are {', '.join(attacks or ()) or 'none'}")
    return attacks[name]


def _references(trials: Sequence[Trial], position: Mapping[Change, int]) -> Tensor:
    """For each trial, the column of the route in the same setting; its own where there is none."""
    ours = {trial.setting: position[trial.change] for trial in trials if trial.criterion == ROUTE}
    return torch.tensor([ours.get(trial.setting, position[trial.change]) for trial in trials])


class _Tally:
    """Counts, over batches, of what each trial gets right, alone and beside the route."""

    def __init__(self, columns: Tensor, references: Tensor) -> None:
        self._columns, self._references = columns, references
        self._correct, self._route_only, self._control_only = torch.zeros(3, len(columns), dtype=torch.int64)

    def add(self, correct: Tensor) -> None:
        """Add a batch: bool (interventions, n)."""
        own, route = correct[self._columns], correct[self._references]
        self._correct += own.sum(1)
        self._route_only += (route & ~own).sum(1)
        self._control_only += (own & ~route).sum(1)

    def rows(self, trials: Sequence[Trial], total: int) -> tuple[Row, ...]:
        counts = zip(self._correct.tolist(), self._route_only.tolist(), self._control_only.tolist(), strict=True)
        return tuple(
            Row(
                trial.setting,
                trial.criterion,
                trial.draw,
                trial.neurons,
                trial.channels,
                Accuracy(right, total),
                route_only,
                control_only,
            )
            for trial, (right, route_only, control_only) in zip(trials, counts, strict=True)
        )
