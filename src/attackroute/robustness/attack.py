"""What every attack is: a callable ``(model, images, labels) -> perturbed images``, and its ball."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from attackroute.core.checks import checked_logits
from attackroute.core.errors import UserError
from attackroute.core.model_state import explained, frozen

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""``(model, images, labels) -> images``, as everything in :mod:`attackroute.robustness`."""

_LEVELS = 255
_ROUNDING = 1e-5  # what it may add to a value in [0, 1], at least


@dataclass(frozen=True)
class Perturbation:
    """Base of attacks, of Gaussian noise too: parameters that print, serialise and compare.

    ``perturbation(model, images, labels, generator=None)`` returns perturbed images of the same shape, dtype, device
    and memory format, detached. The model is run in eval mode and comes back as it was. What is random depends on the
    image and on ``seed`` alone, so that batch size and order do not matter (save for AutoAttack and Square, which are
    another package's and draw for a whole batch); with a ``generator`` every call draws anew, as training wants it.

    ``str()`` gives the specification that names the attack everywhere, and that
    :func:`attackroute.parse_attack` reads back.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Check those settings that many attacks have; others are the class's own to check."""
        eps = getattr(self, "eps", 0.0)
        if not (isinstance(eps, (int, float)) and 0 <= eps <= 1):
            raise UserError(f"eps {eps} is out of range: it is in [0, 1] units, as in 8/255, and at most 1")
        for name in ("steps", "restarts", "queries"):
            value = getattr(self, name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} {value!r} is not a positive number of times; give 1 or more")
        size = getattr(self, "step_size", None)
        if size is not None and not (isinstance(size, (int, float)) and 0 < size < math.inf):
            raise UserError(f"step_size {size} is not above 0; leave it out for the attack's own")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Perturb images ``(N, C, H, W)`` in [0, 1] with labels ``(N,)`` of a model that maps them to logits.

        Without a generator, random numbers belong to the image and the seed.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        """Radius or level, and what is not the attack's own default: one name for one attack, wherever it stands."""
        given = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "name"}
        usual = {item.name: item.default for item in fields(self) if item.name not in ("eps", "std")}
        named = [name for name, value in given.items() if value is not None and value != usual.get(name)]
        settings = ",".join(f"{name}={self._text(name, given[name])}" for name in named)
        return f"{self.name}:{settings}" if settings else self.name

    def to_json(self) -> dict[str, Any]:
        """Name and parameters as plain values."""
        return {"name": self.name, **asdict(self)}

    @property
    def radius(self) -> float | None:
        """Of the L-infinity ball that the attack keeps to; None for what keeps to none, as noise."""
        return float(self.eps) if hasattr(self, "eps") else None

    def _text(self, name: str, value: Any) -> str:
        if name in ("eps", "step_size"):
            return show_eps(value)
        return repr(float(value)) if name in ("std", "decay") else str(value)


def checked_result(attack: Perturbation, images: object, clean: Tensor) -> Tensor:
    """What an attack made of clean images, once it is sure to keep to the attack's own rules, but for rounding.

    Raises:
        UserError: Another shape, values that are NaN or outside [0, 1], or images outside the attack's ball.
    """
    images = shaped_like(clean, images, str(attack))
    if not len(images):
        return images
    slack = max(_ROUNDING, 2 * torch.finfo(images.dtype).eps)
    if not (images.min() >= -slack and images.max() <= 1 + slack):
        raise UserError(f"{attack} returns images with NaN or values outside [0, 1]; its results cannot be trusted")
    distance = (images.double() - clean.double()).abs().max().item()
    if attack.radius is not None and distance > attack.radius + slack:
        ball = f"its ball of radius {show_eps(attack.radius)}"
        raise UserError(f"{attack} returns images at a distance of {distance:.6g}, outside {ball}")
    return images


def attacked(model: nn.Module, attack: Attack, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """A batch after the attack, and the labels that it was attacked for: the model's predictions where none are given.

    Whatever the attack does to the model, which is in eval mode, is undone.

    Raises:
        UserError: The attack does not return finite images of the same shape, or the model no logits.
    """
    if labels is None:
        with torch.no_grad(), explained(images):
            labels = checked_logits(model(images.clone()), images.shape[0]).argmax(1)
    with frozen(model):
        changed = shaped_like(images, attack(model, images.clone(), labels), "the attack")
    if not torch.isfinite(changed).all():
        raise UserError("the attack returns NaN or inf")
    return changed, labels


def attack_name(attack: Attack) -> str:
    """What the attack is called everywhere: in tables, files and a route's provenance."""
    return str(attack) if isinstance(attack, Perturbation) else getattr(attack, "__name__", type(attack).__name__)


def show_eps(eps: float) -> str:
    """``8/255`` for 8/255, and a plain number for what is no whole number of grey levels."""
    levels = round(eps * _LEVELS)
    return f"{levels}/{_LEVELS}" if levels / _LEVELS == eps else repr(float(eps))


def require_extra(module: str, extra: str, what: str) -> None:
    """Check that an optional package is installed, without importing it; else say how to install it."""
    if find_spec(module) is None:
        raise UserError(f'{what} needs an optional package: pip install "attackroute[{extra}]"')


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put the global generators of Python, numpy and PyTorch back, which other packages seed."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


def shaped_like(clean: Tensor, images: object, attack: str) -> Tensor:
    """What an attack returns, of the clean images' shape, dtype and device."""
    if not isinstance(images, Tensor) or images.shape != clean.shape:
        what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise UserError(f"{attack} returns {what} for images of shape {tuple(clean.shape)}")
    return images.detach().to(clean)
