"""Accuracies under interventions: the tidy table of Figs. 3 and 4, and where the route beats its controls."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from attackroute.analysis.rankings import RANDOM, ROUTE
from attackroute.analysis.tables import Record
from attackroute.core.accuracy import Accuracy
from attackroute.core.statistics import CLEAR, sign_test
from attackroute.core.table import plural

UNTOUCHED = "untouched"


@dataclass(frozen=True)
class Setting:
    """What is done, whoever chose the channels.

    Attributes:
        layers: The layers that are changed together; none for the untouched network.
        share: Share of each layer's channels.
        attack: Name of the attack on the images; None for clean ones.
        beta: Factor on the connections, where they are weakened.
    """

    layers: tuple[str, ...]
    share: float
    attack: str | None = None
    beta: float | None = None


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        setting: What was done.
        criterion: What chose the channels: ``"route"``, ``"random off-route"``, a rival's name, or ``"untouched"``.
        draw: Seed of the random draw; None for other criteria.
        neurons: How many channels were changed, over all the layers.
        channels: How many these layers have.
        accuracy: On the samples that the untouched network gets right when they are clean.
        route_only: Samples right with the route's channels changed, and wrong with these.
        control_only: Samples wrong with the route's channels changed, and right with these.
    """

    setting: Setting
    criterion: str
    draw: int | None
    neurons: int
    channels: int
    accuracy: Accuracy
    route_only: int
    control_only: int

    def record(self, network: int) -> Record:
        """The row as plain values, for a network of so many channels."""
        low, high = self.accuracy.interval
        setting = self.setting
        return {
            "attack": setting.attack,
            "layers": "+".join(setting.layers),
            "share": setting.share,
            "beta": setting.beta,
            "criterion": self.criterion,
            "draw": self.draw,
            "neurons": self.neurons,
            "channels": self.channels,
            "share_of_network": self.neurons / network,
            "accuracy": self.accuracy.value,
            "accuracy_low": low,
            "accuracy_high": high,
            "samples": self.accuracy.total,
            "route_only": self.route_only,
            "control_only": self.control_only,
            "p": sign_test(self.route_only, self.control_only),
        }


