"""Pictures in the page are the images."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import nn

from attackroute.report.pictures import take_pictures


def opened(source: str) -> Image.Image:
    kind, _, content = source.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == f"data:image/{image.format.lower()}"
    return image


def test_pictures_are_the_images() -> None:
    model = nn.Conv2d(3, 2, 3)
    small = torch.rand(40, 3, 16, 12)
    found = take_pictures(model, small, 20)
    assert len(found) == 20 and len(take_pictures(model, small, 50)) == 40
    for source, image in zip(found, small, strict=False):
        levels = torch.from_numpy(np.array(opened(source).convert("RGB"))).long()
        assert torch.equal(levels, (image * 255).round().long().movedim(0, 2))
    (large,) = take_pictures(model, torch.rand(1, 3, 400, 300), 5)
    assert opened(large).size == (168, 224)
    (grey,) = take_pictures(model, torch.rand(1, 1, 8, 8), 1)
    assert opened(grey).mode == "L"
    assert take_pictures(model, torch.rand(3, 16), 2) == ()
