"""Evaluation against a naive loop, its invariants, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import attackroute as ar
from architectures import Function
from attackroute.core.checks import require_no_probabilities
from attackroute.core.errors import UserError
from attackroute.core.statistics import Accuracy
from attackroute.robustness.evaluation import Evaluation
from attackroute.robustness.gaussian_noise import GaussianNoise
from attackroute.robustness.gradient_attacks import FGSM
from attackroute.robustness.masking import Candidates
from attackroute.robustness.registry import parse_attack
from evaluated_models import ATTACKS, CLASSES, Shift, images_and_labels, noisy, small_model
from model_checks import one_line
from tracing import state


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attackroute.robustness.masking._QUERIES", 5)
    monkeypatch.setattr("attackroute.robustness.masking._STEPS", 10)


def counts(evaluation: Evaluation) -> dict[tuple[str, str], tuple[int, int]]:
    return {(row["model"], row["attack"]): (row["correct"], row["samples"]) for row in evaluation.table}


def naive(model: nn.Module, images: Tensor, labels: Tensor, attack: str | None) -> int:
    """One image at a time."""
    change = (lambda model, x, y: x) if attack is None else parse_attack(attack)
    samples = zip(images.split(1), labels.split(1), strict=True)
    return sum(int(model.eval()(change(model.eval(), x, y)).argmax() == y) for x, y in samples)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_accuracies_against_a_naive_loop(batch_size: int) -> None:
    images, labels = images_and_labels()
    images = images.double()
    models = {"one": small_model().double(), "two": small_model(7).double()}
    evaluation = ar.evaluate(models, (images, labels), ATTACKS, batch_size=batch_size, checks=0)
    expected = {
        (name, "clean" if attack is None else str(parse_attack(attack))): (naive(model, images, labels, attack), 23)
        for name, model in models.items()
        for attack in (None, *ATTACKS)
    }
    assert counts(evaluation) == expected
    assert list(expected) == list(evaluation.right) == list(counts(evaluation))  # clean images first
    assert {key: (sum(right), len(right)) for key, right in evaluation.right.items()} == expected
    assert len(set(counts(evaluation).values())) > 3  # the numbers are not all the same


def test_order_and_kind_of_data_do_not_matter() -> None:
    images, labels = images_and_labels()
    images, model = images.double(), small_model().double()
    loader = DataLoader(TensorDataset(images, labels), 4, shuffle=True, generator=torch.Generator().manual_seed(3))
    sources = (images, labels), (images.flip(0), labels.flip(0)), loader
    wanted, turned, shuffled = (ar.evaluate(model, data, ATTACKS, checks=8) for data in sources)
    assert counts(wanted) == counts(turned) == counts(shuffled)
    assert wanted.checks == turned.checks == shuffled.checks
    assert wanted.checks[0].samples == 8


def test_repeats_exactly_and_seeds_differ() -> None:
    data = images_and_labels(60)
    first, again = (ar.evaluate(small_model(), data, ["pgd:eps=0.2,steps=1"], checks=0, seed=3) for _ in range(2))
    assert counts(first) == counts(again)
    assert first.table.column("seed") == [None, 3]
    own = ar.evaluate(small_model(), data, ["pgd:seed=5", GaussianNoise()], checks=0, seed=3)
    assert own.table.column("seed") == [None, 5, 0]


def test_a_random_model_repeats_and_the_global_generator_is_left_alone() -> None:
    data = images_and_labels(40)
    model = noisy(small_model())
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = ar.evaluate(model, data, ATTACKS, checks=4, batch_size=8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert counts(ar.evaluate(model, data, ATTACKS, checks=4, batch_size=8)) == counts(first)
    assert counts(ar.evaluate(model, data, ATTACKS, checks=0, batch_size=8, seed=1)) != counts(first)


def test_intervals_and_records() -> None:
    evaluation = ar.evaluate(small_model(), images_and_labels(), ATTACKS, checks=0)
    for row in evaluation.table:
        share = row["correct"] / 23
        assert (row["accuracy"], row["samples"]) == (share, 23)
        assert row["accuracy_low"] <= share <= row["accuracy_high"]
        for bound in (row["accuracy_low"], row["accuracy_high"]):  # the ends of Wilson's interval solve this
            assert (share - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / 23, rel=1e-5, abs=1e-12)
        assert row["seconds"] >= 0
    assert evaluation.table.columns == (
        *("model", "attack", "accuracy", "accuracy_low", "accuracy_high", "correct", "samples"),
        *("eps", "steps", "step_size", "restarts", "random_start", "seed", "std", "seconds"),
    )
    assert evaluation.table.column("steps") == [None, None, 3, None]
    content = json.loads(json.dumps(evaluation.document().to_json(), allow_nan=False))
    assert content["settings"]["libraries"]["torch"] == torch.__version__
    assert content["settings"]["libraries"]["attackroute"]
    assert content["settings"]["attacks"][1]["steps"] == 3
    assert [row["attack"] for row in content["rows"]] == evaluation.table.column("attack")
    assert evaluation.accuracy("clean") == Accuracy(evaluation.table[0]["correct"], 23)
    assert evaluation.accuracy("pgd") == Accuracy(evaluation.table[2]["correct"], 23)
    with pytest.raises(UserError, match="no row for 'fgms'"):
        evaluation.accuracy("fgms")
    assert len(str(evaluation).splitlines()) == 1 + 4 + 1


def test_all_models_see_the_same_noise() -> None:
    images, labels = images_and_labels(10)
    models = {"one": small_model(), "two": small_model(1), "wide": small_model(2).double()}
    shown: dict[str, list[Tensor]] = {name: [] for name in models}
    for name, model in models.items():
        model.register_forward_pre_hook(lambda _, args, name=name: shown[name].append(args[0].float()))
    ar.evaluate(models, (images, labels), ["gaussian-noise"], batch_size=4, checks=0)
    assert len(shown["one"]) == 6  # clean and noisy, three batches
    for mine, yours, wide in zip(*shown.values(), strict=True):
        assert torch.equal(mine, yours)
        torch.testing.assert_close(mine, wide, atol=1e-6, rtol=0)


def test_a_model_s_numbers_do_not_depend_on_its_neighbours() -> None:
    data = images_and_labels()
    alone = ar.evaluate(small_model(), data, ATTACKS, checks=5)
    together = ar.evaluate({"other": small_model(1).double(), "model": small_model()}, data, ATTACKS, checks=5)
    assert {key: value for key, value in counts(together).items() if key[0] == "model"} == counts(alone)
    assert [check for check in together.checks if check.model == "model"] == list(alone.checks)


def test_attacks_are_measured_once_and_clean_images_always() -> None:
    attacks = ["clean", "fgsm:eps=0.1", FGSM(0.1), "fgsm:eps=0.2"]
    evaluation = ar.evaluate(small_model(), images_and_labels(), attacks, checks=0)
    assert evaluation.table.column("attack") == ["clean", str(FGSM(0.1)), str(FGSM(0.2))]


def test_models_come_back_as_they_were() -> None:
    model = small_model().train()
    model[0].eval()
    model[0].weight.requires_grad_(False)
    before = state(model)
    ar.evaluate(model, images_and_labels(), ATTACKS, checks=6)
    assert state(model) == before
    with pytest.raises(UserError):
        ar.evaluate(model, images_and_labels(), [Shift(by=0.5)])
    assert state(model) == before


def returning(change: Callable[[Tensor], Any]) -> nn.Module:
    return Function(lambda parts, x: change(parts["model"](x)), model=small_model())


DATA = images_and_labels(6)


@pytest.mark.parametrize(
    ("model", "data", "attacks", "message"),
    [
        (small_model(), DATA[0], ["fgsm"], "no labels"),
        (small_model(), (DATA[0], DATA[1] + CLASSES), ["fgsm"], "outside the model's 4 logits"),
        (small_model(), (DATA[0] * 2, DATA[1]), ["fgsm"], r"must be in \[0, 1\]"),
        (small_model(), (DATA[0] / 0, DATA[1]), ["fgsm"], "NaN or inf"),
        (small_model(), (DATA[0][:0], DATA[1][:0]), ["fgsm"], "no sample"),
        (small_model(), DATA, ["fgms"], "did you mean fgsm"),
        (small_model(), DATA, [3], "an attack is an object of type int"),
        (returning(lambda x: x.softmax(1)), DATA, [], "returns probabilities"),
        (returning(lambda x: x[:, :, None]), DATA, [], "not logits"),
        (returning(lambda x: {"out": x}), DATA, [], "returns dict"),
        ({}, DATA, [], "no model"),
        ({"net": 3}, DATA, [], "'net' is int"),
    ],
    ids=lambda value: None if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_refused(model: Any, data: Any, attacks: Any, message: str, tmp_path: Any) -> None:
    with one_line(match=message):
        ar.evaluate(model, data, attacks, checks=0, folder=tmp_path)
    assert not list(tmp_path.iterdir())  # and nothing is left behind that would look unfinished


@pytest.mark.parametrize("sharpness", [0.01, 1.0, 1000.0])
def test_probabilities_are_no_logits_anywhere(sharpness: float) -> None:
    model = returning(lambda x: (sharpness * x).softmax(1)).eval()
    logits = returning(lambda x: x).eval()
    route = ar.trace_routes(logits, DATA).aggregate(0.5)
    uses: list[Callable[[nn.Module], object]] = [
        lambda model: ar.evaluate(model, DATA, [], checks=0), lambda model: ar.trace_routes(model, DATA),
        lambda model: ar.hardness(model, route, DATA), lambda model: ar.rank_channels(model, DATA, "gradient", 0.5),
    ]  # fmt: skip
    for use in uses:
        use(logits)
        with pytest.raises(UserError, match="returns probabilities, which add up to 1, and not logits"):
            use(model)
    vanishing = sharpness == 1000  # to the last digit
    with pytest.raises(UserError, match="the loss without a gradient") if vanishing else nullcontext():
        ar.trace_routes(model, DATA, loss=lambda shares, labels: -shares.gather(1, labels[:, None])[:, 0])
    for values in ([[1.5, -0.5]], [[0.5, 0.5], [0.5, 0.6]], [[0.0, 0.0]], [[1.0]]):  # some that happen to
        require_no_probabilities(torch.tensor(values))
    with pytest.raises(UserError, match="probabilities"):
        require_no_probabilities((10 * torch.rand(4, 100)).softmax(1).bfloat16())


def test_attacks_that_break_their_own_rules_are_found_out() -> None:
    images, labels = DATA
    assert ar.evaluate(small_model(), (images / 2, labels), [Shift()], checks=0).accuracy("shift").total == 6
    with pytest.raises(UserError, match=r"shift:.* distance of 0.2, outside its ball of radius 0.1"):
        ar.evaluate(small_model(), (images / 2, labels), [Shift(by=0.2)], checks=0)
    with pytest.raises(UserError, match=r"outside \[0, 1\]"):
        ar.evaluate(small_model(), (images * 0.01 + 0.99, labels), [Shift()], checks=0)


def test_arguments_that_are_refused() -> None:
    for options, message in [({"checks": -1}, "checks -1"), ({"resume": True}, "name the folder")]:
        with pytest.raises(UserError, match=message):
            ar.evaluate(small_model(), DATA, ["pgd"], **options)


def test_progress_counts_images() -> None:
    calls: list[tuple[int, int | None, str]] = []
    ar.evaluate(
        {"a": small_model(), "b": small_model(1)}, images_and_labels(10), ["fgsm"], batch_size=4, checks=0,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert [call[0] for call in calls[1::2]] == [4, 8, 12, 16, 20, 24, 28, 32, 34, 36, 38, 40]
    assert {call[1] for call in calls} == {40}


def test_checks_use_the_largest_radius() -> None:
    seen = ar.evaluate(small_model(), images_and_labels(), ["fgsm:eps=0.3", "pgd:eps=0.05"], checks=20)
    check = next(item for item in seen.checks if item.name == "one step against many")
    _, images, labels = Candidates.of(*images_and_labels(), 0).first(20)
    model = small_model().eval()
    right = (model(FGSM(0.3)(model, images, labels)).argmax(1) == labels).double().mean().item()
    assert check.numbers["accuracy under FGSM"] == right
    assert check.samples == 20


def test_the_choice_of_samples_is_that_of_the_smallest_hashes() -> None:
    images, labels = images_and_labels(50)
    whole = Candidates.of(images, labels, 4).first(50)
    few = whole.first(0)
    for rows in torch.randperm(50, generator=torch.Generator().manual_seed(0)).split(3):
        few = few.joined(Candidates.of(images[rows], labels[rows], 4).first(7), 7)
    assert len(few.images) == 7
    for mine, all_of_them in zip(few, whole, strict=True):
        assert torch.equal(mine, all_of_them[:7])
    other = Candidates.of(images, labels, 5).first(7)
    assert not torch.equal(other.images, few.images)
    assert not torch.equal(few.images, images[:7])


def test_one_name_for_one_attack() -> None:
    """Whoever writes it: joins of tables go by it."""
    for texts, name in (
        (("pgd:eps=4/255", "pgd:steps=10,seed=0,eps=4/255", "pgd:eps=0.01568627450980392"), "pgd:eps=4/255"),
        (("pgd:eps=0.1", "pgd:eps=25.5/255,step_size=none", "pgd:eps=1/10"), "pgd:eps=0.1"),
        (("pgd:steps=50,seed=3",), "pgd:eps=8/255,steps=50,seed=3"),
        (("gaussian-noise", "gaussian-noise:std=0.18", "gaussian-noise:std=18/100"), "gaussian-noise:std=0.18"),
    ):  # fmt: skip
        assert {str(parse_attack(text)) for text in texts} == {name}
        assert parse_attack(name) == parse_attack(texts[0])
    assert str(FGSM(1)) == str(FGSM(1.0))  # type: ignore[arg-type]


def test_the_reading_names_the_worst_attack_and_mistrust() -> None:
    blind = Function(lambda _, x: nn.functional.one_hot((x.flatten(1)[:, 0] * 3.999).long(), 4).float() * 5)
    images, _ = images_and_labels(30)
    evaluation = ar.evaluate(blind, (images, (images[:, 0, 0, 0] * 3.999).long()), ["pgd:eps=0.01"], checks=30)
    assert evaluation.accuracy("clean") == Accuracy(30, 30)
    assert "not to be trusted" in evaluation.reading()
    assert "vanishing gradient of the logits" in evaluation.reading()
