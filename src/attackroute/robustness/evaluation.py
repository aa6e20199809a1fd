"""The result of an evaluation: one row for each model and attack, what they have in common, and the checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attackroute.core.document import Document
from attackroute.core.errors import UserError, did_you_mean
from attackroute.core.statistics import Accuracy
from attackroute.core.table import Shown, Table, aligned, plural
from attackroute.robustness.attack import Perturbation
from attackroute.robustness.masking import SUSPICIOUS, Check

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLEAN = "clean"
EVALUATION = "evaluation"
COLUMNS = ("model", "attack", "accuracy", "95 % interval", "samples", "seconds")


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """Accuracies of one or several models.

    Attributes:
        table: One row for each model and attack, by model, clean images first: ``accuracy`` with the ends of its
            interval, counts, each parameter of any attack, and what attack and classification took in seconds, those
            before an interruption included.
        checks: Signs of masked gradients, by model; none where they were not asked for.
        settings: On what all the rows depend, and versions of the libraries, as plain values.
        right: By model and attack, whether the model is right on each image, in the data's order, for paired
            comparisons.
    """

    table: Table
    checks: tuple[Check, ...]
    settings: Mapping[str, Any]
    right: Mapping[tuple[str, str], tuple[bool, ...]]

    @classmethod
    def of(
        cls,
        right: Mapping[tuple[str, str], tuple[bool, ...]],
        seconds: Mapping[tuple[str, str], float],
        attacks: Sequence[Perturbation],
        checks: tuple[Check, ...],
        *,
        settings: Mapping[str, Any],
    ) -> Evaluation:
        """An evaluation from what was measured, by model and attack, and the attacks that were run."""
        parameters = {CLEAN: {}, **{str(attack): attack.to_json() for attack in attacks}}
        names = dict.fromkeys(name for values in parameters.values() for name in values if name != "name")
        rows = []
        for (model, attack), answers in right.items():
            accuracy = Accuracy(sum(answers), len(answers))
            low, high = accuracy.interval
            rows.append(
                {
                    "model": model,
                    "attack": attack,
                    "accuracy": accuracy.value,
                    "accuracy_low": low,
                    "accuracy_high": high,
                    "correct": accuracy.correct,
                    "samples": accuracy.total,
                    **{name: parameters[attack].get(name) for name in names},
                    "seconds": round(seconds[model, attack], 3),
                }
            )
        return cls(Table.of(rows), checks, settings, right)

    def accuracy(self, attack: str, model: str | None = None) -> Accuracy:
        """The accuracy in one row; there must be exactly one.

        Args:
            attack: As the row has it, or its name alone where no other row of the model has it, such as ``"pgd"``.
            model: Its name; None where there is only one.
        """
        models = self.table.distinct("model")
        if model is None and len(models) > 1:
            raise UserError(f"there are several models; name one of {', '.join(models)}")
        rows = {row["attack"]: row for row in self.table if model is None or row["model"] == model}
        named = [attack] if attack in rows else [title for title in rows if title.partition(":")[0] == attack]
        if len(named) != 1:
            what = "several rows" if named else "no row"
            raise UserError(f"{what} for {attack!r}{did_you_mean(attack, rows)}; there are {', '.join(rows)}")
        return Accuracy(rows[named[0]]["correct"], rows[named[0]]["samples"])

    def suspicious(self, model: str | None = None) -> tuple[Check, ...]:
        """The checks that are suspicious, of one model or of all."""
        return tuple(item for item in self.checks if item.verdict == SUSPICIOUS and model in (None, item.model))

    def cells(self) -> list[list[str]]:
        """The rows as text, for :data:`COLUMNS`."""
        return [
            [
                row["model"],
                row["attack"],
                f"{row['accuracy']:.2%}",
                f"{row['accuracy_low']:.1%} to {row['accuracy_high']:.1%}",
                str(row["samples"]),
                f"{row['seconds']:.1f}",
            ]
            for row in self.table
        ]

    def __str__(self) -> str:
        return f"{aligned(COLUMNS, self.cells(), words=2)}\n{self.reading()}"

    __repr__ = __str__

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each model's accuracy under each attack, with its interval."""
        axes, models, attacks = self._axes(ax), self.table.distinct("model"), self.table.distinct("attack")
        for index, model in enumerate(models):
            rows = list(self.table.select(model=model))
            places = [attacks.index(row["attack"]) + 0.8 * (index + 0.5) / len(models) - 0.4 for row in rows]
            ends = [[abs(row["accuracy"] - row[f"accuracy_{end}"]) for row in rows] for end in ("low", "high")]
            axes.bar(places, [row["accuracy"] for row in rows], 0.75 / len(models), yerr=ends, capsize=2, label=model)
        axes.set_xticks(range(len(attacks)), attacks, rotation=20, ha="right")
        axes.set_ylim(0, 1)
        axes.set_ylabel("accuracy, with its 95 % interval")
        axes.legend(frameon=False)
        return axes

    def to_frame(self) -> Any:
        """The table as a ``pandas.DataFrame``."""
        return self.table.to_frame()

    def document(self) -> Document:
        """The result as ``evaluation.json`` and ``evaluation.csv`` hold it."""
        about = {"interval": "95 % Wilson score interval", "checks": [check.to_json() for check in self.checks]}
        return Document(EVALUATION, self.settings, self.reading(), self.table, about=about)

    def reading(self) -> str:
        """One sentence: what is left of each model, and whether it can be trusted."""
        sentences = []
        for model in self.table.distinct("model"):
            clean, *attacked = self.table.select(model=model)
            worst = min(attacked, key=lambda row: row["accuracy"], default=None)
            left = "" if worst is None else f" and on {worst['accuracy']:.1%} under {worst['attack']}"
            right = f"{model} is right on {clean['accuracy']:.1%} of {plural(clean['samples'], 'clean image')}"
            sentences.append(f"{right}{left}{self._trust(model)}")
        return "; ".join(sentences) + "."

    def _trust(self, model: str) -> str:
        if not any(check.model == model for check in self.checks):
            return " (no check for masked gradients)"
        if names := ", ".join(check.name for check in self.suspicious(model)):
            return f" (not to be trusted; signs of masked gradients: {names})"
        return " (no sign of masked gradients)"
