"""Attacks of the user's own, and objects of torchattack, torchattacks and foolbox, as attacks here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError
from attackroute.core.model_state import frozen
from attackroute.core.random import drawn_number, seeded
from attackroute.robustness.attack import Attack, Perturbation, shaped_like

_BOUND = ("torchattack", "torchattacks")  # libraries whose attacks hold the model, and take images and labels


@dataclass(frozen=True)
class OwnAttack(Perturbation):
    """Any callable ``(model, images, labels) -> images``, under a name; it is known to keep to no ball.

    It gets copies, may differentiate, and draws from PyTorch's global generators, which ``generator`` seeds.
    """

    name: str  # type: ignore[misc]  # of the callable, not of the class
    function: Attack

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        drawing = nullcontext() if generator is None else seeded(drawn_number(generator))
        with frozen(model), torch.inference_mode(False), torch.enable_grad(), drawing:
            return shaped_like(x, self.function(model, x.detach().clone(), y.clone()), str(self))

    def __str__(self) -> str:
        return self.name

    def to_json(self) -> dict[str, Any]:
        """The name."""
        return {"name": self.name}


def own_attack(attack: object, name: str | None = None) -> OwnAttack:
    """A callable or another library's attack as one here; a `UserError` if it is neither."""
    if isinstance(attack, type) or not callable(attack):
        what = "the class" if isinstance(attack, type) else "an object of type"
        name = getattr(attack, "__name__", type(attack).__name__)
        raise UserError(
            f"an attack is {what} {name}; give a text such as 'pgd:steps=20', an attack of attackroute, torchattack, "
            "torchattacks or foolbox, or a callable (model, images, labels) -> images"
        )
    made = attack.func if isinstance(attack, partial) else attack
    library, title = type(made).__module__.partition(".")[0], getattr(made, "__name__", type(made).__name__)
    if library in (*_BOUND, "foolbox"):
        title = f"{library}.{title}"
    function: Callable[..., Any] = attack
    if library in _BOUND:
        function = partial(_bound, attack, title)
    elif library == "foolbox":
        function = partial(_foolbox, attack)
    return OwnAttack(name or title, function)


def _bound(attack: Any, title: str, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    if not any(module is attack.model for module in model.modules()):
        raise UserError(
            f"{title} was made for another network than the one that is to be attacked; make it for this one"
        )
    changed: Tensor = attack(images, labels)
    return changed


def _foolbox(attack: Any, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """What foolbox makes of images, in the radius of ``functools.partial(attack, epsilons=...)`` or at the least."""
    from foolbox import PyTorchModel

    radius = {} if isinstance(attack, partial) else {"epsilons": None}
    try:
        _, changed, _ = attack(PyTorchModel(model, bounds=(0, 1), device=images.device), images, labels, **radius)
    except NotImplementedError as error:
        raise UserError(f"{error}: give a radius, as in functools.partial(attack, epsilons=8/255)") from error
    return changed  # type: ignore[no-any-return]
