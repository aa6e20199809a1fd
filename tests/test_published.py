"""The paper's accuracies stand beside a run in the paper's own setting, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from attackroute.paper.published import PaperSetting, is_paper_attack
from attackroute.robustness.registry import parse_attack

VANILLA_G = PaperSetting("vgg16", 1.0, "cifar10", 32, None, ("gradient",), True)
PGD = parse_attack("pgd")


def test_the_rows_of_the_paper() -> None:
    assert VANILLA_G.rows() == {
        "before": {"clean": 0.8919, "fgsm": 0.0488, "mi-fgsm": 0.031, "gaussian-noise": 0.2549},
        "after": {"clean": 0.926, "fgsm": 0.0926, "mi-fgsm": 0.0748, "gaussian-noise": 0.2854},
    }
    pat_w = replace(VANILLA_G, data="svhn", attack=PGD, penalties=("weight",)).rows()
    assert pat_w["after"] == {"clean": 0.954, "fgsm": 0.578, "pgd": 0.4874, "gaussian-noise": 0.8023}
    assert pat_w["before"]["pgd"] == 0.4621
    none = replace(VANILLA_G, attack=PGD, penalties=(), on_route=False).rows()
    assert none["before"] == none["after"]
    assert replace(VANILLA_G, attack=parse_attack("pgd:step_size=0.8/255")).rows()


@pytest.mark.parametrize(
    "change",
    [
        {"model": "vgg_small"}, {"width": 0.25}, {"data": "mnist-sample"}, {"image_size": 64}, {"on_route": False},
        {"penalties": ("gradient", "weight")}, {"attack": parse_attack("fgsm")}, {"attack": parse_attack("pgd-l2")},
        {"attack": parse_attack("pgd:eps=4/255")}, {"attack": parse_attack("pgd:steps=7")},
        {"attack": parse_attack("pgd:step_size=2/255")}, {"attack": parse_attack("pgd:restarts=2")},
    ],
)  # fmt: skip
def test_another_setting_has_no_row(change: dict[str, Any]) -> None:
    assert replace(VANILLA_G, **change).rows() == {}


@pytest.mark.parametrize(
    ("attack", "same"),
    [
        ("fgsm", True), ("mi-fgsm", True), ("pgd", True), ("gaussian-noise:std=0.1", True), ("fgsm:eps=4/255", False),
        ("pgd:steps=20", False), ("pgd:step_size=2/255", False), ("step-ll", False), ("pgd-l2", False),
    ],
)  # fmt: skip
def test_attacks_of_the_paper(attack: str, same: bool) -> None:
    assert is_paper_attack(parse_attack(attack)) == same
