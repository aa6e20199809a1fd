"""What training does in one way on a CPU and in another on an accelerator."""

from __future__ import annotations

import torch


def loss_interval(device: torch.device) -> int:
    """Steps between looks at the loss; on an accelerator, each look waits for it."""
    return 1 if device.type == "cpu" else 50


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The short number format of mixed precision on a device; None where it has none."""
    if not torch.amp.is_autocast_available(device.type):
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the generators that dropout draws from, and no other device's."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
