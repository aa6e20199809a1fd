"""Attacks and corruptions behind one contract: ``attack(model, images, labels) -> images``."""

from attackroute.attacks.autoattack import AutoAttack, Square
from attackroute.attacks.contract import Perturbation, show_eps
from attackroute.attacks.corruptions import Corruption, GaussianNoise
from attackroute.attacks.gradient import FGSM, MIFGSM, PGD, PGDL2, StepLL
from attackroute.attacks.registry import attack_names, parse_attack

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
