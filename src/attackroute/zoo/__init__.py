"""Networks, their weights, and data sets.

In come names (``vgg16``, ``preset:vgg16-cifar10``, ``torchvision:NAME``, ``cifar10:PATH``) and files; out go networks
that take images in [0, 1], and labelled images. Read `networks.py` first, then `weights.py`, which opens trained ones,
and `sources.py`, which opens data.
"""

from attackroute.zoo.data import ImageBatches, ImageData, check_images
from attackroute.zoo.networks import BUILT_IN, build, build_model
from attackroute.zoo.sources import load_data
from attackroute.zoo.spec import ModelSpec, Normalise
from attackroute.zoo.weights import (
    ModelCard,
    check_input,
    load_preset,
    load_weights,
    preset_folder,
    preset_names,
    preset_training,
)

__all__ = [
    "BUILT_IN",
    "ImageBatches",
    "ImageData",
    "ModelCard",
    "ModelSpec",
    "Normalise",
    "build",
    "build_model",
    "check_images",
    "check_input",
    "load_data",
    "load_preset",
    "load_weights",
    "preset_folder",
    "preset_names",
    "preset_training",
]
