"""Pictures in the page as data: figures, and images of the run."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from attackroute.core.batches import Data, batches
from attackroute.core.files import file_errors

_LARGEST = 224  # pixels each way of a picture
_LOSSLESS = 64  # up to so many pixels each way
_READ = 16  # images at a time
_FIGURES = {".svg": "image/svg+xml", ".png": "image/png"}


def inline_figures(figures: Mapping[str, Mapping[str, Path]], largest: int) -> dict[str, str | None]:
    """Each figure as a ``data:`` address: the SVG where its file is at most so large, else the PNG, else None.

    As images they cannot run a script or load anything, whatever their files hold. Files are by title, then by ending.
    """
    sources: dict[str, str | None] = dict.fromkeys(figures)
    for title, files in figures.items():
        for file in (files[ending] for ending in _FIGURES if ending in files):
            with file_errors(file):
                if sources[title] is None and file.stat().st_size <= largest:
                    sources[title] = _address(_FIGURES[file.suffix], file.read_bytes())
    return sources


def take_pictures(model: nn.Module, data: Data, count: int) -> tuple[str, ...]:
    """The first images as ``data:`` addresses; none where the data are no images ``(N, C, H, W)``."""
    sources: list[str] = []
    for images, _ in batches(model, data, _READ):
        if images.ndim != 4:
            return ()
        sources += map(_source, images[: count - len(sources)].cpu())
        if len(sources) >= count:
            break
    return tuple(sources)


def _source(image: Tensor) -> str:
    """An image as a ``data:`` address: three channels in colour, others as their mean in grey."""
    values = image.float().clamp(0, 1)
    values = values if len(values) == 3 else values.mean(0, keepdim=True)
    levels = (values * 255).round().to(torch.uint8).movedim(0, 2).numpy()
    picture = Image.fromarray(levels if levels.shape[2] == 3 else levels[:, :, 0])
    picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if max(picture.size) <= _LOSSLESS:
        picture.save(stream, "PNG", optimize=True)
        return _address("image/png", stream.getvalue())
    picture.save(stream, "JPEG", quality=85)
    return _address("image/jpeg", stream.getvalue())


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
