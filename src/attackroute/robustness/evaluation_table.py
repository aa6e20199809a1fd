"""The result of an evaluation: one row for each model and attack, what they have in common, and the checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from attackroute.analysis.tables import Record, to_json
from attackroute.core.accuracy import Accuracy
from attackroute.core.errors import UserError, did_you_mean
from attackroute.core.table import aligned, plural
from attackroute.robustness.masking import SUSPICIOUS, Check

EVALUATION = "evaluation"


COLUMNS = ("model", "attack", "accuracy", "95 % interval", "samples", "seconds")


_LIBRARIES = (
    *("attackroute", "torch", "torchvision", "numpy", "scipy", "safetensors"),
    *("pyautoattack", "imagecorruptions-imaug"),
)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        model: Name of the model.
        attack: Specification of the attack, or ``"clean"``.
        label: The same without what is the attack's own default.
        accuracy: On all samples, with its interval.
        settings: Name and parameters of the attack as plain values; empty for clean images.
        seconds: What attack and classification took, those before an interruption included. A corruption's images are
            made once, in the time of the first model.
        right: Whether the model is right on each image, in the data's order, for paired comparisons.
    """

    model: str
    attack: str
    label: str
    accuracy: Accuracy
    settings: Mapping[str, Any]
    seconds: float
    right: tuple[bool, ...] = ()

    def cells(self) -> list[str]:
        """The row as text, for :data:`COLUMNS`."""
        low, high = self.accuracy.interval
        return [
            self.model,
            self.label,
            f"{self.accuracy.value:.2%}",
            f"{low:.1%} to {high:.1%}",
            str(self.accuracy.total),
            f"{self.seconds:.1f}",
        ]


@dataclass(frozen=True)
class Evaluation:
    """Accuracies of one or several models.

    Attributes:
        rows: By model, then by attack, clean images first.
        checks: Signs of masked gradients, by model; none where they were not asked for.
        settings: On what all the rows depend, and versions of the libraries, as plain values.
    """

    rows: tuple[Row, ...]
    checks: tuple[Check, ...]
    settings: Mapping[str, Any]

    def accuracy(self, attack: str, model: str | None = None) -> Accuracy:
        """The accuracy in one row.

        Args:
            attack: As the row has it, or its name alone where no other row of the model has it, such as ``"pgd"``.
            model: Its name; None where there is only one.

        Raises:
            UserError: There is no such row, or more than one.
        """
        models = dict.fromkeys(row.model for row in self.rows)
        if model is None and len(models) > 1:
            raise UserError(f"there are several models; name one of {', '.join(models)}")
        own = {row.attack: row for row in self.rows if model is None or row.model == model}
        found = (
            [own[attack]] if attack in own else [row for title, row in own.items() if title.partition(":")[0] == attack]
        )
        if len(found) != 1:
            what = "several rows" if found else "no row"
            raise UserError(f"{what} for {attack!r}{did_you_mean(attack, own)}; there are {', '.join(own)}")
        return found[0].accuracy

    def suspicious(self, model: str | None = None) -> tuple[Check, ...]:
        """The checks that are suspicious, of one model or of all."""
        return tuple(item for item in self.checks if item.verdict == SUSPICIOUS and model in (None, item.model))

    def table(self) -> str:
        """The rows as aligned text."""
        return aligned(COLUMNS, [row.cells() for row in self.rows], words=2)

    def __str__(self) -> str:
        return f"{self.table()}\n{self.reading()}"

    def records(self) -> list[Record]:
        """The rows as a tidy table: each parameter of any attack is a column."""
        parameters = dict.fromkeys(name for row in self.rows for name in row.settings if name != "name")
        return [
            {
                "model": row.model,
                "attack": row.attack,
                "accuracy": row.accuracy.value,
                "accuracy_low": row.accuracy.interval[0],
                "accuracy_high": row.accuracy.interval[1],
                "correct": row.accuracy.correct,
                "samples": row.accuracy.total,
                **{name: row.settings.get(name) for name in parameters},
                "seconds": round(row.seconds, 3),
            }
            for row in self.rows
        ]

    def about(self) -> dict[str, Any]:
        """What all rows have in common, and the checks."""
        return {
            **self.settings,
            "interval": "95 % Wilson score interval",
            "checks": [check.to_json() for check in self.checks],
        }

    def reading(self) -> str:
        """One sentence: what is left of each model, and whether it can be trusted."""
        parts = []
        for model in dict.fromkeys(row.model for row in self.rows):
            own = [row for row in self.rows if row.model == model]
            clean = own[0].accuracy
            worst = min(own[1:], key=lambda row: row.accuracy.value, default=None)
            attacked = "" if worst is None else f" and on {worst.accuracy.value:.1%} under {worst.label}"
            right = f"{model} is right on {clean.value:.1%} of {plural(clean.total, 'clean image')}"
            parts.append(f"{right}{attacked}{self._trust(model)}")
        return "; ".join(parts) + "."

    def _trust(self, model: str) -> str:
        made = [item for item in self.checks if item.model == model]
        if not made:
            return " (no check for masked gradients)"
        names = ", ".join(item.name for item in self.suspicious(model))
        return (
            f" (not to be trusted; signs of masked gradients: {names})" if names else " (no sign of masked gradients)"
        )

    def to_json(self) -> dict[str, Any]:
        """The whole result as plain values."""
        return to_json(self)


def library_versions() -> dict[str, str]:
    """Versions of those libraries on which results depend, as far as they are installed."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**versions, "torch": torch.__version__}  # with the accelerator that it was built for
