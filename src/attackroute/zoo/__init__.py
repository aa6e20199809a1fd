"""Networks, their weights, and data sets.

In come names (``vgg16``, ``preset:vgg16-cifar10``, ``torchvision:NAME``, ``cifar10:PATH``) and files; out go networks
that take images in [0, 1], and labelled images. Read `networks.py` first, then `weights.py`, which opens trained ones,
and `data.py`, which opens data.
"""

from attackroute.zoo.data import ImageBatches as ImageBatches
from attackroute.zoo.data import ImageData as ImageData
from attackroute.zoo.data import load_data as load_data
from attackroute.zoo.networks import BUILT_IN as BUILT_IN
from attackroute.zoo.networks import build as build
from attackroute.zoo.networks import build_model as build_model
from attackroute.zoo.spec import ModelSpec as ModelSpec
from attackroute.zoo.spec import Normalise as Normalise
from attackroute.zoo.weights import ModelCard as ModelCard
from attackroute.zoo.weights import check_input as check_input
from attackroute.zoo.weights import load_preset as load_preset
from attackroute.zoo.weights import load_weights as load_weights
from attackroute.zoo.weights import preset_folder as preset_folder
from attackroute.zoo.weights import preset_names as preset_names
