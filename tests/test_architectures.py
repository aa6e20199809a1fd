"""Well-known architectures at reduced size against the oracle, and their table."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attackroute.benchmark import architectures
from attackroute.benchmark.architectures import ARCHITECTURES, Architecture, ArchitectureResult, compare_reduced
from attackroute.benchmark.plan import Plan
from attackroute.benchmark.timing import Runs
from attackroute.cli.app import app

SLOW = {"ResNet-50, GroupNorm", "EfficientNet-B0", "Inception-v3", "Swin-T, linear"}
CLOSED = {"EfficientNet-B0", "MobileNetV3-L", "RegNetY-400MF", "DenseNet-121", "GoogLeNet", "Inception-v3"}


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=[pytest.mark.slow] if each.name in SLOW else [], id=each.name) for each in ARCHITECTURES],
)
def test_reduced_networks_are_the_oracle(architecture: Architecture) -> None:
    if architecture.needs is not None and importlib.util.find_spec(architecture.needs) is None:
        pytest.skip(f"{architecture.needs} is not installed")
    found = compare_reduced(architecture)
    assert found.deviation < 1e-9
    assert found.agreement == 1 if architecture.name in CLOSED else 0.6 < found.agreement <= 1
    ungated = {"DenseNet-121", "GoogLeNet", "Inception-v3"}
    assert found.frozen_agreement == 1 if architecture.name in ungated else 0.2 < found.frozen_agreement < 1


def tiny(name: str, linear: bool) -> Architecture:
    found = next(each for each in ARCHITECTURES if each.name == name)
    return Architecture(found.name, found.reduced, found.reduced_size, linear, found.reduced, found.reduced_size)


def test_an_architecture_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = architectures.measure_architecture(tiny("ViT-B/16, linear", True), Plan(repeats=1))
    assert (vit.layers, vit.closed) == (10, 0)
    assert vit.exact > 0
    assert vit.exact_ratio > 0
    assert vit.deviation < 1e-9
    net = architectures.measure_architecture(tiny("DenseNet-121", False), Plan(repeats=1))
    assert net.closed == net.edges
    assert (net.exact, net.agreement, net.exact_ratio) == (0, 1, net.ratio.median)


def test_the_table_is_shown_and_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(architecture: Architecture, plan: Plan, advance: object) -> ArchitectureResult:
        forward, trace = (Runs(({"all": first}, {"all": second})) for first, second in ((1.0, 2.0), (20.0, 60.0)))
        closed = 3 if architecture.linear else 4
        exact = 3000.0 if architecture.linear else 0.0
        return ArchitectureResult(architecture, 2, 5, 4, closed, forward, trace, exact, 2e-16, 0.9, 4, 4, 0.5)

    monkeypatch.setattr("attackroute.benchmark.report.measure_architecture", measured)
    target = tmp_path / "table.md"
    call = ["benchmark", "--case", "architectures", "--quick", "--threads", "1", "--table", str(target)]
    result = CliRunner().invoke(app, call, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = target.read_text().splitlines()
    assert (
        rows[2] == "| EfficientNet-B0 | 5 | 4 | 100% | 25.0 (20.0-30.0) | the same | 2e-16 | all, exact | 100% | 50% |"
    )
    assert rows[3] == "| ViT-B/16, linear | 5 | 4 | 75% | 25.0 (20.0-30.0) | 2,000 | 2e-16 | 90% | 100% | 50% |"
    assert "approximate" in target.read_text()
    shown = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "ViT-B/16, linear 5 4 75% 25.0 (20.0-30.0) 2,000 2e-16 90% 100% 50%" in shown


def test_a_table_without_the_architectures_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["benchmark", "--case", "vgg16", "--table", str(tmp_path / "table.md")])
    assert result.exit_code != 0
