"""Well-known architectures at reduced size against the oracle, and their table."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.architectures import (
    ARCHITECTURES,
    Architecture,
    ArchitectureResult,
    ReducedComparison,
    compare_reduced,
    measure_architecture,
)
from benchmarks.cases import Plan
from benchmarks.run import main
from benchmarks.timing import Spread

SLOW = {"ResNet-50, GroupNorm", "EfficientNet-B0", "Inception-v3", "Swin-T, linear"}
OPEN = {"ResNet-50, GroupNorm", "ConvNeXt-T", "Swin-T, linear"}  # at least an edge


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=[pytest.mark.slow] if each.name in SLOW else [], id=each.name) for each in ARCHITECTURES],
)
def test_reduced_networks_are_the_oracle(architecture: Architecture) -> None:
    if architecture.needs is not None and importlib.util.find_spec(architecture.needs) is None:
        pytest.skip(f"{architecture.needs} is not installed")
    found = compare_reduced(architecture)
    assert found.deviation < 1e-9
    assert found.agreement == 1 if architecture.name not in OPEN else 0.6 < found.agreement <= 1


def tiny(name: str, linear: bool) -> Architecture:
    found = next(each for each in ARCHITECTURES if each.name == name)
    return replace(found, build=found.reduced, image_size=found.reduced_size, linear=linear)


@pytest.mark.slow
def test_an_architecture_is_measured() -> None:
    vit = measure_architecture(tiny("ViT-B/16, linear", True), Plan(repeats=1))
    assert (vit.layers, len(vit.closed), all(vit.closed)) == (10, 19, True)
    assert (vit.exact, vit.reduced.agreement, vit.exact_ratio) == (0, 1, (vit.trace / vit.forward).median)
    assert vit.reduced.deviation < 1e-9
    net = measure_architecture(tiny("ResNet-50, GroupNorm", False), Plan(repeats=1))
    assert not any(net.closed)
    assert net.exact > 0
    assert net.exact_ratio > 0


def test_the_table_is_shown_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(architecture: Architecture, plan: Plan, advance: object) -> ArchitectureResult:
        closed = (True, True, True, not architecture.linear)
        return ArchitectureResult(
            architecture.name, 5, closed, forward=Spread((1.0, 2.0)), trace=Spread((20.0, 60.0)),
            exact=3000.0 if architecture.linear else 0.0, reduced=ReducedComparison(2e-16, 0.9),
        )  # fmt: skip

    monkeypatch.setattr("benchmarks.run.measure_architecture", measured)
    monkeypatch.setenv("COLUMNS", "200")
    target = tmp_path / "table.md"
    assert main(["architectures", "--quick", "--threads", "1", "--table", str(target)]) == 0
    rows = target.read_text().splitlines()
    assert rows[2] == "| EfficientNet-B0 | 5 | 4 | 100% | 25.0 (20.0-30.0) | the same | 2e-16 | all, exact |"
    assert rows[3] == "| ViT-B/16, linear | 5 | 4 | 75% | 25.0 (20.0-30.0) | 2,000 | 2e-16 | 90% |"
    assert "approximate" in target.read_text() and "2 images a batch" in target.read_text()
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "ViT-B/16, linear 5 4 75% 25.0 (20.0-30.0) 2,000 2e-16 90%" in shown
