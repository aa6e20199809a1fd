"""The table of accuracies under interventions (Figs. 3 and 4), and where the route beats its controls."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attackroute.analysis.controls import RANDOM, ROUTE
from attackroute.analysis.experiment import ExperimentResult
from attackroute.core.statistics import CLEAR, Accuracy
from attackroute.core.table import Record, Table, plural
from attackroute.routes.route import Route

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNTOUCHED = "untouched"

TRANSPLANT, DEACTIVATE, WEAKEN = "transplant", "deactivate", "weaken"

BEATS, LOSES, UNDECIDED = "beats", "loses to", "undecided against"


Key = tuple["str | None", str, float, "float | None"]


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

    @property
    def key(self) -> Key:
        """The cells' values, by which rows are found."""
        return _key(self.cells)


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
        kind: ``"transplant"``, ``"deactivate"`` or ``"weaken"``.
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
        route: A route with its frequencies, to draw beside what its deactivation costs; None for no such picture.
        title: Of that picture.
    """

    kind: str
    table: Table
    settings: tuple[Setting, ...]
    main_share: float
    main_beta: float | None = None
    at: str
    counts: Counts
    targets: Sequence[str] | None = None
    route: Route | None = None
    title: str = ""

    @property
    def criteria(self) -> tuple[str, ...]:
        """Criteria in the order in which they were measured."""
        return tuple(name for name in self.table.distinct("criterion") if name != UNTOUCHED)

    @property
    def attacks(self) -> tuple[str | None, ...]:
        """Attacks in the order in which they were made; (None,) for clean images."""
        return tuple(self.table.distinct("attack"))

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers that were changed alone, in forward order."""
        return tuple(dict.fromkeys(setting.layers[0] for setting in self.settings if len(setting.layers) == 1))

    @cached_property
    def _rows(self) -> dict[tuple[Key, str], list[Record]]:
        """Rows by setting and criterion, one for each draw."""
        rows: dict[tuple[Key, str], list[Record]] = {}
        for row in self.table:
            rows.setdefault((_key(row), row["criterion"]), []).append(row)
        return rows

    def _rows_of(self, setting: Setting, criterion: str) -> list[Record]:
        return self._rows.get((setting.key, criterion), [])

    def untouched(self, attack: str | None = None) -> Accuracy:
        """Accuracy of the untouched network on images of that attack."""
        row = self.table.one(criterion=UNTOUCHED, attack=attack)
        return Accuracy(round(row["accuracy"] * row["samples"]), row["samples"])

    def values(self, setting: Setting, criterion: str) -> list[float]:
        """Accuracies of one criterion in one setting, one for each draw; none where it was not measured."""
        return [row["accuracy"] for row in self._rows_of(setting, criterion)]

    @cached_property
    def verdicts(self) -> Table:
        """The route beside each control, in each setting; where a control has no set of that size, none.

        A control has as many ``draws`` as sets of channels. Against some of them the route's effect is
        ``clearly_stronger``, or ``clearly_weaker``, by the sign test; the ``verdict`` is ``"beats"`` or ``"loses to"``
        if it is so against every set, else ``"undecided against"``. ``accuracy_difference`` is the route's accuracy
        less the control's mean accuracy.
        """
        return Table.of(
            {**setting.cells, "control": criterion, **self._verdict(setting, criterion)}
            for setting in self.settings
            for criterion in self.criteria
            if criterion != ROUTE and self._rows_of(setting, criterion)
        )

    def _verdict(self, setting: Setting, criterion: str) -> Record:
        rows = self._rows_of(setting, criterion)
        sign = 1 if self.kind == TRANSPLANT else -1  # a transplant of what matters raises accuracy
        gains = [sign * (row["route_only"] - row["control_only"]) for row in rows if row["p"] < CLEAR]
        stronger, weaker = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
        (route,) = self.values(setting, ROUTE)
        return {
            "draws": len(rows),
            "clearly_stronger": stronger,
            "clearly_weaker": weaker,
            "accuracy_difference": route - statistics.fmean(row["accuracy"] for row in rows),
            "verdict": BEATS if stronger == len(rows) else LOSES if weaker == len(rows) else UNDECIDED,
        }

    def main_settings(self) -> tuple[Setting, ...]:
        """The settings on which the reading is based: single layers at the main share, or all where connections are."""
        return tuple(
            setting
            for setting in self.settings
            if setting.share == self.main_share
            and setting.beta == self.main_beta
            and (self.main_beta is not None or len(setting.layers) == 1)
        )

    def reading(self) -> str:
        """One sentence: in how many layers the route beats, and loses to, each control at the main share."""
        scores = []
        main = {setting.key for setting in self.main_settings()}
        for criterion in (name for name in self.criteria if name != ROUTE):
            verdicts = [row["verdict"] for row in self.verdicts if row["control"] == criterion and _key(row) in main]
            if verdicts:
                name = "every random draw" if criterion == RANDOM else criterion
                counts = f"{verdicts.count(BEATS)} (loses in {verdicts.count(LOSES)}) of {len(verdicts)}"
                scores.append(f"{name} in {counts}")
        beaten = f"the route beats {', '.join(scores)}" if scores else "no control"
        return f"{self._opening()} {beaten}."

    def _opening(self) -> str:
        share = f"{self.main_share:.0%}"
        cases = "layers" if self.attacks in ((None,), self.attacks[:1]) else "layers and attacks"
        if self.kind == TRANSPLANT:
            return f"Transplanting {share} of one layer's clean channels at its {self.at}; in clear effect, by {cases}:"
        if self.kind == DEACTIVATE:
            return f"Setting {share} of one layer's channels to zero at its {self.at}; in clear effect, by layers:"
        into = "" if self.targets is None else f", into {plural(len(self.targets), 'layer')},"
        return (
            f"Weakening the connections between {share} of all layers' channels{into} to {self.main_beta:g}; in clear "
            "effect:"
        )

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
            head, settings = "layer", {setting: self._layers_text(setting) for setting in main}
        controls: dict[tuple[Key, str], list[str]] = {}
        for row in self.verdicts:
            controls.setdefault((_key(row), row["verdict"]), []).append(row["control"])
        rows = tuple(
            (
                text,
                *(spread_text(self.values(setting, by)) for by in (ROUTE, RANDOM)),
                *(", ".join(controls.get((setting.key, verdict), [])) or "-" for verdict in (BEATS, LOSES)),
            )
            for setting, text in settings.items()
        )
        under = f" under {attack}" if attack else ""
        return Table((head, f"route{under}", RANDOM, "route beats", "route loses to"), rows)

    def _layers_text(self, setting: Setting) -> str:
        if len(setting.layers) == 1:
            return setting.layers[0]
        return f"{'all' if setting.layers == self.layers else 'first'} {len(setting.layers)} layers"

    def figures(self) -> dict[str, Figure]:
        """``transplant-shares`` (Fig. 3a) and ``transplant-layers`` (Fig. 3b), or one that bears the kind's name.

        With a route, also ``deactivate-route``.
        """
        from attackroute.analysis.figures.accuracy import accuracy_figures
        from attackroute.analysis.figures.route import route_figure

        picture = {} if self.route is None else {"deactivate-route": route_figure(self.route, self, self.title)}
        return {**accuracy_figures(self), **picture}


def spread_text(values: Sequence[float]) -> str:
    """Accuracies for a table: one value, or the mean and range of several draws; a dash for none."""
    if len(values) < 2:
        return f"{values[0]:.1%}" if values else "-"
    return f"{statistics.fmean(values):.1%} ({100 * min(values):.0f} to {100 * max(values):.0f})"


def _key(row: Record) -> Key:
    """The setting of a row."""
    return row["attack"], row["layers"], row["share"], row["beta"]
