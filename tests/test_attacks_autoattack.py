"""AutoAttack and Square: the library's own results, on images that are still right, with nothing left behind."""

from __future__ import annotations

import random
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from architectures import Function
from attack_samples import images, network, right, untrained
from attackroute.core.errors import UserError
from attackroute.robustness.autoattack import AutoAttack, Square

pyautoattack = pytest.importorskip("pyautoattack")
np = pytest.importorskip("numpy")
EPS = 4 / 255
BLACK = 20 / 255
QUICK = AutoAttack(EPS)


@pytest.fixture(autouse=True)
def first_attack_alone(monkeypatch, request):
    if "standard" not in request.node.name:
        monkeypatch.setattr(AutoAttack, "attacks", AutoAttack.attacks[:1])


def cut(model: nn.Module) -> nn.Module:
    """The model without a gradient at its images."""
    return Function(lambda parts, x: parts["inner"](x.detach()), inner=model)


@pytest.mark.parametrize("names", [("apgd-ce", "fab-t"), pytest.param(AutoAttack.attacks, marks=pytest.mark.slow)])
def test_the_standard_attacks_are_the_librarys(names, monkeypatch):
    monkeypatch.setattr("attackroute.robustness.autoattack._QUERIES", 500)
    monkeypatch.setattr(AutoAttack, "attacks", names)
    model, (x, y) = network(), images(14)
    library = pyautoattack.AutoAttack(model, norm="Linf", eps=EPS, seed=3)
    library.attacks_to_run = list(names)
    library.apgd_targeted.n_target_classes = library.fab.n_target_classes = 4
    library.square.n_queries = 500
    with torch.random.fork_rng():
        expected, _ = library.run_standard_evaluation(x, y, batch_size=100)
    found = AutoAttack(EPS, seed=3)(model, x, y)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    fooled = right(model, x, y) & ~right(model, found, y)
    assert fooled.sum() >= 3
    assert torch.equal(found[~fooled], x[~fooled])  # wrong from the start, or never fooled
    assert (found - x).abs().max() <= EPS + 2e-7 and found.min() >= 0 and found.max() <= 1


class NaiveSquare:
    """Croce and Hein's and Andriushchenko's search as its paper tells it, one image at a time."""

    def __init__(self, eps: float, queries: int) -> None:
        self.eps, self.queries = eps, queries
        self.draw = random.Random(0)

    def margin(self, model: nn.Module, image: Tensor, label: int) -> float:
        with torch.no_grad():
            logits = model(image[None])[0].tolist()
        return logits.pop(label) - max(logits)

    def side(self, query: int, pixels: int) -> int:
        limits = (10, 50, 200, 500, 1000, 2000, 4000)
        return max(1, round((0.8 / 2 ** sum(query > limit for limit in limits) * pixels) ** 0.5))

    def __call__(self, model: nn.Module, image: Tensor, label: int) -> bool:
        """Whether the image stays right."""
        channels, height, width = image.shape
        signs = torch.tensor([[self.draw.choice((-1.0, 1.0)) for _ in range(width)] for _ in range(channels)])
        best = (image + self.eps * signs[:, None]).clamp(0, 1)
        lowest = self.margin(model, best, label)
        for query in range(self.queries):
            if lowest <= 0:
                return False
            side = min(self.side(query, height * width), height)
            top, left = self.draw.randrange(height - side + 1), self.draw.randrange(width - side + 1)
            window = (slice(None), slice(top, top + side), slice(left, left + side))
            signs = torch.tensor([self.draw.choice((-1.0, 1.0)) for _ in range(channels)])
            tried = best.clone()
            tried[window] = (image[window] + self.eps * signs[:, None, None]).clamp(0, 1)
            margin = self.margin(model, tried, label)
            if margin < lowest:
                best, lowest = tried, margin
        return lowest > 0


def test_square_succeeds_as_often_as_the_papers():
    model, (x, y) = network(), images(80)
    before = right(model, x, y)
    ours = right(model, Square(BLACK, 60)(model, x, y), y)
    naive = NaiveSquare(BLACK, 60)
    theirs = torch.tensor(
        [bool(kept) and naive(model, image, int(label)) for image, label, kept in zip(x, y, before, strict=True)]
    )
    assert before.sum() - ours.sum() > 15 and ours.sum() > 10
    assert abs(int(ours.sum() - theirs.sum())) <= 10


def test_square_needs_no_gradient_and_more_queries_find_more():
    model, (x, y) = network(), images(60)
    found = Square(BLACK, 100)(cut(model), x, y)
    assert torch.equal(found, Square(BLACK, 100)(model, x, y))
    left = [int(right(model, Square(BLACK, queries)(model, x, y), y).sum()) for queries in (1, 20, 100)]
    assert left[0] > left[1] > left[2]
    assert (found - x).abs().max() <= BLACK + 1e-7


