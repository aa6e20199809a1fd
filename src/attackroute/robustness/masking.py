"""Signs that gradients are masked: that attacks fail because they are misled, not because the model is robust.

The checks are those of Athalye, Carlini and Wagner (2018) and Carlini et al. (2019): a weaker attack must not beat a
stronger one, and an attack without a limit must reach everything. Every check compares attacks on the same images, so
that sampling error is that of paired counts. Each calls a model suspicious below a probability of 1 % alone; nothing is
corrected for the number of checks. A silent check is no proof of robustness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.random import image_keys
from attackroute.robustness.attack import Perturbation
from attackroute.robustness.gradient_attacks import FGSM, PGD, attacking, input_gradient, predicted
from attackroute.robustness.registry import parse_attack

SILENT, SUSPICIOUS, SKIPPED = "silent", "suspicious", "skipped"
CLEAR = 0.01
"""Below this probability a check is suspicious."""

_FEW_STEPS, _MANY_STEPS = 10, 50
_QUERIES = 500
_NEAR_ZERO = 0.05  # accuracy that may be left without a limit on the change
_RARE = 0.01  # share of images that may have a gradient of zero
_REPEATS = 1e-3  # of the largest logit: far above rounding, far below what a draw changes

Probe = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``(model, images, labels) -> bool (N,)``: whether the model is right, or whether the image shows the sign."""


Candidates = tuple[Tensor, Tensor, Tensor]
"""Hash numbers, images and labels, by hash number."""


