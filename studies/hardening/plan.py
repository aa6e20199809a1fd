"""The plan of a hardening study: who is compared, with which lambda, on what; fixed before anything is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from attackroute.core.errors import UserError
from attackroute.core.statistics import Accuracy
from attackroute.core.table import plain
from attackroute.hardening.settings import GRADIENT, ON_ROUTE, PENALTIES, STABILISATION, TARGETS, WEIGHT, TrainSettings
from attackroute.paper.published import BASES, PAT, VANILLA
from attackroute.robustness.attack import Perturbation
from attackroute.robustness.registry import parse_attack
from attackroute.tracing.config import CARRIERS, NOISE, UNIT

RULE = (
    "of 0, the same fine-tuning without a penalty, and the lambdas with which clean accuracy on the validation images "
    "is at most {tolerance:.0%} below that, the one with the highest accuracy under {judges} there, the smaller one of "
    "equals. Where the largest lambda that was tried is chosen, {step:g} times as much is tried too, at most {more} "
    "times"
)
_STEP = 3.0

_LETTERS = {GRADIENT: "g", WEIGHT: "w", STABILISATION: "s"}


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        base: ``"Vanilla"`` or ``"PAT"``: what the network was trained with, and is fine-tuned with.
        tuned: Whether it is fine-tuned at all.
        penalty: ``"gradient"``, ``"weight"``, ``"stabilisation"``, or None for fine-tuning alone.
        target: Whose neurons are punished.
        carrier: What their route follows.
        every_image: Whether the route is traced from all training images, not from a tenth of them.
    """

    base: str
    tuned: bool = True
    penalty: str | None = None
    target: str = ON_ROUTE
    carrier: str = UNIT
    every_image: bool = False

    @property
    def name(self) -> str:
        """As the paper has it, with what is different from the paper: ``"PAT_g, random"``."""
        if not self.tuned:
            return self.base
        if self.penalty is None:
            return f"{self.base}, no penalty"
        route = [] if self.carrier == UNIT else ["noise route"]
        notes = route if self.target == ON_ROUTE else [self.target]
        notes += ["route of all images"] if self.every_image else []
        return ", ".join([f"{self.base}_{_LETTERS[self.penalty]}", *notes])


@dataclass(frozen=True)
class Trial:
    """One lambda that was tried.

    Attributes:
        lam: The factor; 0 without a penalty.
        clean: On clean validation images.
        attacked: On the same under the attack that judges.
    """

    lam: float
    clean: Accuracy
    attacked: Accuracy


