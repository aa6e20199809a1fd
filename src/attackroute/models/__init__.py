"""Networks and their weights."""

from __future__ import annotations

from attackroute.models.card import ModelCard
from attackroute.models.checks import check_input, check_precision
from attackroute.models.normalisation import Normalise
from attackroute.models.presets import load_preset, preset_folder, preset_names, preset_training
from attackroute.models.registry import BUILT_IN, build, build_model
from attackroute.models.spec import ModelSpec
from attackroute.models.weights import load_weights

__all__ = [
    "BUILT_IN",
    "ModelCard",
    "ModelSpec",
    "Normalise",
    "build",
    "build_model",
    "check_input",
    "check_precision",
    "load_preset",
    "load_weights",
    "preset_folder",
    "preset_names",
    "preset_training",
]
