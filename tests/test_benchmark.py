"""The benchmark's arithmetic, that what it times is what it says, and its command line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

from attackroute.core.errors import UserError
from attackroute.robustness.gradient_attacks import PGD
from benchmarks import attacks, memory, run
from benchmarks.cases import CASE_NAMES, SPEED_CASES, Case, Plan, workload
from benchmarks.memory import Job, Peaks, measure_memory, memory_measurements
from benchmarks.timing import BYTES, SECONDS, Measurement, Spread, Stopclock, in_threads, interleaved
from benchmarks.trace import measure_hardness, measure_speed, speed_measurements, training_step

TINY = Case("tiny", "vgg_small", 1.25, image_size=32, classes=10, batch_size=3)


def by_quantity(measurements: list[Measurement]) -> dict[str, tuple[float, ...]]:
    return {each.quantity: each.spread.values for each in measurements}


# --- timing


def test_spread_of_paired_ratios() -> None:
    spread = Spread((2.0, 9.0, 8.0)) / Spread((1.0, 3.0, 2.0))
    assert spread.values == (2.0, 3.0, 4.0)
    assert (spread.median, spread.low, spread.high) == (3.0, 2.0, 4.0)  # the ratio of the medians would be 8 / 2
    assert Spread((1.0, 4.0)).median == 2.5
    assert (Spread((3.0, 4.0)) - Spread((1.0, 1.0))).times(2).values == (4.0, 6.0)
    with pytest.raises(ValueError, match="zip"):
        Spread((1.0,)) / Spread((1.0, 2.0))


def test_runs_take_turns_and_the_first_turn_does_not_count() -> None:
    order: list[str] = []

    def measurement(name: str, *seconds: float) -> Callable[[], float]:
        left = iter(seconds)

        def measure() -> float:
            order.append(name)
            return next(left)

        return measure

    turns: list[int] = []
    found = interleaved(
        {"a": measurement("a", 100, 1, 2, 4), "b": measurement("b", 100, 3, 5, 16)}, 3, lambda: turns.append(len(order))
    )
    assert order == ["a", "b"] * 4
    assert turns == [2, 4, 6, 8]
    assert found["a"].values == (1, 2, 4)
    assert (found["b"] / found["a"]).values == (3, 2.5, 4)


def test_the_clock_is_read_only_when_the_device_has_finished() -> None:
    events: list[str] = []
    clock = Stopclock(clock=lambda: events.append("read") or 0.0, finish=lambda: events.append("finish"))
    clock.seconds(lambda: events.append("work"))
    assert events == ["finish", "read", "work", "finish", "read"]
    ticks = Stopclock(clock=count().__next__)
    assert ticks.interleaved({"a": lambda: None, "b": ticks.clock}, 2)["b"].values == (2, 2)


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), in_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    with in_threads(None):
        assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("values", "unit", "cells"),
    [
        ((1.5, 1.25, 1.0), "", ["1.25", "1.00 to 1.50"]), ((6946.2,), "", ["6,946", "6,946 to 6,946"]),
        ((2e-16,), "", ["2e-16", "2e-16 to 2e-16"]), ((0.01, 0.02), SECONDS, ["15.0 ms", "10.0 to 20.0"]),
        ((20.0, 60.0), SECONDS, ["40 s", "20 to 60"]), ((1.2e8,), BYTES, ["120 MB", "120 to 120"]),
        ((585.2,), BYTES, ["585 bytes", "585 to 585"]),
    ],
)  # fmt: skip
def test_numbers_are_shown_in_fitting_units(values: tuple[float, ...], unit: str, cells: list[str]) -> None:
    assert Measurement("case", "what", Spread(values), unit, "bound").cells() == ["case", "what", *cells, "bound"]


# --- traces


def test_arithmetic_of_speed() -> None:
    runs = {
        "forward, contiguous": Spread((2.0, 6.0, 5.0)), "forward, channels_last": Spread((4.0, 4.0, 6.0)),
        "trace, contiguous": Spread((3.0, 5.0, 5.0)), "trace, channels_last": Spread((2.0, 8.0, 10.0)),
        "training step": Spread((3.0, 5.0, 1.0)), "noise trace": Spread((6.0, 12.0, 20.0)),
    }  # fmt: skip
    measurements = speed_measurements("tiny", runs, 2, 1.25)
    found = by_quantity(measurements)
    assert found["trace, contiguous / forward"] == (1.5, 1.25, 1.0)
    assert found["trace, channels_last / forward"] == (1.0, 2.0, 2.0)
    assert found["trace, contiguous / training step"] == (0.5, 0.5, 2.5)  # of one batch, where the trace ran two
    assert found["noise trace / two forwards"] == (1.5, 1.0, 2.0)
    assert {each.quantity for each in measurements if each.unit == SECONDS} == set(runs)
    assert [each.bound for each in measurements][:3] == ["at most 1.25", "at most 1.25", ""]


def test_a_speed_case_is_measured() -> None:
    turns: list[int] = []
    found = measure_speed(TINY, Plan(repeats=2, quick=True, batch_size=4), advance=lambda: turns.append(1))
    assert len(turns) == 3
    assert {each.case for each in found} == {"tiny, 2 x 4"}
    assert not any(each.bound for each in found)  # the limit is for another batch size
    assert all(len(each.spread.values) == 2 and each.spread.low > 0 for each in found)


def test_hardness_is_measured() -> None:
    ratio, *runs = measure_hardness(TINY, Plan(repeats=3, batch_size=4, quick=True))
    passes, hardness = (each.spread for each in runs)
    assert ratio.spread.values == (hardness / passes).values and ratio.spread.low > 0
    assert len(passes.values) == 3 and ratio.bound == "at most 1.15"


def test_a_workload_is_a_network_as_after_training() -> None:
    state = torch.get_rng_state()
    load = workload(TINY, 8, 2, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert load.images == 16
    assert not any(module.training for module in load.model.modules())
    norms = [module for module in load.model.modules() if isinstance(module, nn.BatchNorm2d)]
    images = load.batches[0][0]
    with torch.no_grad():
        seen = norms[0].running_var / load.model.features[0](load.model.normalise(images)).var((0, 2, 3))
    assert ((seen > 0.75) & (seen < 1.3) & (seen != 1)).all()  # a batch's own, a little changed
    assert all(norm.momentum == 0.1 for norm in norms)
    again, other = workload(TINY, 8, 2, seed=3), workload(TINY, 8, 2, seed=4)
    with torch.no_grad():
        logits = load.model(images)
        assert logits.isfinite().all() and logits.std() > 1e-3
        assert torch.equal(logits, again.model(again.batches[0][0]))
        assert not torch.equal(logits, other.model(images))


def test_memory_formats() -> None:
    load = workload(TINY, 2, 1, channels_last=True)
    assert load.batches[0][0].is_contiguous(memory_format=torch.channels_last)
    assert load.model.features[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert workload(TINY, 2, 1).model.features[3].weight.is_contiguous()


def test_training_steps_leave_the_network_as_it_is() -> None:
    load = workload(TINY, 4, 1)
    before = {name: value.clone() for name, value in load.model.state_dict().items()}
    training_step(load)()
    assert all(torch.equal(value, before[name]) for name, value in load.model.state_dict().items())
    assert all(parameter.grad is None for parameter in load.model.parameters())
    assert not load.model.training


# --- attack


def test_an_attack_is_measured_against_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def peer(name: str) -> Callable[..., attacks.Attack]:
        def prepare(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> attacks.Attack:
            assert not any(module.training for module in model.modules())

            def attack() -> None:
                assert all(parameter.grad is None for parameter in model.parameters())
                nn.functional.cross_entropy(model(images), labels).backward()
                calls.append((name, tuple(images.shape)))

            return attack

        return prepare

    monkeypatch.setattr(attacks, "PEERS", {name: peer(name) for name in ("torch", "no_such_library", "pytest")})
    state, turns = torch.get_rng_state(), []
    found = by_quantity(attacks.measure_attack(Plan(repeats=2, batch_size=3), lambda: turns.append(1)))
    assert len(turns) == 3 and torch.equal(torch.get_rng_state(), state)
    assert calls == [("torch", (3, 3, 32, 32)), ("pytest", (3, 3, 32, 32))] * 3
    torch_name, pytest_name = (name for name in found if name.endswith(" / ours"))
    assert torch_name == f"torch {version('torch')} / ours" and pytest_name.startswith("pytest ")
    assert found["ours / bare passes"] == (Spread(found["ours"]) / Spread(found["bare passes"])).values
    assert found[torch_name] == (Spread(found[f"torch {version('torch')}"]) / Spread(found["ours"])).values


@pytest.mark.parametrize("name", list(attacks.PEERS))
def test_other_libraries_run_the_attack_that_is_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without random starts they and this package make the same images."""
    pytest.importorskip(name)
    from attack_samples import images, network

    x, y = images(16)
    model = network().double()
    attack = attacks.PEERS[name](copy.deepcopy(model), x.double(), y)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, *_, **__: tensor.zero_())
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, 0.5, **options))
    found = attack()
    expected = PGD(random_start=False)(model, x.double(), y)
    torch.testing.assert_close(found.detach(), expected, atol=1e-9, rtol=0)