@dataclass(frozen=True)
class Verdict:
    """Whether the route has more effect than a control of the same size, in one setting.

    Attributes:
        setting: The setting.
        criterion: The control.
        draws: How many sets of channels it has; 1 unless it is random.
        stronger: Sets against which the route's effect is clearly larger, by the exact sign test on paired samples.
        weaker: Sets against which it is clearly smaller.
        difference: Route's accuracy less the control's mean accuracy.
    """

    setting: Setting
    criterion: str
    draws: int
    stronger: int
    weaker: int
    difference: float

    @property
    def verdict(self) -> str:
        """``"beats"`` or ``"loses to"`` if clear against every set, else ``"undecided against"``."""
        if self.stronger == self.draws:
            return "beats"
        return "loses to" if self.weaker == self.draws else "undecided against"

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain values."""
        setting = self.setting
        return {
            "attack": setting.attack,
            "layers": "+".join(setting.layers),
            "share": setting.share,
            "beta": setting.beta,
            "control": self.criterion,
            "draws": self.draws,
            "clearly_stronger": self.stronger,
            "clearly_weaker": self.weaker,
            "accuracy_difference": self.difference,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Cost:
    """What a measurement took.

    Attributes:
        samples: Samples read.
        counted: Those that the untouched network gets right when clean, which alone count.
        batches: Batches read.
        forward_passes: Forward passes of the model, one for a batch, those of attacks included.
    """

    samples: int
    counted: int
    batches: int
    forward_passes: int


@dataclass(frozen=True)
class AccuracyTable:
    """Accuracies under one kind of intervention.

    Attributes:
        experiment: ``"transplant"``, ``"deactivate"`` or ``"weaken"``.
        rows: The measurements; those of the untouched network first.
        main_share: The share of a layer's channels on which the reading is based.
        helps: Whether changing the channels that matter raises accuracy, as a transplant does.
        at: Where channels are changed: the layers' ``"output"``, before batch norm, or after their ``"activation"``.
        cost: What it took.
        network: How many channels all of the route's layers have.
        main_beta: The factor on which the reading is based, where connections are weakened.
        targets: The layers whose kernels are weakened, where they are not all.
    """

    experiment: str
    rows: tuple[Row, ...]
    main_share: float
    helps: bool
    at: str
    cost: Cost
    network: int
    main_beta: float | None = None
    targets: Sequence[str] | None = None

    @property
    def criteria(self) -> tuple[str, ...]:
        """Criteria in the order in which they were measured."""
        return tuple(dict.fromkeys(row.criterion for row in self.rows if row.criterion != UNTOUCHED))

    @property
    def attacks(self) -> tuple[str | None, ...]:
        """Attacks in the order in which they were made; (None,) for clean images."""
        return tuple(dict.fromkeys(row.setting.attack for row in self.rows))

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers that were changed alone, in forward order."""
        return tuple(
            dict.fromkeys(row.setting.layers[0] for row in self.rows if len(row.setting.layers) == 1)
        )  # the rows are in that order

    def untouched(self, attack: str | None = None) -> Accuracy:
        """Accuracy of the untouched network on images of that attack."""
        return next(row.accuracy for row in self.rows if row.criterion == UNTOUCHED and row.setting.attack == attack)

    def values(self, setting: Setting, criterion: str) -> list[float]:
        """Accuracies of one criterion in one setting, one for each draw; none where it was not measured."""
        return [row.accuracy.value for row in self.rows if row.setting == setting and row.criterion == criterion]

    def settings(self) -> tuple[Setting, ...]:
        """Settings in which channels were changed."""
        return tuple(dict.fromkeys(row.setting for row in self.rows if row.criterion == ROUTE))

    def verdicts(self, settings: Iterable[Setting] | None = None) -> tuple[Verdict, ...]:
        """The route beside each control, in each setting; where a control has no set of that size, none."""
        wanted = set(self.settings() if settings is None else settings)
        groups: dict[tuple[Setting, str], list[Row]] = {}
        ours: dict[Setting, float] = {}
        for row in self.rows:
            if row.setting not in wanted or row.criterion == UNTOUCHED:
                continue
            if row.criterion == ROUTE:
                ours[row.setting] = row.accuracy.value
            else:
                groups.setdefault((row.setting, row.criterion), []).append(row)
        return tuple(self._verdict(at, name, rows, ours[at]) for (at, name), rows in groups.items() if at in ours)

    def _verdict(self, setting: Setting, criterion: str, rows: Sequence[Row], ours: float) -> Verdict:
        sign = 1 if self.helps else -1
        clear = [
            sign * (row.route_only - row.control_only)
            for row in rows
            if sign_test(row.route_only, row.control_only) < CLEAR
        ]
        mean = statistics.fmean(row.accuracy.value for row in rows)
        stronger, weaker = sum(gain > 0 for gain in clear), sum(gain < 0 for gain in clear)
        return Verdict(setting, criterion, len(rows), stronger, weaker, ours - mean)

    def main_settings(self) -> tuple[Setting, ...]:
        """The settings on which the reading is based: single layers at the main share, or all where connections are."""
        return tuple(
            setting
            for setting in self.settings()
            if setting.share == self.main_share
            and setting.beta == self.main_beta
            and (self.main_beta is not None or len(setting.layers) == 1)
        )

    def reading(self) -> str:
        """One sentence: in how many layers the route beats, and loses to, each control at the main share."""
        verdicts = self.verdicts(self.main_settings())
        found = []
        for criterion in (name for name in self.criteria if name != ROUTE):
            own = [verdict.verdict for verdict in verdicts if verdict.criterion == criterion]
            if own:
                found.append(
                    f"{named(criterion)} {own.count('beats')} (loses in {own.count('loses to')}) of {len(own)}"
                )
        return f"{self._opening()} the route beats {', '.join(found)}." if found else f"{self._opening()} no control."

    def _opening(self) -> str:
        share = f"{self.main_share:.0%}"
        cases = "layers" if self.attacks in ((None,), self.attacks[:1]) else "layers and attacks"
        if self.experiment == "transplant":
            return f"Transplanting {share} of one layer's clean channels at its {self.at}; in clear effect, by {cases}:"
        if self.experiment == "deactivate":
            return f"Setting {share} of one layer's channels to zero at its {self.at}; in clear effect, by layers:"
        into = "" if self.targets is None else f", into {plural(len(self.targets), 'layer')},"
        return (
            f"Weakening the connections between {share} of all layers' channels{into} to {self.main_beta:g}; in clear "
            "effect:"
        )

    def records(self) -> list[Record]:
        """The measurements as a tidy table."""
        return [row.record(self.network) for row in self.rows]

    def about(self) -> dict[str, Any]:
        """What the measurements have in common, and the verdicts."""
        return {
            "experiment": self.experiment,
            "at": self.at,
            "samples": self.cost.samples,
            "counted": self.cost.counted,
            "counted_are": "samples that the untouched network classifies correctly when clean",
            "batches": self.cost.batches,
            "forward_passes": self.cost.forward_passes,
            "main_share": self.main_share,
            "main_beta": self.main_beta,
            "weakened_layers": None if self.targets is None else list(self.targets),
            "clear": f"exact two-sided sign test on paired samples, p < {CLEAR}, not corrected for the number of tests",
            "verdicts": [verdict.to_json() for verdict in self.verdicts()],
        }


def named(criterion: str) -> str:
    """A control as a sentence has it."""
    return "every random draw in" if criterion == RANDOM else f"{criterion} in"


def spread(values: Sequence[float]) -> str:
    """Accuracies for a table: one value, or the mean and range of several draws."""
    if len(values) == 1:
        return f"{values[0]:.1%}"
    return f"{statistics.fmean(values):.1%} ({100 * min(values):.0f} to {100 * max(values):.0f})"
