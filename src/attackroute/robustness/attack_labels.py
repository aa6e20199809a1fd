"""Attacks in short, for tables."""

from __future__ import annotations

from dataclasses import fields

from attackroute.robustness.contract import Perturbation


def short(attack: Perturbation) -> str:
    """An attack's specification without what is its own default, but for radius and level."""
    name, _, settings = str(attack).partition(":")
    defaults = {item.name: item.default for item in fields(attack)}
    shown = [
        setting
        for setting in filter(None, settings.split(","))
        for key in [setting.partition("=")[0]]
        if key in ("eps", "severity") or getattr(attack, key) != defaults[key]
    ]
    return f"{name}:{','.join(shown)}" if shown else name
