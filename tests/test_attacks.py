"""Gradient attacks against second implementations, and what every attack guarantees."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from attack_samples import CLASSES, images, network, right
from attackroute.core.errors import UserError
from attackroute.robustness.gradient_attacks import FGSM, MIFGSM, PGD, PGDL2, StepLL, input_gradient
from attackroute.robustness.registry import parse_attack

EPS = 4 / 255
LINF = ("fgsm:eps=4/255", "step-ll:eps=4/255", "mi-fgsm:eps=4/255,steps=4", "pgd:eps=4/255,steps=4")
SPECS = (*LINF, "pgd:eps=4/255,steps=3,restarts=3", "pgd-l2:eps=0.3,steps=4")


def doubles(samples: int = 64) -> tuple[nn.Module, Tensor, Tensor]:
    x, y = images(samples)
    return network().double(), x.double(), y


# --- second implementations


def naive_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of each image's own cross entropy, one image after the other."""
    rows = []
    for image, label in zip(x, y, strict=True):
        leaf = image[None].clone().requires_grad_()
        loss = nn.functional.cross_entropy(model(leaf + 0), label[None])
        rows.append(torch.autograd.grad(loss, leaf)[0][0])
    return torch.stack(rows)


def test_fgsm_and_step_ll_are_those_of_another_library():
    torchattack = pytest.importorskip("torchattack")
    model, x, y = doubles()
    other = torchattack.FGSM(copy.deepcopy(model), device=torch.device("cpu"), eps=EPS)
    torch.testing.assert_close(FGSM(EPS)(model, x, y), other(x, y).detach(), atol=1e-12, rtol=0)
    least = model(x).argmin(1)
    other = torchattack.FGSM(copy.deepcopy(model), device=torch.device("cpu"), eps=EPS, targeted=True)
    torch.testing.assert_close(StepLL(EPS)(model, x, y), other(x, least).detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", [1, 7])
def test_iterated_attacks_are_those_of_another_library(steps):
    torchattack = pytest.importorskip("torchattack")
    model, x, y = doubles()
    settings = {"device": torch.device("cpu"), "eps": EPS, "steps": steps, "alpha": EPS / 3}
    other = torchattack.MIFGSM(copy.deepcopy(model), **settings, decay=0.9)
    ours = MIFGSM(EPS, steps=steps, step_size=EPS / 3, decay=0.9)
    torch.testing.assert_close(ours(model, x, y), other(x, y).detach(), atol=1e-12, rtol=0)
    other = torchattack.PGD(copy.deepcopy(model), **settings, random_start=False)
    ours = PGD(EPS, steps=steps, step_size=EPS / 3, random_start=False)
    torch.testing.assert_close(ours(model, x, y), other(x, y).detach(), atol=1e-12, rtol=0)


def test_defaults_are_the_papers():
    assert (PGD().eps, PGD().steps, MIFGSM().eps, MIFGSM().steps, FGSM().eps) == (8 / 255, 10, 8 / 255, 10, 8 / 255)
    model, x, y = doubles(8)
    for attack in (PGD, MIFGSM):
        assert torch.equal(attack()(model, x, y), attack(step_size=0.8 / 255)(model, x, y))


@pytest.mark.parametrize("library", ["torchattack", "torchattacks"])
def test_pgd_succeeds_as_often_as_another_librarys(library):
    module = pytest.importorskip(library)
    model = network()
    x, y = images(600)
    settings = {"eps": EPS, "steps": 7, "alpha": EPS / 4, "random_start": True}
    if library == "torchattack":
        settings["device"] = torch.device("cpu")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = right(model, module.PGD(copy.deepcopy(model), **settings)(x, y).detach(), y)
    ours = right(model, PGD(EPS, steps=7, step_size=EPS / 4)(model, x, y), y)
    assert 0.1 < ours.float().mean() < right(model, x, y).float().mean() - 0.2
    # the two differ in their starting points alone, so that they disagree on few images, and on these at random
    lost, won = int((other & ~ours).sum()), int((ours & ~other).sum())
    assert lost + won < 30 and abs(lost - won) < 4 * math.sqrt(lost + won + 1)


def naive_l2(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    size, current = 2.5 * eps / steps, x.clone()
    for _ in range(steps):
        for row, gradient in enumerate(naive_gradient(model, current, y)):
            change = current[row] + size * gradient / gradient.norm() - x[row]
            if change.norm() > eps:
                change = change * (eps / change.norm())
            current[row] = (x[row] + change).clamp(0, 1)
    return current


def test_pgd_l2_is_the_naive_one():
    model, x, y = doubles(16)
    ours = PGDL2(0.3, steps=5, random_start=False)(model, x, y)
    torch.testing.assert_close(ours, naive_l2(model, x, y, 0.3, 5), atol=1e-9, rtol=0)


def test_pgd_l2_succeeds_as_often_as_another_librarys():
    torchattacks = pytest.importorskip("torchattacks")
    model = network()
    x, y = images(600)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = right(model, torchattacks.PGDL2(copy.deepcopy(model), eps=0.25, alpha=0.0625, steps=10)(x, y), y)
    ours = right(model, PGDL2(0.25)(model, x, y), y)
    lost, won = int((other & ~ours).sum()), int((ours & ~other).sum())
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
    """A model without a gradient shows them: uniform in the cube, and a radius whose n-th power is uniform."""
    stats = pytest.importorskip("scipy.stats")
    x = torch.full((500, 3, 4, 4), 0.5, dtype=torch.float64) + torch.arange(500)[:, None, None, None] * 1e-5
    y = torch.zeros(500, dtype=torch.long)
    cut = Cut()
    change = PGD(0.1)(cut, x, y) - x
    assert stats.kstest(change.flatten() / 0.1, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    change = (PGDL2(0.1)(cut, x, y) - x).flatten(1)
    radius = change.norm(dim=1) / 0.1
    assert stats.kstest(radius**48, "uniform").pvalue > 1e-3
    direction = change / change.norm(dim=1, keepdim=True)
    assert direction.mean(0).abs().max() < 5 / math.sqrt(500 * 48)
    assert (direction.T @ direction / 500 * 48 - torch.eye(48)).abs().max() < 5 * math.sqrt(2 / 500)


# --- guarantees


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
    size = change.abs().amax(1) if spec in LINF or "restarts" in spec else change.norm(dim=1)
    assert size.max() <= attack.eps * (1 + 1e-6) + 1e-7
    assert size.max() > 0.2 * attack.eps


@pytest.mark.parametrize("spec", SPECS)
def test_an_eps_of_zero_changes_nothing(spec):
    name, _, rest = spec.partition(":")
    attack = parse_attack(":".join((name, ",".join(["eps=0", *rest.split(",")[1:]]))))
    x, y = images(8)
    torch.testing.assert_close(attack(network(), x, y), x, atol=0, rtol=0)


class Watched(nn.Module):
    """A network in an awkward state: mixed flags, gradients, hooks, and a buffer that every pass counts up."""

    def __init__(self, fail_at: int = 10**9) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("passes", torch.zeros(()))
        self.fail_at = fail_at
        self.inner[1].train()
        self.inner[4].eval()
        self.inner[0].weight.requires_grad_(False)
        self.inner[4].weight.grad = torch.ones_like(self.inner[4].weight)
        self.hook = self.inner[2].register_forward_hook(lambda *_: None)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.passes += 1
        if self.calls == self.fail_at:
            raise ZeroDivisionError
        return self.inner(x)

    def state(self) -> dict[str, object]:
        return {
            "modes": [module.training for module in self.modules()],
            "flags": [parameter.requires_grad for parameter in self.parameters()],
            "grads": [parameter.grad is not None for parameter in self.parameters()],
            "hooks": [len(module._forward_hooks) + len(module._backward_hooks) for module in self.modules()],
            "values": {name: value.tolist() for name, value in self.state_dict().items()},
            "pointers": [tensor.data_ptr() for tensor in (*self.parameters(), *self.buffers())],
        }


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(spec, fails):
    model = Watched(fail_at=1 if fails else 10**9)
    x, y = images(8)
    before, kept, labels, generator = model.state(), x.clone(), y.clone(), torch.get_rng_state()
    if fails:
        with pytest.raises(ZeroDivisionError):
            parse_attack(spec)(model, x, y)
    else:
        found = parse_attack(spec)(model, x, y)
        assert not found.requires_grad and found.grad_fn is None and found.grad is None
        assert found.data_ptr() != x.data_ptr()
    assert model.state() == before
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


@pytest.mark.parametrize("attack", [PGD, PGDL2], ids=["pgd", "pgd-l2"])
def test_seeds_and_generators(attack):
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


class Destructive(nn.Module):
    """Writes over the images that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(2).sub_(0.5))


class Careful(Destructive):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 2 - 0.5)


@pytest.mark.parametrize("spec", SPECS)
def test_models_that_work_in_place(spec):
    attack, (x, y) = parse_attack(spec), images(16)
    assert torch.equal(attack(Destructive(), x.double(), y), attack(Careful(), x.double(), y))


class Cut(nn.Module):
    """Cuts the graph between images and logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach().flatten(1)[:, :CLASSES] * 3


class Unrelated(nn.Module):
    """Logits with a graph, to which the images do not belong."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.zeros(1, CLASSES, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


@pytest.mark.parametrize("model", [Cut(), Unrelated()], ids=["cut", "unrelated"])
def test_without_a_gradient_only_the_random_start_is_left(model):
    x, y = images(8)
    assert torch.equal(input_gradient(model, x, y), torch.zeros_like(x))
    for attack in (FGSM(EPS), StepLL(EPS), MIFGSM(EPS), PGD(EPS, random_start=False)):
        torch.testing.assert_close(attack(model, x, y), x, atol=0, rtol=0)
    torch.testing.assert_close(PGDL2(0.1, random_start=False)(model, x, y), x, atol=1e-7, rtol=0)
    started = PGD(EPS)(model, x, y)
    assert 0 < (started - x).abs().max() <= EPS + 1e-7
    assert torch.equal(started, PGD(EPS, steps=1)(model, x, y))
    if isinstance(model, Unrelated):
        assert model.logits.grad is None


class Expanded(nn.Module):
    """The gradient at the images is one number, expanded."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum((1, 2, 3))
        return torch.stack([total, -total], 1)


@pytest.mark.parametrize("spec", SPECS)
def test_expanded_gradients(spec):
    x = images(4)[0] * 0.5 + 0.25
    found = parse_attack(spec)(Expanded(), x, torch.zeros(4, dtype=torch.long))
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

    class Keeper(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Kept.apply(x, gradient)

    parse_attack(spec)(Keeper(), x, y % 2)
    assert torch.equal(gradient, before)


class Dead(nn.Module):
    """Images whose first value is above a half have no gradient at all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        alive = (x[:, :1, :1, :1] <= 0.5).to(x.dtype)
        return self.inner(x * alive)


def test_one_gradient_of_zero_freezes_nothing():
    x, y = images(16)
    x = x.clone()
    x[:8, 0, 0, 0], x[8:, 0, 0, 0] = 0.9, 0.1
    for attack in (MIFGSM(EPS), PGD(EPS, random_start=False), PGDL2(0.3, random_start=False)):
        found = attack(Dead(), x, y)
        assert found.isfinite().all()
        torch.testing.assert_close(found[:8], x[:8], atol=1e-7, rtol=0)
        assert ((found[8:] - x[8:]).flatten(1).norm(dim=1) > 0.05).all()


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = network().double(), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


@pytest.mark.parametrize("attack", [FGSM(EPS), MIFGSM(EPS), PGD(EPS), PGDL2(0.3)], ids=str)
def test_large_logits_are_no_defence(attack):
    _, x, y = doubles(64)
    model = Scaled(1000)
    leaf = x.clone().requires_grad_()
    losses = nn.functional.cross_entropy(model.float()(leaf.float()), y, reduction="none")
    plain = torch.autograd.grad(losses.sum(), leaf)[0]
    model.double()
    assert (plain.flatten(1).abs().amax(1) == 0).sum() > 10  # the cross entropy's own gradient is gone
    assert (input_gradient(model, x, y).flatten(1).abs().amax(1) > 0).all()
    fooled = ~right(model, attack(model, x, y), y)
    usual = ~right(Scaled(1), attack(Scaled(1), x, y), y)
    assert fooled.sum() >= 0.8 * usual.sum() > 10


# --- bad input


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: FGSM(-0.1), "eps -0.1 is out of range"),
        (lambda: FGSM(8.0), "eps 8.0 is out of range.*8/255"),
        (lambda: PGD(math.nan), "eps nan"),
        (lambda: PGDL2(math.inf), "eps inf"),
        (lambda: PGDL2(-1.0), "at least 0"),
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


class Returns(nn.Module):
    def __init__(self, change) -> None:
        super().__init__()
        self.inner, self.change = network(), change

    def forward(self, x: Tensor) -> object:
        return self.change(self.inner(x))


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
@pytest.mark.parametrize("spec", ["fgsm", "mi-fgsm", "pgd", "pgd-l2"])
def test_what_a_model_must_return(change, part, spec):
    x, y = images(8)
    with pytest.raises(UserError, match=part) as caught:
        parse_attack(spec)(Returns(change), x, y)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["fgsm", "pgd", "pgd-l2", "gaussian-noise"])
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


@pytest.mark.parametrize("spec", ["fgsm", "pgd", "pgd-l2"])
def test_labels_beyond_the_logits(spec):
    x, y = images(8)
    with pytest.raises(UserError, match="outside the model's 5 logits"):
        parse_attack(spec)(network(), x, y + CLASSES)


def test_a_model_is_a_module():
    x, y = images(8)
    with pytest.raises(UserError, match="not a module"):
        FGSM()(lambda images: images, x, y)


@pytest.mark.parametrize("spec", SPECS)
def test_no_images(spec):
    x, y = images(8)
    assert parse_attack(spec)(network(), x[:0], y[:0]).shape == (0, 3, 8, 8)


def test_values_that_are_a_rounding_error_out_of_range():
    x, y = images(8)
    x = x.clone()
    x[0, 0, 0, :2] = torch.tensor([-5e-5, 1 + 5e-5])
    for spec in ("fgsm:eps=0", "pgd:eps=0", "pgd-l2:eps=0", "gaussian-noise:std=0"):
        found = parse_attack(spec)(network(), x, y)
        assert torch.equal(found, x.clamp(0, 1))
