"""Claims, their rules and the page of a reproduction, on results that are made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from attackroute.core.document import Document
from attackroute.core.errors import UserError
from attackroute.core.table import Table
from attackroute.paper import hardening_tables, tables
from attackroute.paper.claims import (
    FAILS,
    HOLDS,
    NOTHING,
    PART,
    UNDECIDED,
    Findings,
    NetworkResults,
    by_count,
    markdown,
    verdict,
)
from attackroute.paper.page import blocks, claims_of, fill, skeleton
from attackroute.paper.published import reported

LAYERS = ("features.0", "features.3", "features.7")


def network(name: str = "vgg16-x", layers: tuple[str, ...] = LAYERS, **parts: Any) -> NetworkResults:
    about = {"layers": layers, "neurons": 24, "parameters": 100, "accuracy": 0.9, "images": 1000}
    return NetworkResults(name, about, {part.replace("_", "-"): findings(content) for part, content in parts.items()})


def findings(content: dict[str, Any]) -> Findings:
    return Findings(Table.of(content["rows"]), content)


Made = Callable[[NetworkResults, Findings], Iterator[Any]]


def made(function: Made, content: dict[str, Any]) -> list[Any]:
    """What a function makes of one experiment on one network."""
    return list(function(network(), findings(content)))


def text(function: Made, content: dict[str, Any]) -> str:
    return markdown(made(function, content))


def test_verdicts_by_hand() -> None:
    assert [verdict(True, True), verdict(False, True), verdict(False, False)] == [HOLDS, PART, FAILS]
    assert [by_count(4, 4), by_count(3, 4), by_count(2, 4), by_count(0, 4)] == [HOLDS, PART, FAILS, FAILS]


def test_a_table_has_one_line_for_each_row() -> None:
    rows = [{"a": "1", "b": "2"}, {"a": "3", "c": "4"}]
    assert markdown(rows) == "| a | b | c |\n| --- | --- | --- |\n| 1 | 2 |  |\n| 3 |  | 4 |"
    assert markdown([]) == ""


def test_layers_are_named_as_in_the_paper() -> None:
    net = network()
    assert net.family == "vgg16"
    assert [net.title(layer) for layer in LAYERS] == ["conv1", "conv2", "conv3"]
    assert net.group_title("features.3") == "conv2"
    assert net.group_title("features.0+features.3") == "first 2 layers"
    assert net.group_title("features.0+features.7") == "2 layers"
    assert net.group_title("+".join(LAYERS)) == "all 3 layers"
    assert network(layers=("conv1", "layer1.0.conv1")).title("layer1.0.conv1") == "layer1.0.conv1"


def test_rows_are_found_by_their_columns() -> None:
    values = ("route", None, 1.0), ("random off-route", 0, 2.0), ("random off-route", 1, 4.0), ("weight", None, 8.0)
    rows = [{"criterion": name, "draw": draw, "value": value} for name, draw, value in values]
    judged = ("weight", "undecided against", "a"), ("random off-route", "beats", "a"), ("gradient", "loses to", "b")
    verdicts = [{"control": name, "verdict": word, "layers": layers} for name, word, layers in judged]
    criteria = findings({"rows": rows, "verdicts": verdicts})
    assert criteria.mean("value", criterion="random off-route") == 3.0
    assert criteria.mean("value", criterion="gradient") is None
    assert criteria.rivals == ["weight"]
    assert criteria.unbeaten(layers="a") == ("weight",)
    read = Findings.of(Document("x", {"seed": 3}, about={"verdicts": []}))
    assert read["seed"] == 3 and read.unbeaten(layers="a") == ()


def occurrence(values: list[float], chance: float = 0.2) -> dict[str, Any]:
    def rows(of: str, numbers: list[float], draw: int | None) -> list[dict[str, Any]]:
        return [
            {"layer": layer, "measure": "occurrence", "of": of, "draw": draw, "value": value}
            for layer, value in zip(LAYERS, numbers, strict=True)
        ]

    return {
        "rows": [
            *rows("clean", values, None), *rows("activation", [0.99] * 3, None), *rows("gradient", [0.1] * 3, None),
            *rows("random routes", [chance] * 3, 0), *rows("random routes", [chance] * 3, 1),
        ]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.8, 0.5, 0.4], HOLDS), ([0.4, 0.5, 0.8], PART), ([0.8, 0.1, 0.4], PART), ([0.1, 0.5, 0.4], FAILS)],
)
def test_occurrence_must_fall_and_be_above_chance(values: list[float], expected: str) -> None:
    (claim,) = made(tables.occurrence_claims, occurrence(values))
    assert claim.verdict == expected
    assert claim.equals == ("activation",)
    assert claim.paper == "70 to 38 %"


def test_table_1_has_the_papers_numbers_beside_ours() -> None:
    table = text(tables.occurrence_table, occurrence([0.8, 0.5, 0.4]))
    assert "| conv1 | 70 | 80.0 | 99.0 | 10.0 | 20.0 |" in table
    assert "| conv2 |  | 50.0 |" in table  # the paper has conv4, not conv2


def responses(beats: list[bool]) -> dict[str, Any]:
    rows = [
        {"layer": layer, "quantity": "gradient", "attack": None, "criterion": name, "draw": None, "mean": value}
        for layer, good in zip(LAYERS, beats, strict=True)
        for name, value in (("route", 3.0 if good else 1.0), ("off-route", 2.0), ("weight", 5.0))
    ]
    verdicts = [
        {"layer": layer, "quantity": "gradient", "attack": None, "control": name, "beats": good and name != "weight"}
        for layer, good in zip(LAYERS, beats, strict=True)
        for name in ("off-route", "random off-route", "weight")
    ]
    return {"rows": rows, "verdicts": verdicts}


def test_gradients_are_counted_by_layers() -> None:
    (claim,) = made(tables.response_claims, responses([True, True, False]))
    assert claim.verdict == PART
    assert claim.found == "in 2 of 3 layers, 1.50 times in the first, 1.50 in the median"
    assert claim.equals == ("weight",)
    assert "| 2 of 3 | 2 of 3 | 0 of 3 |" in text(tables.responses_table, responses([True, True, False]))


def transplants(route: float, random: float, three: float, clear: bool = True) -> dict[str, Any]:
    group = "+".join(LAYERS)

    def row(criterion: str, layers: str, value: float, draw: int | None = None) -> dict[str, Any]:
        return {"criterion": criterion, "layers": layers, "attack": "pgd", "share": 0.3, "draw": draw,
                "accuracy": value, "share_of_network": 0.02 * len(layers.split("+"))}  # fmt: skip

    verdicts = [
        {"control": control, "layers": layers, "attack": "pgd", "verdict": "beats" if clear else "undecided against"}
        for control in ("random off-route", "weight")
        for layers in (LAYERS[0], group)
    ]
    verdicts[-1]["verdict"] = verdicts[-2]["verdict"] = "loses to"
    rows = [
        row("untouched", "", 0.0), row("route", LAYERS[0], route), row("random off-route", LAYERS[0], random, 0),
        row("weight", LAYERS[0], 0.4), row("route", group, three), row("random off-route", group, 0.2, 0),
        row("weight", group, 0.3),
    ]  # fmt: skip
    return {"rows": rows, "verdicts": verdicts}


@pytest.mark.parametrize(
    ("content", "first", "together"),
    [
        (transplants(0.54, 0.02, 0.95), HOLDS, HOLDS),
        (transplants(0.3, 0.02, 0.5), PART, PART),
        (transplants(0.54, 0.2, 0.95), PART, HOLDS),
        (transplants(0.3, 0.2, 0.95, clear=False), FAILS, FAILS),
    ],
)
def test_transplants_must_repair_and_random_ones_must_not(content: Any, first: str, together: str) -> None:
    claims = made(tables.transplant_claims, content)
    assert [claim.verdict for claim in claims] == [first, together]
    assert "with 6.0 %" in claims[1].found
    assert "weight" in claims[1].equals
    table = text(tables.transplant_layers_table, content)
    assert "| pgd | 0.0 | conv1 |" in table and "| all 3 layers |" in table


@pytest.mark.parametrize(
    ("ours", "random", "equal", "expected"),
    [(0.2, 0.95, "beats", HOLDS), (0.6, 0.95, "beats", PART), (0.2, 0.8, "beats", PART),
     (0.2, 0.95, "undecided against", HOLDS), (0.9, 0.95, "undecided against", FAILS)],
)  # fmt: skip
def test_silence_must_destroy_and_no_random_one(ours: float, random: float, equal: str, expected: str) -> None:
    rows = [
        {"criterion": name, "beta": 0.5, "accuracy": value}
        for name, value in (("route", ours), ("random off-route", random))
    ]
    verdicts = [{"control": "random off-route", "beta": 0.5, "verdict": equal}]
    (claim,) = made(tables.weakening_claims, {"main_beta": 0.5, "rows": rows, "verdicts": verdicts})
    assert claim.verdict == expected
    assert claim.equals == (() if equal == "beats" else ("random off-route",))


def test_attention_is_judged_by_the_paired_interval() -> None:
    def row(images: str, criterion: str, measure: str, value: float, low: float) -> dict[str, Any]:
        return {"images": images, "criterion": criterion, "measure": measure, "mean": value,
                "route_minus_this_low": low}  # fmt: skip

    rows = [
        row("clean", "route", "energy inside", 0.5, 0.0), row("clean", "off-route", "energy inside", 0.3, 0.1),
        row("clean", "weight", "energy inside", 0.4, -0.1), row("pgd", "route", "shift", 0.2, 0.0),
        row("pgd", "off-route", "shift", 0.4, -0.3), row("pgd", "weight", "shift", 0.1, 0.05),
        row("pgd", "route", "energy inside", 0.2, 0.0),
    ]  # fmt: skip
    inside, shift = made(tables.attention_claims, {"layer": LAYERS[2], "rows": rows})
    assert (inside.verdict, inside.equals) == (HOLDS, ("weight",))
    assert (shift.verdict, shift.equals) == (FAILS, ())


def hardness_content(low: float = 0.6, lead: float = 0.1) -> dict[str, Any]:
    def judgement(predictor: str, value: float) -> dict[str, Any]:
        return {
            "target": "fgsm:eps=1/255", "predictor": predictor, "statistic": "AUROC", "value": value,
            "low": low, "high": 0.9, "lead": lead, "lead_low": lead, "lead_high": lead,
        }  # fmt: skip

    gradients = [
        {"layer": layer, "hard_mean": 1.0, "weak_mean": weak, "hard_median": 1.0, "weak_median": 2.0}
        for layer, weak in zip(LAYERS, (10.0, 100.0, 0.5), strict=True)
    ]
    attack = {"bins_hardest_first": [[10, 1]] * 9 + [[10, 8]], "gradients": gradients}
    names = ("hardness V", "loss", "margin", "input gradient", "V on all neurons", "V on random neurons 0")
    return {"attacks": {"fgsm:eps=1/255": attack}, "rows": [judgement(name, 0.8) for name in names]}


def test_hardness_by_hand() -> None:
    content = hardness_content()
    (claim,) = made(tables.gradient_claims, content)
    assert claim.verdict == PART and claim.found == "in 2 of 3 layers, 10 times in the median"
    (claim,) = made(tables.prediction_claims, content)
    assert claim.verdict == HOLDS and claim.equals == () and "fooled 1 of 10 hardest, 8 of 10 weakest" in claim.found
    (claim,) = made(tables.prediction_claims, hardness_content(low=0.4, lead=-0.01))
    assert claim.verdict == PART and claim.equals == (
        "loss",
        "margin",
        "input gradient",
        "V on all neurons",
        "V on random neurons",
    )
    assert "| conv1 | 0.0046 / 4.5565 | 1 / 10 | 1 / 2 |" in text(tables.gradients_table, content)
    assert "| 10 | 1 | 1 | 1 | 1 | 1 | 1 | 1 | 1 | 1 | 8 |" in text(tables.bins_table, content)


def study_content(gain: float, found: str) -> Findings:
    attacks = ("clean", "fgsm", "mi-fgsm", "pgd", "gaussian-noise")
    bases = [(base, f"{base}_{letter}") for base in ("Vanilla", "PAT") for letter in "gw"]
    pairs = [(name, f"{base}, no penalty") for base, name in bases]
    pairs += [(name, f"{name}{control}") for _, name in bases for control in (", random", ", all")]
    rows = [
        {"variant": "PAT_g", "lambda": 0.5, "attack": attack, "accuracy": value, "seed": seed}
        for attack in attacks
        for seed, value in ((1, 0.4), (2, 0.5))
    ]
    differences = [
        {"first": first, "second": second, "attack": attack, "difference": gain, "verdict": found}
        for first, second in pairs
        for attack in attacks
    ]
    overlaps = [{"share": 0.95}, {"share": 0.93}]
    return findings({"seeds": [1, 2], "rows": rows, "differences": differences, "overlap_with_full_route": overlaps})


def test_hardening_must_beat_the_same_without_a_penalty() -> None:
    claims = list(hardening_tables.hardening_claims(study_content(0.02, "beats"), "cifar10"))
    assert [claim.verdict for claim in claims] == [HOLDS] * 4 + [FAILS]
    assert claims[0].paper == "FGSM +4.4, MI-FGSM +4.4, Gaussian +3.0"
    assert claims[2].paper == "FGSM +1.3, PGD +1.7, Gaussian +0.5"
    assert claims[2].found == "FGSM +2.0, PGD +2.0, Gaussian +2.0"
    assert claims[0].equals == ()
    claims = list(hardening_tables.hardening_claims(study_content(0.02, "undecided against"), "cifar10"))
    assert [claim.verdict for claim in claims] == [UNDECIDED] * 4 + [FAILS]
    assert claims[0].equals == ("random", "all") and claims[4].equals is None
    claims = list(hardening_tables.hardening_claims(study_content(-0.02, "loses to"), "cifar10"))
    assert [claim.verdict for claim in claims] == [FAILS] * 5


@pytest.mark.parametrize(("penalty", "expected"), [("beats", HOLDS), ("undecided against", NOTHING)])
def test_a_penalty_that_does_nothing_tells_no_route_from_another(penalty: str, expected: str) -> None:
    study = study_content(0.02, penalty)
    other = "PAT_g, route of all images"
    more = [
        {"first": other, "second": "PAT_g", "attack": attack, "difference": 0.001, "verdict": "undecided against"}
        for attack in ("clean", "pgd")
    ]
    rows = [*study.table, {**study.table[0], "variant": other}]
    study = findings({**study.facts, "rows": rows, "differences": [*study["differences"], *more]})
    (claim,) = [each for each in hardening_tables.hardening_claims(study, "cifar10") if "all training" in each.text]
    assert claim.verdict == expected and claim.cells["controls that do as well"] == "no control was run"


def test_the_papers_numbers_are_those_of_its_tables() -> None:
    assert reported("cifar10", "Vanilla_g") == {
        "clean": 0.926, "fgsm": 0.0926, "mi-fgsm": 0.0748, "gaussian-noise": 0.2854
    }  # fmt: skip
    assert reported("svhn", "PAT_w") == {"clean": 0.954, "fgsm": 0.578, "pgd": 0.4874, "gaussian-noise": 0.8023}
    assert reported("svhn", "PAT_w, random") == reported("mnist", "PAT") == {}


def test_table_2_has_the_papers_accuracies() -> None:
    table = markdown(hardening_tables.accuracies_table(study_content(0.0, "beats"), "cifar10"))
    assert "| PAT_g | 0.5 | 45.0 (40.0-50.0) [84.9] | 45.0 (40.0-50.0) [49.2] |" in table
    assert "**+2.0**" in markdown(hardening_tables.differences_table(study_content(0.02, "beats")))
    assert "**" not in markdown(hardening_tables.differences_table(study_content(0.02, "undecided against")))


def test_the_page_keeps_what_stands_outside_the_marks() -> None:
    page = skeleton().replace("## Fig. 2", "Our words.\n\n## Fig. 2")
    once = fill(page, {"fig2": "first $1 \\1"})
    assert "Our words." in once and "<!-- fig2 -->\n\nfirst $1 \\1\n\n<!-- end of fig2 -->" in once
    twice = fill(once, {"fig2": "second"})
    assert "first" not in twice and "second" in twice
    assert fill(twice, {"fig2": "second"}) == twice


@pytest.mark.parametrize("page", ["# A page", skeleton() + "<!-- fig2 --><!-- end of fig2 -->"])
def test_a_page_without_its_marks_is_refused(page: str) -> None:
    with pytest.raises(UserError, match="places for fig2"):
        fill(page, {"fig2": "text"})


def test_every_section_has_its_place() -> None:
    results = [
        network(
            occurrence=occurrence([0.8, 0.5, 0.4]), sensitivity=responses([True] * 3),
            transplant_layers=transplants(0.5, 0.1, 0.9), hardness=hardness_content(),
        )
    ]  # fmt: skip
    assert blocks([], {}) == {}
    assert list(blocks([network()], {})) == ["networks"]
    found = blocks(results, {})
    assert list(found) == ["networks", "table1", "fig2", "fig3", "table4", "fig6"]
    page = fill(skeleton(), found)
    for name in found:
        claims = [] if name == "networks" else claims_of(name, results, {})
        assert markdown(claim.cells for claim in claims) in page
    assert "90.0 % of 1,000" in page
