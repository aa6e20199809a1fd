"""Attacks, and accuracy under them.

In come a model, images in [0, 1] and labels; out go perturbed images (``attack(model, images, labels) -> images``),
and an :class:`Evaluation`: accuracies by model and attack, with signs of masked gradients. Read `attack.py` first,
then `gradient_attacks.py` and `evaluate.py`.
"""
