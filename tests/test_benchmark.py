"""The benchmark's arithmetic, and that what it times is what it says."""

from __future__ import annotations

import copy
import json
from importlib.metadata import version
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attackroute.benchmark import attack_speed, breakdown, memory, memory_probe
from attackroute.benchmark.cases import workload
from attackroute.benchmark.memory import Peaks, measure_memory
from attackroute.benchmark.plan import Plan
from attackroute.benchmark.speed import measure_speed, training_step
from attackroute.benchmark.timing import Runs, Spread, Stopclock, in_threads, interleaved
from attackroute.core.errors import UserError
from attackroute.robustness.gradient_attacks import PGD
from attackroute.tracing import recorder, trace
from attackroute.tracing import trace as trace_module
from attackroute.zoo import registry
from benchmark_samples import TINY, Hands, attack_result, memory_result, speed_result


def ticking() -> Stopclock:
    """A clock that moves on by one second each time it is read."""
    return Stopclock(clock=count().__next__)


# --- timing


def test_spread_of_paired_ratios():
    spread = Spread.of_ratios([2.0, 9.0, 8.0], [1.0, 3.0, 2.0])
    assert spread.values == (2.0, 3.0, 4.0)
    assert (spread.median, spread.low, spread.high) == (3.0, 2.0, 4.0)
    # The ratio of the medians would be 8 / 2.
    assert spread.to_json() == {"median": 3.0, "min": 2.0, "max": 4.0, "values": [2.0, 3.0, 4.0]}
    assert Spread((1.0, 4.0)).median == 2.5
    with pytest.raises(ValueError):
        Spread.of_ratios([1.0], [1.0, 2.0])


def test_runs_take_turns_and_the_first_turn_does_not_count():
    clock, order = Hands(), []
    stopclock = Stopclock(clock=clock)

    def action(name: str, *seconds: float):
        left = iter(seconds)

        def act() -> None:
            order.append(name)
            clock.move(next(left))

        return stopclock.whole(act)

    turns = []
    found = interleaved(
        {"a": action("a", 100, 1, 2, 4), "b": action("b", 100, 3, 5, 16)}, 3, lambda: turns.append(len(order))
    )
    assert order == ["a", "b"] * 4
    assert turns == [2, 4, 6, 8]
    assert found["a"].totals == (1, 2, 4)
    assert Spread.of_ratios(found["b"].totals, found["a"].totals).values == (3, 2.5, 4)


def test_the_clock_is_read_only_when_the_device_has_finished():
    events = []
    clock = Stopclock(clock=lambda: events.append("read") or 0.0, finish=lambda: events.append("finish"))
    clock.seconds(lambda: events.append("work"))
    assert events == ["finish", "read", "work", "finish", "read"]


def test_parts_of_runs():
    found = Runs(({"a": 1.0, "b": 2.0}, {"a": 4.0}))
    assert found.totals == (3.0, 4.0)
    assert found.of("b") == (2.0, 0.0)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), in_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    with in_threads(None):
        assert torch.get_num_threads() == before


# --- breakdown


def test_phases_do_not_count_what_other_phases_do(monkeypatch):
    clock = Hands()
    home = SimpleNamespace()

    def outer() -> None:
        clock.move(1)
        home.inner()
        clock.move(2)
        home.inner()

    def probe() -> None:
        clock.move(100)
        home.inner()

    def items():
        for _ in range(2):
            clock.move(1000)
            yield clock.move(2000)

    home.outer, home.inner, home.probe, home.items = outer, lambda: clock.move(10), probe, items
    originals = dict(vars(home))
    places = {name: ((home, name),) for name in ("outer", "inner", "items")}
    monkeypatch.setattr(breakdown, "PHASES", {**places, breakdown.PROBE: ((home, "probe"),)})

    def action() -> None:
        home.outer()
        home.probe()
        for _ in home.items():
            clock.move(0.5)  # what happens between two items is not the generator's
            home.inner()

    found = breakdown.Stopwatch(Stopclock(clock=clock)).measure(action)
    assert found == {"outer": 3, "inner": 40, "items": 6000, breakdown.PROBE: 110, breakdown.REST: 1}
    assert sum(found.values()) == clock.now
    assert vars(home) == originals


