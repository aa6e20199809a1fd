"""Routes of images after an attack."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError
from attackroute.robustness.gradient_attacks import PGD
from attackroute.tracing import oracle
from attackroute.tracing.trace import trace_routes
from tracing import ready, same_routes, small, worst

ATTACK = PGD(eps=0.1, steps=3)


def test_the_attacked_images_are_traced_for_the_given_labels() -> None:
    model, images, labels = ready(small)
    expected = oracle.trace(model, ATTACK(model, images, labels), labels, width=0.3)
    found = trace_routes(model, (images, labels), 0.3, attack=ATTACK, keep_scores=True)
    assert worst(found, expected) < 1e-9
    assert same_routes(found, expected)
    assert found.provenance.attack == str(ATTACK) == "pgd:eps=0.1,steps=3"
    clean = oracle.trace(model, images, labels, width=0.3)
    assert worst(found, clean) > 1e-6


def test_images_without_labels_are_attacked_and_traced_for_the_clean_prediction() -> None:
    model, images, _ = ready(small)
    with torch.no_grad():
        clean = model(images).argmax(1)
    labelled = trace_routes(model, (images, clean), attack=ATTACK, keep_scores=True)
    found = trace_routes(model, images, attack=ATTACK, keep_scores=True)
    assert worst(found, labelled) == 0
    assert found.labels is None


def test_batches_do_not_matter() -> None:
    model, images, labels = ready(small)
    whole = trace_routes(model, (images, labels), attack=ATTACK, keep_scores=True)
    single = trace_routes(model, (images, labels), attack=ATTACK, keep_scores=True, batch_size=1)
    assert worst(single, whole) < 1e-9


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
