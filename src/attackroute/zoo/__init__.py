"""Networks, weights, presets and data sets."""

from __future__ import annotations

from attackroute.zoo.card import ModelCard
from attackroute.zoo.checks import check_input, check_precision
from attackroute.zoo.normalisation import Normalise
from attackroute.zoo.presets import load_preset, preset_folder, preset_names, preset_training
from attackroute.zoo.registry import BUILT_IN, build, build_model
from attackroute.zoo.spec import ModelSpec
from attackroute.zoo.weights import load_weights

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