@dataclass(frozen=True)
class Check:
    """What one check of one model found.

    Attributes:
        model: Name of the model.
        name: What is checked.
        verdict: ``"silent"``, ``"suspicious"`` or ``"skipped"``.
        samples: Images that it was made on.
        numbers: What was counted, by name.
        p: Probability of counts as suspicious as these if nothing were masked; None where nothing is left to chance.
        sentence: What that suggests.
    """

    model: str
    name: str
    verdict: str
    samples: int
    numbers: Mapping[str, int | float]
    p: float | None
    sentence: str

    def to_json(self) -> dict[str, Any]:
        """The check as plain values."""
        names = {"name": "check"}
        return {names.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class _Sign:
    """A sign of masked gradients, and how it is told from chance.

    Where there is a stronger attack, the probe's own must not fool images that the stronger one does not, beyond
    chance. Else the probe must not find more than a small share of the images, beyond chance; a share of zero leaves
    nothing to chance, so that one image is enough.
    """

    name: str
    probe: str
    labels: tuple[str, ...]
    silent: str
    suspicious: str
    stronger: str | None = None
    share: float = 0.0

    def judge(self, model: str, outcomes: Mapping[str, list[int]]) -> Check:
        counts, p, suspicious = self._rare(outcomes) if self.stronger is None else self._paired(outcomes)
        return Check(
            model,
            self.name,
            SUSPICIOUS if suspicious else SILENT,
            samples=len(outcomes[self.probe]),
            numbers=counts,
            p=p,
            sentence=self.suspicious if suspicious else self.silent,
        )

    def _paired(self, outcomes: Mapping[str, list[int]]) -> tuple[dict[str, int | float], float | None, bool]:
        weaker, stronger = outcomes[self.probe], outcomes[str(self.stronger)]
        pairs = list(zip(weaker, stronger, strict=True))
        wins, losses = pairs.count((0, 1)), pairs.count((1, 0))
        p = tail(wins, wins + losses, 0.5)
        counts = {
            f"accuracy under {self.labels[0]}": sum(weaker) / len(weaker),
            f"accuracy under {self.labels[1]}": sum(stronger) / len(stronger),
            f"fooled by {self.labels[0]} alone": wins,
            f"fooled by {self.labels[1]} alone": losses,
        }
        return counts, p, p < CLEAR

    def _rare(self, outcomes: Mapping[str, list[int]]) -> tuple[dict[str, int | float], float | None, bool]:
        flags = outcomes[self.probe]
        count = sum(flags)
        p = tail(count, len(flags), self.share) if self.share else None
        return {self.labels[0]: count, "share": count / len(flags)}, p, count > 0 if p is None else p < CLEAR


_SIGNS: tuple[_Sign, ...] = (
    _Sign(
        name="one step against many",
        probe="fgsm",
        stronger="many steps",
        labels=("FGSM", f"PGD-{_MANY_STEPS}"),
        silent="Many steps fool what one step fools, as they should.",
        suspicious=(
            "One step fools images that many do not: the gradient leads iterative attacks astray, and PGD overstates "
            "robustness."
        ),
    ),
    _Sign(
        name="few steps against more",
        probe="few steps",
        stronger="many steps",
        labels=(f"PGD-{_FEW_STEPS}", f"PGD-{_MANY_STEPS}"),
        silent="More steps do not lose what fewer have found, as it should be.",
        suspicious=(
            "Accuracy rises with the number of steps: the attack does not converge on this loss surface, so its "
            "numbers are no bound."
        ),
    ),
    _Sign(
        name="no limit on the change",
        probe="unbounded",
        labels=("right under PGD with eps 1",),
        share=_NEAR_ZERO,
        silent="With any change allowed, nearly nothing withstands PGD, as it should be.",
        suspicious=(
            "With any change allowed, images withstand PGD: it fails, so its numbers at a smaller eps mean nothing."
        ),
    ),
    _Sign(
        name="black box against white box",
        probe="square",
        stronger="many steps",
        labels=(f"Square-{_QUERIES}", f"PGD-{_MANY_STEPS}"),
        silent="An attack without gradients finds no more than PGD does, as it should be.",
        suspicious=(
            "An attack that never asks for a gradient fools images that PGD does not: the gradient hides the way."
        ),
    ),
    _Sign(
        name="transfer from a twin",
        probe="transfer",
        stronger="many steps",
        labels=("PGD on the twin", f"PGD-{_MANY_STEPS}"),
        silent="Images made for the undefended twin fool no more than those made for the model, as it should be.",
        suspicious=(
            "Images made for an undefended twin fool the model where its own gradient does not: the defence hides its"
            " gradient."
        ),
    ),
    _Sign(
        name="vanishing loss gradient",
        probe="no loss gradient",
        labels=("images whose cross entropy has a gradient of exactly zero",),
        share=_RARE,
        silent="The cross entropy has a gradient at the images.",
        suspicious=(
            "The cross entropy's gradient is exactly zero, as with overlarge logits: attacks that follow it do "
            "nothing (those made here do not depend on its size)."
        ),
    ),
    _Sign(
        name="vanishing gradient of the logits",
        probe="no gradient",
        labels=("images at which the logits have a gradient of exactly zero",),
        share=_RARE,
        silent="The logits have a gradient at the images.",
        suspicious=(
            "The logits do not change with the image in any direction, as behind a quantiser: every gradient attack "
            "is blind; trust attacks without gradients alone."
        ),
    ),
    _Sign(
        name="random answers",
        probe="random",
        labels=("images whose logits differ when they are asked for twice",),
        share=0.0,
        silent="The same image gets the same logits twice.",
        suspicious=(
            "The same image gets other logits each time: one gradient is one draw, so attack the average over draws "
            "(EOT)."
        ),
    ),
)


@dataclass(frozen=True)
class MaskingProbes:
    """What the checks count on each image.

    Attributes:
        probes: By title; see :data:`Probe`.
        skipped: Why a probe cannot be made, by title.
    """

    probes: Mapping[str, Probe]
    skipped: Mapping[str, str]

    @classmethod
    def of(cls, eps: float, seed: int, twin: nn.Module | None) -> MaskingProbes:
        """The probes in an L-infinity ball.

        Args:
            eps: Radius of the ball in which attacks are compared.
            seed: Of the attacks' random numbers.
            twin: A network of the same task that was not defended, for the transfer check.
        """
        probes: dict[str, Probe] = {
            "few steps": _right_after(PGD(eps, _FEW_STEPS, seed=seed)),
            "fgsm": _right_after(FGSM(eps)),
            "many steps": _right_after(PGD(eps, _MANY_STEPS, seed=seed)),
            # from the image itself, since a random start within [0, 1] would be another image already
            "unbounded": _right_after(PGD(1.0, _MANY_STEPS, random_start=False)),
            "no loss gradient": _no_loss_gradient,
            "no gradient": _no_gradient,
            "random": _random,
        }
        skipped: dict[str, str] = {}
        try:
            probes["square"] = _right_after(parse_attack(f"square:queries={_QUERIES}", eps=eps, seed=seed))
        except UserError as error:
            skipped["square"] = f"Skipped, since {error}."
        if twin is None:
            skipped["transfer"] = "Skipped, since no undefended twin was given."
        else:
            probes["transfer"] = _right_after(PGD(eps, _MANY_STEPS, seed=seed), made_for=twin)
        return cls(probes, skipped)

    def run(self, title: str, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> list[int]:
        """What a probe finds on each image, 0 or 1.

        Args:
            title: The probe's.
            model: Maps images in [0, 1] to logits; comes back as it was.
            images: ``(N, ...)`` on the model's device and in its dtype, N at least 1.
            labels: ``(N,)``.
            batch_size: Images at a time.

        Raises:
            UserError: There is no image, or the model does not return logits.
        """
        if not len(images):
            raise UserError("the masking checks need at least one image")
        probe = self.probes[title]
        batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
        outcomes: list[int] = torch.cat([probe(model, x, y) for x, y in batches]).int().tolist()
        return outcomes

    def judge(self, model: str, outcomes: Mapping[str, list[int]]) -> tuple[Check, ...]:
        """One check for each sign, in a fixed order, from what every probe found on the same images.

        A check that cannot be made is skipped and says why.

        Args:
            model: The model's name in the result.
            outcomes: What :meth:`run` gave, by title.
        """
        return tuple(
            Check(model, sign.name, SKIPPED, samples=0, numbers={}, p=None, sentence=self.skipped[sign.probe])
            if sign.probe in self.skipped
            else sign.judge(model, outcomes)
            for sign in _SIGNS
        )


def tail(count: int, trials: int, share: float) -> float:
    """Probability of at least ``count`` in ``trials``, each with probability ``share``."""
    from scipy.stats import binom

    return float(binom.sf(count - 1, trials, share))


def _right_after(attack: Perturbation, made_for: nn.Module | None = None) -> Probe:
    """Which images the model gets right after an attack on it, or on another model."""

    def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if made_for is None:
            attacked = attack(model, x, y)
        else:
            reference = next((p for p in made_for.parameters() if p.is_floating_point()), x)
            attacked = attack(made_for, x.to(reference.device, reference.dtype), y.to(reference.device)).to(x)
        with attacking(model, attacked, y) as (images, labels):
            return predicted(model, images) == labels

    return right


def _no_loss_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Images at which the plain cross entropy's gradient is exactly zero, in the model's own number format."""
    with attacking(model, x, y) as (images, labels):
        leaf = images.requires_grad_()
        with torch.enable_grad():
            logits = checked_logits(model(leaf.clone()), len(leaf))
            loss = nn.functional.cross_entropy(
                logits, checked_labels(labels, logits.shape[1], len(leaf)), reduction="sum"
            )
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        return _all_zero(torch.zeros_like(x) if gradient is None else gradient)


def _no_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Images at which even the direction of the loss's gradient is zero, which large logits cannot do."""
    with attacking(model, x, y) as (images, labels):
        return _all_zero(input_gradient(model, images, labels))


def _random(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Images whose logits differ between two passes by more than rounding."""
    with attacking(model, x, y) as (images, _):
        first, second = (checked_logits(model(images.clone()), len(images)).double() for _ in range(2))
        return (first - second).abs().amax(1) > _REPEATS * first.abs().amax(1)


def _all_zero(gradient: Tensor) -> Tensor:
    return (gradient == 0).flatten(1).all(1)


class SampleChoice:
    """The samples whose images have the smallest hash numbers, at most ``count``; they alone are held.

    Args:
        count: How many to choose.
        seed: Another seed, another choice.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._chosen: Candidates | None = None

    def candidates(self, images: Tensor, labels: Tensor) -> Candidates | None:
        """What of a batch ``(N, ...)``, ``(N,)`` can still be chosen, on the CPU."""
        if not self._count:
            return None
        keys = image_keys(images, self._seed, "sample choice").cpu()
        rows = keys.argsort(stable=True)[: self._count]
        if self._chosen is not None and len(self) == self._count:
            rows = rows[keys[rows] < self._chosen[0][-1]]
        return (keys[rows], images.cpu()[rows], labels.cpu()[rows]) if len(rows) else None

    def __len__(self) -> int:
        return 0 if self._chosen is None else len(self._chosen[0])

    def take(self, new: Candidates | None) -> None:
        """Let the candidates of the next batch take part."""
        if new is None:
            return
        if self._chosen is not None:
            keys, images, labels = (torch.cat(pair) for pair in zip(self._chosen, new, strict=True))
            new = keys, images, labels
        order = new[0].argsort(stable=True)[: self._count]
        self._chosen = new[0][order], new[1][order], new[2][order]

    def samples(self) -> tuple[Tensor, Tensor]:
        """The chosen images and labels on the CPU, by hash number."""
        assert self._chosen is not None
        return self._chosen[1], self._chosen[2]
