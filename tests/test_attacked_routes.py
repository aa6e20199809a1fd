"""Routes of images after an attack, and routes of what the attack changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from architectures import Residual, Shuffled
from attackroute.core.errors import UserError
from attackroute.robustness.registry import parse_attack
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.tracing import oracle
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.trace import trace_routes
from tracing import ready, same_routes, shaken, small, worst

Trace = partial[InstanceRoutes]


@pytest.fixture(params=["unit", "noise"])
def trace(request: pytest.FixtureRequest) -> Trace:
    return partial(trace_routes, config=TraceConfig(carrier=request.param), attack=shaken, keep_scores=True)


@pytest.mark.parametrize("attack", ["gaussian-noise:std=0.1", "fgsm", "pgd:eps=0.1,steps=3"])
def test_the_attacked_images_are_traced_for_the_given_labels(trace: Trace, attack: str) -> None:
    model, images, labels = ready(Residual)
    known = parse_attack(attack)
    found = trace(model, (images, labels), 0.3, attack=known)
    noise = trace.keywords["config"].carrier == "noise"
    clean = images if noise else None
    expected = oracle.trace(model, known(model, images, labels), labels, clean=clean, width=0.3)
    assert worst(found, expected) <= 1e-12
    assert same_routes(found, expected)
    assert found.provenance.criterion == ("noise" if noise else "influence")
    assert found.provenance.attack == str(known)
    assert worst(found, oracle.trace(model, images, labels, width=0.3)) > 1e-6


def test_images_without_labels_are_attacked_and_traced_for_the_clean_prediction(trace: Trace) -> None:
    model, images, _ = ready(Residual)
    with torch.no_grad():
        answers = model(images).argmax(1)
    found = trace(model, images)
    assert worst(found, trace(model, (images, answers))) == 0
    assert found.labels is None


@pytest.mark.parametrize("build", [Residual, Shuffled])
def test_batches_and_order_change_nothing(trace: Trace, build: Callable[[], nn.Module]) -> None:
    model, images, labels = ready(build, samples=5)
    whole = trace(model, (images, labels))
    single = trace(model, (images, labels), batch_size=1)
    assert worst(single, whole) <= 1e-12
    assert same_routes(single, whole)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = trace(model, (images[order], labels[order]), batch_size=2)
    assert worst(moved, whole.select(order)) <= 1e-12


def test_any_callable_will_do_and_is_checked() -> None:
    model, images, labels = ready(small)

    def darker(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * x

    found = trace_routes(model, (images, labels), attack=darker, keep_scores=True)
    assert worst(found, trace_routes(model, (0.5 * images, labels), keep_scores=True)) == 0
    assert found.provenance.attack == "darker"
    with pytest.raises(UserError, match=r"returns \(2, 3, 13, 13\) for images of shape \(3, 3, 13, 13\)"):
        trace_routes(model, (images, labels), attack=lambda _, x, y: x[:2])
    with pytest.raises(UserError, match="returns NoneType"):
        trace_routes(model, (images, labels), attack=lambda *_: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match="NaN or inf"):
        trace_routes(model, (images, labels), attack=lambda _, x, y: x / 0)
