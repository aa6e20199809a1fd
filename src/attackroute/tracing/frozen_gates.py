"""Normaliser statistics and gates taken as constants, as propagation rules do: an approximation, on request.

Group and layer norm then scale each element by a number of its own, so that edges through them have a closed form in
convolutional networks, and attention weights and squeeze-excite gates pass nothing on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ATTENTION_DIMS = 3  # a softmax over fewer is a head, not attention


class FrozenGates(TorchFunctionMode):
    """Context in which derivatives take normaliser statistics, attention weights and channel gates as constants.

    The values that the model computes stay what they are. A gate is a sigmoid or hard sigmoid with a single value per
    channel, ``(n, C, 1, 1)``, as in squeeze-excite blocks.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        function: Callable[..., Any] = _REPLACED.get(func, func)
        output = function(*args, **kwargs)
        attends = func in _SOFTMAX and args and args[0].ndim >= _ATTENTION_DIMS
        gates = func in _SIGMOIDS and output.ndim == 4 and output.shape[2:] == (1, 1)
        return output.detach() if attends or gates else output


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    with torch.no_grad():
        variance, mean = torch.var_mean(input, dims, correction=0, keepdim=True)
        factor = (variance + eps).rsqrt()
        factor = factor if weight is None else factor * weight
        shift = -mean * factor
        shift = shift if bias is None else shift + bias
    return input * factor + shift


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Tensor:
    with torch.no_grad():
        grouped = input.reshape(len(input), num_groups, -1)
        variance, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
        per_channel = (len(input), input.shape[1], *(1,) * (input.ndim - 2))
        repeats = input.shape[1] // num_groups
        factor = (variance + eps).rsqrt().repeat_interleave(repeats, 1).view(per_channel)
        shift = mean.repeat_interleave(repeats, 1).view(per_channel)
        channels = per_channel[1:]
        factor = factor if weight is None else factor * weight.view(channels)
        shift = -shift * factor if bias is None else bias.view(channels) - shift * factor
    return input * factor + shift


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:  # statistics of its own are constants already
        return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _group_norm(input, input.shape[1], weight, bias, eps)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.scaled_dot_product_attention(query.detach(), key.detach(), value, *args, **kwargs)


_REPLACED: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.scaled_dot_product_attention: _attention,
}

_SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax})
_SIGMOIDS = frozenset({F.sigmoid, torch.sigmoid, Tensor.sigmoid, F.hardsigmoid})
