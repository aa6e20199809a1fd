"""AutoAttack (Croce and Hein, 2020) and its black-box part, by the package ``pyautoattack``.

The package brings the attacks themselves, bit for bit those of its authors. The order of attacks, and what each of them
gets to see, is done here: its own evaluation runs a model in the mode in which it finds it, cannot go on after an
interruption, stops a debugger's or coverage tool's tracing, and fails below four classes.

Unlike all other attacks here, these draw random numbers for a batch as a whole. They repeat for a seed and a batch; in
another batch the same image gets other numbers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError, did_you_mean
from attackroute.core.random import drawn_number
from attackroute.robustness.attack import Ball, Perturbation, kept_generators, require_extra
from attackroute.robustness.gradient_attacks import attacking, predicted

Logits = Callable[[Tensor], Tensor]
Part = Callable[[Tensor, Tensor], Tensor]
"""One attack of the package: ``(images, labels) -> images``."""

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
PARTS = (*STANDARD, "apgd-dlr", "fab")

_EPS = {"linf": 8 / 255, "l2": 0.5}
_ITERATIONS, _QUERIES, _MOST_TARGETS = 100, 5000, 9  # of the standard version
_FEWEST_CLASSES = {"apgd-t": 4, "apgd-dlr": 3}  # the loss is scaled by the difference of logits of lower ranks
_IMAGE_DIMS = 4
_LOGGER = logging.getLogger(__name__)
_LOGGER.addHandler(logging.NullHandler())  # told of zero gradients by the package, and not heard unless asked for


@dataclass(frozen=True)
class AutoAttack(Perturbation):
    """Several attacks in a row, each on the images that the model still gets right (Croce and Hein, 2020).

    The standard set is APGD on the cross entropy, APGD on the targeted DLR loss, targeted FAB and Square, with the
    authors' settings. The DLR loss needs three classes, and targeted four; with fewer classes those attacks are left
    out with a warning (:meth:`parts_for` says what runs), and the result is weaker than the standard.

    Attributes:
        eps: Radius of the ball; None for 8/255 in the L-infinity norm and 0.5 in the L2 norm.
        norm: ``"linf"`` or ``"l2"``.
        attacks: ``"standard"``, or names of :data:`PARTS` joined by ``+``, such as ``"apgd-ce+square"``.
        seed: Of all random numbers.
    """

    name: ClassVar[str] = "autoattack"
    eps: float | None = None
    norm: str = "linf"
    attacks: str = "standard"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.norm not in _EPS:
            raise UserError(f"unknown norm {self.norm!r}{did_you_mean(self.norm.lower(), _EPS)}; give linf or l2")
        if self.eps is None:
            object.__setattr__(self, "eps", _EPS[self.norm])
        super().__post_init__()
        for name in self._names():
            if name not in PARTS:
                raise UserError(
                    f"autoattack has no attack {name!r}{did_you_mean(name, PARTS)}; "
                    f'give "standard", or some of {", ".join(PARTS)} joined by +'
                )
        require_extra("pyautoattack", "autoattack", self.name)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """See :class:`Perturbation`; images that the model gets wrong are not changed.

        Raises:
            UserError: None of the attacks can be run with the model's number of classes.
        """

        def parts(classes: int) -> tuple[str, ...]:
            names = self.parts_for(classes)
            left_out = [name for name in self._names() if name not in names]
            if left_out:
                message = f"autoattack runs without {', '.join(left_out)}: {classes} classes are too few"
                warnings.warn(message, stacklevel=4)
            return names

        seed, ball = self.seed + drawn_number(generator), cast("Ball", self.ball)
        return _in_a_row(model, x, y, parts, ball, seed=seed, queries=_QUERIES)

    def parts_for(self, classes: int) -> tuple[str, ...]:
        """Which attacks are run on a model with so many classes, in order; at least one, or an error."""
        parts = tuple(name for name in self._names() if classes >= _FEWEST_CLASSES.get(name, 2))
        if not parts:
            raise UserError(
                f"none of the attacks {self.attacks} can be run on {classes} classes; add apgd-ce or square"
            )
        return parts

    def _names(self) -> tuple[str, ...]:
        return STANDARD if self.attacks == "standard" else tuple(self.attacks.split("+"))


@dataclass(frozen=True)
class Square(Perturbation):
    """Square attack (Andriushchenko et al., 2020): random squares at the ball's corners, kept where they help.

    It asks for the model's logits alone, so that it finds what masked gradients hide.

    Attributes:
        eps: Radius of the L-infinity ball.
        queries: Rounds of the search, each one forward pass.
        seed: Of the squares.
    """

    name: ClassVar[str] = "square"
    eps: float = _EPS["linf"]
    queries: int = _QUERIES
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_extra("pyautoattack", "autoattack", self.name)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """See :class:`Perturbation`; images that the model gets wrong are not changed."""
        seed, ball = self.seed + drawn_number(generator), Ball(self.norm, self.eps)
        return _in_a_row(model, x, y, lambda _: ("square",), ball, seed=seed, queries=self.queries)


def _in_a_row(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    parts: Callable[[int], Sequence[str]],
    ball: Ball,
    *,
    seed: int,
    queries: int,
) -> Tensor:
    """Run the attacks that ``parts`` names for so many classes, each on the images that the model still gets right."""
    with attacking(model, x, y) as (images, given), kept_generators():
        if images.ndim != _IMAGE_DIMS:
            raise UserError(f"images to attack have shape {tuple(x.shape)}; these attacks need (N, C, H, W)")
        if not len(images):
            return images
        logits = checked_logits(model(images.clone()), len(images))
        classes = logits.shape[1]
        labels = checked_labels(given, classes, len(images))
        right = logits.argmax(1) == labels
        makers = _makers(_logits_of(model, x.dtype), classes, ball, seed % 2**63, queries)
        for attack in [makers[name]() for name in parts(classes)]:
            rows = right.nonzero().flatten()
            if not len(rows) or ball.eps == 0:
                break
            clean = images[rows]
            with _default_dtype(torch.float32):  # which the package takes for granted
                perturbed = attack(clean.to(torch.float32).contiguous(), labels[rows].clone())
            candidates = _projected(perturbed.detach().to(x.dtype), clean, ball)
            fooled = predicted(model, candidates) != labels[rows]
            images[rows[fooled]] = candidates[fooled]
            right[rows[fooled]] = False
        return images


def _makers(logits: Logits, classes: int, ball: Ball, seed: int, queries: int) -> dict[str, Callable[[], Part]]:
    """What makes each of the package's attacks, with the settings of its standard version."""
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    common = {"norm": ball.norm.capitalize(), "eps": ball.eps, "seed": seed, "verbose": False, "n_restarts": 1}
    targets = min(_MOST_TARGETS, classes - 1)
    steps = {**common, "n_iter": _ITERATIONS}
    return {
        "apgd-ce": lambda: APGDAttack(logits, **steps, loss="ce", logger=_LOGGER).perturb,
        "apgd-dlr": lambda: APGDAttack(logits, **steps, loss="dlr", logger=_LOGGER).perturb,
        "apgd-t": lambda: APGDAttack_targeted(logits, **steps, n_target_classes=targets, logger=_LOGGER).perturb,
        "fab": lambda: FABAttack_PT(logits, **steps, targeted=False).perturb,
        "fab-t": lambda: FABAttack_PT(logits, **steps, targeted=True, n_target_classes=targets).perturb,
        "square": lambda: SquareAttack(logits, **common, n_queries=queries, resc_schedule=False).perturb,
    }


def _logits_of(model: nn.Module, dtype: torch.dtype) -> Logits:
    """The model as the package wants it: float32 in and out, nothing shared, and a gradient whatever the model does."""
    usual = torch.get_default_dtype()

    def logits(images: Tensor) -> Tensor:
        with _default_dtype(usual):
            output = checked_logits(model(images.to(dtype, copy=True)), len(images)).to(torch.float32)
        # zeros join the graph to the images, for a model that cuts it
        return output + 0 * images.flatten(1).sum(1, keepdim=True)

    return logits


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _projected(perturbed: Tensor, clean: Tensor, ball: Ball) -> Tensor:
    """Images in the ball and in [0, 1], from images that are there but for rounding; ``clean`` where they are NaN."""
    change = perturbed - clean
    if ball.norm == "linf":
        change.clamp_(-ball.eps, ball.eps)
    else:
        lengths = torch.linalg.vector_norm(change, dim=(1, 2, 3), keepdim=True)
        change.mul_((ball.eps / lengths).clamp_(max=1).nan_to_num_(1.0))
    whole = change.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)
    return torch.where(whole, clean + change, clean).clamp_(0, 1)
