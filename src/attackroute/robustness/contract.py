"""What every attack and corruption is: a callable ``(model, images, labels) -> perturbed images``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError

_TOLERANCE = 1e-4


_LEVELS = 255


@dataclass(frozen=True)
class Perturbation:
    """Base of attacks and corruptions: parameters that print, serialise and compare.

    ``perturbation(model, images, labels, generator=None)`` returns perturbed images of the same shape, dtype, device
    and memory format, detached. The model is run in eval mode and comes back as it was. What is random depends on the
    image and on ``seed`` alone, so that batch size and order do not matter (save for AutoAttack and Square, which are
    another package's and draw for a whole batch); with a ``generator`` every call draws anew, as training wants it.

    ``str()`` gives a specification that :func:`attackroute.attacks.parse_attack` reads back.
    """

    name: ClassVar[str]
    uses_model: ClassVar[bool] = True
    """Whether the result depends on the model; a corruption's does not."""
    in_levels: ClassVar[bool] = True
    """Whether ``eps`` and ``step_size`` are per value of the image, so that they print as n/255."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Perturb a batch.

        Args:
            model: Maps images in [0, 1] to logits.
            x: ``(N, C, H, W)`` in [0, 1].
            y: ``(N,)`` labels.
            generator: None for numbers that belong to the image and the seed.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        known = {item.name: getattr(self, item.name) for item in fields(self)}
        settings = ",".join(f"{name}={self._shown(name, value)}" for name, value in known.items() if value is not None)
        return f"{self.name}:{settings}" if settings else self.name

    def _shown(self, name: str, value: object) -> str:
        if self.in_levels and name in ("eps", "step_size") and isinstance(value, float):
            return show_eps(value)
        return str(value)

    def to_json(self) -> dict[str, Any]:
        """Name and parameters as plain values."""
        return {"name": self.name, **asdict(self)}


def check_images(x: Tensor, y: Tensor) -> None:
    """Check a batch that is to be perturbed.

    Raises:
        UserError: Not images in [0, 1] with one integer label each.
    """
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.is_floating_point():
        what = f"shape {tuple(x.shape)} and type {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"images to attack are {what}; floating tensors (N, C, H, W) are needed")
    if not isinstance(y, Tensor):
        raise UserError("an attack needs the labels: pass (images, labels)")
    if y.shape != (len(x),) or y.is_floating_point():
        raise UserError(f"labels have shape {tuple(y.shape)} and type {y.dtype}; expected {len(x)} integers")
    if len(x) and int(y.min()) < 0:
        raise UserError(f"label {int(y.min())} is negative; labels count from 0")
    if x.numel():
        low, high = (float(value) for value in x.detach().aminmax())
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
            raise UserError(
                f"images to attack have values from {low:.3g} to {high:.3g}; they must be in [0, 1], "
                "with normalisation inside the model"
            )


def check_eps(eps: float, *, largest: float = 1.0) -> None:
    """Check a radius in units of the images' [0, 1]."""
    if not (isinstance(eps, (int, float)) and 0 <= eps <= largest and eps < math.inf):
        unit = f"it is in [0, 1] units, as in 8/255, and at most {largest:g}" if largest < math.inf else "at least 0"
        raise UserError(f"eps {eps} is out of range: {unit}")


def check_count(name: str, value: int) -> None:
    """Check a number of steps or restarts."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} {value!r} is not a positive number of times; give 1 or more")


def check_step_size(value: float | None) -> None:
    """Check a step size; None leaves it to the attack."""
    if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise UserError(f"step_size {value} is not above 0; leave it out for the attack's own")


def require_extra(module: str, extra: str, what: str) -> None:
    """Check that an optional package is installed, without importing it.

    Raises:
        UserError: It is not; says how to install it.
    """
    if find_spec(module) is None:
        raise UserError(f'{what} needs an optional package: pip install "attackroute[{extra}]"')


def show_eps(eps: float) -> str:
    """``8/255`` for 8/255, and a plain number for what is no multiple of a tenth of a grey level."""
    levels = round(eps * _LEVELS, 1)
    return f"{levels:g}/{_LEVELS}" if levels / _LEVELS == eps else repr(float(eps))
