"""Accuracy under interventions (Figs. 3 and 4): each distinct one runs once a batch, and what the table says of them.

Only samples that the untouched network gets right when they are clean count; only their numbers are kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from attackroute.analysis.channel_statistics import labelled
from attackroute.analysis.controls import RANDOM, ROUTE, Comparison, Ranking, require_right
from attackroute.analysis.experiment import ExperimentResult
from attackroute.analysis.interventions import OtherRowsError, record_outputs
from attackroute.core.batches import BatchStream
from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.layers import OUTPUT
from attackroute.core.model_state import frozen
from attackroute.core.statistics import CLEAR, Accuracy, sign_test
from attackroute.core.table import Record, Table, plural
from attackroute.robustness.attack import Attack, attack_name, attacked
from attackroute.routes.route import Route

UNTOUCHED = "untouched"
BEATS, LOSES, UNDECIDED = "beats", "loses to", "undecided against"


@dataclass(frozen=True)
class Setting:
    """What is done, whoever chose the channels."""

    layers: tuple[str, ...]  # that are changed together; none for the untouched network
    share: float  # of each layer's channels
    attack: str | None = None  # on the images, by name; None for clean ones
    beta: float | None = None  # factor on the connections, where they are weakened

    @property
    def cells(self) -> Record:
        """The setting as cells of a table's row."""
        return {"attack": self.attack, "layers": "+".join(self.layers), "share": self.share, "beta": self.beta}


