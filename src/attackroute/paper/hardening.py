"""Tables 2 and 3: do penalties on the route harden, and more than on other neurons?

All of it comes from a hardening study's file, see :mod:`attackroute.experiments.hardening_results`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from attackroute.analysis.hardening_plan import BASES, PAT, VANILLA
from attackroute.analysis.paired import BEATS, LOSES
from attackroute.paper.claims import FAILS, HOLDS, PART, Claim, markdown, percent, verdict
from attackroute.paper.published import SHARED_BY_A_TENTH, reported
from attackroute.paper.results import Content, matching, rows

_SAME = 0.005


_LETTERS = {"g": "gradients", "w": "weights"}


_TITLES = {
    "clean": "clean",
    "fgsm": "FGSM",
    "mi-fgsm": "MI-FGSM",
    "pgd": "PGD",
    "gaussian-noise": "Gaussian",
    "autoattack": "AutoAttack",
}


def accuracies_table(study: Content, data: str) -> str:
    """Accuracies in percent, mean over seeds with the lowest and the highest, beside the paper's."""
    attacks = list(dict.fromkeys(row["attack"] for row in study["rows"]))
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in study["rows"]):
        own = rows(study, variant=variant)
        paper = reported(data, variant)
        factor = own[0]["lambda"]
        cells = []
        for attack in attacks:
            values = [100 * row["accuracy"] for row in own if row["attack"] == attack]
            there = f" [{100 * paper[attack]:.1f}]" if attack in paper else ""
            cells.append(f"{statistics.fmean(values):.1f} ({min(values):.1f}-{max(values):.1f}){there}")
        lines.append([variant, "" if factor is None else f"{factor:g}", *cells])
    return markdown(["variant", "lambda", *(_TITLES.get(name, name) for name in attacks)], lines)


def differences_table(study: Content) -> str:
    """Paired differences in points under every attack, with the verdict."""
    attacks = list(dict.fromkeys(found["attack"] for found in study["differences"]))
    pairs: dict[tuple[str, str], dict[str, Content]] = {}
    for found in study["differences"]:
        pairs.setdefault((found["first"], found["second"]), {})[found["attack"]] = found
    lines = [
        [first, second, *(_points(found[attack]) for attack in attacks)] for (first, second), found in pairs.items()
    ]
    return markdown(["first", "less", *(_TITLES.get(name, name) for name in attacks)], lines)


def claims(study: Content, data: str) -> Iterator[Claim]:
    """What the paper reads from its table."""
    seeds = f"{len(study['seeds'])} seeds"
    for base in BASES:
        for letter, what in _LETTERS.items():
            yield _claim(study, data, base, letter, what, seeds)
    for base in BASES:
        for letter in _LETTERS:
            yield from _same_defence(study, f"{base}_{letter}", seeds)
    shares = [found["share"] for found in study["overlap_with_full_route"]]
    if shares:
        lowest = min(shares)
        yield Claim(
            "a tenth of the training images gives the same route",
            f"{percent(SHARED_BY_A_TENTH)} %",
            seeds,
            f"{percent(statistics.fmean(shares))} % ({percent(lowest)} to {percent(max(shares))})",
            verdict(lowest >= SHARED_BY_A_TENTH, statistics.fmean(shares) >= SHARED_BY_A_TENTH),
        )


def _claim(study: Content, data: str, base: str, letter: str, what: str, seeds: str) -> Claim:
    ours = f"{base}_{letter}"
    paper, before = reported(data, ours), reported(data, base)
    attacks = ("fgsm", "mi-fgsm") if base == VANILLA else ("fgsm", "pgd")
    wanted = (*attacks, "gaussian-noise")
    found = {attack: _difference(study, ours, f"{base}, no penalty", attack) for attack in wanted}
    verdicts = [each["verdict"] for each in found.values()]
    gains = [each["difference"] for each in found.values()]
    controls = [
        control
        for control in ("random", "all")
        if any(_difference(study, ours, f"{ours}, {control}", attack)["verdict"] != BEATS for attack in attacks)
    ]
    whole = all(each == BEATS for each in verdicts)
    some = any(each == BEATS for each in verdicts) and LOSES not in verdicts
    return Claim(
        f"{ours} (penalty on {what}) beats the same fine-tuning without a penalty",
        ", ".join(f"{_TITLES[name]} {100 * (paper[name] - before[name]):+.1f}" for name in wanted),
        seeds,
        ", ".join(f"{_TITLES[name]} {100 * gain:+.1f}" for name, gain in zip(wanted, gains, strict=True)),
        HOLDS if whole else PART if some else FAILS,
        tuple(controls),
    )


def _same_defence(study: Content, ours: str, seeds: str) -> Iterator[Claim]:
    """Whether the route of all training images defends as that of a tenth does."""
    other = f"{ours}, route of all images"
    if not rows(study, variant=other):
        return
    attack = "pgd" if ours.startswith(PAT) else "fgsm"
    gaps = {name: _difference(study, other, ours, name)["difference"] for name in ("clean", attack)}
    yield Claim(
        f"{ours}: the route of all training images defends no better than that of a tenth",
        "within 0.5 points",
        seeds,
        ", ".join(f"{_TITLES[name]} {100 * gap:+.1f}" for name, gap in gaps.items()),
        verdict(
            all(abs(gap) <= _SAME for gap in gaps.values()),
            all(_difference(study, other, ours, name)["verdict"] not in (BEATS, LOSES) for name in gaps),
        ),
    )


def _difference(study: Content, first: str, second: str, attack: str) -> Content:
    (found,) = matching(study["differences"], first=first, second=second, attack=attack)
    return found


def _points(found: Content) -> str:
    """A difference in points, bold where it is clear over images and over seeds."""
    text = f"{100 * found['difference']:+.1f}"
    return f"**{text}**" if found["verdict"] in (BEATS, LOSES) else text
