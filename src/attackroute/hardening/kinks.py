"""Which side of its kinks a network is on, kept from one pass and held in the next.

A network of ReLUs and max pooling is linear in pieces, and its gradient jumps from piece to piece. A difference
quotient across such jumps is not the derivative within the piece, however small the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from attackroute.core.errors import UserError

_RELU = frozenset(
    {functional.relu, functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
)  # fmt: skip


_LEAKY = frozenset({functional.leaky_relu, functional.leaky_relu_})


_POOL = frozenset({functional.max_pool2d, torch.max_pool2d})


_SLOPE = 0.01  # leaky_relu's own default


class Kinks(TorchFunctionMode):
    """Context that notes the kinks of a pass: ReLU, ReLU6, leaky ReLU and 2-D max pooling.

    Attributes:
        sides: In the order of the calls, where each activation's output was positive (and below 6), or the winners of
            each pooling.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _POOL:
            return self._pooled(args, kwargs)
        output = func(*args, **kwargs)
        if func in _RELU or func in _LEAKY:
            self.sides.append(output.detach() > 0)
        elif func is functional.relu6:
            self.sides.append((output.detach() > 0).logical_and_(output.detach() < 6))
        return output

    def _pooled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        both = kwargs.get("return_indices", False)
        output, winners = functional.max_pool2d_with_indices(*args[:6], **{**kwargs, "return_indices": True})
        self.sides.append(winners)
        return (output, winners) if both else output


class HeldKinks(TorchFunctionMode):
    """Context in which a pass stays on the sides that another pass of the same network noted.

    Args:
        sides: Those of :class:`Kinks`.
    """

    def __init__(self, sides: list[Tensor]) -> None:
        super().__init__()
        self._sides: Iterator[Tensor] = iter(sides)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _RELU and func not in _LEAKY and func not in _POOL and func is not functional.relu6:
            return func(*args, **kwargs)
        values = args[0] if args else kwargs["input"]
        side = next(self._sides, None)
        if side is None:
            raise UserError("the model ran other operations on the same batch a second time: use the exact method")
        if func in _POOL:
            winners = values.flatten(2).gather(2, side.flatten(2)).view(side.shape)
            return (winners, side) if kwargs.get("return_indices", False) else winners
        if func in _LEAKY:
            slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", _SLOPE)
            return torch.where(side, values, values * slope)
        if func is functional.relu6:
            return torch.where(side, values, values.detach().clamp(0, 6))
        return values * side