# --- memory


def peaks(before: int = 100) -> dict[str, Peaks]:
    return {
        "forward": Peaks.of([(before, 300), (before, 500)]), "trace": Peaks.of([(100, 360), (100, 500)]),
        "few": Peaks.of([(10, 50), (10, 60)]), "many": Peaks.of([(10, 60), (10, 60)]),
    }  # fmt: skip


def test_arithmetic_of_memory() -> None:
    found = by_quantity(memory_measurements(peaks(), 16, 64, 84))
    assert found["trace / inference"] == (1.2, 1.0)
    assert found["the same beyond libraries and weights"] == (1.3, 1.0)
    assert found["trace of many / of few"] == (1.2, 1.0)
    hidden = by_quantity(memory_measurements(peaks(before=300), 16, 64, 84))  # nothing was seen to be added
    assert set(found) - set(hidden) == {"the same beyond libraries and weights"}


def test_memory_jobs_differ_in_what_is_compared_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []

    def measured(_: str, job: dict[str, object], __: str) -> tuple[int, int]:
        jobs.append(Job(**job))  # type: ignore[arg-type]
        return len(jobs), 10 * len(jobs)

    monkeypatch.setattr(memory, "measured", measured)
    plan, done = Plan(repeats=2, batch_size=5, seed=6), []
    found = measure_memory(plan, lambda: done.append(1))
    assert len(jobs) == len(done) == 4 * plan.memory_repeats == 8
    assert jobs[:4] == jobs[4:]
    forward, traced, few, many = jobs[:4]
    assert forward == replace(traced, trace=False) and traced.trace
    assert (traced.image_size, traced.batch_size, traced.seed) == (224, 5, 6)
    assert many == replace(few, batches=many.batches)
    assert (few.batches * few.batch_size, many.batches * many.batch_size) == (64, 1024)
    assert by_quantity(found)["trace"] == (20, 60)
    assert Plan(repeats=50).memory_repeats == 3


