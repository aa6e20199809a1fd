"""The batch norm that directly follows a route layer, so that its gain can be folded into the layer's kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall, LayerCalls

_BATCH_NORM = inspect.signature(nn.functional.batch_norm)


@dataclass(frozen=True)
class FollowingNorm:
    """A batch norm that reads a layer's output and nothing else.

    Attributes:
        weight: Name of the parameter gamma; None for a gain of one.
        variance: Name of the buffer of running variances.
        eps: What is added to the variance.
    """

    weight: str | None
    variance: str
    eps: float

    def gain(self, model: nn.Module) -> Tensor:
        """``|gamma / sigma|``, ``(C,)``, with sigma as in eval mode; gamma can be differentiated."""
        sigma = (model.get_buffer(self.variance).detach() + self.eps).sqrt()
        return 1 / sigma if self.weight is None else model.get_parameter(self.weight).abs() / sigma


def following_norms(model: nn.Module, images: Tensor) -> dict[str, FollowingNorm]:
    """Run a frozen model on a few images and find the batch norms that read a layer's output directly.

    Args:
        model: The model.
        images: ``(n, ...)`` on the model's device.

    Returns:
        For each layer's name, its batch norm; layers without one are left out.

    Raises:
        UserError: A batch norm has running variances, or a gain, that are not the model's own.
    """
    outputs: list[tuple[Tensor, str]] = []
    found: dict[str, FollowingNorm] = {}
    parameters = {value: name for name, value in model.named_parameters()}
    buffers = {value: name for name, value in model.named_buffers()}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        outputs.append((output, call.name))  # held, so that no other tensor takes its identity
        return output

    def see(images: Tensor, arguments: dict[str, Any]) -> None:
        for output, layer in outputs:
            if output is images and arguments["running_var"] is not None:
                gamma, variance = arguments["weight"], arguments["running_var"]
                if variance not in buffers or not (gamma is None or gamma in parameters):
                    raise UserError(
                        f"the batch norm after layer {layer!r} takes a gain or variances that are not the model's own, "
                        "so they cannot be folded into its kernel; pass folded=False"
                    )
                name = None if gamma is None else parameters[gamma]
                found[layer] = FollowingNorm(name, buffers[variance], float(arguments["eps"]))

    with torch.no_grad(), LayerCalls(model, visit, linear=True), _BatchNorms(see):
        model(images.clone())
    return found


class _BatchNorms(TorchFunctionMode):
    """Shows every call of batch norm to ``see``."""

    def __init__(self, see: Callable[[Tensor, dict[str, Any]], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.batch_norm:
            given = _BATCH_NORM.bind(*args, **(kwargs or {}))
            given.apply_defaults()
            self._see(given.arguments["input"], given.arguments)
        return func(*args, **(kwargs or {}))
