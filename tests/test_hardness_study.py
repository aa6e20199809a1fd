"""Who is fooled and what tells so: success and tables against loops."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attackroute as ar
from architectures import chain, randomised
from attackroute.analysis.hardness_experiment import ALL, BASELINES, OURS, PAPER, RANDOM, _verdict, study_hardness
from attackroute.core.document import Document
from attackroute.core.errors import UserError
from attackroute.core.statistics import AUROC, associations
from attackroute.core.table import Table
from attackroute.paper.claims import Findings
from attackroute.robustness.attack import Perturbation
from attackroute.robustness.gradient_attacks import FGSM
from studies import fill_page


@dataclass(frozen=True)
class Darken(Perturbation):
    """A perturbation that needs no gradient."""

    name: ClassVar[str] = "darken"
    factor: float = 0.9

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return x * self.factor


def centred_model(seed: int, images: Tensor) -> nn.Module:
    """A network whose answers differ between the images."""
    torch.manual_seed(seed)
    model = randomised(chain()).double().eval()
    with torch.no_grad():
        model[-1].fc.bias -= model(images).mean(0)  # type: ignore[index,union-attr]
    return model


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Tensor, Tensor, ar.Route]:
    images = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    model = centred_model(2, images)
    labels = model(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 5  # misclassified ones
    return model, images, labels, ar.trace_routes(model, (images, labels)).aggregate(0.3)


def study(case: tuple[nn.Module, Tensor, Tensor, ar.Route], **options: object):  # type: ignore[no-untyped-def]
    model, images, labels, route = case
    settings = {"attacks": [FGSM(1 / 255), Darken()], "draws": 2, "resamples": 20, **options}
    return study_hardness(model, route, (images, labels), **settings)  # type: ignore[arg-type]


def test_only_correctly_classified_samples_count(case: tuple[nn.Module, Tensor, Tensor, ar.Route]) -> None:
    model, images, labels, route = case
    found = study(case)
    right = torch.arange(40) % 5 != 0
    assert torch.equal(found.hardness.correct, right) and found.correct == 32
    expected = (model(images[right] * 0.9).argmax(1) != labels[right]).numpy()
    assert expected.any() and not expected.all()
    assert (found.fooled[str(Darken())] == expected).all()
    assert torch.equal(found.hardness.votes, ar.hardness(model, route, (images, labels)).votes)


def test_the_papers_route_is_a_rival_of_another(case: tuple[nn.Module, Tensor, Tensor, ar.Route]) -> None:
    model, images, labels, route = case
    other = route.complement()
    found = study_hardness(model, other, (images, labels), [Darken()], paper=route, draws=2, resamples=20)
    plain = study(case, attacks=[Darken()])
    right = found.hardness.correct
    assert (found.predictors["V on the paper's route"] == plain.predictors["hardness V"]).all()
    assert (found.predictors["hardness V"] == -ar.hardness(model, other, (images, labels)).values[right].numpy()).all()
    assert "V on the paper's route" in found.table.column("predictor")
    assert "V on the paper's route" not in plain.predictors


def test_a_papers_route_that_says_nothing_is_no_rival() -> None:
    numbers, events = np.arange(6.0), np.arange(6) > 3
    predictors = {OURS: numbers, "loss": numbers[::-1], PAPER: np.zeros(6)}
    rows = {row["predictor"]: row for row in associations(predictors, events, resamples=20)}
    assert f"clearly ahead of the best rival, {PAPER} (0.500)" in _verdict(rows)
    undefined = {"value": None, "lead": None}
    assert "clearly ahead of the best rival, loss (0.000)" in _verdict(rows | {PAPER: rows[PAPER] | undefined})


def test_a_lead_that_is_too_small_to_matter_is_none() -> None:
    numbers, events = np.arange(400.0), np.arange(400) >= 200
    almost = numbers.copy()
    almost[196:204] = almost[196:204][::-1]  # clearly behind, but by a hair
    predictors = {OURS: almost, "loss": numbers, "margin": numbers[::-1]}
    rows = {row["predictor"]: row for row in associations(predictors, events, resamples=50)}
    assert rows["loss"]["lead_high"] < 0
    assert "level with the best rival, loss" in _verdict(rows)


def test_any_attack_is_taken(case: tuple[nn.Module, Tensor, Tensor, ar.Route]) -> None:
    made, named = study(case, attacks=[FGSM(1 / 255)], draws=1), study(case, attacks="fgsm:eps=1/255", draws=1)
    assert named.table == made.table and named.reading().startswith("V, an image's votes from all layers, is larger")
    model, images, labels, _ = case
    with torch.no_grad():
        wrong = model(images * 0.9).argmax(1) != labels
    found = study(case, attacks={"dark": lambda model, x, y: x * 0.9}, draws=1)
    assert (found.fooled["dark"] == wrong[found.hardness.correct].numpy()).all()
    assert "larger the smaller" in found.figures()["hardness"].get_suptitle()


def test_the_page_shows_an_attack_that_fools_nobody(case: tuple[nn.Module, Tensor, Tensor, ar.Route]) -> None:
    found = study(case, attacks=[Darken(), Darken(factor=1.0)], draws=1).document({}).to_json()
    names = [f"fgsm:eps={eps}/255" for eps in (1, 2)]  # the page takes attacks that have a name
    attacks = found["about"]["attacks"]
    for name, attack in zip(names, list(attacks), strict=True):
        attacks[name] = attacks.pop(attack)
        for item in found["rows"]:
            item["target"] = name if item["target"] == attack else item["target"]
    document = Document("hardness", found["settings"], table=Table.of(found["rows"]), about=found["about"])
    first, second = fill_page._hardness({"chain": Findings.of(document)}).splitlines()[-2:]
    assert " to " in first and f"0 of {found['about']['correctly_classified']} |  |" in second


def test_predictors_are_larger_for_what_is_easier_to_fool(case: tuple[nn.Module, Tensor, Tensor, ar.Route]) -> None:
    model, images, labels, route = case
    found = study(case)
    right = found.hardness.correct
    assert list(found.predictors)[:5] == [OURS, *BASELINES[:3], ALL]
    assert (found.predictors[OURS] == -ar.hardness(model, route, (images, labels)).values[right].numpy()).all()
    logits = model(images).detach()
    loss = F.cross_entropy(logits, labels, reduction="none")[right]
    assert found.predictors["loss"] == pytest.approx(loss.log().numpy())
    others = logits.scatter(1, labels[:, None], -math.inf).amax(1)
    margin = (logits.gather(1, labels[:, None])[:, 0] - others)[right]
    assert found.predictors["margin"] == pytest.approx(-margin.numpy())
    everything = ar.Route({layer: range(count) for layer, count in route.channels.items()}, route.channels)
    assert (found.predictors[ALL] == -ar.hardness(model, everything, (images, labels)).values[right].numpy()).all()
    drawn = ar.hardness(model, route.random_like(1), (images, labels)).values[right]
    assert (found.predictors[f"{RANDOM} 1"] == -drawn.numpy()).all() and f"{RANDOM} 2" not in found.predictors


def test_judgements_and_bins_are_those_of_the_samples(case: tuple[nn.Module, Tensor, Tensor, ar.Route]) -> None:
    found = study(case)
    attack = "fgsm:eps=1/255"
    events, scores = found.fooled[attack], found.predictors[OURS]
    pairs = [(a > b) + (a == b) / 2 for a in scores[events] for b in scores[~events]]
    ours = found.judged(attack)[OURS]
    assert ours["statistic"] == AUROC and ours["value"] == pytest.approx(np.mean(pairs))
    bins = found.bins(attack)
    assert [samples for samples, _ in bins] == [4, 4, *[3] * 8]
    order = sorted(range(32), key=lambda at: scores[at])  # the largest V first
    assert bins[0][1] == int(events[order[:4]].sum()) and bins[-1][1] == int(events[order[-3:]].sum())
    assert sum(fooled for _, fooled in bins) == int(events.sum())


def test_table_of_gradients(case: tuple[nn.Module, Tensor, Tensor, ar.Route]) -> None:
    found = study(case)
    attack = "fgsm:eps=1/255"
    sizes = found.hardness.log_gradients[found.hardness.correct].exp().numpy()
    weak = found.fooled[attack]
    for at, row in enumerate(found.gradients(attack)):
        assert row["layer"] == found.hardness.route.layers[at]
        assert row["hard_mean"] == pytest.approx(sizes[~weak, at].mean())
        assert row["weak_mean"] == pytest.approx(sizes[weak, at].mean())
        assert row["hard_median"] == pytest.approx(np.median(sizes[~weak, at]))
        assert row["weak_median"] == pytest.approx(np.median(sizes[weak, at]))


def test_batches_do_not_matter(case: tuple[nn.Module, Tensor, Tensor, ar.Route]) -> None:
    whole, parts = study(case), study(case, batch_size=7)
    assert whole.table.rows[:5] == parts.table.rows[:5]
    assert whole.reading() == parts.reading()


def test_nobody_fooled_and_everything_fooled(case: tuple[nn.Module, Tensor, Tensor, ar.Route]) -> None:
    found = study(case, attacks=[FGSM(0.0)])
    assert not found.fooled["fgsm:eps=0/255"].any()
    assert set(found.table.select(target="fgsm:eps=0/255", statistic=AUROC).column("value")) == {None}
    assert "nothing to judge" in found.reading()
    row = found.gradients("fgsm:eps=0/255")[0]
    assert row["weak_mean"] is row["weak_median"] is None and row["hard_mean"] is not None
    json.dumps(found.document({}).to_json(), allow_nan=False)
    found.figures()["hardness"].canvas.draw()  # type: ignore[attr-defined]


def test_a_wide_route_has_no_random_control(case: tuple[nn.Module, Tensor, Tensor, ar.Route]) -> None:
    model, images, labels, route = case
    wide = ar.Route({layer: range(count) for layer, count in route.channels.items()}, route.channels)
    found = study((model, images, labels, wide))
    assert not any(name.startswith(RANDOM) for name in found.predictors)
    assert (found.predictors[OURS] == found.predictors[ALL]).all()


def test_json_is_plain_and_says_which_samples_count(case: tuple[nn.Module, Tensor, Tensor, ar.Route]) -> None:
    found = study(case)
    document = found.document({"seed": 0}).to_json()
    content = json.loads(json.dumps(document, allow_nan=False))["about"]
    assert content["counted"] == "only samples that the model classifies correctly"
    assert content["samples"] == 40 and content["correctly_classified"] == 32
    assert sum(size for size, _ in content["attacks"]["fgsm:eps=1/255"]["bins_hardest_first"]) == 32
    assert {row["target"] for row in document["rows"]} == set(found.fooled)
    assert found.reading().count("AUROC of V") == 2


def test_the_model_comes_back_and_faults_are_one_line(case: tuple[nn.Module, Tensor, Tensor, ar.Route]) -> None:
    model, images, labels, route = case
    model = copy.deepcopy(model).train()
    for options, data, message in (
        ({"attacks": []}, (images, labels), "no attack is given"),
        ({}, (images[:1], labels[:1]), "one sample"),
        ({}, (images, (model.eval()(images).argmax(1) + 1) % 5), "none of the 40 samples right"),
        ({}, (images * 3, labels), r"must be in \[0, 1\]"),
        ({}, images, "no labels"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            study((model.train(), *data, route) if isinstance(data, tuple) else (model, data, None, route), **options)
        assert "\n" not in str(caught.value)
        assert model.training and not any(module._forward_hooks for module in model.modules())


def test_figures_show_every_target(case: tuple[nn.Module, Tensor, Tensor, ar.Route]) -> None:
    found = study(case)
    figure = found.figures()["hardness"]
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["fgsm:eps=1/255", str(Darken())]
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    bins = found.bins("fgsm:eps=1/255")
    assert heights == [samples for samples, _ in bins] + [fooled for _, fooled in bins]