@dataclass(frozen=True, kw_only=True)
class InterventionTable(ExperimentResult):
    """Accuracies under one kind of intervention.

    Attributes:
        table: The measurements, those of the untouched network first. ``criterion`` is what chose the channels:
            ``"route"``, ``"random off-route"``, a baseline's name, or ``"untouched"``; ``draw`` the seed of a random
            one. ``accuracy`` is on the samples that the untouched network gets right when they are clean, of which
            ``route_only`` are right with the route's channels changed, and wrong with these, ``control_only`` the
            reverse, and ``p`` is the sign test's.
    """

    settings: tuple[Setting, ...]  # in which the route was measured
    main_share: float  # of a layer's channels, on which the reading is based
    main_beta: float | None = None  # factor on which the reading is based, where connections are weakened
    at: str  # where channels are changed: the layers' output, before batch norm, or after their activation
    samples: int
    counted: int  # of these, right when clean
    targets: Sequence[str] | None = None  # layers whose kernels are weakened, where they are not all

    helps: ClassVar[bool] = False
    """Whether the intervention raises accuracy where it meets what matters."""

    injects: ClassVar[bool] = False
    """Whether clean images run, with values of the attacked ones; else attacked ones, if there is an attack."""

    adapts: ClassVar[bool] = False
    """Whether the attack is made on the changed network; else on the untouched one."""

    done: ClassVar[str] = "changed"
    """What is done to the channels, in a picture's title."""

    opening: ClassVar[str]
    """How the reading begins, as a format of the table."""

    @property
    def cases(self) -> str:
        """What verdicts are counted by; where kernels are weakened, into which."""
        if self.main_beta is not None:
            return "" if self.targets is None else f", into {plural(len(self.targets), 'layer')},"
        return "layers" if len(self.attacks) == 1 else "layers and attacks"

    @property
    def without(self) -> str:
        """Accuracy under each attack where nothing is done about it."""
        return ", ".join(f"{attack} {self.untouched(attack).value:.1%}" for attack in self.attacks)

    @property
    def criteria(self) -> tuple[str, ...]:
        """Criteria in the order in which they were measured, the route first."""
        return tuple(name for name in self.table.distinct("criterion") if name != UNTOUCHED)

    @property
    def attacks(self) -> tuple[str | None, ...]:
        """Attacks in the order in which they were made; (None,) for clean images."""
        return tuple(self.table.distinct("attack"))

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers that were changed alone, in forward order."""
        return tuple(dict.fromkeys(setting.layers[0] for setting in self.settings if len(setting.layers) == 1))

    def untouched(self, attack: str | None = None) -> Accuracy:
        """Accuracy of the untouched network on images of that attack."""
        row = self.table.one(criterion=UNTOUCHED, attack=attack)
        return Accuracy(round(row["accuracy"] * row["samples"]), row["samples"])

    def values(self, setting: Setting, criterion: str) -> list[float]:
        """Accuracies of one criterion in one setting, one for each draw; none where it was not measured."""
        return self.table.select(criterion=criterion, **setting.cells).column("accuracy")

    @cached_property
    def verdicts(self) -> Table:
        """The route beside each control, in each setting; where a control has no set of that size, none.

        A control has as many ``draws`` as sets of channels. Against some of them the route's effect is
        ``clearly_stronger``, or ``clearly_weaker``, by the sign test; the ``verdict`` is ``"beats"`` or ``"loses to"``
        if it is so against every set, else ``"undecided against"``. ``accuracy_difference`` is the route's accuracy
        less the control's mean accuracy.
        """
        verdicts = []
        for setting in self.settings:
            (route,) = self.values(setting, ROUTE)
            for control in self.criteria[1:]:
                rows = self.table.select(criterion=control, **setting.cells)
                if not rows:
                    continue
                gains = [row["route_only"] - row["control_only"] for row in rows if row["p"] < CLEAR]
                better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
                stronger, weaker = (better, worse) if self.helps else (worse, better)
                verdict = {
                    "draws": len(rows),
                    "clearly_stronger": stronger,
                    "clearly_weaker": weaker,
                    "accuracy_difference": route - statistics.fmean(rows.column("accuracy")),
                    "verdict": BEATS if stronger == len(rows) else LOSES if weaker == len(rows) else UNDECIDED,
                }
                verdicts.append({**setting.cells, "control": control, **verdict})
        return Table.of(verdicts)

    def reading(self) -> str:
        """One sentence: in how many layers the route beats, and loses to, each control at the main share.

        It is about single layers at the main share; where connections are weakened, about all at the main factor.
        """
        main = [
            setting.cells.items()
            for setting in self.settings
            if (setting.share, setting.beta) == (self.main_share, self.main_beta)
            and (self.main_beta is not None or len(setting.layers) == 1)
        ]
        rows = [row for row in self.verdicts if any(cells <= row.items() for cells in main)]
        scores = []
        for control in dict.fromkeys(row["control"] for row in rows):
            verdicts = [row["verdict"] for row in rows if row["control"] == control]
            name = "every random draw" if control == RANDOM else control
            scores.append(f"{name} in {verdicts.count(BEATS)} (loses in {verdicts.count(LOSES)}) of {len(verdicts)}")
        beaten = f"the route beats {', '.join(scores)}" if scores else "no control"
        return f"{self.opening.format(self)} {beaten}."

    def about(self) -> dict[str, Any]:
        """What the measurements have in common, and the verdicts."""
        return {
            "at": self.at,
            "samples": self.samples,
            "counted": self.counted,
            "counted_are": "samples that the untouched network classifies correctly when clean",
            "main_share": self.main_share,
            "main_beta": self.main_beta,
            "weakened_layers": None if self.targets is None else list(self.targets),
            "clear": f"exact two-sided sign test on paired samples, p < {CLEAR}, not corrected for the number of tests",
            "verdicts": self.verdicts.to_json(),
        }

    def group_name(self, layers: tuple[str, ...]) -> str:
        """Layers that are changed together, in a few words."""
        if len(layers) == 1:
            return layers[0]
        if layers == self.layers[: len(layers)]:
            return f"{'all' if layers == self.layers else 'first'} {len(layers)} layers"
        return "+".join(layers) if len(layers) < 3 else f"{layers[0]} ... {layers[-1]}"


T = TypeVar("T", bound=InterventionTable)

Change = tuple[Route | None, str | None, float | None]
"""Channels, attack and factor, the same whichever criterion asked for them; no channels for the untouched network."""


@dataclass(frozen=True)
class Trial:
    """One row to measure: a setting, what chose the channels, and these; none for the untouched network."""

    setting: Setting
    criterion: str
    draw: int | None
    channels: Route | None

    def change(self, injects: bool) -> Change:
        """The intervention that it comes to: none without any channel (in clean images if it injects), or by 1."""
        setting = self.setting
        if self.channels is None or self.channels.size == 0 or setting.beta == 1:
            return None, None if injects and self.channels is not None else setting.attack, None
        return self.channels, setting.attack, setting.beta

    def row(self, accuracy: Accuracy, route_only: int, control_only: int, *, network: int) -> Record:
        """What was measured, as a row of an :class:`InterventionTable`, on a network of so many channels."""
        low, high = accuracy.interval
        route = self.channels
        neurons = route.size if route else 0
        return {
            **self.setting.cells, "criterion": self.criterion, "draw": self.draw,
            "neurons": neurons, "channels": sum(route.channels.values()) if route else 0,
            "share_of_network": neurons / network,
            "accuracy": accuracy.value, "accuracy_low": low, "accuracy_high": high, "samples": accuracy.total,
            "route_only": route_only, "control_only": control_only, "p": sign_test(route_only, control_only),
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class CorrectSamples:
    """Samples of a batch that the untouched model gets right when clean, and outputs of layers that belong to them."""

    images: Tensor  # clean, or after an attack
    labels: Tensor
    outputs: Mapping[str, Tensor]

    def select(self, rows: Tensor) -> CorrectSamples:
        """Some of the samples, by index."""
        outputs = {layer: values[rows] for layer, values in self.outputs.items()}
        return CorrectSamples(self.images[rows], self.labels[rows], outputs)


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

    The untouched network comes first, under every attack, and the route's ranking before the others. Batches are
    outermost: each is attacked once per attack and then forgotten. Trials that come to the same intervention share one
    forward pass; a share of 0, or a factor of 1, comes to the untouched network. Progress is in images times
    interventions. ``attacks`` bear the names that the settings use, ``record`` names the layers whose outputs
    ``intervene`` needs: those of the clean images, or of the attacked ones if the ``result`` injects.
    """
    model, progress = compared.model, compared.progress
    settings = list(dict.fromkeys(settings))
    attacked_by = dict.fromkeys(setting.attack for setting in settings)
    trials = [Trial(Setting((), 0.0, attack), UNTOUCHED, None, None) for attack in attacked_by]
    for setting, ranking in product(settings, rankings):
        if (channels := ranking.route(setting.share, setting.layers)) is not None:
            trials.append(Trial(setting, ranking.criterion, ranking.draw, channels))
    asked = [trial.change(result.injects) for trial in trials]
    position = {change: index for index, change in enumerate(dict.fromkeys(asked))}
    changes, columns = list(position), [position[change] for change in asked]
    route = {trial.setting: at for trial, at in zip(trials, columns, strict=True) if trial.criterion == ROUTE}
    # the route in the same setting; a trial's own column where the route was not measured
    references = [route.get(trial.setting, at) for trial, at in zip(trials, columns, strict=True)]
    stream = BatchStream(model, compared.data, compared.batch_size)
    total = None if stream.total is None else stream.total * len(changes)
    samples = counted = 0

    def count(images: Tensor, labels: Tensor | None) -> tuple[int, int, Tensor]:
        """The batch's samples, those that count, and of these for each trial: right, route alone, control alone."""
        clean = correct_when_clean(model, images, labels, () if result.injects else record, compared.at)
        correct = torch.ones(len(changes), len(clean.images), dtype=torch.bool)
        done = samples * len(changes)
        for name in dict.fromkeys(attack for _, attack, _ in changes) if len(clean.images) else ():
            attack = None if name is None or attacks is None else attacks[name]
            inputs = clean.images if attack is None else attacked(model, attack, clean.images, clean.labels)[0]
            outputs = record_outputs(model, inputs, record, at=compared.at) if result.injects else clean.outputs
            given = replace(clean, images=clean.images if result.injects or result.adapts else inputs, outputs=outputs)
            for at, (channels, made_by, beta) in enumerate(changes):
                if made_by != name:
                    continue
                if channels is not None:
                    change, within = partial(intervene, channels, beta), attack if result.adapts else None
                    correct[at] = right_within(model, change, given, within)
                elif name is not None:  # without an attack these are the samples that count
                    correct[at] = right_within(model, nullcontext, replace(given, images=inputs))
                done += len(images)
                if progress is not None:
                    progress(done, total)
        control, with_route = correct[columns], correct[references]
        outcomes = control, with_route & ~control, control & ~with_route
        return len(images), len(clean.images), torch.stack([each.sum(1) for each in outcomes])

    sums = torch.zeros(3, len(trials), dtype=torch.int64)
    with frozen(model), torch.inference_mode(False), torch.no_grad():
        for size, right, sums_of_batch in stream.map(count):
            samples += size
            counted += right
            sums += sums_of_batch
    require_right(counted, samples)
    network = sum(compared.route.channels.values())
    rows = [
        trial.row(Accuracy(right, counted), route_only, control_only, network=network)
        for trial, (right, route_only, control_only) in zip(trials, sums.T.tolist(), strict=True)
    ]
    return result(
        table=Table.of(rows), settings=tuple(route), main_share=compared.share, at=compared.at,
        samples=samples, counted=counted,
    )  # fmt: skip


