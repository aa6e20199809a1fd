"""Checks for masked gradients: silent for honest models, loud for deliberately masked ones."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import comb

import pytest
import torch
from torch import Tensor, nn

from architectures import Function
from attackroute.core.errors import UserError
from attackroute.robustness import masking
from attackroute.robustness.gradient_attacks import PGD
from attackroute.robustness.masking import SIGNS, SILENT, SKIPPED, SUSPICIOUS, Check, masking_probes, probed, tail
from attackroute.zoo.data import load_data

EPS = 0.1
SAMPLES = 48


def check_masking(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 128) -> tuple[Check, ...]:
    outcomes = {
        title: probe if isinstance(probe, str) else probed(probe, model, images, labels, batch_size)
        for title, probe in masking_probes(EPS, 0).items()
    }
    return tuple(sign.judge("model", outcomes) for sign in SIGNS)


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_QUERIES", 100)


def small_net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 4 * 4, 10),
        )  # fmt: skip


def digits(split: str) -> tuple[Tensor, Tensor]:
    data = load_data("mnist-sample", split=split, image_size=22).dataset
    return data.images.float() / 255, torch.tensor(data.labels)


def fitted(eps: float, epochs: int) -> nn.Sequential:
    """Trained on clean images, or on PGD's."""
    images, labels = (part[:1500] for part in digits("train"))
    model = small_net()
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    draws = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=draws).split(100):
            x, y = images[rows], labels[rows]
            if eps:
                x = PGD(eps, 4, step_size=eps / 3)(model, x, y, generator=draws)
            loss = nn.functional.cross_entropy(model(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def plain() -> nn.Sequential:
    return fitted(0.0, epochs=4)


@pytest.fixture(scope="module")
def defended() -> nn.Sequential:
    return fitted(EPS, epochs=5)


@pytest.fixture(scope="module")
def samples() -> tuple[Tensor, Tensor]:
    images, labels = digits("test")
    return images[:SAMPLES], labels[:SAMPLES]


def changed(model: nn.Module, change: Callable[[Tensor], Tensor] = lambda x: x, scale: float = 1.0) -> nn.Module:
    """A model behind a change of its images, with its logits scaled."""
    return Function(lambda parts, x: parts["model"](change(x)) * scale, model=model)


def named(name: str, checks: tuple[Check, ...]) -> Check:
    return next(check for check in checks if check.name == name)


def suspicious(checks: tuple[Check, ...]) -> set[str]:
    return {check.name for check in checks if check.verdict == SUSPICIOUS}


def test_silent_for_a_plain_model(plain: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    checks = check_masking(plain, *samples)
    assert suspicious(checks) == set()
    assert all(check.samples == SAMPLES for check in checks if check.verdict == SILENT)


def test_silent_for_a_pgd_trained_model(plain: nn.Module, defended: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    images, labels = samples
    attacked = PGD(EPS, 20)(defended, images, labels)
    assert (defended(attacked).argmax(1) == labels).float().mean() > 0.5  # it is robust indeed
    assert (plain(PGD(EPS, 20)(plain, images, labels)).argmax(1) == labels).float().mean() < 0.3
    assert suspicious(check_masking(defended, images, labels)) == set()


def test_loud_for_overlarge_logits(plain: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    images, labels = (part[:16] for part in samples)
    checks = check_masking(changed(plain, scale=1000.0), images, labels)
    assert suspicious(checks) == {"vanishing loss gradient"}  # attacks here are not fooled by it


def test_loud_for_a_quantiser(plain: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    checks = check_masking(changed(plain, lambda x: (x * 15).round() / 15), *samples)
    found = {"no limit on the change", "vanishing gradient of the logits"}
    assert found | {"vanishing loss gradient"} <= suspicious(checks)
    if named("black box against white box", checks).verdict != SKIPPED:  # it needs an extra
        assert "black box against white box" in suspicious(checks)


def test_one_step_that_beats_many_is_suspicious() -> None:
    def corner(_: nn.ModuleDict, x: Tensor) -> Tensor:
        """Wrong at the ball's very corner only, where one step leads; nearby the gradient leads back."""
        way = (x - 0.5).flatten(1).mean(1)
        slope = torch.where(way.abs() < 1e-6, -1.0, 1.0)
        margin = torch.where(way > 0.0999, -1.0, 1.0) + slope * (way - way.detach())
        return torch.stack([margin, -margin], 1)

    images, labels = torch.full((20, 1, 4, 4), 0.5), torch.zeros(20, dtype=torch.long)
    check = named("one step against many", check_masking(Function(corner), images, labels))
    assert check.verdict == SUSPICIOUS
    assert check.numbers == {
        "accuracy under FGSM": 0.0,
        "accuracy under PGD-50": 1.0,
        "fooled by FGSM alone": 20,
        "fooled by PGD-50 alone": 0,
    }
    assert check.p == pytest.approx(0.5**20)


@pytest.mark.parametrize(("count", "trials", "share"), [(0, 5, 0.5), (7, 7, 0.5), (3, 256, 0.01), (9, 40, 0.05)])
def test_tail_against_exact_sums(count: int, trials: int, share: float) -> None:
    p = Fraction(share)
    exact = sum(comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(count, trials + 1))
    assert tail(count, trials, share) == pytest.approx(float(exact), rel=1e-9)
    assert tail(0, 0, share) == 1.0


def test_sampling_error_is_taken_into_account() -> None:
    paired = next(check for check in SIGNS if check.name == "one step against many")
    for wins, losses, verdict in [(6, 0, SILENT), (7, 0, SUSPICIOUS), (20, 15, SILENT), (60, 30, SUSPICIOUS)]:
        both = 50
        weaker = [0] * wins + [1] * losses + [0] * both
        stronger = [1] * wins + [0] * losses + [0] * both
        check = paired.judge("net", {"fgsm": weaker, "many steps": stronger})  # type: ignore[union-attr]
        assert check.verdict == verdict
        assert check.numbers["fooled by FGSM alone"] == wins
        assert check.numbers["fooled by PGD-50 alone"] == losses
        assert check.p == tail(wins, wins + losses, 0.5)


def test_a_missing_extra_skips_its_check_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise UserError("square needs the package pyautoattack")

    monkeypatch.setattr(masking, "parse_attack", missing)
    images = torch.rand(4, 1, 22, 22)
    checks = check_masking(small_net(), images, torch.zeros(4, dtype=torch.long))
    check = named("black box against white box", checks)
    assert check.verdict == SKIPPED
    assert "needs the package pyautoattack" in check.sentence


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_do_not_matter(plain: nn.Module, samples: tuple[Tensor, Tensor], batch_size: int) -> None:
    images, labels = (part[:3] for part in samples)
    wanted = check_masking(plain.double(), images.double(), labels)
    found = check_masking(plain, images.double(), labels, batch_size=batch_size)
    plain.float()
    without_square = [check for check in wanted if check.name != "black box against white box"]
    assert [check for check in found if check.name != "black box against white box"] == without_square
