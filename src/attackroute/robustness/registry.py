"""Attacks by name: ``pgd``, ``pgd:eps=4/255,steps=50``, ``gaussian-noise:std=0.1``; in short, and in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from attackroute.core.errors import UserError, did_you_mean
from attackroute.robustness.attack import Attack, Perturbation, show_eps
from attackroute.robustness.autoattack import AutoAttack, Square
from attackroute.robustness.gaussian_noise import GaussianNoise
from attackroute.robustness.gradient_attacks import FGSM, MIFGSM, PGD, StepLL
from attackroute.robustness.own_attack import own_attack

_CLASSES: dict[str, type[Perturbation]] = {
    cls.name: cls for cls in (FGSM, StepLL, MIFGSM, PGD, AutoAttack, Square, GaussianNoise)
}


def attack_names() -> tuple[str, ...]:
    """All names that :func:`parse_attack` knows."""
    return tuple(_CLASSES)


def parse_attack(text: str, **defaults: Any) -> Perturbation:
    """Make an attack from its name and settings.

    Args:
        text: ``NAME`` or ``NAME:key=value,key=value``; numbers may be fractions, as in ``eps=8/255``.
        defaults: Settings for what the text leaves out, where the attack has them.

    Raises:
        UserError: The name or a setting is unknown, or a value is not of the setting's kind.
    """
    name, _, settings = text.strip().partition(":")
    if name not in _CLASSES:
        near = did_you_mean(name.lower(), attack_names())
        raise UserError(f"unknown attack {name!r}{near}; choose from {', '.join(attack_names())}")
    cls = _CLASSES[name]
    parameters = {item.name: item for item in fields(cls)}
    values = {key: value for key, value in defaults.items() if key in parameters}
    for setting in filter(None, settings.split(",")):
        key, equals, value = (part.strip() for part in setting.partition("="))
        if key not in parameters or not equals:
            raise UserError(
                f"{name} has no setting {setting!r}{did_you_mean(key, parameters)}; "
                f"write key=value, with {', '.join(parameters) or 'no setting at all'}"
            )
        values[key] = _value(name, key, value, parameters[key])
    return cls(**values)


def as_attack(attack: Attack | str, **defaults: Any) -> Perturbation:
    """An attack by its specification, an attack itself, or any callable ``(model, images, labels) -> images``.

    Objects of torchattack, torchattacks and foolbox are attacks too, see :mod:`attackroute.robustness.own_attack`.
    """
    if isinstance(attack, str):
        return parse_attack(attack, **defaults)
    return attack if isinstance(attack, Perturbation) else _own(attack)


def named_attacks(
    attacks: Mapping[str, Attack | str] | Iterable[Attack | str] | Attack | str, **defaults: Any
) -> dict[str, Perturbation]:
    """One attack or several, each once, by name; a mapping names those of the user's own.

    Raises:
        UserError: There is none, one is no attack, or two have one name.
    """
    several: Iterable[Attack | str]
    if isinstance(attacks, Mapping):
        known = (str, Perturbation)
        several = [each if isinstance(each, known) else _own(each, name) for name, each in attacks.items()]
    else:
        several = [attacks] if isinstance(attacks, str) or not isinstance(attacks, Iterable) else attacks
    named: dict[str, Perturbation] = {}
    for attack in (as_attack(each, **defaults) for each in several):
        if named.setdefault(str(attack), attack) != attack:
            raise UserError(f"two attacks are called {str(attack)!r}; give names, as in {{'one': ..., 'other': ...}}")
    if not named:
        raise UserError("no attack is given: pass one by name, such as pgd")
    return named


def by_radius(attack: str) -> tuple[str, float, str]:
    """Sorts specifications: those of one attack by their radius."""
    perturbation = _parsed(attack)
    radius = None if perturbation is None else perturbation.radius
    return attack.partition(":")[0], radius or 0.0, attack


def radii(attacks: Sequence[str]) -> list[str] | None:
    """The attacks' radii where nothing else tells them apart; None otherwise."""
    perturbations = [perturbation for perturbation in map(_parsed, attacks) if perturbation is not None]
    known = [perturbation.radius for perturbation in perturbations if perturbation.radius is not None]
    others = [{**item.to_json(), "eps": None, "step_size": None} for item in perturbations]
    if not known or len(known) != len(attacks) or any(settings != others[0] for settings in others):
        return None
    return list(map(show_eps, known))


def _own(attack: object, name: str | None = None) -> Perturbation:
    """An attack of the user's own, under a name that is none of those here: a function may be called pgd."""
    own = own_attack(attack, name)
    return own if _parsed(own.name) is None else replace(own, name=f"own {own.name}")


def _parsed(attack: str) -> Perturbation | None:
    try:
        return parse_attack(attack)
    except UserError:
        return None


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
