"""Forward passes that can be differentiated twice, where PyTorch's usual way of an operation can be only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_ATTENTION = functional.scaled_dot_product_attention


_HARD_SIGMOID = functional.hardsigmoid


class TwiceDifferentiable(TorchFunctionMode):
    """Context in which attention and hard sigmoid are computed of operations with a second derivative.

    Their results are the same up to rounding. Enter it before :class:`attackroute.layers.LayerCalls`, which opens
    multi-head attention up: what was entered later does not see the attention in it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _ATTENTION:  # the fused kernels' backward has no derivative
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        if func is _HARD_SIGMOID:
            return _hard_sigmoid(*args, **kwargs)
        return func(*args, **kwargs)


def _hard_sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    values = functional.relu6(input + 3) / 6
    return input.copy_(values) if inplace else values
