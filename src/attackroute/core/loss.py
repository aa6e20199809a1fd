"""Loss gradients at the sinks, right at any confidence (Eqs. (3)-(4))."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attackroute.core.checks import ONE_LOGIT
from attackroute.core.errors import UserError
from attackroute.core.model_state import differentiated

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss ``(logits (n, K), labels (n,)) -> losses (n,)``."""


def cross_entropy_seed(logits: Tensor, labels: Tensor) -> Tensor:
    """Direction of the cross entropy's gradient at the logits, exact at any confidence.

    The gradient is ``softmax - onehot = (1 - p_y) * (q - onehot)`` with q the softmax over the other classes. In
    floating point ``1 - p_y`` loses all digits of a confident sample; being positive, it changes no ranking and is
    left out. What comes back, for logits ``(n, K)``, is ``q - onehot`` in float32 or wider.
    """
    if logits.shape[1] < 2:
        raise UserError(f"cross entropy needs two logits or more: pass loss=..., or {ONE_LOGIT}")
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    label = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    others = wide.masked_fill(label, -torch.inf).softmax(dim=1)
    return others - label.to(wide.dtype)


def log_doubt(logits: Tensor, labels: Tensor) -> Tensor:
    """``log(1 - p_y)``, the factor that :func:`cross_entropy_seed` leaves out, ``(n,)``, right at any confidence."""
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    label = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    return wide.masked_fill(label, -torch.inf).logsumexp(1) - wide.logsumexp(1)


def seed_gradients(logits: Tensor, labels: Tensor, sinks: dict[str, Tensor], loss: Loss | None) -> dict[str, Tensor]:
    """``dL/dZ`` at each sink, up to a positive factor per sample (Eq. (3)); zeros where no logit depends on the sink.

    Logits ``(n, K)`` come with the graph to the sinks, outputs ``Z_L`` by name; without a loss it is cross entropy.
    """
    if loss is None:
        outputs, weights = logits, cross_entropy_seed(logits, labels).to(logits.dtype)
    else:
        with torch.inference_mode(False), torch.enable_grad():
            outputs = loss(logits, labels.clone())  # a clone, since the caller's may come from inference mode
        if not isinstance(outputs, Tensor) or outputs.shape != (logits.shape[0],):
            raise UserError(
                f"loss returned shape {tuple(getattr(outputs, 'shape', ()))}, expected one loss per sample "
                f"({logits.shape[0]},): use reduction='none'"
            )
        weights = torch.ones_like(outputs)
    if not outputs.requires_grad:
        raise UserError("the logits do not depend on any route layer: does the model's forward detach, or use no_grad?")
    with differentiated():
        gradients = torch.autograd.grad(outputs, list(sinks.values()), weights, allow_unused=True)
    return {
        name: torch.zeros_like(sink) if gradient is None else gradient
        for (name, sink), gradient in zip(sinks.items(), gradients, strict=True)
    }