TINY_JOB = Job(True, 32, 4, 2, threads=1, device="cpu", seed=0, model="vgg_small")


@pytest.mark.parametrize("traced", [True, False])
def test_a_peak_holds_what_was_given_back_at_once_and_nothing_from_before(
    traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("a process cannot forget its peak here")
    size = 1 << 26

    def build(*_: object, **__: object) -> nn.Module:
        torch.ones(6 * size // 4)
        return nn.Conv2d(3, 3, 3)

    def job(*_: object) -> None:
        torch.ones(size // 4)

    monkeypatch.setattr(memory, "build_model", build)
    monkeypatch.setattr(memory, "trace_routes", job)
    if not traced:
        monkeypatch.setattr(nn.Conv2d, "forward", job)
    with in_threads(None):
        before, peak = memory.run(replace(TINY_JOB, trace=traced))
    assert 0.9 * size < peak - before < 4 * size


@pytest.mark.slow
def test_jobs_run_in_processes_of_their_own() -> None:
    before, peak = memory.measured("benchmarks.memory", asdict(TINY_JOB), "memory")
    assert 10_000_000 < before <= peak


def test_failed_processes_are_one_line() -> None:
    with pytest.raises(UserError, match=r"no_such_module.*smaller --batch-size") as caught:
        memory.measured("no_such_module", asdict(TINY_JOB), "memory")
    assert "\n" not in str(caught.value)


# --- the plan and the command


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"cases": ("resnet81",)}, "'resnet81'.*resnet18"),
        ({"repeats": 0}, "repeats must be at least 1, not 0"),
        ({"batch_size": -2}, "batch size must be at least 1, not -2"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
    ],
)
def test_bad_plans(settings: dict[str, object], part: str) -> None:
    with pytest.raises(UserError, match=part):
        Plan(**settings)  # type: ignore[arg-type]


