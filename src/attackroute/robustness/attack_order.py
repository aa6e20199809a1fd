"""Attacks as the page names and orders them: by kind, and by radius where they have one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from attackroute.core.errors import UserError
from attackroute.robustness.attack_labels import short
from attackroute.robustness.balls import ball_of
from attackroute.robustness.contract import Perturbation, show_eps
from attackroute.robustness.registry import parse_attack

_OF_THE_RADIUS = ("eps", "step_size")


def brief(attack: str) -> str:
    """An attack without what is its own default; as it stands where it is not known here."""
    known = _known(attack)
    return attack if known is None else short(known)


def by_radius(attack: str) -> tuple[str, float, str]:
    """Sorts attacks: those of one kind by their radius."""
    known = _known(attack)
    ball = None if known is None else ball_of(known)
    return attack.partition(":")[0], 0.0 if ball is None else ball.eps, attack


def radii(attacks: Sequence[str]) -> list[str] | None:
    """The attacks' radii where nothing else tells them apart; None otherwise."""
    known = [found for found in map(_known, attacks) if found is not None]
    balls = [ball for ball in map(ball_of, known) if ball is not None]
    if len(balls) != len(attacks) or len({str(_without_radius(item)) for item in known}) != 1:
        return None
    return [show_eps(ball.eps) if ball.norm == "linf" else f"{ball.eps:g}" for ball in balls]


def _known(attack: str) -> Perturbation | None:
    try:
        return parse_attack(attack)
    except UserError:
        return None


def _without_radius(attack: Perturbation) -> dict[str, object]:
    settings = {name: value for name, value in asdict(attack).items() if name not in _OF_THE_RADIUS}
    return {"name": attack.name, **settings}
