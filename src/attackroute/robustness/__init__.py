"""Attacks, corruptions, and accuracy under them.

In come a model, images in [0, 1] and labels; out go perturbed images (``attack(model, images, labels) -> images``),
and an :class:`Evaluation`: accuracies by model and attack, with signs of masked gradients. Read `attack.py` first,
then `gradient_attacks.py` and `evaluate.py`.
"""

from attackroute.robustness.attack import Perturbation, show_eps
from attackroute.robustness.autoattack import AutoAttack, Square
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
