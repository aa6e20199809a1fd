"""Gradient attacks against second implementations, and what every attack guarantees."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from architectures import Function
from attack_samples import CLASSES, images, network, right
from attackroute.core.errors import UserError
from attackroute.robustness.gradient_attacks import FGSM, MIFGSM, PGD, StepLL, input_gradient
from attackroute.robustness.registry import parse_attack
from model_checks import one_line
from tracing import state, untidy

EPS = 4 / 255
LINF = ("fgsm:eps=4/255", "step-ll:eps=4/255", "mi-fgsm:eps=4/255,steps=4", "pgd:eps=4/255,steps=4")
SPECS = (*LINF, "pgd:eps=4/255,steps=3,restarts=3")
CUT = Function(lambda _, x: x.detach().flatten(1)[:, :CLASSES] * 3)  # the graph between images and logits is cut


def doubles(samples: int = 64) -> tuple[nn.Module, Tensor, Tensor]:
    x, y = images(samples)
    return network().double(), x.double(), y


@pytest.mark.parametrize("steps", [1, 7])
def test_attacks_are_those_of_another_library(steps):
    torchattack = pytest.importorskip("torchattack")
    model, x, y = doubles()
    single = {"device": torch.device("cpu"), "eps": EPS}
    iterated = {**single, "steps": steps, "alpha": EPS / 3}
    for ours, other, labels in (
        (FGSM(EPS), torchattack.FGSM(copy.deepcopy(model), **single), y),
        (StepLL(EPS), torchattack.FGSM(copy.deepcopy(model), **single, targeted=True), model(x).argmin(1)),
        (MIFGSM(EPS, steps, EPS / 3, decay=0.9), torchattack.MIFGSM(copy.deepcopy(model), **iterated, decay=0.9), y),
        (
            PGD(EPS, steps, step_size=EPS / 3, random_start=False),
            torchattack.PGD(copy.deepcopy(model), **iterated, random_start=False),
            y,
        ),
    ):
        torch.testing.assert_close(ours(model, x, y), other(x, labels).detach(), atol=1e-12, rtol=0)


def test_defaults_are_the_papers():
    assert (PGD().eps, PGD().steps, MIFGSM().eps, MIFGSM().steps, FGSM().eps) == (8 / 255, 10, 8 / 255, 10, 8 / 255)
    model, x, y = doubles(8)
    for attack in (PGD, MIFGSM):
        assert torch.equal(attack()(model, x, y), attack(step_size=0.8 / 255)(model, x, y))


@pytest.mark.parametrize("library", ["torchattack", "torchattacks"])
@pytest.mark.parametrize(
    ("name", "ours", "settings"),
    [("PGD", PGD(EPS, steps=7, step_size=EPS / 4), {"eps": EPS, "steps": 7, "alpha": EPS / 4, "random_start": True})],
)
def test_attacks_succeed_as_often_as_another_librarys(library, name, ours, settings):
    module = pytest.importorskip(library)
    if not hasattr(module, name):
        pytest.skip(f"{library} has no {name}")
    model, (x, y) = network(), images(600)
    device = {"device": torch.device("cpu")} if library == "torchattack" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = right(model, getattr(module, name)(copy.deepcopy(model), **settings, **device)(x, y).detach(), y)
    found = right(model, ours(model, x, y), y)
    assert 0.1 < found.float().mean() < right(model, x, y).float().mean() - 0.2
    # the two differ in their starting points alone, so that they disagree on few images, and on these at random
    lost, won = int((other & ~found).sum()), int((found & ~other).sum())
    assert lost + won < 30 and abs(lost - won) < 4 * math.sqrt(lost + won + 1)


def test_restarts_are_for_images_still_right_and_find_more():
    model = network()
    x, y = images(400)
    once, often = PGD(EPS, steps=2), PGD(EPS, steps=2, restarts=6)
    first, last = once(model, x, y), often(model, x, y)
    fooled = ~right(model, first, y)
    assert torch.equal(first[fooled], last[fooled])
    assert not torch.equal(first[~fooled], last[~fooled])
    assert right(model, last, y).sum() < right(model, first, y).sum()


def test_starting_points_fill_the_ball():
    """A model without a gradient shows them: uniform in the cube."""
    stats = pytest.importorskip("scipy.stats")
    x = torch.full((500, 3, 4, 4), 0.5, dtype=torch.float64) + torch.arange(500)[:, None, None, None] * 1e-5
    y = torch.zeros(500, dtype=torch.long)
    change = PGD(0.1)(CUT, x, y) - x
    assert stats.kstest(change.flatten() / 0.1, stats.uniform(-1, 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_in_the_ball_and_in_range(spec, dtype):
    attack = parse_attack(spec)
    model = network().to(dtype)
    x, y = images(32)
    x = x.to(dtype).clone()
    x[:4] = x[:4].round()  # at the border of the range
    found = attack(model, x, y)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    assert found.min() >= 0 and found.max() <= 1
    change = (found - x).flatten(1)
    size = change.abs().amax(1)
    assert size.max() <= attack.eps * (1 + 1e-6) + 1e-7
    assert size.max() > 0.2 * attack.eps
    assert attack(model, x[:0], y[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("spec", [*SPECS, "gaussian-noise:std=0"])
def test_an_eps_of_zero_changes_nothing_but_rounding_errors(spec):
    name, _, rest = spec.partition(":")
    x, y = images(8)
    x = x.clone()
    x[0, 0, 0, :2] = torch.tensor([-5e-5, 1 + 5e-5])
    attack = parse_attack(":".join((name, ",".join([rest.partition("=")[0] + "=0", *rest.split(",")[1:]]))))
    assert torch.equal(attack(network(), x, y), x.clamp(0, 1))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(spec, fails):
    """A network in an awkward state, with a buffer that every pass counts up."""
    model, (x, y) = untidy(), images(8)
    model.register_buffer("passes", torch.zeros(()))

    def count(module: nn.Module, _: object) -> None:
        module.passes += 1
        if fails:
            raise ZeroDivisionError

    def memory() -> list[int]:
        return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]

    model.register_forward_pre_hook(count)
    before, kept, labels, generator = (state(model), memory()), x.clone(), y.clone(), torch.get_rng_state()
    if fails:
        with pytest.raises(ZeroDivisionError):
            parse_attack(spec)(model, x, y)
    else:
        found = parse_attack(spec)(model, x, y)
        assert not found.requires_grad and found.grad_fn is None and found.grad is None
        assert found.data_ptr() != x.data_ptr()
    assert (state(model), memory()) == before
    assert torch.equal(x, kept) and torch.equal(y, labels) and x.grad is None and not x.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("spec", SPECS)
def test_batch_size_and_order_do_not_matter(spec):
    attack = parse_attack(spec)
    model, x, y = doubles(24)
    whole = attack(model, x, y)
    assert torch.equal(whole, attack(model, x, y))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attack(model, x[order], y[order]), whole[order], atol=1e-9, rtol=0)
    parts = [attack(model, *part) for part in zip(x.split(7), y.split(7), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-9, rtol=0)


def test_seeds_and_generators():
    attack = PGD
    model, (x, y) = network(), images(8)
    assert not torch.equal(attack(seed=0)(model, x, y), attack(seed=1)(model, x, y))
    generator = torch.Generator().manual_seed(5)
    first, second = (attack()(model, x, y, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    generator.manual_seed(5)
    assert torch.equal(attack()(model, x, y, generator=generator), first)


@pytest.mark.parametrize("spec", SPECS)
def test_grad_modes_and_autocast(spec):
    attack, model, (x, y) = parse_attack(spec), network(), images(8)
    expected = attack(model, x, y)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y), expected)
    with torch.inference_mode():
        inside, labels = x.clone(), y.clone()
        found = attack(model, inside, labels)
        assert torch.equal(found, expected)
    assert not found.is_inference()
    wanted = x.clone().requires_grad_()
    found = attack(model, wanted, y)
    assert torch.equal(found, expected) and not found.requires_grad and wanted.grad is None
    nn.functional.cross_entropy(model(found), y).backward()  # what an attack returns can be trained on
    with torch.autocast("cpu", torch.bfloat16):
        found = attack(model, x, y)
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.2 * (expected - x).abs().mean()  # but for bfloat16's rounding


def test_inside_a_training_step():
    """Between a forward and a backward pass of the same network, whose gradients are those without the attack."""
    x, y = images(16)
    gradients = []
    for attacked in (False, True):
        model = network().train()
        model[7].p = 0.0
        loss = nn.functional.cross_entropy(model(x), y)
        if attacked:
            PGD(EPS, steps=2)(model, x, y)
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert all(module.training for module in model.modules())
    for plain, after in zip(*gradients, strict=True):
        assert torch.equal(plain, after)


@pytest.mark.parametrize("spec", SPECS)
def test_channels_last_is_kept(spec):
    attack, model, (x, y) = parse_attack(spec), network().double(), images(8)
    found = attack(model, x.double().contiguous(memory_format=torch.channels_last), y)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, attack(model, x.double(), y), atol=1e-9, rtol=0)
    assert attack(model, x.double(), y).is_contiguous()


@pytest.mark.parametrize("spec", SPECS)
def test_models_that_work_in_place(spec):
    attack, (x, y), inner = parse_attack(spec), images(16), network().double()
    destructive = Function(lambda parts, x: parts["inner"](x.mul_(2).sub_(0.5)), inner=inner)
    careful = Function(lambda parts, x: parts["inner"](x * 2 - 0.5), inner=inner)
    assert torch.equal(attack(destructive, x.double(), y), attack(careful, x.double(), y))


LOGITS = torch.zeros(1, CLASSES, requires_grad=True)  # with a graph, to which the images do not belong


@pytest.mark.parametrize("model", [CUT, Function(lambda _, x: LOGITS.expand(len(x), -1))], ids=["cut", "unrelated"])
def test_without_a_gradient_only_the_random_start_is_left(model):
    x, y = images(8)
    assert torch.equal(input_gradient(model, x, y), torch.zeros_like(x))
    for attack in (FGSM(EPS), StepLL(EPS), MIFGSM(EPS), PGD(EPS, random_start=False)):
        torch.testing.assert_close(attack(model, x, y), x, atol=0, rtol=0)
    started = PGD(EPS)(model, x, y)
    assert 0 < (started - x).abs().max() <= EPS + 1e-7
    assert torch.equal(started, PGD(EPS, steps=1)(model, x, y))
    assert LOGITS.grad is None


@pytest.mark.parametrize("spec", SPECS)
def test_expanded_gradients(spec):
    """The gradient at the images is one number, expanded."""
    x = images(4)[0] * 0.5 + 0.25
    model = Function(lambda _, x: torch.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], 1))
    found = parse_attack(spec)(model, x, torch.zeros(4, dtype=torch.long))
    assert (found - x).flatten(1).sum(1).max() < 0  # away from class 0; for step-ll too, where class 1 is the least


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gradient):
        ctx.kept = gradient
        return x.flatten(1)[:, :2].clone()

    @staticmethod
    def backward(ctx, _):
        return ctx.kept, None


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_that_the_model_keeps_are_not_written_to(spec):
    x, y = images(4)
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    before = gradient.clone()
    parse_attack(spec)(Function(lambda _, x: Kept.apply(x, gradient)), x, y % 2)
    assert torch.equal(gradient, before)


def test_one_gradient_of_zero_freezes_nothing():
    """Images whose first value is above a half have no gradient at all."""
    x, y = images(16)
    x = x.clone()
    x[:8, 0, 0, 0], x[8:, 0, 0, 0] = 0.9, 0.1
    dead = Function(lambda parts, x: parts["inner"](x * (x[:, :1, :1, :1] <= 0.5).to(x.dtype)), inner=network())
    for attack in (MIFGSM(EPS), PGD(EPS, random_start=False)):
        found = attack(dead, x, y)
        assert found.isfinite().all()
        torch.testing.assert_close(found[:8], x[:8], atol=1e-7, rtol=0)
        assert ((found[8:] - x[8:]).flatten(1).norm(dim=1) > 0.05).all()


@pytest.mark.parametrize("attack", [FGSM(EPS), MIFGSM(EPS), PGD(EPS)], ids=str)
def test_large_logits_are_no_defence(attack):
    plain, x, y = doubles(64)
    model = Function(lambda parts, x: parts["inner"](x) * 1000, inner=network().double())
    leaf = x.clone().requires_grad_()
    losses = nn.functional.cross_entropy(model.float()(leaf.float()), y, reduction="none")
    vanishing = torch.autograd.grad(losses.sum(), leaf)[0]
    model.double()
    assert (vanishing.flatten(1).abs().amax(1) == 0).sum() > 10  # the cross entropy's own gradient is gone
    assert (input_gradient(model, x, y).flatten(1).abs().amax(1) > 0).all()
    fooled = ~right(model, attack(model, x, y), y)
    usual = ~right(plain, attack(plain, x, y), y)
    assert fooled.sum() >= 0.8 * usual.sum() > 10


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: FGSM(-0.1), "eps -0.1 is out of range"),
        (lambda: FGSM(8.0), "eps 8.0 is out of range.*8/255"),
        (lambda: PGD(math.nan), "eps nan"),
        (lambda: PGD(math.inf), "eps inf"),
        (lambda: PGD(steps=0), "steps 0 is not a positive"),
        (lambda: MIFGSM(steps=1.5), "steps 1.5 is not"),
        (lambda: PGD(restarts=0), "restarts 0"),
        (lambda: PGD(restarts=2, random_start=False), "set random_start"),
        (lambda: PGD(step_size=0.0), "step_size 0.0 is not above 0"),
        (lambda: MIFGSM(decay=-1), "decay -1"),
    ],
)
def test_bad_settings(make, part):
    with pytest.raises(UserError, match=part):
        make()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda logits: logits.argmax(1), "not logits"),
        (lambda logits: logits[:3], "for 8 images"),
        (lambda logits: [logits], "returns list"),
        (lambda logits: logits[:, :1], "single logit|outside the model's 1 logits"),
        (lambda logits: logits / 0, "not finite"),
        (lambda logits: logits + 0 * (logits - logits.detach()).abs().sqrt(), "gradient.*not finite"),
    ],
)
@pytest.mark.parametrize("spec", ["fgsm", "mi-fgsm", "pgd"])
def test_what_a_model_must_return(change, part, spec):
    x, y = images(8)
    with one_line(match=part):
        parse_attack(spec)(Function(lambda parts, x: change(parts["inner"](x)), inner=network()), x, y)


@pytest.mark.parametrize("spec", ["fgsm", "pgd", "gaussian-noise"])
@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda x, y: (x * 255, y), "must be in .0, 1."),
        (lambda x, y: (x - 0.5, y), "must be in .0, 1."),
        (lambda x, y: (x * math.nan, y), "nan"),
        (lambda x, y: ((x * 255).byte(), y), "floating"),
        (lambda x, y: (x.numpy(), y), "ndarray"),
        (lambda x, y: (x, None), "needs the labels"),
        (lambda x, y: (x, y[:5]), "expected 8 integers"),
        (lambda x, y: (x, y[:0]), "expected 8 integers"),
        (lambda x, y: (x, y[0]), "expected 8 integers"),
        (lambda x, y: (x, y.float()), "expected 8 integers"),
        (lambda x, y: (x, y - 9), "is negative"),
    ],
)
def test_what_images_and_labels_must_be(change, part, spec):
    x, y = images(8)
    with pytest.raises(UserError, match=part):
        parse_attack(spec)(network(), *change(x, y))


@pytest.mark.parametrize("spec", ["fgsm", "pgd"])
def test_labels_beyond_the_logits(spec):
    x, y = images(8)
    with pytest.raises(UserError, match="outside the model's 5 logits"):
        parse_attack(spec)(network(), x, y + CLASSES)


def test_a_model_is_a_module():
    x, y = images(8)
    with pytest.raises(UserError, match="not a module"):
        FGSM()(lambda images: images, x, y)
