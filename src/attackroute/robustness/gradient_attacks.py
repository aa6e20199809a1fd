"""Attacks that follow the gradient of the loss at the image.

The cross entropy's gradient at the logits is ``(1 - p_y)`` times ``q - onehot`` (:mod:`attackroute.core.loss`), and
every attack here uses the direction alone. So they start from ``q - onehot``: the direction is the same where the cross
entropy's gradient can be represented, and is still there where that has become zero. Large logits are no defence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attackroute.core.checks import check_attackable, checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.loss import cross_entropy_seed
from attackroute.core.model_state import frozen
from attackroute.core.random import image_keys, uniforms
from attackroute.robustness.attack import Perturbation

_EPS = 8 / 255
_PAPER_STEPS = 10  # the paper's step size is eps / 10, whatever the number of steps
_TINY = 1e-30  # below any gradient norm that float32 can hold but zero


@dataclass(frozen=True)
class FGSM(Perturbation):
    """Fast gradient sign method (Goodfellow et al., 2015): one step to the ball's corner.

    Attributes:
        eps: Radius of the L-infinity ball.
    """

    name: ClassVar[str] = "fgsm"
    eps: float = _EPS

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        with attacking(model, x, y) as (images, labels):
            gradient = input_gradient(model, images, labels)
            return torch.add(images, gradient.sign(), alpha=self.eps).clamp_(0, 1)


@dataclass(frozen=True)
class StepLL(FGSM):
    """One step towards the class that the model finds least likely (Kurakin et al., 2017), of FGSM's size."""

    name: ClassVar[str] = "step-ll"

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        with attacking(model, x, y) as (images, _):
            gradient = input_gradient(model, images, None)
            return torch.sub(images, gradient.sign(), alpha=self.eps).clamp_(0, 1)


@dataclass(frozen=True)
class MIFGSM(Perturbation):
    """Momentum iterative FGSM (Dong et al., 2018): steps along a running sum of gradients of unit L1 norm.

    Attributes:
        eps: Radius of the L-infinity ball.
        steps: Number of steps.
        step_size: None for the paper's ``eps / 10``.
        decay: Factor on the running sum at every step.
    """

    name: ClassVar[str] = "mi-fgsm"
    eps: float = _EPS
    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.decay, (int, float)) and 0 <= self.decay < math.inf):
            raise UserError(f"decay {self.decay} is not a factor; the usual one is 1")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        size = self.eps / _PAPER_STEPS if self.step_size is None else self.step_size
        with attacking(model, x, y) as (images, labels):
            low, high = _box(images, self.eps)
            momentum = torch.zeros_like(images)
            current = images
            largest: list[Tensor] = []
            for step in range(self.steps):
                gradient = input_gradient(model, current, labels, largest if step else None)
                dims, wide = tuple(range(1, gradient.ndim)), torch.promote_types(gradient.dtype, torch.float32)
                norm = torch.linalg.vector_norm(gradient, 1, dims, keepdim=True, dtype=wide)
                norm.clamp_(min=_TINY)  # one zero gradient must not make the sum NaN
                momentum.mul_(self.decay).add_(gradient / norm)
                current = torch.add(current, momentum.sign(), alpha=size).clamp_(low, high)
            _require_finite(largest)
            return current


@dataclass(frozen=True)
class PGD(Perturbation):
    """Projected gradient descent in the L-infinity ball (Madry et al., 2018).

    Attributes:
        eps: Radius of the ball.
        steps: Number of steps; the last image is the result.
        step_size: None for the paper's ``eps / 10``.
        restarts: Further starts for images that are still classified correctly.
        random_start: Whether to start from a random point of the ball.
        seed: Of the starting points.
    """

    name: ClassVar[str] = "pgd"
    eps: float = _EPS
    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    random_start: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restarts > 1 and not self.random_start:
            raise UserError(f"{self.restarts} restarts from the same point are one: set random_start, or restarts=1")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        with attacking(model, x, y) as (images, labels):
            result = self._descend(model, images, labels, 0, generator)
            for restart in range(1, self.restarts):
                left = (predicted(model, result) == labels).nonzero().flatten()
                if not len(left):
                    break
                result[left] = self._descend(model, images[left], labels[left], restart, generator)
            return result

    def _descend(
        self, model: nn.Module, x: Tensor, y: Tensor, restart: int, generator: torch.Generator | None
    ) -> Tensor:
        size = self.eps / _PAPER_STEPS if self.step_size is None else self.step_size
        low, high = _box(x, self.eps)
        current = x.clone()
        if self.random_start:
            keys = image_keys(x, self.seed, f"{self.name} {restart}", generator)
            current += uniforms(keys, x.shape[1:]).to(x.dtype).mul_(2 * self.eps).sub_(self.eps)
            current.clamp_(low, high)
        largest: list[Tensor] = []
        for step in range(self.steps):
            gradient = input_gradient(model, current, y, largest if step else None)
            current.add_(gradient.sign(), alpha=size).clamp_(low, high)
        _require_finite(largest)
        return current


@contextmanager
def attacking(model: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hold the model still while its images are attacked; gives images and labels that no graph knows."""
    check_attackable(x, y)
    with frozen(model), torch.inference_mode(False), torch.no_grad():
        yield x.detach().clamp(0, 1), y.clone().to(x.device)  # copies, since inference mode may have made these


def input_gradient(model: nn.Module, x: Tensor, y: Tensor | None, largest: list[Tensor] | None = None) -> Tensor:
    """Direction of a frozen model's cross entropy's gradient at images ``(N, ...)``, exact at any confidence.

    Without labels ``(N,)``, the loss is that of the least likely class of each. The gradient, of the shape and dtype of
    ``x``, is to be read only, since it may share memory with what the model keeps. To look at values waits for the
    device: after an attack's first step only the ``largest`` value is noted, for it to check at its end.

    Raises:
        UserError: The model does not return logits, a label has none, or the gradient is not finite.
    """
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        output = model(leaf.clone())  # a copy, since the model may work in place
        logits = checked_logits(output, x.shape[0], finite=largest is None)
    labels = logits.detach().argmin(1) if y is None else y
    if largest is None:
        checked_labels(labels, logits.shape[1], x.shape[0])
    if not logits.requires_grad:  # the model cuts the graph, which the masking checks report
        return torch.zeros_like(x)
    seed = cross_entropy_seed(logits, labels).to(logits.dtype)
    (gradient,) = torch.autograd.grad(logits, leaf, seed, allow_unused=True, materialize_grads=True)
    size = torch.linalg.vector_norm(gradient, torch.inf) if gradient.numel() else gradient.sum()
    if largest is None:
        _require_finite([size])
    else:
        largest.append(size)
    return gradient.detach()


def _require_finite(largest: list[Tensor]) -> None:
    """Raise a `UserError` if the largest value of a gradient was not finite, which its sign would hide."""
    if largest and not torch.stack(largest).isfinite().all():
        raise UserError("the model's gradient at the images is not finite: check its weights and its normalisation")


def predicted(model: nn.Module, x: Tensor) -> Tensor:
    """The model's classes for images, ``(N,)``."""
    return checked_logits(model(x.clone()), x.shape[0]).argmax(1)  # a copy, since the model may work in place


def _box(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of the L-infinity ball within [0, 1]."""
    return (x - eps).clamp_(min=0), (x + eps).clamp_(max=1)