def test_plans() -> None:
    assert [case.name for case in Plan().speed_cases] == [case.name for case in SPEED_CASES]
    assert [name for name in CASE_NAMES if not Plan().includes(name)] == ["architectures", "processes", "gpu"]
    assert [name for name in CASE_NAMES if Plan(quick=True).includes(name)] == ["vgg16", "naive", "memory"]
    assert [name for name in CASE_NAMES if Plan(cases=("resnet50",), quick=True).includes(name)] == ["resnet50"]
    assert (Plan().turns, Plan(quick=True).turns, Plan(quick=True, repeats=9).turns) == (7, 2, 9)
    assert Plan(quick=True).batches < Plan().batches


def fake_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace what takes time; returns the speed cases that are asked for."""
    asked: list[str] = []

    def speed(case: Case, plan: Plan, advance: Callable[[], None]) -> list[Measurement]:
        asked.append(case.name)
        return [Measurement(case.name, "trace / forward", Spread((1.5, 1.25, 1.0)), bound="at most 1.30")]

    def named(name: str) -> Callable[..., list[Measurement]]:
        return lambda *_: [Measurement(name, "measured", Spread((0.5,)), SECONDS)]

    monkeypatch.setattr(run, "measure_speed", speed)
    for name in ("naive", "memory", "attack", "hardening", "hardness"):
        monkeypatch.setattr(run, f"measure_{name}", named(name))
    return asked


def test_all_cases_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_parts(monkeypatch)
    measurements, architectures = run.run_benchmark(Plan())
    assert asked == [case.name for case in SPEED_CASES]
    assert [each.case for each in measurements[len(asked) :]] == ["hardness", "naive", "memory", "attack", "hardening"]
    assert not architectures
    only, _ = run.run_benchmark(Plan(cases=("memory",)))
    assert [each.case for each in only] == ["memory"]


def test_want_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory\ndetails")

    monkeypatch.setattr(run, "measure_naive", fail)
    before = torch.get_num_threads()
    with pytest.raises(UserError, match=r"out of memory.*smaller --batch-size") as caught:
        run.run_benchmark(Plan(cases=("naive",), threads=before + 1))
    assert "\n" not in str(caught.value)
    assert torch.get_num_threads() == before


def test_tables_json_and_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fake_parts(monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")
    assert run.main(["vgg16", "naive", "--threads", "1"]) == 0
    shown, notes = capsys.readouterr()
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert notes == "" and "1 thread" in rows[0] and "7 interleaved repeats" in rows[0]
    assert "vgg16 trace / forward 1.25 1.00 to 1.50 at most 1.30" in rows
    assert "naive measured 500.0 ms 500.0 to 500.0" in rows
    assert run.main(["vgg16", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert {"torch", "device", "threads", "dtype", "repeats", "quick", "seed"} < set(content["settings"])
    (row,) = content["rows"]
    assert (row["case"], row["median"], row["values"]) == ("vgg16", 1.25, [1.5, 1.25, 1.0])
    assert run.main(["memory", "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_real_run_counts_its_steps() -> None:
    before = torch.get_num_threads()
    steps: list[tuple[int, int, str]] = []
    plan = Plan(cases=("vgg16", "hardness"), batch_size=2, repeats=1, quick=True, threads=1)
    measurements, _ = run.run_benchmark(plan, lambda *step: steps.append(step))
    assert {each.case for each in measurements} == {"vgg16, 2 x 2", "hardness, vgg16"}
    assert [done for done, _, _ in steps] == [0, 1, 2, 2, 3, 4] and {total for _, total, _ in steps} == {4}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("vgg61",), ("gpu", "--device", "cpu"), ("--repeats", "0"), ("--threads", "none"), ("--batch-size", "-1"),
        ("--device", "no-such-device"), ("--table", "table.md"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(arguments) == 2
    shown, error = capsys.readouterr()
    assert (shown, error.count("\n")) == ("", 1)
    assert error.startswith("error: ") and arguments[0] in error
