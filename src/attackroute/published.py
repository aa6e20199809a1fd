"""Accuracies that the paper reports for hardened networks (Tables 2 and 3), for runs in its own setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attackroute.attacks import PGD, Perturbation
from attackroute.penalised import GRADIENT, WEIGHT

_EPS = 8 / 255
_STEPS = 10

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
_LETTERS = {GRADIENT: "_g", WEIGHT: "_w"}


@dataclass(frozen=True)
class PaperSetting:
    """What a run has to share with the paper's to be put beside its numbers.

    Attributes:
        model: Name of the network.
        width: Factor on its channels.
        data: Name of the data set.
        image_size: Height and width.
        attack: What it was trained against.
        penalties: What was punished.
        on_route: Whether that was the route's neurons, by the exact gradient, on kernels as they are.
    """

    model: str
    width: float
    data: str
    image_size: int
    attack: Perturbation | None
    penalties: tuple[str, ...]
    on_route: bool

    def rows(self) -> dict[str, dict[str, float]]:
        """The paper's accuracies in [0, 1] of the network before and after, by attack; none in another setting."""
        table = _TABLES.get(self.data)
        if table is None or (self.model, self.width, self.image_size) != ("vgg16", 1.0, 32):
            return {}
        if len(self.penalties) > 1 or not (self.on_route or not self.penalties):
            return {}
        base = self._base()
        if base is None:
            return {}
        after = base + "".join(_LETTERS[name] for name in self.penalties)
        names = ("clean", "fgsm", "mi-fgsm" if base == "Vanilla" else "pgd", "gaussian-noise")
        return {
            when: {name: round(value / 100, 4) for name, value in zip(names, table[title], strict=True)}
            for when, title in (("before", base), ("after", after))
        }

    def _base(self) -> str | None:
        if self.attack is None:
            return "Vanilla"
        attack = self.attack
        if type(attack) is not PGD or not (abs(attack.eps - _EPS) < 1e-9 and attack.steps == _STEPS):
            return None
        in_tenths = attack.step_size is None or abs(attack.step_size - _EPS / 10) < 1e-9
        return "PAT" if in_tenths and attack.restarts == 1 else None


def is_paper_attack(attack: Perturbation | None) -> bool:
    """Whether an attack has the paper's parameters; the paper does not state the spread of its Gaussian noise."""
    if attack is None or attack.name == "gaussian-noise":
        return True
    plain = attack.to_json()
    return (
        plain["name"] in ("fgsm", "mi-fgsm", "pgd")
        and abs(plain["eps"] - _EPS) < 1e-9
        and plain.get("steps", _STEPS) == _STEPS
        and plain.get("step_size") is None
    )