def right_within(
    model: nn.Module,
    context: Callable[[CorrectSamples], AbstractContextManager[object]],
    samples: CorrectSamples,
    attack: Attack | None = None,
) -> Tensor:
    """Which samples the model gets right in a context of theirs, after an attack that is made in there too.

    The attack may run all images together as often as it likes, in their order; one that runs some of them, or all
    several times over, is made on one image at a time.
    """
    images = samples.images
    try:
        with context(samples):
            if attack is not None:
                images, _ = attacked(model, attack, images, samples.labels)
            return (checked_logits(model(images.clone()), len(images)).argmax(1) == samples.labels).cpu()
    except OtherRowsError as error:
        if attack is None:
            raise
        if len(images) == 1:
            raise UserError(f"{attack_name(attack)} cannot be made on a network with held channels: {error}") from error
        rows = torch.arange(len(images), device=images.device).split(1)
        return torch.cat([right_within(model, context, samples.select(row), attack) for row in rows])


def correct_when_clean(
    model: nn.Module, images: Tensor, labels: Tensor | None, record: Sequence[str] = (), at: str = OUTPUT
) -> CorrectSamples:
    """The images of a batch that a frozen model gets right, and outputs of layers to record, in one forward pass."""
    answers: list[object] = []
    handle = model.register_forward_hook(lambda module, _, output: answers.append(output))
    try:
        outputs = record_outputs(model, images, record, at=at)
    finally:
        handle.remove()
    logits = checked_logits(answers[-1], len(images))
    labels = checked_labels(labelled(labels), logits.shape[1], len(images))
    samples, right = CorrectSamples(images, labels, outputs), (logits.argmax(1) == labels).nonzero().flatten()
    return samples if len(right) == len(images) else samples.select(right)
