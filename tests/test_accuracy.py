"""Counts of right answers and the Wilson interval."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from attackroute.core.errors import UserError
from attackroute.core.statistics import Accuracy, count_correct


class Brightness(nn.Module):
    """Answers with the first pixel's value, an integer, as the class."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.classes = classes
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(nn.functional.one_hot(x[:, 0, 0, 0].long(), self.classes).float())


def numbered(answers: list[int], labels: list[int]) -> TensorDataset:
    images = torch.tensor(answers, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 2, 2)
    return TensorDataset(images, torch.tensor(labels))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 256])
def test_counts(batch_size: int) -> None:
    data = numbered([0, 1, 2, 3, 3], [0, 1, 1, 3, 0])
    assert count_correct(Brightness(), data, batch_size=batch_size) == Accuracy(3, 5)
    assert count_correct(Brightness(), data, batch_size=batch_size).value == 0.6


def test_wilson_interval_against_published_and_defining_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I: 81/263, 15/148, 0/20, 1/29; and the mirror image of 0/20
    for correct, total, low, high in [
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ]:  # fmt: skip
        assert Accuracy(correct, total).interval == pytest.approx((low, high), abs=5e-5)
    result = Accuracy(37, 50)
    for bound in result.interval:  # the ends solve |p - x| = z sqrt(x (1 - x) / n)
        assert abs(result.value - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / 50) ** 0.5, rel=1e-6)


def test_flags_and_global_randomness_are_left_alone() -> None:
    model = nn.Sequential(Brightness(), nn.Identity())
    model.train()
    model[1].eval()
    before = torch.get_rng_state()
    count_correct(model, numbered([0, 1], [0, 1]))
    assert (model.training, model[0].training, model[0].dropout.training, model[1].training) == (
        True,
        True,
        True,
        False,
    )
    assert torch.equal(torch.get_rng_state(), before)


class Unsized(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (numbered([], []), "empty"),
        (numbered([0, 1], [0, 4]), r"label 4 .*outside the model's 4 logits"),
        (numbered([0, 1], [0, -1]), r"label -1 "),
        (TensorDataset(torch.zeros(2, 1, 2, 2), torch.zeros(2)), "expected 2 integers"),
        (TensorDataset(torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)), "give floats"),
        (TensorDataset(torch.zeros(2, 1, 2, 2)), "pairs"),
        (Unsized(), "no length"),
    ],
)
def test_bad_data_is_named(data: Dataset[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        count_correct(Brightness(), data)


def test_bad_models_are_named() -> None:
    data = numbered([0, 1], [0, 1])
    with pytest.raises(UserError, match="not logits"):
        count_correct(nn.Identity(), data)
    with pytest.raises(UserError, match="NaN"):
        count_correct(nn.Sequential(nn.Flatten(), nn.Linear(4, 2).requires_grad_(False).apply(spoil)), data)
    with pytest.raises(UserError, match="batch_size"):
        count_correct(Brightness(), data, batch_size=0)


def spoil(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.bias.fill_(torch.nan)


def test_a_double_model_takes_float_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    assert 0 <= count_correct(model, numbered([0, 1], [0, 1])).value <= 1
