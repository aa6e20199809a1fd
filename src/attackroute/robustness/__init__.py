"""Attacks, corruptions, accuracy under them, and signs of masked gradients."""

from __future__ import annotations

from attackroute.robustness.autoattack import AutoAttack, Square
from attackroute.robustness.contract import Perturbation, show_eps
from attackroute.robustness.corruptions import Corruption, GaussianNoise
from attackroute.robustness.gradient_attacks import FGSM, MIFGSM, PGD, PGDL2, StepLL
from attackroute.robustness.registry import attack_names, parse_attack

__all__ = [
    "FGSM",
    "MIFGSM",
    "PGD",
    "PGDL2",
    "AutoAttack",
    "Corruption",
    "GaussianNoise",
    "Perturbation",
    "Square",
    "StepLL",
    "attack_names",
    "parse_attack",
    "show_eps",
]
