"""Checks of a model before it is run at length."""

from __future__ import annotations

import torch
from torch import nn

from attackroute.core.errors import UserError
from attackroute.core.model_state import kept_modes


def check_precision(model: nn.Module) -> None:
    """Refuse a model in half precision on the CPU, where its sums are slow and coarse.

    Raises:
        UserError: A float16 parameter or buffer lies on the CPU.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype is torch.float16 and tensor.device.type == "cpu":
            raise UserError(
                f"the model is in half precision on the CPU ({name} is float16); "
                "use model.float(), or move it to an accelerator"
            )


def check_input(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Try a model on one black image, in eval mode and without gradients; it comes back as it was.

    Args:
        model: Maps images (N, C, H, W) to logits.
        shape: (C, H, W) of the images to come.

    Raises:
        UserError: The model cannot take images of this shape.
    """
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)
    with kept_modes(model), torch.no_grad():
        model.eval()
        try:
            model(image)
        except UserError:
            raise
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            channels, height, width = shape
            raise UserError(
                f"the model cannot take images with {channels} channels of {height}x{width} pixels ({reason}); "
                "give images of another size, or another model"
            ) from error