def network_with_every_kind_of_edge() -> nn.Module:
    """Max pooling that overlaps, a sum over positions that only autograd can differentiate, and a plain edge."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4),
        nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def test_every_phase_of_a_trace_is_seen_and_the_trace_is_the_same():
    torch.manual_seed(0)
    model, images = network_with_every_kind_of_edge(), torch.rand(5, 3, 16, 16)
    before = [getattr(home, name) for places in breakdown.PHASES.values() for home, name in places]
    routes = []
    clock = ticking()
    found = breakdown.Stopwatch(clock).measure(lambda: routes.append(trace.trace_routes(model, images, batch_size=3)))
    assert all(found[phase] > 0 for phase in (*breakdown.PHASES, breakdown.REST)), found
    # Each reading of the clock is a tick, and all of them lie in some phase.
    assert sum(found.values()) == clock.clock() - 1
    assert routes[0] == trace.trace_routes(model, images)
    assert before == [getattr(home, name) for places in breakdown.PHASES.values() for home, name in places]


def test_the_engine_is_put_back_after_an_error():
    before = recorder.record
    with pytest.raises(UserError, match="no route layer"):
        breakdown.Stopwatch(ticking()).measure(lambda: trace.trace_routes(nn.Flatten(), torch.rand(2, 3, 4, 4)))
    assert recorder.record is before


# --- speed


def test_arithmetic_of_speed():
    result = speed_result()
    assert result.ratio.values == (1.5, 1.25, 1.0)
    assert result.training_ratio.values == (0.5, 0.5, 2.5)  # of one batch, where the trace ran two
    assert result.noise_ratio.values == tuple(
        noise / (2 * forward) for noise, forward in zip((6.0, 8.0, 20.0), result.forward.totals, strict=True)
    )
    assert result.shares["top-k"].values == (0.5, 0.25, 0.8)
    assert list(result.shares) == ["top-k", breakdown.REST]
    assert result.limit == 1.25
    assert speed_result(batch_size=4).limit is None


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_speed_case_is_measured(channels_last):
    turns = []
    plan = Plan(repeats=2, quick=True, batch_size=4)
    result = measure_speed(TINY, plan, channels_last=channels_last, advance=lambda: turns.append(1))
    assert len(turns) == 3
    assert (result.batches, result.batch_size, result.limit) == (2, 4, None)
    assert len(result.ratio.values) == 2 and result.ratio.low > 0
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["memory_format"] == ("channels_last" if channels_last else "contiguous")
    assert {name: len(values) for name, values in content["seconds"].items()} == dict.fromkeys(
        ("forward", "trace", "noise_trace", "training_step", "watched_trace"), 2
    )


def test_a_workload_is_a_network_as_after_training():
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


def test_memory_formats():
    load = workload(TINY, 2, 1, channels_last=True)
    assert load.batches[0][0].is_contiguous(memory_format=torch.channels_last)
    assert load.model.features[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert workload(TINY, 2, 1).model.features[3].weight.is_contiguous()


def test_training_steps_leave_the_network_as_it_is():
    load = workload(TINY, 4, 1)
    before = {name: value.clone() for name, value in load.model.state_dict().items()}
    training_step(load)()
    assert all(torch.equal(value, before[name]) for name, value in load.model.state_dict().items())
    assert all(parameter.grad is None for parameter in load.model.parameters())
    assert not load.model.training


# --- attack


def test_arithmetic_of_attacks():
    result = attack_result()
    assert result.overhead.values == (1.0, 2.0, 1.25)
    assert result.ratio("torchattack").values == (1.5, 1.25, 1.0)
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content["others_to_ours"]["torchattacks"]["median"] == 1.0
    assert content["left_out"] == ["foolbox"]
    assert set(content["seconds"]) == {"ours", "passes", "torchattack", "torchattacks"}


def test_an_attack_is_measured_against_what_is_installed(monkeypatch):
    calls = []

    def peer(name):
        def prepare(model, images, labels):
            assert not any(module.training for module in model.modules())

            def attack() -> None:
                assert all(parameter.grad is None for parameter in model.parameters())
                nn.functional.cross_entropy(model(images), labels).backward()
                calls.append((name, tuple(images.shape)))

            return attack

        return prepare

    monkeypatch.setattr(attack_speed, "PEERS", {name: peer(name) for name in ("torch", "no_such_library", "pytest")})
    state, turns = torch.get_rng_state(), []
    result = attack_speed.measure_attack(Plan(repeats=2, batch_size=3), lambda: turns.append(1))
    assert len(turns) == 3 and torch.equal(torch.get_rng_state(), state)
    assert calls == [("torch", (3, 3, 32, 32)), ("pytest", (3, 3, 32, 32))] * 3
    assert (list(result.others), result.left_out) == (["torch", "pytest"], ("no_such_library",))
    assert result.versions["torch"] == version("torch")
    assert len(result.overhead.values) == 2 and result.overhead.low > 0.5


@pytest.mark.parametrize("name", list(attack_speed.PEERS))
def test_other_libraries_run_the_attack_that_is_timed(name, monkeypatch):
    """Without random starts they and this package make the same images."""
    pytest.importorskip(name)
    from attack_samples import images, network

    x, y = images(16)
    model = network().double()
    attack = attack_speed.PEERS[name](copy.deepcopy(model), x.double(), y)
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda tensor, *_, **__: tensor.zero_())
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(shape, 0.5, **options))
    found = attack()
    expected = PGD(random_start=False)(model, x.double(), y)
    torch.testing.assert_close(found.detach(), expected, atol=1e-9, rtol=0)


# --- memory


def test_arithmetic_of_memory():
    result = memory_result()
    assert result.ratio.values == (1.2, 1.0)
    assert result.own_ratio is not None and result.own_ratio.values == (1.3, 1.0)
    assert result.growth.values == (1.2, 1.0)
    assert result.growth_per_sample.values == (0.5, 0.0)
    assert memory_result(before=300).own_ratio is None  # nothing was seen to be added
    assert memory_result(before=300).to_json()["inference"]["trace_to_forward_own"] is None


def test_memory_jobs_differ_in_what_is_compared_alone(monkeypatch):
    jobs = []
    monkeypatch.setattr(memory, "measured", lambda module, job, case: jobs.append(job) or (len(jobs), 10 * len(jobs)))
    done = []
    result = measure_memory(Plan(repeats=2, batch_size=5, seed=6), lambda: done.append(1))
    assert len(jobs) == len(done) == memory.memory_processes(Plan(repeats=2)) == 8
    assert jobs[:4] == jobs[4:]
    forward, traced, few, many = jobs[:4]
    assert forward == {**traced, "trace": False} and traced["trace"]
    assert (traced["model"], traced["image_size"], traced["batch_size"], traced["seed"]) == ("vgg16", 224, 5, 6)
    assert many == {**few, "batches": many["batches"]}
    assert (few["batches"] * few["batch_size"], many["batches"] * many["batch_size"]) == (64, 1024)
    assert (result.few_samples, result.many_samples) == (64, 1024)
    assert result.trace == Peaks((2, 6), (20, 60))
    assert memory.memory_repeats(Plan(repeats=50)) == 3
    for job in jobs[:4]:
        memory_probe.Job(**job)


TINY_JOB = {
    "trace": True,
    "model": "vgg_small",
    "image_size": 32,
    "classes": 10,
    "batch_size": 4,
    "batches": 2,
    "threads": 1,
    "device": "cpu",
    "seed": 0,
}


@pytest.mark.parametrize("traced", [True, False])
def test_a_peak_holds_what_was_given_back_at_once_and_nothing_from_before(traced, monkeypatch):
    try:
        memory_probe._RESET.write_text("5")
    except OSError:
        pytest.skip("a process cannot forget its peak here")
    size = 1 << 26

    def build(*_: object, **__: object) -> nn.Module:
        torch.ones(6 * size // 4)
        return nn.Conv2d(3, 3, 3)

    def job(*_: object) -> None:
        torch.ones(size // 4)

    monkeypatch.setattr(registry, "build_model", build)
    monkeypatch.setattr(trace_module, "trace_routes", job)
    if not traced:
        monkeypatch.setattr(nn.Conv2d, "forward", job)
    with in_threads(None):
        before, peak = memory_probe.run(memory_probe.Job(**{**TINY_JOB, "trace": traced}))
    assert 0.9 * size < peak - before < 4 * size


def test_jobs_run_in_processes_of_their_own():
    before, peak = memory.measured(memory._PROBE, TINY_JOB, "memory")
    assert 10_000_000 < before <= peak


def test_failed_processes_are_one_line():
    with pytest.raises(UserError, match=r"no_such_module.*smaller --batch-size") as caught:
        memory.measured("no_such_module", TINY_JOB, "memory")
    assert "\n" not in str(caught.value)
