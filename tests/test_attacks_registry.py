"""Attacks by name, and back."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

import attackroute as ar
from attackroute.core.errors import UserError
from attackroute.robustness.attack import Perturbation, show_eps
from attackroute.robustness.autoattack import AutoAttack, Square
from attackroute.robustness.gaussian_noise import GaussianNoise
from attackroute.robustness.gradient_attacks import FGSM, MIFGSM, PGD, StepLL
from attackroute.robustness.registry import attack_names, parse_attack
from model_checks import one_line

EXAMPLES = {
    "fgsm": FGSM(),
    "fgsm:eps=4/255": FGSM(4 / 255),
    "step-ll:eps=0.02": StepLL(0.02),
    "mi-fgsm:eps=1,steps=3,step_size=2/255,decay=0.5": MIFGSM(1.0, 3, 2 / 255, 0.5),
    "pgd:steps=50, restarts=2": PGD(steps=50, restarts=2),
    "pgd:random_start=false,seed=-3": PGD(random_start=False, seed=-3),
    " pgd:step_size=none ": PGD(),
    "gaussian-noise": GaussianNoise(0.18),
    "gaussian-noise:std=0.1": GaussianNoise(std=0.1),
    "gaussian-noise:std=1/10,seed=2": GaussianNoise(0.1, seed=2),
}
WITH_EXTRAS = {
    "autoattack:eps=4/255": ("pyautoattack", lambda: AutoAttack(4 / 255)),
    "square:eps=2/255,queries=100": ("pyautoattack", lambda: Square(2 / 255, 100)),
}


def check(text: str, attack: Perturbation) -> None:
    found = parse_attack(text)
    assert found == attack and type(found) is type(attack)
    assert parse_attack(str(found)) == found
    assert str(parse_attack(str(found))) == str(found)
    assert str(found).partition(":")[0] == text.strip().partition(":")[0] == found.name
    assert json.loads(json.dumps(found.to_json()))["name"] == found.name
    assert len({found, attack}) == 1
    with pytest.raises(FrozenInstanceError):
        found.seed = 1


@pytest.mark.parametrize("text", [*EXAMPLES, *WITH_EXTRAS])
def test_names_and_settings(text):
    if text in WITH_EXTRAS:
        pytest.importorskip(WITH_EXTRAS[text][0])
    check(text, EXAMPLES[text] if text in EXAMPLES else WITH_EXTRAS[text][1]())


def test_every_name_makes_an_attack():
    pytest.importorskip("pyautoattack")
    assert len(attack_names()) == len(set(attack_names())) == 7
    for name in attack_names():
        check(name, parse_attack(name))
    assert ar.parse_attack is parse_attack


@pytest.mark.parametrize("eps", [0.0, 8 / 255, 0.5 / 255, 0.1, 1 / 3, 1.0, 1e-7, 127.5 / 255])
def test_radii_print_as_they_are(eps):
    assert parse_attack(f"fgsm:eps={show_eps(eps)}").eps == eps
    assert str(FGSM(pytest.importorskip("numpy").float64(eps))) == str(FGSM(eps))


def test_defaults_fill_what_the_text_leaves_out():
    assert parse_attack("pgd:steps=5", eps=0.1, steps=7, std=2) == PGD(0.1, 5)
    assert parse_attack("gaussian-noise:std=0.1", std=2, eps=0.1) == GaussianNoise(std=0.1)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("pdg", "unknown attack 'pdg'; did you mean pgd"),
        ("FGSM", "unknown attack 'FGSM'; did you mean fgsm"),
        ("gaussian-nose", "did you mean gaussian-noise"),
        ("", "unknown attack ''; choose from fgsm"),
        ("pgd:step=3", "pgd has no setting 'step=3'; did you mean steps"),
        ("pgd:eps", "pgd has no setting 'eps'"),
        ("fgsm:steps=3", "no setting 'steps=3'"),
        ("pgd:eps=8/0", "eps=8/0 is not what eps takes, such as"),
        ("pgd:eps=big", "eps=big"),
        ("pgd:steps=3.5", "steps=3.5"),
        ("pgd:random_start=maybe", "random_start=maybe.*such as True"),
        ("gaussian-noise:severity=3", "no setting 'severity=3'; write key=value, with std, seed"),
        ("gaussian-noise:std=-1", "std -1.0 is not a standard deviation"),
        ("gaussian-noise:std=nan", "std nan"),
        ("autoattack:eps=3", "eps 3.0 is out of range"),
        ("autoattack:norm=l2", "no setting 'norm=l2'"),
        ("square:queries=0", "queries 0"),
    ],
)
def test_bad_names_and_settings(text, part):
    with one_line(match=part):
        parse_attack(text)


@pytest.mark.parametrize("name", ["autoattack", "square"])
def test_missing_extras_are_named_at_once(name, monkeypatch):
    monkeypatch.setattr("attackroute.robustness.attack.find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf'{name} needs an optional package: pip install "attackroute\[autoattack\]"'):
        parse_attack(name)
