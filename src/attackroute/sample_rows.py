"""Whether the first dimension of each layer's output is the samples: without that there are no numbers per sample."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

from attackroute.display import plural
from attackroute.errors import UserError
from attackroute.layers import LayerCall, LayerCalls

_ROUNDING = 1e-3  # of an output's largest value; other samples, where they come in, change outputs by much more


def require_rows(layer: str, rows: int, samples: int) -> None:
    """Check that a layer's output has one row per sample.

    Raises:
        UserError: It has not.
    """
    if rows != samples:
        raise UserError(
            f"layer {layer!r} gives {plural(rows, 'row')} for {plural(samples, 'image')}, so there are no numbers per "
            "image: let the model keep the images in the first dimension (batch_first=True), or leave linear maps out"
        )


def require_rows_apart(model: nn.Module, images: Tensor, layers: Container[str] | None = None) -> None:
    """Check, on a frozen model, that one image's rows of the linear maps' outputs do not depend on another image.

    They would where positions stand first, and where windows of several images take turns in the batch.

    Args:
        model: The model.
        images: ``(n, ...)``; the first and the last run together, and once more with the last one changed.
        layers: Some of the linear maps; None for all.

    Raises:
        UserError: They do in some layer, or a layer has not one row per image.
    """
    seen: list[dict[str, Tensor]] = []
    for other in (images[-1:], 1 - images[-1:].flip(-1)):
        batch = torch.cat([images[:1], other]).detach()
        firsts: dict[str, Tensor] = {}

        def visit(call: LayerCall, firsts: dict[str, Tensor] = firsts) -> Tensor:
            output = call.run()
            if call.kind == "linear" and (layers is None or call.name in layers):
                require_rows(call.name, len(output), 2)
                firsts[call.name] = output[0].detach().clone()
            return output

        with torch.no_grad(), LayerCalls(model, visit, linear=True):
            model(batch)
        seen.append(firsts)
    for layer, first in seen[0].items():
        if layer in seen[1] and bool((first - seen[1][layer]).abs().amax() > _ROUNDING * first.abs().amax()):
            raise UserError(
                f"the rows of one image in the output of layer {layer!r} depend on another image, so there are no "
                "numbers per image: let the model keep the images in the first dimension (batch_first=True), or leave "
                "linear maps out"
            )
