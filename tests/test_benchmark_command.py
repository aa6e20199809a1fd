"""``attackroute benchmark``: plans, steps, tables, JSON, bad input."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from attackroute.benchmark import attack_speed, extrapolation, hardening_speed, memory, process_speed
from attackroute.benchmark import memory as memory_module
from attackroute.benchmark import speed as speed_module
from attackroute.benchmark.cases import SPEED_CASES
from attackroute.benchmark.hardening_speed import step_processes
from attackroute.benchmark.image_costs import JPEG, PACKING, READING, SENT, TRACE, ImageCosts
from attackroute.benchmark.plan import CASE_NAMES, Plan
from attackroute.benchmark.process_speed import ProcessSpeed
from attackroute.benchmark.report import run_benchmark
from attackroute.cli import benchmark
from attackroute.cli.app import app
from attackroute.core.errors import UserError
from benchmark_samples import attack_result, hardening_result, memory_result, naive_result, runs, speed_result


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"cases": ("resnet81",)}, "'resnet81'.*resnet18"),
        ({"repeats": 0}, "repeats must be at least 1, not 0"),
        ({"batch_size": -2}, "batch size must be at least 1, not -2"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
    ],
)
def test_bad_plans(settings, part):
    with pytest.raises(UserError, match=part):
        Plan(**settings)


def test_plans():
    assert [case.name for case in Plan().speed_cases] == [case.name for case in SPEED_CASES]
    assert [name for name in CASE_NAMES if not Plan().includes(name)] == ["architectures", "processes"]
    assert [name for name in CASE_NAMES if Plan(quick=True).includes(name)] == ["vgg16", "naive", "memory"]
    assert [name for name in CASE_NAMES if Plan(cases=("resnet50",), quick=True).includes(name)] == ["resnet50"]
    assert (Plan().turns, Plan(quick=True).turns, Plan(quick=True, repeats=9).turns) == (7, 2, 9)
    assert Plan(quick=True).batches < Plan().batches


def fake_parts(monkeypatch) -> list[tuple[str, bool]]:
    """Replace what takes time; returns the speed cases that are asked for."""
    asked: list[tuple[str, bool]] = []

    def speed(case, plan, *, channels_last, advance):
        asked.append((case.name, channels_last))
        for _ in range(plan.turns + 1):
            advance()
        form = "channels_last" if channels_last else "contiguous"
        return speed_result(case=case, memory_format=form, batch_size=case.batch_size)

    def naively(plan, advance):
        for _ in range(plan.turns + 1):
            advance()
        return naive_result()

    def remember(plan, advance):
        for _ in range(memory.memory_processes(plan)):
            advance()
        return memory_result()

    monkeypatch.setattr(speed_module, "measure_speed", speed)
    monkeypatch.setattr(extrapolation, "measure_naive", naively)

    def attack(plan, advance):
        for _ in range(plan.turns + 1):
            advance()
        return attack_result()

    monkeypatch.setattr(memory_module, "measure_memory", remember)
    monkeypatch.setattr(attack_speed, "measure_attack", attack)

    def hardening(plan, advance):
        for _ in range(plan.turns + 1 + step_processes(plan)):
            advance()
        return hardening_result()

    monkeypatch.setattr(hardening_speed, "measure_hardening", hardening)
    return asked


def test_all_cases_are_measured_and_every_step_is_counted(monkeypatch):
    asked = fake_parts(monkeypatch)
    steps = []
    result = run_benchmark(Plan(channels_last=True), lambda *step: steps.append(step))
    assert asked == [(case.name, form) for case in SPEED_CASES for form in (False, True)]
    assert result.naive is not None and result.memory is not None and result.attack is not None
    assert result.hardening is not None
    done, totals, messages = zip(*steps, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]} == {11 * 8 + 12 + 24}
    assert "resnet50, channels_last" in messages
    only = run_benchmark(Plan(cases=("memory",)))
    assert (only.speed, only.naive, only.attack, only.hardening) == ((), None, None, None) and only.memory is not None


def test_want_of_memory_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("out of memory\ndetails")

    monkeypatch.setattr(extrapolation, "measure_naive", fail)
    before = torch.get_num_threads()
    with pytest.raises(UserError, match=r"out of memory.*smaller --batch-size") as caught:
        run_benchmark(Plan(cases=("naive",), threads=before + 1))
    assert "\n" not in str(caught.value)
    assert torch.get_num_threads() == before


def run(*arguments: str):
    return CliRunner().invoke(app, ["benchmark", *arguments], catch_exceptions=False)


def test_tables(monkeypatch):
    fake_parts(monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")
    result = run("--channels-last", "--threads", "1")
    assert (result.exit_code, result.stderr) == (0, "")
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "1 thread" in rows[0] and "7 interleaved repeats" in rows[0]
    assert "vgg16 2 x 128 1.25 (1.00-1.50) 1.30 0.50 (0.50-2.50) 1.50 (1.00-2.00)" in rows
    assert "mobilenet_v2, channels_last 2 x 16 1.25 (1.00-1.50) 1.60 0.50 (0.50-2.50) 1.50 (1.00-2.00)" in rows
    assert "top-k" + " 0.500" * 8 in rows
    assert "trace 15.0 (10.0-20.0) ms all 1" in rows
    assert "naive: autograd 40 (20-60) s 2 x 8 of 1,100 2,500 (2,000-3,000)" in rows
    assert "10,000 such images by the trace, extrapolated: 2.5 (1.7-3.3) minutes;" in rows
    assert any("GTX 1080: 7.4 hours" in row for row in rows)
    assert "trace / inference, 16 x 224x224 0 MB 0 MB 1.10 (1.00-1.20)" in rows
    assert "torchattack 1.7.2 5,000 (3,000-5,000) ms 1.25 (1.00-1.50)" in rows
    assert "Ours / 10 bare forward and backward passes: 1.25 (1.00-2.00)" in rows
    assert "Not installed, and left out: foolbox" in rows
    assert "gradient, exact 5,000 (4,000-12,000) ms 2.50 (2.00-3.00) 3.20" in rows
    assert "PAT, gradient, exact 15,000 (11,000-20,000) ms 1.50 (1.10-2.00) -" in rows
    assert "float32 0.0003 0.9900 1.0100 0.0125" in rows
    assert "bfloat16 0.0003 0.5000 2.0000 1.5000" in rows
    assert "PAT, gradient, exact 0 MB 0 MB 2.00 (1.50-2.50)" in rows


def test_two_processes_are_compared_with_one_where_that_is_asked_for(monkeypatch):
    small = ImageCosts("vgg16", 32, 128, 4224, {TRACE: (0.004, 0.005, 0.009), PACKING: (9e-6,)}, {SENT: 585.2})
    large = ImageCosts("resnet18", 224, 16, 4800, {TRACE: (0.05,), READING: (0.0032,)}, {JPEG: 49_123.0})
    # the ratios are 1.5, 2 and 1.6
    found = ProcessSpeed(100, runs(3.0, 4.0, 8.0), runs(2.0, 2.0, 5.0), (small, large))
    monkeypatch.setattr(process_speed, "measure_processes", lambda plan: found)
    rows = [" ".join(line.split()) for line in run("--case", "processes").stdout.splitlines()]
    assert "one 40.00 (30.00-80.00) ms 1" in rows
    assert "two 20.00 (20.00-50.00) ms 1.60 (1.50-2.00)" in rows
    assert "an image vgg16, 32x32 resnet18, 224x224" in rows
    assert "channels of route layers 4,224 4,800" in rows
    assert "trace 5.0 (4.0-9.0) ms 50.0 (50.0-50.0) ms" in rows
    assert "packing its routes 0.009 (0.009-0.009) ms -" in rows
    assert "reading a JPEG - 3.2 (3.2-3.2) ms" in rows
    assert "JPEG - 49,123 bytes" in rows
    assert "Times are processor time, medians of 3 repeats:" in rows
    assert "routes as they are sent 585 bytes -" in rows
    content = json.loads(run("--case", "processes", "--json").stdout)["processes"]
    assert content["throughput_ratio"]["median"] == 1.6 and content["aim"] == 1.8
    assert [ImageCosts(**costs).sizes for costs in content["costs"]] == [small.sizes, large.sizes]


def test_json_and_quiet(monkeypatch):
    fake_parts(monkeypatch)
    result = run("--case", "vgg16", "--case", "naive", "--json")
    content = json.loads(result.stdout)
    assert set(content) == {
        *("versions", "device", "threads", "dtype", "repeats", "quick", "seed"),
        *("speed", "naive", "memory", "attack", "hardening", "architectures", "processes"),
    }
    assert set(content["versions"]) == {"attackroute", "torch", "torchvision", "python"}
    assert (content["repeats"], content["dtype"], content["memory"]) == (7, "float32", None)
    (speed,) = content["speed"]
    assert (speed["case"], speed["limit"]) == ("vgg16", 1.3)
    assert speed["trace_to_forward"] == {"median": 1.25, "min": 1.0, "max": 1.5, "values": [1.5, 1.25, 1.0]}
    assert speed["seconds"]["trace"] == [3.0, 5.0, 5.0]
    assert content["naive"]["ways"]["autograd"]["ratio_to_trace"]["median"] == pytest.approx(2500)
    assert json.loads(run("--case", "memory", "--json", "--quiet").stdout)["memory"]["growth"]["samples"] == [64, 84]
    assert run("--case", "memory", "--quiet").output == ""


def test_a_real_run():
    arguments = ("--case", "vgg16", "--batch-size", "2", "--repeats", "1", "--quick", "--threads", "1", "--json")
    before = torch.get_num_threads()
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    (speed,) = json.loads(result.stdout)["speed"]
    assert (speed["batch_size"], speed["limit"]) == (2, None)
    assert speed["trace_to_forward"]["median"] == speed["seconds"]["trace"][0] / speed["seconds"]["forward"][0] > 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("--case", "vgg61"),
        ("--repeats", "0"),
        ("--threads", "none"),
        ("--batch-size", "-1"),
        ("--device", "no-such-device"),
    ],
)
def test_bad_input_is_one_line(arguments):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert arguments[0] in result.stderr


def test_the_command_offers_every_case():
    assert tuple(name.value for name in benchmark.Cases) == CASE_NAMES
