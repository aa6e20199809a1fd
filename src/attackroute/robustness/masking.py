"""Signs that gradients are masked: that attacks fail because they are misled, not because the model is robust.

The checks are those of Athalye, Carlini and Wagner (2018) and Carlini et al. (2019): a weaker attack must not beat a
stronger one, and an attack without a limit must reach everything. Every check compares attacks on the same images, so
that sampling error is that of paired counts. Each calls a model suspicious below a probability of 1 % alone; nothing is
corrected for the number of checks. A silent check is no proof of robustness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.robustness.contract import Perturbation
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


Remember = Callable[[str, Callable[[], list[int]]], list[int]]
"""``(name, compute) -> outcomes``: what was computed under that name before, or now."""


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
        return {
            "model": self.model,
            "check": self.name,
            "verdict": self.verdict,
            "samples": self.samples,
            "numbers": dict(self.numbers),
            "p": self.p,
            "sentence": self.sentence,
        }


@dataclass(frozen=True)
class _Paired:
    """A weaker attack beside a stronger one: it must not fool images that the stronger does not, beyond chance."""

    name: str
    weaker: str
    stronger: str
    labels: tuple[str, str]
    silent: str
    suspicious: str

    def judge(self, model: str, outcomes: Mapping[str, list[int]]) -> Check:
        weaker, stronger = outcomes[self.weaker], outcomes[self.stronger]
        pairs = list(zip(weaker, stronger, strict=True))
        wins, losses = pairs.count((0, 1)), pairs.count((1, 0))
        p = tail(wins, wins + losses, 0.5)
        numbers = {
            f"accuracy under {self.labels[0]}": sum(weaker) / len(weaker),
            f"accuracy under {self.labels[1]}": sum(stronger) / len(stronger),
            f"fooled by {self.labels[0]} alone": wins,
            f"fooled by {self.labels[1]} alone": losses,
        }
        verdict, sentence = (SUSPICIOUS, self.suspicious) if p < CLEAR else (SILENT, self.silent)
        return Check(model, self.name, verdict, len(weaker), numbers, p, sentence)


@dataclass(frozen=True)
class _Rare:
    """A count that must not be above a small share of the images, beyond chance."""

    name: str
    probe: str
    label: str
    share: float
    silent: str
    suspicious: str

    def judge(self, model: str, outcomes: Mapping[str, list[int]]) -> Check:
        shown = outcomes[self.probe]
        count = sum(shown)
        # a share of zero leaves nothing to chance: one image that shows the sign is enough
        p = tail(count, len(shown), self.share) if self.share else None
        suspicious = count > 0 if p is None else p < CLEAR
        numbers: dict[str, int | float] = {self.label: count, "share": count / len(shown)}
        verdict, sentence = (SUSPICIOUS, self.suspicious) if suspicious else (SILENT, self.silent)
        return Check(model, self.name, verdict, len(shown), numbers, p, sentence)


_CHECKS: tuple[_Paired | _Rare, ...] = (
    _Paired(
        "one step against many",
        "fgsm",
        "many steps",
        ("FGSM", f"PGD-{_MANY_STEPS}"),
        "Many steps fool what one step fools, as they should.",
        "One step fools images that many do not: the gradient leads iterative attacks astray, and PGD overstates "
        "robustness.",
    ),
    _Paired(
        "few steps against more",
        "few steps",
        "many steps",
        (f"PGD-{_FEW_STEPS}", f"PGD-{_MANY_STEPS}"),
        "More steps do not lose what fewer have found, as it should be.",
        "Accuracy rises with the number of steps: the attack does not converge on this loss surface, so its numbers "
        "are no bound.",
    ),
    _Rare(
        "no limit on the change",
        "unbounded",
        "right under PGD with eps 1",
        _NEAR_ZERO,
        "With any change allowed, nearly nothing withstands PGD, as it should be.",
        "With any change allowed, images withstand PGD: it fails, so its numbers at a smaller eps mean nothing.",
    ),
    _Paired(
        "black box against white box",
        "square",
        "many steps",
        (f"Square-{_QUERIES}", f"PGD-{_MANY_STEPS}"),
        "An attack without gradients finds no more than PGD does, as it should be.",
        "An attack that never asks for a gradient fools images that PGD does not: the gradient hides the way.",
    ),
    _Paired(
        "transfer from a twin",
        "transfer",
        "many steps",
        ("PGD on the twin", f"PGD-{_MANY_STEPS}"),
        "Images made for the undefended twin fool no more than those made for the model, as it should be.",
        "Images made for an undefended twin fool the model where its own gradient does not: the defence hides its "
        "gradient.",
    ),
    _Rare(
        "vanishing loss gradient",
        "no loss gradient",
        "images whose cross entropy has a gradient of exactly zero",
        _RARE,
        "The cross entropy has a gradient at the images.",
        "The cross entropy's gradient is exactly zero, as with overlarge logits: attacks that follow it do nothing "
        "(those made here do not depend on its size).",
    ),
    _Rare(
        "vanishing gradient of the logits",
        "no gradient",
        "images at which the logits have a gradient of exactly zero",
        _RARE,
        "The logits have a gradient at the images.",
        "The logits do not change with the image in any direction, as behind a quantiser: every gradient attack is "
        "blind; trust attacks without gradients alone.",
    ),
    _Rare(
        "random answers",
        "random",
        "images whose logits differ when they are asked for twice",
        0.0,
        "The same image gets the same logits twice.",
        "The same image gets other logits each time: one gradient is one draw, so attack the average over draws (EOT).",
    ),
)


def check_masking(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    name: str = "model",
    seed: int = 0,
    batch_size: int = 128,
    twin: nn.Module | None = None,
    remember: Remember | None = None,
) -> tuple[Check, ...]:
    """Look for masked gradients on a set of images.

    Args:
        model: Maps images in [0, 1] to logits; comes back as it was.
        images: ``(N, ...)`` on the model's device and in its dtype, N at least 1.
        labels: ``(N,)``.
        eps: Radius of the L-infinity ball in which attacks are compared.
        name: The model's name in the result.
        seed: Of the attacks' random numbers.
        batch_size: Images at a time.
        twin: A network of the same task that was not defended, for the transfer check.
        remember: Gives back what was computed before under a name; None computes everything.

    Returns:
        One check for each sign, in a fixed order; a check that cannot be made is skipped and says why.

    Raises:
        UserError: There is no image, or the model does not return logits.
    """
    if not len(images):
        raise UserError("the masking checks need at least one image")
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
    remember = remember or (lambda _, compute: compute())

    def outcomes(probe: Probe) -> list[int]:
        parts = [probe(model, *batch) for batch in zip(images.split(batch_size), labels.split(batch_size), strict=True)]
        return torch.cat(parts).int().tolist()  # type: ignore[no-any-return]

    found = {title: remember(title, lambda probe=probe: outcomes(probe)) for title, probe in probes.items()}  # type: ignore[misc]
    return tuple(_judged(check, name, found, skipped) for check in _CHECKS)


def tail(count: int, trials: int, share: float) -> float:
    """Probability of at least ``count`` in ``trials``, each with probability ``share``."""
    from scipy.stats import binom

    return float(binom.sf(count - 1, trials, share))


def _judged(check: _Paired | _Rare, model: str, found: Mapping[str, list[int]], skipped: Mapping[str, str]) -> Check:
    reason = skipped.get(check.weaker) if isinstance(check, _Paired) else None
    if reason is not None:
        return Check(model, check.name, SKIPPED, 0, {}, None, reason)
    return check.judge(model, found)


def _right_after(attack: Perturbation, made_for: nn.Module | None = None) -> Probe:
    """Which images the model gets right after an attack on it, or on another model."""

    def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if made_for is None:
            attacked = attack(model, x, y)
        else:
            home = next((p for p in made_for.parameters() if p.is_floating_point()), x)
            attacked = attack(made_for, x.to(home.device, home.dtype), y.to(home.device)).to(x)
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
