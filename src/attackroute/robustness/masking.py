"""Signs that gradients are masked: that attacks fail because they are misled, not because the model is robust.

The checks are those of Athalye, Carlini and Wagner (2018) and Carlini et al. (2019): a weaker attack must not beat a
stronger one, and an attack without a limit must reach everything. Every check compares attacks on the same images, so
that sampling error is that of paired counts. Each calls a model suspicious below a probability of 1 % alone; nothing is
corrected for the number of checks. A silent check is no proof of robustness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.random import image_keys
from attackroute.robustness.attack import Perturbation
from attackroute.robustness.gradient_attacks import FGSM, PGD, attacking, input_gradient, predicted
from attackroute.robustness.registry import parse_attack

SILENT, SUSPICIOUS, SKIPPED = "silent", "suspicious", "skipped"

_CLEAR = 0.01  # below this probability a check is suspicious
_STEPS = 50
_QUERIES = 500
_RARE = 0.01  # share of images that may have a gradient of zero

Probe = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``(model, images, labels) -> bool (N,)``: whether the model is right, or whether the gradient is zero."""


@dataclass(frozen=True)
class Check:
    """What one check of one model found."""

    model: str
    name: str
    verdict: str  # "silent", "suspicious" or "skipped"
    samples: int  # images that it was made on
    numbers: Mapping[str, int | float]  # what was counted, by name
    p: float | None  # probability of such counts, or worse, if nothing were masked; None where it is skipped
    sentence: str  # what that suggests

    def to_json(self) -> dict[str, Any]:
        """The check as plain values."""
        return {"check" if name == "name" else name: value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Sign:
    """A sign of masked gradients, and how it is told from chance.

    Without a share, the probe is a weaker attack than PGD of many steps, and must not fool images that this one does
    not, beyond chance. Else the probe must not find more than that share of the images, beyond chance.
    """

    name: str
    probe: str
    label: str
    suspicious: str
    share: float | None = None

    def judge(self, model: str, outcomes: Mapping[str, list[int] | str]) -> Check:
        """The check, from what each probe found on the same images, or from the sentence why it is skipped."""
        flags, stronger = outcomes[self.probe], outcomes["many steps"]
        if isinstance(flags, str) or isinstance(stronger, str):
            return Check(model, self.name, SKIPPED, samples=0, numbers={}, p=None, sentence=str(flags))
        numbers: dict[str, int | float]
        if self.share is None:
            pairs = list(zip(flags, stronger, strict=True))
            wins, losses = pairs.count((0, 1)), pairs.count((1, 0))
            p = tail(wins, wins + losses, 0.5)
            numbers = {
                f"accuracy under {self.label}": sum(flags) / len(flags),
                f"accuracy under PGD-{_STEPS}": sum(stronger) / len(stronger),
                f"fooled by {self.label} alone": wins,
                f"fooled by PGD-{_STEPS} alone": losses,
            }
        else:
            p = tail(sum(flags), len(flags), self.share)
            numbers = {self.label: sum(flags), "share": sum(flags) / len(flags)}
        verdict, sentence = (SUSPICIOUS, self.suspicious) if p < _CLEAR else (SILENT, "As it should be.")
        return Check(model, self.name, verdict, samples=len(flags), numbers=numbers, p=p, sentence=sentence)


SIGNS = (
    Sign(
        name="one step against many",
        probe="fgsm",
        label="FGSM",
        suspicious="One step fools images that many do not: the gradient misleads PGD, which overstates robustness.",
    ),
    Sign(
        name="no limit on the change",
        probe="unbounded",
        label="right under PGD with eps 1",
        share=0.05,
        suspicious="With any change allowed, images withstand PGD: its numbers at a smaller eps mean nothing.",
    ),
    Sign(
        name="black box against white box",
        probe="square",
        label=f"Square-{_QUERIES}",
        suspicious="An attack that asks for no gradient fools images that PGD does not: the gradient hides the way.",
    ),
    Sign(
        name="vanishing loss gradient",
        probe="no loss gradient",
        label="images whose cross entropy has a gradient of exactly zero",
        share=_RARE,
        suspicious="As with overlarge logits, attacks by the loss are blind (those made here do not need its size).",
    ),
    Sign(
        name="vanishing gradient of the logits",
        probe="no gradient",
        label="images at which the logits have a gradient of exactly zero",
        share=_RARE,
        suspicious="As behind a quantiser, every gradient attack is blind: trust attacks without gradients alone.",
    ),
)


def masking_probes(eps: float, seed: int) -> dict[str, Probe | str]:
    """What is counted on each image, by title; for what cannot be counted, a sentence that says why.

    Attacks are compared in the L-infinity ball of radius ``eps``.
    """
    probes: dict[str, Probe | str] = {
        "fgsm": _right_after(FGSM(eps)),
        "many steps": _right_after(PGD(eps, _STEPS, seed=seed)),
        # from the image itself, since a random start within [0, 1] would be another image already
        "unbounded": _right_after(PGD(1.0, _STEPS, random_start=False)),
        "no loss gradient": _no_loss_gradient,
        "no gradient": _no_gradient,
    }
    try:
        probes["square"] = _right_after(parse_attack(f"square:queries={_QUERIES}", eps=eps, seed=seed))
    except UserError as error:
        probes["square"] = f"Skipped, since {error}."
    return probes


def probed(probe: Probe, model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> list[int]:
    """What a probe finds on each of the images ``(N, ...)``, 0 or 1; they are on the model's device, in its dtype."""
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    outcomes: list[int] = torch.cat([probe(model, x, y) for x, y in batches]).int().tolist()
    return outcomes


def tail(count: int, trials: int, share: float) -> float:
    """Probability of at least ``count`` in ``trials``, each with probability ``share``."""
    from scipy.stats import binom

    return float(binom.sf(count - 1, trials, share))


def _right_after(attack: Perturbation) -> Probe:
    """Which images the model gets right after an attack."""

    def right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with attacking(model, attack(model, x, y), y) as (images, labels):
            return predicted(model, images) == labels

    return right


def _no_loss_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Images at which the plain cross entropy's gradient is exactly zero, in the model's own number format."""
    with attacking(model, x, y) as (images, labels):
        leaf = images.requires_grad_()
        with torch.enable_grad():
            logits = checked_logits(model(leaf.clone()), len(leaf))
            loss = cross_entropy(logits, checked_labels(labels, logits.shape[1], len(leaf)), reduction="sum")
        if not loss.requires_grad:
            return torch.ones(len(x), dtype=torch.bool, device=x.device)
        return _all_zero(*torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True))


def _no_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Images at which even the direction of the loss's gradient is zero, which large logits cannot do."""
    with attacking(model, x, y) as (images, labels):
        return _all_zero(input_gradient(model, images, labels))


def _all_zero(gradient: Tensor) -> Tensor:
    return (gradient == 0).flatten(1).all(1)


class Candidates(NamedTuple):
    """Samples on the CPU, by hash of image and seed.

    Those with the smallest hashes are a random choice that belongs to the images and the seed, whatever their order.
    """

    keys: Tensor
    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, seed: int) -> Candidates:
        """All samples of a batch ``(N, ...)``, ``(N,)``."""
        return cls(image_keys(images, seed, "sample choice").cpu(), images.cpu(), labels.cpu())

    def first(self, count: int) -> Candidates:
        """At most ``count`` of them, by rising hash."""
        rows = self.keys.argsort(stable=True)[:count]
        return Candidates(*(values[rows] for values in self))

    def joined(self, others: Candidates, count: int) -> Candidates:
        """The first of these and others."""
        return Candidates(*map(torch.cat, zip(self, others, strict=True))).first(count)
