"""Tables 2 and 3: do penalties on the route harden, and more than on other neurons? Read from a study's file."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

from attackroute.analysis.intervention_table import BEATS, LOSES
from attackroute.core.table import Record
from attackroute.paper.claims import NOTHING, UNDECIDED, Claim, Findings, Row, percent, verdict
from attackroute.paper.published import BASES, PAT, SHARED_BY_A_TENTH, VANILLA, reported

STUDY = "study"
"""What a study's files are called, ``study.json`` and ``study.csv``."""

_SAME = 0.005
_LETTERS = {"g": "gradients", "w": "weights"}
_TITLES = {name: name.upper() for name in ("fgsm", "mi-fgsm", "pgd")}
_TITLES |= {"gaussian-noise": "Gaussian", "autoattack": "AutoAttack"}


def accuracies_table(study: Findings, data: str) -> Iterator[Row]:
    """Accuracies in percent, mean over seeds with the lowest and the highest, beside the paper's of that data set."""
    for variant in study.distinct("variant"):
        outcomes = study.table.select(variant=variant)
        paper, lam = reported(data, variant), outcomes[0]["lambda"]
        cells = {"variant": variant, "lambda": "" if lam is None else f"{lam:g}"}
        for attack in study.distinct("attack"):
            values = [100 * accuracy for accuracy in outcomes.select(attack=attack).column("accuracy")]
            beside = f" [{100 * paper[attack]:.1f}]" if attack in paper else ""
            cells[_title(attack)] = f"{statistics.fmean(values):.1f} ({min(values):.1f}-{max(values):.1f}){beside}"
        yield cells


def differences_table(study: Findings) -> Iterator[Row]:
    """Paired differences in points under every attack, bold where they are clear over images and over seeds."""
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for each in study["differences"]:
        text = _points(each["difference"])
        clear = each["verdict"] in (BEATS, LOSES)
        cells = pairs.setdefault((each["first"], each["second"]), {"first": each["first"], "less": each["second"]})
        cells[_title(each["attack"])] = f"**{text}**" if clear else text
    yield from pairs.values()


def study_terms(study: Findings) -> str:
    """On what a study was made and judged, and whether it shows signs of masked gradients."""
    checks, attacked = study["checks"], study["autoattack_samples"]
    suspicious = sorted({check["variant"] for check in checks if check["verdict"] == "suspicious"})
    return (
        f"Networks of seeds {', '.join(map(str, study['seeds']))}, trained for {study['training']['epochs']} epochs on "
        f"{study['train_samples']:,} images less {study['validation']:.0%} that chose lambda, PAT against "
        f"`{study['training_attack']}`, fine-tuned for {study['fine_tuning']['epochs']} more; judged on "
        f"{study['test_samples']:,} test images{f', AutoAttack on {attacked}' if attacked else ''}. "
        f"Lambda: {study['rule']}. "
        f"Signs of masked gradients, first seed: {', '.join(suspicious) or 'none'} ({len(checks)} checks)."
    )


def hardening_claims(study: Findings, data: str) -> Iterator[Claim]:
    """What the paper reads from its table of that data set."""
    pairs = [(base, letter) for base in BASES for letter in _LETTERS]
    for base, letter in pairs:
        yield _penalty_claim(study, data, base, letter)
    for base, letter in pairs:
        yield from _same_defence(study, f"{base}_{letter}")
    shares = [each["share"] for each in study["overlap_with_full_route"]]
    if shares:
        yield Claim(
            text="a tenth of the training images gives the same route",
            paper=f"{percent(SHARED_BY_A_TENTH)} %",
            found=f"{percent(statistics.fmean(shares))} % ({percent(min(shares))} to {percent(max(shares))})",
            verdict=verdict(min(shares) >= SHARED_BY_A_TENTH, statistics.fmean(shares) >= SHARED_BY_A_TENTH),
        )


def _penalty_claim(study: Findings, data: str, base: str, letter: str) -> Claim:
    ours = f"{base}_{letter}"
    paper, before = reported(data, ours), reported(data, base)
    attacks = ("fgsm", "mi-fgsm") if base == VANILLA else ("fgsm", "pgd")
    claimed = (*attacks, "gaussian-noise")
    differences = {attack: _difference(study, ours, f"{base}, no penalty", attack) for attack in claimed}
    verdicts = [each["verdict"] for each in differences.values()]
    controls = [
        control
        for control in ("random", "all")
        if any(_difference(study, ours, f"{ours}, {control}", attack)["verdict"] != BEATS for attack in attacks)
    ]
    return Claim(
        text=f"{ours} (penalty on {_LETTERS[letter]}) beats the same fine-tuning without a penalty",
        paper=", ".join(f"{_title(name)} {_points(paper[name] - before[name])}" for name in claimed),
        found=_listed(differences),
        verdict=verdict(set(verdicts) == {BEATS}, BEATS in verdicts and LOSES not in verdicts)
        if {BEATS, LOSES} & {*verdicts}
        else UNDECIDED,
        equals=tuple(controls),
    )


def _same_defence(study: Findings, ours: str) -> Iterator[Claim]:
    """Whether the route of all training images defends as that of a tenth does."""
    other = f"{ours}, route of all images"
    if other not in study.distinct("variant"):
        return
    attack = "pgd" if ours.startswith(PAT) else "fgsm"
    differences = {name: _difference(study, other, ours, name) for name in ("clean", attack)}
    yield Claim(
        text=f"{ours}: the route of all training images defends no better than that of a tenth",
        paper="within 0.5 points",
        found=_listed(differences),
        verdict=verdict(
            all(abs(each["difference"]) <= _SAME for each in differences.values()),
            all(each["verdict"] not in (BEATS, LOSES) for each in differences.values()),
        )
        if _difference(study, ours, f"{ours.partition('_')[0]}, no penalty", attack)["verdict"] == BEATS
        else NOTHING,  # a penalty that does nothing tells no route from another
    )


def _difference(study: Findings, first: str, second: str, attack: str) -> Record:
    (difference,) = study.entries("differences", first=first, second=second, attack=attack)
    return difference


def _title(attack: str) -> str:
    return _TITLES.get(attack, attack)


def _listed(differences: Mapping[str, Record]) -> str:
    return ", ".join(f"{_title(attack)} {_points(each['difference'])}" for attack, each in differences.items())


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"
