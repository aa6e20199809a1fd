"""Attacks and corruptions by name: ``pgd``, ``pgd:eps=4/255,steps=50``, ``fog:severity=3``."""

from __future__ import annotations

from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any

from attackroute.core.errors import UserError, did_you_mean
from attackroute.robustness.contract import Perturbation
from attackroute.robustness.corruptions import KINDS

# Where each name's class lives, imported on first use, and the settings that the name itself stands for.
_HOMES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fgsm": ("gradient_attacks", "FGSM", {}),
    "step-ll": ("gradient_attacks", "StepLL", {}),
    "mi-fgsm": ("gradient_attacks", "MIFGSM", {}),
    "pgd": ("gradient_attacks", "PGD", {}),
    "pgd-l2": ("gradient_attacks", "PGDL2", {}),
    "autoattack": ("autoattack", "AutoAttack", {}),
    "square": ("autoattack", "Square", {}),
    "gaussian-noise": ("corruptions", "GaussianNoise", {}),
    **{kind: ("corruptions", "Corruption", {"kind": kind}) for kind in KINDS},
}


def attack_names() -> tuple[str, ...]:
    """All names that :func:`parse_attack` knows."""
    return tuple(_HOMES)


def parse_attack(text: str, **defaults: Any) -> Perturbation:
    """Make an attack or corruption from its name and settings.

    Args:
        text: ``NAME`` or ``NAME:key=value,key=value``; numbers may be fractions, as in ``eps=8/255``.
        defaults: Settings for what the text leaves out, where the attack has them.

    Raises:
        UserError: The name or a setting is unknown, or a value is not of the setting's kind.
    """
    name, _, settings = text.strip().partition(":")
    if name not in _HOMES:
        near = did_you_mean(name.lower(), attack_names())
        raise UserError(f"unknown attack {name!r}{near}; choose from {', '.join(attack_names())}")
    module, kind, fixed = _HOMES[name]
    cls: type[Perturbation] = getattr(import_module(f"attackroute.robustness.{module}"), kind)
    known = {item.name: item for item in fields(cls) if item.name not in fixed}
    values = {key: value for key, value in defaults.items() if key in known}
    for setting in filter(None, settings.split(",")):
        key, equals, value = (part.strip() for part in setting.partition("="))
        if key not in known or not equals:
            raise UserError(
                f"{name} has no setting {setting!r}{did_you_mean(key, known)}; "
                f"write key=value, with {', '.join(known) or 'no setting at all'}"
            )
        values[key] = _value(name, key, value, known[key])
    return cls(**fixed, **values)


def _value(attack: str, key: str, text: str, item: Any) -> Any:
    kind = str(item.type)
    if text.lower() == "none" and "None" in kind:
        return None
    try:
        if "bool" in kind:
            return {"true": True, "false": False}[text.lower()]
        if "float" in kind:
            numerator, slash, denominator = text.partition("/")
            return float(numerator) / float(denominator) if slash else float(numerator)
        return int(text) if "int" in kind else text
    except (ValueError, KeyError, ZeroDivisionError):
        example = "" if item.default is MISSING or item.default is None else f", such as {item.default}"
        raise UserError(f"{attack}: {key}={text} is not what {key} takes{example}") from None
