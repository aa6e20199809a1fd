"""Numbers that the paper reports: Tables 1 to 4, and what its text says."""

from __future__ import annotations

from collections.abc import Mapping

VANILLA, PAT = "Vanilla", "PAT"
BASES = (VANILLA, PAT)
"""What the paper hardens: a network that was trained plainly, and one that was trained against PGD."""

# Clean, FGSM, MI-FGSM (Vanilla) or PGD (PAT), Gaussian noise; in percent.
_TABLES: Mapping[str, Mapping[str, tuple[float, float, float, float]]] = {
    "cifar10": {
        "Vanilla": (89.19, 4.88, 3.10, 25.49),
        "Vanilla_g": (92.60, 9.26, 7.48, 28.54),
        "Vanilla_w": (91.94, 10.01, 5.52, 26.08),
        "PAT": (84.95, 47.88, 46.71, 76.63),
        "PAT_g": (84.93, 49.16, 48.39, 77.16),
        "PAT_w": (85.06, 49.61, 48.20, 78.18),
    },
    "svhn": {
        "Vanilla": (94.42, 28.10, 1.86, 38.76),
        "Vanilla_g": (95.38, 56.97, 14.95, 45.47),
        "Vanilla_w": (95.48, 55.38, 14.29, 43.12),
        "PAT": (92.23, 55.25, 46.21, 78.34),
        "PAT_g": (93.56, 57.07, 52.50, 83.15),
        "PAT_w": (95.40, 57.80, 48.74, 80.23),
    },
}
OCCURRENCES: Mapping[str, Mapping[str, float]] = {
    "alexnet": {"conv1": 97, "conv2": 97, "conv3": 97, "conv4": 94, "conv5": 45},
    "vgg16": {"conv1": 70, "conv4": 48, "conv7": 60, "conv10": 67, "conv13": 38},
}
"""Table 1, in percent, by network and layer."""
GRADIENTS: Mapping[str, tuple[float, float]] = {
    "conv1": (0.0046, 4.5565),
    "conv4": (0.0014, 1.1183),
    "conv7": (0.0005, 2.1692),
    "conv10": (0.0001, 0.4096),
}
"""Table 4: gradients of hard and of weak samples, by layer; the paper does not say of which network."""
LEAST_RATIO = 990
"""Of the gradients of weak samples over those of hard ones, in Table 4."""
SHARED_BY_A_TENTH = 0.946
"""Section 5.1.3: how much the route of a tenth of the samples shares with that of all."""
TRANSPLANTED_FIRST, TRANSPLANTED_RANDOM = 0.5368, 0.0463
"""Section 4.2.2: accuracy with 30 % of the first layer's route neurons transplanted, and with random ones, at most."""
SHARE_OF_THREE = 0.018
"""There too: how much of the network's neurons 30 % of the first three layers are."""


def reported(data: str, variant: str) -> dict[str, float]:
    """Accuracies in [0, 1] of Table 2 or 3 by attack; none for what the paper does not have.

    Args:
        data: ``"cifar10"`` or ``"svhn"``.
        variant: As the paper has it, such as ``"PAT_g"``.
    """
    numbers = _TABLES.get(data, {}).get(variant)
    if numbers is None:
        return {}
    names = ("clean", "fgsm", "mi-fgsm" if variant.startswith(VANILLA) else "pgd", "gaussian-noise")
    return {name: round(value / 100, 4) for name, value in zip(names, numbers, strict=True)}
