"""What every attack and corruption is: a callable ``(model, images, labels) -> perturbed images``, and its ball."""

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
_ORDERS = {"linf": math.inf, "l2": 2.0}
_ROUNDING = 1e-5  # what it may add to a value in [0, 1], at least


@dataclass(frozen=True)
class Perturbation:
    """Base of attacks and corruptions: parameters that print, serialise and compare.

    ``perturbation(model, images, labels, generator=None)`` returns perturbed images of the same shape, dtype, device
    and memory format, detached. The model is run in eval mode and comes back as it was. What is random depends on the
    image and on ``seed`` alone, so that batch size and order do not matter (save for AutoAttack and Square, which are
    another package's and draw for a whole batch); with a ``generator`` every call draws anew, as training wants it.

    ``str()`` gives the specification that names the attack everywhere, and that
    :func:`attackroute.robustness.parse_attack` reads back.
    """

    name: ClassVar[str]
    uses_model: ClassVar[bool] = True
    """Whether the result depends on the model; a corruption's does not."""
    norm = "linf"
    """Of the ball of radius ``eps``, where the attack has one: ``"linf"``, whose radii print as n/255, or ``"l2"``."""

    def __post_init__(self) -> None:
        """Check those settings that many attacks have; others are the class's own to check."""
        if hasattr(self, "eps"):
            check_eps(self.eps, largest=1.0 if self.norm == "linf" else math.inf)
        for name in ("steps", "restarts", "queries"):
            if hasattr(self, name):
                check_count(name, getattr(self, name))
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
        usual = {item.name: item.default for item in fields(self) if item.name not in ("eps", "severity")}
        named = [name for name, value in given.items() if value is not None and value != usual.get(name)]
        settings = ",".join(f"{name}={self._text(name, given[name])}" for name in named)
        return f"{self.name}:{settings}" if settings else self.name

    def to_json(self) -> dict[str, Any]:
        """Name and parameters as plain values."""
        return {"name": self.name, **asdict(self)}

    @property
    def ball(self) -> Ball | None:
        """The ball that the attack keeps to; None for what keeps to none, as corruptions."""
        return Ball(self.norm, float(self.eps)) if hasattr(self, "eps") else None

    def _text(self, name: str, value: Any) -> str:
        if name in ("eps", "step_size") and self.norm == "linf":
            return show_eps(value)
        return repr(float(value)) if name in ("eps", "step_size", "std", "decay") else str(value)


@dataclass(frozen=True)
class Ball:
    """The images that an attack may choose from: within a distance of the clean image, and within [0, 1]."""

    norm: str  # "linf" or "l2"
    eps: float  # the radius, for values in [0, 1]

    def __post_init__(self) -> None:
        if self.norm not in _ORDERS or not (isinstance(self.eps, (int, float)) and self.eps >= 0):
            raise UserError(f"no ball of norm {self.norm!r} and radius {self.eps!r} is known")

    def __str__(self) -> str:
        return f"{self.norm} {self.radius}"

    @property
    def radius(self) -> str:
        """The radius as text, as ``8/255`` in the L-infinity norm."""
        return show_eps(self.eps) if self.norm == "linf" else format(self.eps, "g")

    def distances(self, images: Tensor, clean: Tensor) -> Tensor:
        """Distance of each image from its clean one, float64 ``(N,)``."""
        change = (images.double() - clean.double()).flatten(1)
        distances: Tensor = torch.linalg.vector_norm(change, _ORDERS[self.norm], dim=1)
        return distances

    def outside(self, images: Tensor, clean: Tensor) -> Tensor:
        """Which images are out of the ball by more than rounding explains, bool ``(N,)``; NaN is outside."""
        return ~(self.distances(images, clean) <= self.eps + max(1.0, self.eps) * _tolerance(images))


def out_of_range(images: Tensor) -> Tensor:
    """Which images have a value outside [0, 1] by more than rounding explains, bool ``(N,)``; NaN is outside."""
    slack = _tolerance(images)
    values = images.flatten(1)
    return ~((values >= -slack) & (values <= 1 + slack)).all(1)


def checked_result(attack: Perturbation, images: object, clean: Tensor) -> Tensor:
    """What an attack made of clean images, once it is sure to keep to the attack's own rules.

    Raises:
        UserError: Another shape, values that are NaN or outside [0, 1], or images outside the attack's ball.
    """
    images = shaped_like(clean, images, str(attack))
    if out_of_range(images).any():
        raise UserError(f"{attack} returns images with NaN or values outside [0, 1]; its results cannot be trusted")
    ball = attack.ball
    if ball is not None and ball.outside(images, clean).any():
        distance = float(ball.distances(images, clean).max())
        raise UserError(f"{attack} returns images at {ball.norm} distance {distance:.6g}, outside its ball of {ball}")
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


def check_eps(eps: float, *, largest: float = 1.0) -> None:
    """Check a radius in units of the images' [0, 1]."""
    if not (isinstance(eps, (int, float)) and 0 <= eps <= largest and eps < math.inf):
        unit = f"it is in [0, 1] units, as in 8/255, and at most {largest:g}" if largest < math.inf else "at least 0"
        raise UserError(f"eps {eps} is out of range: {unit}")


def check_count(name: str, value: int) -> None:
    """Check a number of steps or restarts."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} {value!r} is not a positive number of times; give 1 or more")


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


def _tolerance(images: Tensor) -> float:
    return max(_ROUNDING, 2 * torch.finfo(images.dtype).eps)
