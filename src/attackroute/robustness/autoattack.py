"""AutoAttack (Croce and Hein, 2020) and its black-box part, by the package ``pyautoattack``: its attacks, bit for bit.

They are put in a row here, since the package's own evaluation runs a model in the mode in which it finds it, stops a
debugger's or coverage tool's tracing, and fails below four classes. Unlike all other attacks here, these draw random
numbers for a batch as a whole: they repeat for a seed and a batch, and in another batch an image gets other numbers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.random import drawn_number
from attackroute.robustness.attack import Perturbation, kept_generators, require_extra
from attackroute.robustness.gradient_attacks import attacking, predicted

Logits = Callable[[Tensor], Tensor]

_EPS = 8 / 255
_ITERATIONS, _QUERIES, _MOST_TARGETS = 100, 5000, 9  # of the standard version
_LOGGER = logging.getLogger(__name__)
_LOGGER.addHandler(logging.NullHandler())  # told of zero gradients by the package, and not heard unless asked for


@dataclass(frozen=True)
class _PackageAttacks(Perturbation):
    """Some of the package's attacks in a row, each on the images that the model still gets right.

    Attributes:
        eps: Radius of the L-infinity ball.
        seed: Of all random numbers.
    """

    attacks: ClassVar[tuple[str, ...]]
    eps: float = _EPS
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_extra("pyautoattack", "autoattack", self.name)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """See :class:`Perturbation`; images that the model gets wrong are not changed."""
        eps, seed, queries = self.eps, self.seed + drawn_number(generator), getattr(self, "queries", _QUERIES)
        with attacking(model, x, y) as (images, given), kept_generators():
            if images.ndim != 4:
                raise UserError(f"images to attack have shape {tuple(x.shape)}; these attacks need (N, C, H, W)")
            output = checked_logits(model(images.clone()), len(images))
            classes = output.shape[1]
            labels = checked_labels(given, classes, len(images))
            right = output.argmax(1) == labels
            makers = _makers(_logits_of(model, x.dtype), classes, eps, seed % 2**63, queries)
            for name in self.attacks:
                rows = right.nonzero().flatten()
                if not len(rows) or eps == 0:
                    break
                if name not in makers:
                    warnings.warn(f"{self.name} runs without {name}: {classes} classes are too few", stacklevel=2)
                    continue
                clean = images[rows]
                with _default_dtype(torch.float32):  # which the package takes for granted
                    perturbed = makers[name]().perturb(clean.to(torch.float32).contiguous(), labels[rows].clone())
                change = (perturbed.detach().to(x.dtype) - clean).clamp_(-eps, eps)  # is there but for rounding
                candidates = (clean + change.nan_to_num_(0)).clamp_(0, 1)
                fooled = predicted(model, candidates) != labels[rows]
                images[rows[fooled]] = candidates[fooled]
                right[rows[fooled]] = False
            return images


@dataclass(frozen=True)
class Square(_PackageAttacks):
    """Square attack (Andriushchenko et al., 2020): random squares at the ball's corners, kept where they help.

    It asks for the model's logits alone, so that it finds what masked gradients hide.

    Attributes:
        queries: Rounds of the search, each one forward pass.
    """

    name: ClassVar[str] = "square"
    attacks: ClassVar[tuple[str, ...]] = ("square",)
    queries: int = _QUERIES


@dataclass(frozen=True)
class AutoAttack(_PackageAttacks):
    """Several attacks in a row, each on the images that the model still gets right (Croce and Hein, 2020).

    The standard set is APGD on the cross entropy, APGD on the targeted DLR loss, targeted FAB and Square, with the
    authors' settings. The targeted DLR loss needs four classes; with fewer it is left out with a warning, and the
    result is weaker than the standard.
    """

    name: ClassVar[str] = "autoattack"
    attacks: ClassVar[tuple[str, ...]] = ("apgd-ce", "apgd-t", "fab-t", "square")


def _makers(logits: Logits, classes: int, eps: float, seed: int, queries: int) -> dict[str, Callable[[], Any]]:
    """What makes each of the package's attacks that so many classes allow, with its standard version's settings."""
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    common = {"norm": "Linf", "eps": eps, "seed": seed, "verbose": False, "n_restarts": 1}
    steps, targets = {**common, "n_iter": _ITERATIONS}, min(_MOST_TARGETS, classes - 1)
    makers: dict[str, Callable[[], Any]] = {
        "apgd-ce": lambda: APGDAttack(logits, **steps, loss="ce", logger=_LOGGER),
        "fab-t": lambda: FABAttack_PT(logits, **steps, targeted=True, n_target_classes=targets),
        "square": lambda: SquareAttack(logits, **common, n_queries=queries, resc_schedule=False),
    }
    if classes >= 4:  # the targeted DLR loss is scaled by the difference of logits of lower ranks
        makers["apgd-t"] = lambda: APGDAttack_targeted(logits, **steps, n_target_classes=targets, logger=_LOGGER)
    return makers


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
