"""Presets: small networks that come with the package, trained by its own ``train`` and ``harden``.

Each is a folder like those that ``attackroute train`` writes: ``model.json``, weights in float16, and ``training.json``
with the command that made it and its accuracy.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from attackroute.core.errors import UserError, did_you_mean
from attackroute.zoo.card import ModelCard
from attackroute.zoo.registry import build
from attackroute.zoo.weights import load_weights

PRESETS = Path(__file__).parent / "presets"


WEIGHTS = "best.safetensors"


TRAINING = "training.json"


def preset_names() -> list[str]:
    """Names of the presets."""
    return sorted(folder.name for folder in PRESETS.iterdir() if (folder / WEIGHTS).is_file())


def preset_folder(name: str) -> Path:
    """Folder of a preset.

    Raises:
        UserError: There is none of that name.
    """
    names = preset_names()
    if name not in names:
        raise UserError(f"no preset {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}")
    return PRESETS / name


def load_preset(name: str) -> nn.Module:
    """A trained network for images in [0, 1], in float32 and eval mode.

    Args:
        name: Such as ``"vgg16-cifar10"``; see :func:`preset_names`.

    Raises:
        UserError: There is none of that name.
    """
    folder = preset_folder(name)
    model = build(ModelCard.load(folder).spec)
    load_weights(model, folder / WEIGHTS)
    return model.eval()


def preset_training(name: str) -> dict[str, Any]:
    """How a preset was trained: command, data, accuracy on clean test images.

    Raises:
        UserError: There is none of that name.
    """
    content: dict[str, Any] = json.loads((preset_folder(name) / TRAINING).read_bytes())
    return content
