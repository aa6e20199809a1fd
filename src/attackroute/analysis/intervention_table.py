"""The table of accuracies under interventions (Figs. 3 and 4), and where the route beats its controls."""

from __future__ import annotations

import statistics
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from attackroute.analysis.controls import RANDOM, ROUTE
from attackroute.analysis.experiment import ExperimentResult
from attackroute.core.statistics import CLEAR, Accuracy
from attackroute.core.table import Record, Table

UNTOUCHED = "untouched"
BEATS, LOSES, UNDECIDED = "beats", "loses to", "undecided against"


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

    @property
    def cells(self) -> Record:
        """The setting as cells of a table's row."""
        return {"attack": self.attack, "layers": "+".join(self.layers), "share": self.share, "beta": self.beta}


@dataclass(frozen=True)
class Counts:
    """How many samples a measurement took.

    Attributes:
        samples: Samples read.
        counted: Those that the untouched network gets right when clean, which alone count.
        batches: Batches read.
    """

    samples: int
    counted: int
    batches: int


@dataclass(frozen=True, kw_only=True)
class InterventionTable(ExperimentResult):
    """Accuracies under one kind of intervention.

    Attributes:
        table: The measurements, those of the untouched network first. ``criterion`` is what chose the channels:
            ``"route"``, ``"random off-route"``, a baseline's name, or ``"untouched"``; ``draw`` the seed of a random
            one. ``accuracy`` is on the samples that the untouched network gets right when they are clean, of which
            ``route_only`` are right with the route's channels changed, and wrong with these, ``control_only`` the
            reverse, and ``p`` is the sign test's.
        settings: The settings in which the route was measured.
        main_share: The share of a layer's channels on which the reading is based.
        main_beta: The factor on which the reading is based, where connections are weakened.
        at: Where channels are changed: the layers' ``"output"``, before batch norm, or after their ``"activation"``.
        counts: How many samples it took.
        targets: The layers whose kernels are weakened, where they are not all.
    """

    table: Table
    settings: tuple[Setting, ...]
    main_share: float
    main_beta: float | None = None
    at: str
    counts: Counts
    targets: Sequence[str] | None = None

    helps: ClassVar[bool] = False
    """Whether the intervention raises accuracy where it meets what matters."""

    @property
    @abstractmethod
    def opening(self) -> str:
        """How the reading begins."""

    @property
    def criteria(self) -> tuple[str, ...]:
        """Criteria in the order in which they were measured."""
        return tuple(name for name in self.table.distinct("criterion") if name != UNTOUCHED)

    @property
    def controls(self) -> tuple[str, ...]:
        """All criteria but the route."""
        return tuple(name for name in self.criteria if name != ROUTE)

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
            for control in self.controls:
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
        scores = []
        for control in self.controls:
            rows = [row for row in self.verdicts if row["control"] == control]
            verdicts = [row["verdict"] for row in rows if any(cells <= row.items() for cells in main)]
            if verdicts:
                name = "every random draw" if control == RANDOM else control
                counts = f"{verdicts.count(BEATS)} (loses in {verdicts.count(LOSES)}) of {len(verdicts)}"
                scores.append(f"{name} in {counts}")
        beaten = f"the route beats {', '.join(scores)}" if scores else "no control"
        return f"{self.opening} {beaten}."

    def about(self) -> dict[str, Any]:
        """What the measurements have in common, and the verdicts."""
        return {
            "at": self.at,
            "samples": self.counts.samples,
            "counted": self.counts.counted,
            "counted_are": "samples that the untouched network classifies correctly when clean",
            "batches": self.counts.batches,
            "main_share": self.main_share,
            "main_beta": self.main_beta,
            "weakened_layers": None if self.targets is None else list(self.targets),
            "clear": f"exact two-sided sign test on paired samples, p < {CLEAR}, not corrected for the number of tests",
            "verdicts": self.verdicts.to_json(),
        }

    def summary(self) -> Table:
        """Settings at the main share, or factors: the route, random channels, and which controls the route beats."""
        attack = self.attacks[0]
        if self.main_beta is not None:
            head, settings = "beta", {setting: f"{setting.beta:g}" for setting in self.settings}
        else:
            main = [each for each in self.settings if each.share == self.main_share and each.attack == attack]
            head, settings = "layer", {setting: self.group_name(setting.layers) for setting in main}
        rows = []
        for setting, text in settings.items():
            accuracies = [_spread_text(self.values(setting, by)) for by in (ROUTE, RANDOM)]
            verdicts = [row for row in self.verdicts if setting.cells.items() <= row.items()]
            controls = [[row["control"] for row in verdicts if row["verdict"] == each] for each in (BEATS, LOSES)]
            rows.append((text, *accuracies, *(", ".join(names) or "-" for names in controls)))
        under = f" under {attack}" if attack else ""
        return Table((head, f"route{under}", RANDOM, "route beats", "route loses to"), tuple(rows))

    def group_name(self, layers: tuple[str, ...]) -> str:
        """Layers that are changed together, in a few words."""
        if len(layers) == 1:
            return layers[0]
        if layers == self.layers[: len(layers)]:
            return f"{'all' if layers == self.layers else 'first'} {len(layers)} layers"
        return "+".join(layers) if len(layers) < 3 else f"{layers[0]} ... {layers[-1]}"


def _spread_text(values: Sequence[float]) -> str:
    """Accuracies for a table: one value, or the mean and range of several draws; a dash for none."""
    if len(values) < 2:
        return f"{values[0]:.1%}" if values else "-"
    return f"{statistics.fmean(values):.1%} ({100 * min(values):.0f} to {100 * max(values):.0f})"
