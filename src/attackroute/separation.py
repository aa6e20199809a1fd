"""Whether a forward pass keeps samples apart, as far as its operations show it by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from attackroute.rules import RULES
from attackroute.rules.arithmetic import BATCH_NORMS
from attackroute.rules.operation import aten, overloads, tensors_in

_OPERAND = {aten.addmm.default: 1, aten.mm.default: 0, aten.convolution.default: 0}
"""Which argument holds samples; another one that depends on the images would take each sample to all of them."""
_REDUCTIONS = frozenset(overloads("mean.dim", "sum.dim_IntList"))
_CONCATENATION = frozenset(overloads("cat"))
_PADDING = frozenset(overloads("constant_pad_nd"))
_BROADCASTING = frozenset(
    overloads("add.Tensor", "add_.Tensor", "sub.Tensor", "sub_.Tensor", "mul.Tensor", "mul_.Tensor", "div.Tensor")
    + overloads("div_.Tensor", "copy_")
)
_BATCH_NORMS = frozenset(overloads(*BATCH_NORMS))
_DETACH = frozenset(overloads("detach"))
_REARRANGEMENTS = frozenset(overloads("as_strided_"))  # of any kind


class Separation:
    """Watches the operations of a forward pass on images that require grad.

    Attributes:
        proven: Whether every operation so far on what depends on the images works on each sample by itself. False
            says only that it is not known.
    """

    def __init__(self, samples: int) -> None:
        self.proven = True
        self._samples = samples
        self._detached: Any = WeakIdKeyDictionary()

    def watch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take note of an ATen operation that has run."""
        if not self.proven:
            return
        read = tensors_in((args, tuple(kwargs.values())))
        dependent = [value for value in read if value.requires_grad]
        if func in _DETACH and dependent:  # autograd detaches what it saves; what else is done with it is not followed
            self._detached[output] = True
        elif any(value in self._detached for value in read):
            self.proven = False
        elif dependent:
            self.proven = torch.is_grad_enabled() and self._apart(func, args, dependent, output)

    def _apart(self, func: Any, args: tuple[Any, ...], dependent: list[Tensor], output: Any) -> bool:
        results = tensors_in(output[0] if func in _BATCH_NORMS else output)  # the others are statistics
        if not all(tensor.shape[:1] == (self._samples,) for tensor in (*dependent, *results)):
            return False
        if func in _BROADCASTING:
            return all(value.ndim == results[0].ndim for value in dependent)
        if func not in _CONCATENATION and any(value is not args[_OPERAND.get(func, 0)] for value in dependent):
            return False
        return func in _OPERAND or (func in RULES and not _meets_samples(func, args, dependent[0].ndim))


def _meets_samples(func: Any, args: tuple[Any, ...], ndim: int) -> bool:
    """Whether an operation that has a rule works, or may work, along the first dimension."""
    if func in _REDUCTIONS:
        return not args[1] or 0 in (dim % ndim for dim in args[1])
    if func in _PADDING:
        return len(args[1]) >= 2 * ndim
    if func in _BATCH_NORMS:
        training = BATCH_NORMS[func.overloadpacket.__name__][3]
        return training is not None and bool(args[training])
    return func in _REARRANGEMENTS
