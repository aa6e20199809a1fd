"""Attacks, and accuracy under them.

In come a model, images in [0, 1] and labels; out go perturbed images (``attack(model, images, labels) -> images``),
and an :class:`Evaluation`: accuracies by model and attack, with signs of masked gradients. Read `attack.py` first,
then `gradient_attacks.py` and `evaluate.py`.
"""

from attackroute.robustness.attack import Perturbation as Perturbation
from attackroute.robustness.attack import show_eps as show_eps
from attackroute.robustness.autoattack import AutoAttack as AutoAttack
from attackroute.robustness.autoattack import Square as Square
from attackroute.robustness.evaluation import Evaluation as Evaluation
from attackroute.robustness.gaussian_noise import GaussianNoise as GaussianNoise
from attackroute.robustness.gradient_attacks import FGSM as FGSM
from attackroute.robustness.gradient_attacks import MIFGSM as MIFGSM
from attackroute.robustness.gradient_attacks import PGD as PGD
from attackroute.robustness.gradient_attacks import StepLL as StepLL
from attackroute.robustness.registry import attack_names as attack_names
from attackroute.robustness.registry import parse_attack as parse_attack
