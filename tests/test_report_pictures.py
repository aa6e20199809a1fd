"""Pictures in the page, and where channels respond most, beside obvious slow computations."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from attackroute.report.pictures import take_pictures
from tracing import state, untidy


def opened(source: str) -> Image.Image:
    kind, _, content = source.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == f"data:image/{image.format.lower()}"
    return image


def strided() -> nn.Sequential:
    """A batch norm with gains of both signs, then a stride: fields of 3 and 5 pixels."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5, -0.1, 3.0, -1.0])
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    ).eval()  # fmt: skip


def test_a_channel_responds_most_where_its_values_after_batch_norm_are_largest() -> None:
    model, images = strided(), torch.rand(20, 3, 16, 12)
    found = take_pictures(model, images, 20, linear=True)
    with torch.no_grad():
        normed = model[1](model[0](images))
        second = model[3](normed.relu())
    assert found.size == (16, 12) and len(found.sources) == 20
    for layer, values, stride in (("0", normed, 1), ("3", second, 2)):
        peaks = found.peaks[layer]
        assert peaks.images.shape == (values.shape[1], 4)
        for channel in range(values.shape[1]):
            best = values[:, channel].flatten(1).max(1)
            ranked = best.values.argsort(descending=True)[:4].tolist()
            assert peaks.images[channel].tolist() == ranked
            for image, (row, column) in zip(ranked, peaks.places[channel].tolist(), strict=True):
                place = int(best.indices[image])
                assert row == int((place // values.shape[3] + 0.5) * stride)
                assert column == int((place % values.shape[3] + 0.5) * stride)
    assert found.peaks["0"].field == (3, 3) and found.peaks["3"].field == (5, 5)
    assert found.peaks["6"].field == (16, 12)  # a linear map sees all
    assert found.peaks["6"].places.unique(dim=0).tolist() == [[[8, 6]] * 4]


def test_pictures_are_the_images() -> None:
    model = strided()
    small = torch.rand(3, 3, 16, 12)
    found = take_pictures(model, small, 2)
    assert len(found.sources) == 2
    for source, image in zip(found.sources, small, strict=False):
        levels = torch.from_numpy(np.array(opened(source).convert("RGB"))).long()
        assert torch.equal(levels, (image * 255).round().long().movedim(0, 2))
    large = take_pictures(model, torch.rand(1, 3, 400, 300), 5)
    assert large.size == (224, 168) and opened(large.sources[0]).size == (168, 224)
    assert large.peaks["0"].field == (2, 2)  # 3 pixels of 400
    grey = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(2))
    grey(torch.rand(1, 1, 8, 8))
    assert opened(take_pictures(grey, torch.rand(1, 1, 8, 8), 1).sources[0]).mode == "L"


def test_what_are_no_images_has_no_pictures() -> None:
    model = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    assert take_pictures(model, torch.rand(3, 16), 2) is None


def test_the_model_comes_back_as_it_was() -> None:
    model = untidy()
    before = state(model)
    take_pictures(model, torch.rand(5, 3, 9, 9), 3)
    assert state(model) == before

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = untidy()

        def forward(self, x: Tensor) -> Tensor:
            self.inner(x)
            raise ArithmeticError

    broken = Broken()
    before = state(broken)
    with pytest.raises(ArithmeticError):
        take_pictures(broken, torch.rand(5, 3, 9, 9), 3)
    assert state(broken) == before