class Spied(nn.Module):
    """Counts how often it sees images, writes over them, and notes the mode that it runs in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.seen, self.modes = 0, set()

    def forward(self, x: Tensor) -> Tensor:
        self.modes.add((self.training, self.inner[7].training))
        self.seen += len(x)
        return self.inner(x.add_(0))


def test_wrong_images_are_not_attacked():
    x, y = images(40)
    model = Spied()
    wrong = ~right(model.inner, x, y)
    wrong = wrong | (torch.arange(40) < 20)
    labels = torch.where(wrong, (model.inner(x).argmax(1) + 1) % 5, y)
    found = Square(EPS, 30)(model, x, labels)
    assert torch.equal(found[wrong], x[wrong])
    assert model.seen <= 40 + (32 + 4) * int((~wrong).sum())
    model.seen = 0
    assert torch.equal(Square(EPS, 30)(model, x, (model.inner(x).argmax(1) + 1) % 5), x)
    assert model.seen == 40


@pytest.mark.parametrize("attack", [QUICK, Square(EPS, 10)], ids=["autoattack", "square"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(attack, fails, capsys):
    model, (x, y) = Spied(), images(8)
    model.train()
    model.inner[0].weight.requires_grad_(False)
    if fails:
        model.inner[9].register_forward_hook(lambda *_: 1 / 0 if model.seen > 16 else None)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    values = {name: value.clone() for name, value in model.state_dict().items()}

    def trace(*_):
        return None

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        if fails:
            with pytest.raises(ZeroDivisionError):
                attack(model, x, y)
        else:
            found = attack(model, x, y)
            assert not found.requires_grad and found.grad is None
        assert sys.gettrace() is trace
    finally:
        sys.settrace(tracing)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert all(module.training for module in model.modules()) and model.modes == {(False, False)}
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("attack", [QUICK, Square(BLACK, 20)], ids=["autoattack", "square"])
def test_seeds_types_and_formats(attack, monkeypatch):
    monkeypatch.setattr("attackroute.robustness.autoattack._ITERATIONS", 10)
    model, (x, y) = network(), images(16)
    expected = attack(model, x, y)
    assert torch.equal(attack(model, x, y), expected)
    assert not torch.equal(replace(attack, seed=1)(model, x, y), expected)
    generator = torch.Generator().manual_seed(0)
    first, second = (attack(model, x, y, generator=generator) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(attack(model, x, y, generator=generator.manual_seed(0)), first)
    last = attack(model, x.contiguous(memory_format=torch.channels_last), y)
    assert last.is_contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        found = attack(model, x.clone(), y.clone())
    assert torch.equal(found, expected) and not found.is_inference()
    doubled = attack(model.double(), x.double(), y)
    assert doubled.dtype == torch.float64 and (doubled - x.double()).abs().max() <= attack.eps * (1 + 1e-9)
    assert attack(model, x[:0].double(), y[:0]).shape == (0, 3, 8, 8)
    assert torch.equal(replace(attack, eps=0.0)(model, x.double(), y), x.double())


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_leave_attacks_out_of_the_standard_and_say_so(classes, monkeypatch):
    monkeypatch.setattr("attackroute.robustness.autoattack._QUERIES", 20)
    monkeypatch.setattr("attackroute.robustness.autoattack._ITERATIONS", 5)
    model, (x, _) = untrained(classes).eval(), images(6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AutoAttack(1e-4)(model, x, model(x).argmax(1))
    expected = [f"autoattack runs without apgd-t: {classes} classes are too few"] * (classes < 4)
    assert [str(warning.message) for warning in caught] == expected
    assert {warning.filename for warning in caught} <= {__file__}


@pytest.mark.parametrize("attack", [QUICK, Square(EPS, 10)], ids=["autoattack", "square"])
@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda x, y: (x * 255, y), "must be in .0, 1."),
        (lambda x, y: (x.flatten(1), y), "need .N, C, H, W."),
        (lambda x, y: (x, y + 5), "outside the model's 5 logits"),
        (lambda x, y: (x, y.float()), "integers"),
    ],
)
def test_bad_input(attack, change, part):
    with pytest.raises(UserError, match=part):
        attack(network(), *change(*images(4)))


def test_a_model_that_cuts_the_graph_is_attacked_from_random_starts_by_the_standard(monkeypatch):
    monkeypatch.setattr("attackroute.robustness.autoattack._ITERATIONS", 5)
    monkeypatch.setattr("attackroute.robustness.autoattack._QUERIES", 5)
    x, y = images(16)
    found = AutoAttack(EPS)(cut(network()), x, y)
    assert found.isfinite().all() and (found - x).abs().max() <= EPS + 2e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_default_dtype_of_float64_changes_nothing_in_the_standard(dtype, float64, monkeypatch):
    torch.set_default_dtype(torch.float32)
    model, (x, y) = network().to(dtype), images(12)
    monkeypatch.setattr("attackroute.robustness.autoattack._QUERIES", 20)
    monkeypatch.setattr("attackroute.robustness.autoattack._ITERATIONS", 10)
    attack = AutoAttack(EPS)
    expected = attack(model, x.to(dtype), y)
    torch.set_default_dtype(torch.float64)
    seen = set()
    model.register_forward_pre_hook(lambda *_: seen.add(torch.get_default_dtype()))
    assert torch.equal(attack(model, x.to(dtype), y), expected)
    assert seen == {torch.get_default_dtype()} == {torch.float64}  # the model sees what it always sees
