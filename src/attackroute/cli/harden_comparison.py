"""Before and after a hardening: accuracies, AutoAttack on a subset, signs of masking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from attackroute.cli.console import Output
from attackroute.core.errors import UserError
from attackroute.robustness.attack import Perturbation
from attackroute.robustness.evaluate import evaluate
from attackroute.robustness.evaluation_table import COLUMNS, Evaluation
from attackroute.robustness.registry import parse_attack
from attackroute.zoo.data import ImageBatches, ImageData

BEFORE, AFTER = "before", "after"
EVALUATION = "evaluation"
DEFAULT_ATTACKS = ("fgsm", "mi-fgsm", "pgd", "gaussian-noise")

_AUTOATTACK_SAMPLES = 50


@dataclass(frozen=True, eq=False)
class Comparison:
    """On what networks are compared.

    Attributes:
        images: What the attacks run on.
        attacks: All but AutoAttack.
        autoattack: AutoAttack; None leaves it out.
        autoattack_samples: On how many of the images it runs.
        checks: Images on which to look for masked gradients.
        seed: Of the evaluation.
        output: Where to talk.
    """

    images: ImageData
    attacks: Sequence[Perturbation]
    autoattack: Perturbation | None
    autoattack_samples: int
    checks: int
    seed: int
    output: Output

    def of(self, models: Mapping[str, nn.Module], folder: Path | None, *, resume: bool) -> Evaluation:
        """Compare networks; in a folder, what is done is kept for ``resume``."""
        twin = models.get(BEFORE)
        costly = [] if self.autoattack is None else [self.autoattack]
        with self.output.progress("images attacked") as progress:
            return evaluate(
                models, ImageBatches(self.images), [*self.attacks, *costly],
                samples={str(attack): self.autoattack_samples for attack in costly},
                checks=self.checks, twin=twin, seed=self.seed,
                folder=None if folder is None else folder / EVALUATION, resume=resume, progress=progress,
            )  # fmt: skip


def compared_by(
    names: Sequence[str], eps: float | None, against: Perturbation | None, seed: int
) -> tuple[Perturbation, ...]:
    """The attacks of the comparison; ``eps``, or the radius trained against, is for those that do not state theirs."""
    own = None if against is None else against.ball
    if eps is None and own is not None and own.norm == "linf":
        eps = own.eps
    attacks = []
    for text in names:
        attack = parse_attack(text, seed=seed)
        ball = attack.ball
        if eps is not None and ball is not None and ball.norm == "linf":  # a radius in another norm is another thing
            attack = parse_attack(text, eps=eps, seed=seed)
        attacks.append(attack)
    return tuple(attacks)


def autoattack_by(
    wanted: int | None,
    chosen: Sequence[str] | None,
    eps: float | None,
    against: Perturbation | None,
    seed: int,
    output: Output,
) -> tuple[int, Perturbation | None]:
    """On how many images AutoAttack runs, and how: on 50 beside the usual attacks, where it is installed.

    Args:
        wanted: As asked for.
        chosen: Attacks that were asked for in the place of the usual ones.
        eps: As for :func:`compared_by`, as are the next two.
        against: What the network is trained against.
        seed: Of its random numbers.
        output: Where to say that it is left out.

    Raises:
        UserError: It is asked for and not installed.
    """
    if wanted == 0 or (wanted is None and chosen):
        return 0, None
    try:
        (attack,) = compared_by(["autoattack"], eps, against, seed)
    except UserError as error:
        if wanted is not None:
            raise
        output.note(f"note: the comparison is without AutoAttack: {error}")
        return 0, None
    return wanted or _AUTOATTACK_SAMPLES, attack


def show(output: Output, evaluation: Evaluation) -> None:
    """Print the table, and what the checks say."""
    output.table(COLUMNS, [row.cells() for row in evaluation.rows])
    output.line(evaluation.reading())