@dataclass(frozen=True)
class StudyPlan:
    """Everything that is decided beforehand.

    Attributes:
        eps: Radius of all attacks, in training and after it.
        seeds: One network is trained, fine-tuned and judged for each.
        tuning_seed: The network on which lambda is chosen; none of the above.
        shares: Lambda is tried where it makes the penalty's gradient these shares of the task's, for the route's
            neurons; the same lambdas are tried for the controls. 0, no penalty, is on every list.
        more: Larger lambdas that the rule may ask for.
        penalties: Which are compared.
        carrier: What the routes follow that are judged; where it is not the paper's, that one is a control.
        tolerance: Clean accuracy that a lambda may cost.
        validation: Share of the training images that choose lambda; no network learns from them.
        training: Of the networks; ``seed`` is replaced.
        fine_tuning: Of the variants; ``seed`` is replaced.
        step: Step of the PGD that judges, as a share of eps.
        vanilla_judge: Name of the attack that chooses the lambdas of Vanilla; PGD may leave nothing to choose by.
        noise: Standard deviation of the Gaussian noise.
        every_image: Whether penalties on the route of all training images are judged too.
        autoattack_samples: Test images for AutoAttack; 0 leaves it out.
        check_samples: Test images on which the first seed's networks are checked for masked gradients; 0 for none.

    Raises:
        UserError: A number is out of range, or the tuning network is among those that are judged.
    """

    eps: float = 0.1
    seeds: Sequence[int] = (1, 2, 3)
    tuning_seed: int = 0
    shares: Sequence[float] = (0.03, 0.1, 0.3, 1.0, 3.0)
    more: int = 4
    penalties: Sequence[str] = PENALTIES
    carrier: str = UNIT
    tolerance: float = 0.02
    validation: float = 0.2
    training: TrainSettings = field(default_factory=lambda: TrainSettings(epochs=8, augment="crop"))
    fine_tuning: TrainSettings = field(default_factory=lambda: TrainSettings(epochs=2, lr=0.01, augment="crop"))
    step: float = 0.25
    vanilla_judge: str = "pgd"
    noise: float = 0.2
    every_image: bool = False
    autoattack_samples: int = 16
    check_samples: int = 96

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 1:
            raise UserError(f"eps {self.eps:g} is outside (0, 1]: give the radius of all attacks, such as 8/255")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("a study needs seeds, each once")
        if self.tuning_seed in self.seeds:
            raise UserError(f"seed {self.tuning_seed} chooses lambda, so it cannot be judged too; take other seeds")
        if not self.shares or not all(0 < share < float("inf") for share in self.shares):
            raise UserError("the shares to try must be numbers above 0")
        comparable = (*PENALTIES, STABILISATION)
        if not self.penalties or any(name not in comparable for name in self.penalties):
            raise UserError(
                f"penalties to compare are some of {', '.join(comparable)}, not {', '.join(self.penalties)}"
            )
        if self.carrier not in CARRIERS:
            raise UserError(f"carrier {self.carrier!r} is unknown; choose from {', '.join(CARRIERS)}")
        if not 0 < self.validation < 1:
            raise UserError(f"a share of {self.validation} of the training images cannot choose lambda; take 0.2")
        if not 0 <= self.tolerance <= 1:
            raise UserError(f"a tolerance of {self.tolerance} is outside [0, 1]; 0.02 allows two points")
        if self.autoattack_samples < 0 or self.check_samples < 0:
            raise UserError("numbers of images are at least 0")
        self.judge_of(VANILLA)

    @property
    def bases(self) -> tuple[str, ...]:
        """What is fine-tuned: noise, and its penalty, are there where an attack is trained against."""
        return (PAT,) if self.carrier == NOISE or STABILISATION in self.penalties else BASES

    @property
    def training_attack(self) -> str:
        """What PAT trains against."""
        return f"pgd:eps={self.eps},steps=3,step_size={self.eps / 2}"

    @property
    def judge(self) -> Perturbation:
        """The attack that the verdict is about: its ten steps reach all of the ball."""
        return parse_attack(f"pgd:eps={self.eps},steps=10,step_size={self.eps * self.step}")

    def judge_of(self, base: str) -> Perturbation:
        """The attack that chooses a base's lambdas.

        Raises:
            UserError: It is not among the attacks on the test images.
        """
        name = self.vanilla_judge if base == VANILLA else self.judge.name
        for attack in self.attacks:
            if attack.name == name:
                return attack
        raise UserError(f"{name!r} cannot choose lambdas; take {', '.join(attack.name for attack in self.attacks)}")

    @property
    def attacks(self) -> tuple[Perturbation, ...]:
        """What all test images are judged under."""
        paper = [parse_attack(name, eps=self.eps) for name in ("fgsm", "mi-fgsm")]
        return (*paper, self.judge, parse_attack(f"gaussian-noise:std={self.noise}"))

    @property
    def rule(self) -> str:
        """How lambda is chosen."""
        judges = str(self.judge)
        if any(self.judge_of(base) != self.judge for base in self.bases):
            judges = " and ".join(f"{self.judge_of(base)} ({base})" for base in self.bases)
        return RULE.format(tolerance=self.tolerance, judges=judges, step=_STEP, more=self.more)

    def choose(self, trials: Sequence[Trial], reference: Trial) -> Trial:
        """Apply the rule.

        Args:
            trials: By rising lambda.
            reference: Without a penalty, which may be chosen too.
        """
        least = reference.clean.value - self.tolerance
        allowed = [reference, *(trial for trial in trials if trial.clean.value >= least)]
        return max(allowed, key=lambda trial: (trial.attacked.value, -trial.lam))

    def larger(self, trials: Sequence[Trial], reference: Trial) -> float | None:
        """A further lambda to try, where the rule asks for one."""
        at_edge = self.choose(trials, reference) is trials[-1]
        return (
            float(f"{_STEP * trials[-1].lam:.2g}") if at_edge and len(trials) < len(self.shares) + self.more else None
        )

    def terms(self) -> dict[str, Any]:
        """All that must be the same for a study to go on; seeds may be added."""
        values: dict[str, Any] = asdict(self)
        del values["seeds"], values["training"]["seed"], values["fine_tuning"]["seed"]
        attacks = {"attacks": list(map(str, self.attacks)), "judge": str(self.judge)}
        attacks |= {"training_attack": self.training_attack, "vanilla_judge": str(self.judge_of(VANILLA))}
        return plain({**values, **attacks})  # type: ignore[no-any-return]


