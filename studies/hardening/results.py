"""What a hardening study found: accuracies over seeds, paired differences, and whether the route beats its controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attackroute.core.document import Document
from attackroute.core.statistics import Accuracy
from attackroute.core.table import Table
from attackroute.hardening.harden import RouteOverlap
from attackroute.robustness.masking import SUSPICIOUS, Check
from studies.hardening.plan import StudyPlan, Trial, Variant, compared
from studies.paired import PairedDifference


@dataclass(frozen=True)
class Tuning:
    """How one variant's lambda was chosen.

    Attributes:
        variant: Which.
        reference: The same fine-tuning without a penalty, lambda 0.
        trials: What was tried beside it.
        chosen: What the rule took; the reference where no penalty did better.
    """

    variant: Variant
    reference: Trial
    trials: tuple[Trial, ...]
    chosen: Trial

    def to_json(self) -> dict[str, Any]:
        """As plain values."""

        def plain(trial: Trial) -> dict[str, Any]:
            return {"lambda": trial.lam, "clean": trial.clean.value, "attacked": trial.attacked.value}

        return {
            "variant": self.variant.name,
            "samples": self.reference.clean.total,
            "without_penalty": plain(self.reference),
            "trials": [plain(trial) for trial in self.trials],
            "chosen": self.chosen.lam,
        }


@dataclass(frozen=True)
class Outcome:
    """One network on the test images.

    Attributes:
        variant: How it was trained.
        seed: From which seed.
        lam: The penalty's factor; None without one.
        right: For each attack, and ``"clean"``, whether each image was classified correctly.
        checks: For masked gradients, where they were made.
        overlap: How much of the route that of all images has too, where that was compared.
    """

    variant: Variant
    seed: int
    lam: float | None
    right: Mapping[str, tuple[bool, ...]]
    checks: tuple[Check, ...]
    overlap: RouteOverlap | None

    @property
    def label(self) -> dict[str, Any]:
        """Which network it is, as plain values."""
        return {"variant": self.variant.name, "seed": self.seed}

    def accuracy(self, attack: str) -> Accuracy:
        """Under one attack, or ``"clean"``."""
        return Accuracy(sum(self.right[attack]), len(self.right[attack]))


@dataclass(frozen=True)
class HardeningStudy:
    """A finished study.

    Attributes:
        plan: What was decided beforehand.
        tuning: How the lambdas were chosen.
        outcomes: Of every seed and variant.
        terms: On what all depends, as JSON values.
    """

    plan: StudyPlan
    tuning: tuple[Tuning, ...]
    outcomes: tuple[Outcome, ...]
    terms: Mapping[str, Any]

    @property
    def attacks(self) -> tuple[str, ...]:
        """By name, clean images first."""
        return tuple(self.outcomes[0].right)

    @property
    def judge(self) -> str:
        """Name of the attack that the verdicts are about."""
        return self.plan.judge.name

    def of(self, variant: Variant) -> tuple[Outcome, ...]:
        """The outcomes of a variant, by seed."""
        return tuple(outcome for outcome in self.outcomes if outcome.variant == variant)

    def accuracies(self, variant: Variant, attack: str) -> list[float]:
        """Of a variant under an attack, by seed."""
        return [outcome.accuracy(attack).value for outcome in self.of(variant)]

    def difference(self, first: Variant, second: Variant, attack: str) -> PairedDifference:
        """The first variant's accuracy less the second's."""
        return PairedDifference.of(
            *([outcome.right[attack] for outcome in self.of(variant)] for variant in (first, second))
        )

    def suspicious(self, variant: Variant) -> list[Check]:
        """Signs of masked gradients."""
        return [check for outcome in self.of(variant) for check in outcome.checks if check.verdict == SUSPICIOUS]

    def table(self) -> Table:
        """One row for each network and attack."""
        return Table.of(
            {
                "variant": outcome.variant.name,
                "base": outcome.variant.base,
                "penalty": outcome.variant.penalty,
                "target": outcome.variant.target if outcome.variant.penalty else None,
                "lambda": outcome.lam,
                "seed": outcome.seed,
                "attack": attack,
                "accuracy": accuracy.value,
                "accuracy_low": accuracy.interval[0],
                "accuracy_high": accuracy.interval[1],
                "correct": accuracy.correct,
                "samples": accuracy.total,
            }
            for outcome in self.outcomes
            for attack in self.attacks
            for accuracy in [outcome.accuracy(attack)]
        )

    def document(self) -> Document:
        """All of it: the plan, how the lambdas were chosen, accuracies, paired differences and checks."""
        settings = {**self.terms, "seeds": list(self.plan.seeds), "rule": self.plan.rule}
        about = {
            "tuning": [each.to_json() for each in self.tuning],
            "differences": [
                {
                    "first": first.name, "second": second.name, "attack": attack,
                    **self.difference(first, second, attack).to_json("over_seeds"),
                }
                for first, second in compared(self.plan)
                for attack in self.attacks
            ],
            "checks": [
                {**outcome.label, **check.to_json()} for outcome in self.outcomes for check in outcome.checks
            ],
            "overlap_with_full_route": [
                {**outcome.label, **outcome.overlap.to_json()}
                for outcome in self.outcomes
                if outcome.overlap is not None
            ],
        }  # fmt: skip
        return Document("hardening study", settings, f"{'; '.join(self.sentences())}.", self.table(), about)

    def sentences(self) -> list[str]:
        """What was found under the attack that judges, one sentence for each comparison."""
        sentences = []
        for first, second in compared(self.plan):
            difference = self.difference(first, second, self.judge)
            sentences.append(f"{first.name} {difference.verdict} {second.name} under {self.judge}: {difference} points")
        return sentences
