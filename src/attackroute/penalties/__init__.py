"""Penalties on a route's neurons for any training loop: their loss gradients (Eq. 10) and their weights (Eq. 13)."""

from attackroute.penalties.gradient import APPROXIMATE, EXACT, GradientPenalty
from attackroute.penalties.weight import WeightPenalty

__all__ = ["APPROXIMATE", "EXACT", "GradientPenalty", "WeightPenalty"]