DIGITS = StudyPlan()
"""For small networks on digits, at a radius at which they can be hardened."""

PAPER = StudyPlan(
    eps=8 / 255,
    shares=(0.1, 0.3),
    more=1,
    validation=0.1,
    training=TrainSettings(epochs=10, augment="crop-flip", channels_last=True),
    fine_tuning=TrainSettings(epochs=1, lr=0.01, augment="crop-flip", channels_last=True),
    step=0.1,
    vanilla_judge="fgsm",
    noise=0.1,
    every_image=True,
    autoattack_samples=64,
    check_samples=128,
)
"""The settings of the paper's Tables 2 and 3 where it states them, with controls.

PGD and MI-FGSM take ten steps of eps / 10 (section 4.1). The paper states neither lambda nor the noise's spread, and
judges Vanilla under weaker attacks than PGD, which leaves it nothing.
"""


def punished(plan: StudyPlan) -> Iterator[Variant]:
    """The variants that have a lambda of their own to be chosen."""
    for base in plan.bases:
        for penalty in plan.penalties:
            yield _ours(plan, base, penalty)
            yield from _controls(plan, base, penalty)


def judged(plan: StudyPlan) -> Iterator[Variant]:
    """All variants, in the order of the tables."""
    for base in BASES:
        yield Variant(base, tuned=False)
        if base in plan.bases:
            yield Variant(base)
            for penalty in plan.penalties:
                yield _ours(plan, base, penalty)
                yield from _controls(plan, base, penalty)
                yield from _further(plan, base, penalty)


def compared(plan: StudyPlan) -> Iterator[tuple[Variant, Variant]]:
    """Pairs whose difference is looked at: a variant, and what it should beat."""
    for base in plan.bases:
        yield Variant(base), Variant(base, tuned=False)
        for penalty in plan.penalties:
            ours = _ours(plan, base, penalty)
            yield ours, Variant(base)
            for control in _controls(plan, base, penalty):
                yield ours, control
            for other in _further(plan, base, penalty):
                yield other, ours


def _ours(plan: StudyPlan, base: str, penalty: str) -> Variant:
    return Variant(base, True, penalty, carrier=plan.carrier)


def _controls(plan: StudyPlan, base: str, penalty: str) -> Iterator[Variant]:
    """The same penalty on other neurons."""
    if plan.carrier != UNIT:
        yield Variant(base, True, penalty)
    for target in TARGETS:
        if target != ON_ROUTE:
            yield Variant(base=base, tuned=True, penalty=penalty, target=target, carrier=plan.carrier)


def _further(plan: StudyPlan, base: str, penalty: str) -> Iterator[Variant]:
    """Variants that take the lambda of the one on the route: how much its computation matters."""
    if plan.every_image:
        yield replace(_ours(plan, base, penalty), every_image=True)
