"""Hardening: from a network, images and a route to a network that is trained with penalties on the route's neurons.

Read :mod:`attackroute.hardening.harden` first. The penalties (Eqs. (10) and (13), and the noise on the route) serve in
any training loop; :mod:`attackroute.hardening.training` is the one here, which repeats bit for bit and can be resumed.
"""

from attackroute.hardening.gradient_penalty import GradientPenalty as GradientPenalty
from attackroute.hardening.harden import HardenResult as HardenResult
from attackroute.hardening.harden import harden as harden
from attackroute.hardening.settings import HardenSettings as HardenSettings
from attackroute.hardening.settings import TrainSettings as TrainSettings
from attackroute.hardening.stabilisation_penalty import StabilisationPenalty as StabilisationPenalty
from attackroute.hardening.training import train as train
from attackroute.hardening.weight_penalty import WeightPenalty as WeightPenalty
