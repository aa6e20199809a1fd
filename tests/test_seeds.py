"""Seed gradients at any confidence, against exact arithmetic."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.errors import UserError
from attackroute.core.loss import cross_entropy_seed, log_doubt, seed_gradients
from attackroute.tracing import oracle
from attackroute.tracing.trace import trace_routes
from tracing import deviation, ready, same_routes, small, worst

LOGITS = [
    [0.0, 0.0, 0.0],
    [1.5, -0.5, 0.25],
    [40.0, 0.0, 1.0],  # p = 1.0 in float32
    [200.0, -3.0, 2.0],  # p = 1.0 in float64 too
    [300.0, -300.0, -298.0],
    [-50.0, 3.0, 2.0],
    [-300.0, 300.0, 0.0],
]


def exact(logits: list[float], label: int) -> tuple[list[float], float]:
    """``(softmax - onehot) / (1 - p_y)`` and ``log(1 - p_y)`` with 400 digits, so that 1 - p_y never vanishes."""
    with localcontext() as context:
        context.prec = 400
        powers = [Decimal(value).exp() for value in logits]
        total = sum(powers)
        doubt = (total - powers[label]) / total
        return [float((power / total - (k == label)) / doubt) for k, power in enumerate(powers)], float(doubt.ln())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_seed_and_the_doubt_are_right_at_any_confidence(dtype: torch.dtype) -> None:
    for logits in LOGITS:
        for label in range(3):
            z, y = torch.tensor([logits], dtype=dtype), torch.tensor([label])
            found = cross_entropy_seed(z, y)
            assert found.dtype == dtype
            seed, doubt = exact(logits, label)
            torch.testing.assert_close(found.double(), torch.tensor([seed]).double(), rtol=1e-5, atol=1e-30)
            assert found[0, label] == -1
            assert found.sum().abs() < 1e-6
            assert log_doubt(z, y).item() == pytest.approx(doubt, rel=1e-5, abs=1e-7)


def test_doubt_times_seed_is_the_gradient_of_cross_entropy() -> None:
    logits = torch.randn(20, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(20) % 7
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    found = log_doubt(logits, labels).exp()[:, None] * cross_entropy_seed(logits, labels)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-14)


def test_half_precision_logits_are_widened() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        logits = torch.tensor([[30.0, 0, -4]], dtype=dtype)
        assert cross_entropy_seed(logits, torch.tensor([0])).dtype == torch.float32
        assert log_doubt(logits, torch.tensor([0])).item() == pytest.approx(-30 + 0.018, abs=1e-3)


def saturated(scale: float) -> tuple[nn.Module, Tensor, Tensor]:
    """A network so sure of itself that its probabilities are 0.0 and 1.0, with its own predictions as labels."""
    model, images, _ = ready(small)
    with torch.no_grad():
        model[6].weight *= scale
        model[6].bias.copy_(torch.linspace(-1, 1, 5) * scale)
    return model, images, model(images).argmax(1)


def test_saturated_samples_keep_their_ranking_in_float32() -> None:
    model, images, labels = saturated(3000)
    exact = trace_routes(model, (images, labels), keep_scores=True)
    found = trace_routes(model.float(), (images, labels), keep_scores=True)
    logits = model(images.float())
    assert logits.softmax(1).gather(1, labels[:, None]).eq(1).all()
    naive = logits.detach().requires_grad_()
    assert torch.autograd.grad(F.cross_entropy(naive, labels, reduction="sum"), naive)[0].eq(0).all()  # what is avoided
    assert worst(found, exact) <= 1e-4
    assert same_routes(found, exact)
    assert all(found.scores[layer].amax(1).gt(0).all() for layer in found.layers)


def test_more_confidence_means_no_other_route() -> None:
    # with two classes q - onehot is (-1, 1) at any confidence: scaling the logits scales scores and moves no route
    results = []
    for scale in (1.0, 1e3, 1e6):
        model, images, _ = ready(lambda: small(classes=2))
        with torch.no_grad():
            model[6].weight *= scale
        results.append(trace_routes(model, (images, torch.zeros(3, dtype=torch.int64)), keep_scores=True))
    for scale, found in zip((1e3, 1e6), results[1:], strict=True):
        assert found == results[0]
        assert deviation(found.scores["2"] / scale, results[0].scores["2"]) < 1e-9


def test_a_loss_of_the_users_own() -> None:
    model, images, labels = ready(small)
    losses = {
        "cross entropy": lambda z, y: F.cross_entropy(z, y, reduction="none"),
        "margin": lambda z, y: z.gather(1, y[:, None])[:, 0] - z.logsumexp(1) * 2,
        "one logit": lambda z, _: z[:, 3],
    }
    for name, loss in losses.items():
        expected = oracle.trace(model, images, labels, loss=loss)
        found = trace_routes(model, (images, labels), loss=loss, keep_scores=True)
        assert worst(found, expected) <= 1e-9
        assert same_routes(found, expected)
        if name == "cross entropy":  # for samples in doubt, the seed changes no ranking
            assert same_routes(found, trace_routes(model, (images, labels)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_loss_under_the_callers_gradient_mode(mode: type[torch.no_grad]) -> None:
    model, images, labels = ready(small)
    loss = lambda z, y: F.cross_entropy(z, y, reduction="none")  # noqa: E731
    expected = trace_routes(model, (images, labels), loss=loss, keep_scores=True)
    with mode():
        found = trace_routes(model, (images.clone(), labels.clone()), loss=loss, keep_scores=True)
    assert worst(found, expected) == 0


def test_seeds_of_a_sink_that_the_logits_ignore_are_zero() -> None:
    used, ignored = torch.rand(2, 3, requires_grad=True), torch.rand(2, 4, requires_grad=True)
    found = seed_gradients(used * 2, torch.tensor([0, 1]), {"used": used, "ignored": ignored}, None)
    assert found["ignored"].eq(0).all()
    assert found["used"].diagonal()[:2].eq(-2).all()


def test_errors_name_the_mistake() -> None:
    z, y = torch.rand(2, 3, requires_grad=True), torch.tensor([0, 1])
    with pytest.raises(UserError, match=r"loss returned shape \(\), expected one loss per sample \(2,\).*'none'"):
        seed_gradients(z, y, {"z": z}, F.cross_entropy)
    with pytest.raises(UserError, match="loss returned shape"):
        seed_gradients(z, y, {"z": z}, lambda *_: None)
    with pytest.raises(UserError, match="do not depend on any route layer"):
        seed_gradients(z.detach(), y, {"z": z}, None)
    with pytest.raises(UserError, match=r"two logits or more"):
        cross_entropy_seed(torch.rand(2, 1), y)
    with pytest.raises(UserError, match=r"returns tuple, not logits"):
        checked_logits((z,), 2)
    for shape in ((3, 3), (2,), (2, 3, 1)):
        with pytest.raises(UserError, match="not logits"):
            checked_logits(torch.zeros(shape), 2)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(UserError, match="logits are not finite"):
            checked_logits(torch.tensor([[bad, 0.0], [0, 0]]), 2)
    for labels in (torch.zeros(2), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(UserError, match="expected 2 integers"):
            checked_labels(labels, 3, 2)
    for wrong in (-1, 3, 10**12):
        with pytest.raises(UserError, match=rf"label {wrong} is outside the model's 3 logits \(0 \.\. 2\)"):
            checked_labels(torch.tensor([0, wrong]), 3, 2)


def test_logits_of_an_output_object() -> None:
    class Output:
        logits = torch.rand(2, 3)

    assert checked_logits(Output(), 2) is Output.logits
    assert checked_labels(torch.tensor([0, 2], dtype=torch.uint8), 3, 2).dtype == torch.int64
