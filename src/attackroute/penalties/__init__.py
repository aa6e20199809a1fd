"""Penalties on a route's neurons for any training loop: their loss gradients (Eq. 10), their weights (Eq. 13), and the
noise in them."""

from attackroute.penalties.gradient import APPROXIMATE, EXACT, GradientPenalty
from attackroute.penalties.stabilisation import StabilisationPenalty
from attackroute.penalties.weight import WeightPenalty

__all__ = ["APPROXIMATE", "EXACT", "GradientPenalty", "StabilisationPenalty", "WeightPenalty"]
