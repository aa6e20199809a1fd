"""Loss gradients at the sinks, right at any confidence (Eqs. (3)-(4))."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attackroute.errors import UserError
from attackroute.explanations import differentiated

Loss = Callable[[Tensor, Tensor], Tensor]
"""A loss ``(logits (n, K), labels (n,)) -> losses (n,)``."""

_MATRIX = 2


def checked_logits(output: object, samples: int) -> Tensor:
    """The model's output as logits ``(n, K)``, or an error that says what it is instead."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise UserError(f"the model returns {type(output).__name__}, not logits of shape (N, classes)")
    if logits.ndim != _MATRIX or logits.shape[0] != samples:
        raise UserError(
            f"the model returns a tensor of shape {tuple(logits.shape)} for {samples} images, not logits (N, classes)"
        )
    if not torch.isfinite(logits).all():
        raise UserError("the model's logits are not finite: check its weights and the range of its inputs")
    return logits


def checked_labels(labels: Tensor, classes: int, samples: int) -> Tensor:
    """Labels as int64 ``(n,)`` within ``0 .. classes - 1``."""
    if labels.shape != (samples,) or labels.is_floating_point():
        raise UserError(f"labels have shape {tuple(labels.shape)} and type {labels.dtype}; expected {samples} integers")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise UserError(f"label {int(wrong[0])} is outside the model's {classes} logits (0 .. {classes - 1})")
    return labels.long()


def cross_entropy_seed(logits: Tensor, labels: Tensor) -> Tensor:
    """Direction of the cross entropy's gradient at the logits, exact at any confidence.

    The gradient is ``softmax - onehot = (1 - p_y) * (q - onehot)`` with q the softmax over the other classes. In
    floating point ``1 - p_y`` loses all digits of a confident sample; being positive, it changes no ranking and is
    left out.

    Args:
        logits: ``(n, K)``, K >= 2.
        labels: ``(n,)`` int64.

    Returns:
        ``q - onehot``, ``(n, K)``, in float32 or wider.
    """
    if logits.shape[1] < 2:
        raise UserError("the model has a single logit; cross entropy needs two classes or more (pass loss=...)")
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
    """``dL/dZ`` at each sink, up to a positive factor per sample (Eq. (3)).

    Args:
        logits: ``(n, K)`` with the graph to the sinks.
        labels: ``(n,)`` int64.
        sinks: Sink outputs ``Z_L`` that require grad, by name.
        loss: Per-sample loss; None for cross entropy.

    Returns:
        Gradients of the shapes of the sinks; zeros where the logits do not depend on a sink.
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


def seed_scores(kind: str, output: Tensor, gradient: Tensor, noise: bool, dtype: torch.dtype) -> Tensor:
    """What Eq. (4) ranks at a sink: ``sum over positions of |dL/dZ|``, or for noise of ``(Z(x') - Z(x)) dL/dZ(x')``.

    The latter keeps its sign: it is, to first order, how much of the loss the neuron's noise has brought about.

    Args:
        kind: ``"conv2d"`` or ``"linear"``.
        output: The sink's output Z; for noise n clean rows, then the attacked ones.
        gradient: dL/dZ, shaped like it.
        noise: Whether noise is what is followed.
        dtype: Of the result.

    Returns:
        ``(n, C)``.
    """
    if noise:
        clean, attacked = output.detach().to(dtype).chunk(2)
        size = (attacked - clean).mul_(gradient.chunk(2)[1])
    else:
        size = gradient.abs()
    if kind == "conv2d":
        size = size.movedim(1, -1)
    return size.flatten(1, -2).sum(1, dtype=dtype) if size.ndim > 2 else size.to(dtype)
