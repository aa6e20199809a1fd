"""Pictures in the page as data: figures, images of the run, and where in them each channel responds most."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from attackroute.core.batches import Data, batches
from attackroute.core.errors import UserError
from attackroute.core.files import file_errors
from attackroute.core.layers import LayerCall, LayerCalls
from attackroute.core.model_state import frozen
from attackroute.hardening.weight_penalty import following_norms

_LARGEST = 224  # pixels each way of a picture
_LOSSLESS = 64  # up to so many pixels each way
_BEST = 4  # places kept for each channel
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


@dataclass(frozen=True)
class Peaks:
    """Where each channel of a layer responds most, one place an image; in pixels of the pictures."""

    images: Tensor  # int64 (C, k), numbers of images, the strongest response first
    places: Tensor  # int64 (C, k, 2), row and column of the response's centre
    field: tuple[int, int]  # height and width of what one position of the layer sees


@dataclass(frozen=True)
class Pictures:
    """Images as ``data:`` addresses, their height and width, and where in them each layer's channels respond most."""

    sources: tuple[str, ...]
    size: tuple[int, int]
    peaks: Mapping[str, Peaks]


def take_pictures(model: nn.Module, data: Data, count: int, *, linear: bool = False) -> Pictures | None:
    """The first images as pictures, and where in them each channel responds most.

    A channel's response is the largest value over positions, after the batch norm where one reads the layer's output
    directly (a negative gain turns the order round), else at the output itself. What one position sees is measured at
    the middle of one image, by the derivative: a lower bound where activations are dead, so *approximate*. None where
    the data are no images ``(N, C, H, W)``.
    """
    with frozen(model):
        images = _first(model, data, count)
        if images is None:
            return None
        signs = _signs(model, images[:1])
        values: dict[str, list[Tensor]] = {}
        places: dict[str, list[Tensor]] = {}
        maps: dict[str, tuple[int, int]] = {}

        def visit(call: LayerCall) -> Tensor:
            output = call.run()
            detached = output.detach() * signs[call.name] if call.name in signs else output.detach()
            flat = _by_position(detached, call.kind)
            best = flat.flatten(2).max(2)
            values.setdefault(call.name, []).append(best.values.float().cpu())
            places.setdefault(call.name, []).append(best.indices.cpu())
            maps[call.name] = (flat.shape[2], flat.shape[3])
            return output

        with torch.no_grad(), LayerCalls(model, visit, linear=linear):
            for chunk in images.split(_READ):
                model(chunk.clone())
        fields = _fields(model, images[:1], linear=linear)
    height, width = images.shape[2:]
    factor = min(1.0, _LARGEST / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    peaks = {}
    for layer, parts in values.items():
        best = torch.cat(parts).T.sort(dim=1, descending=True, stable=True).indices[:, :_BEST]
        at = torch.cat(places[layer]).T.gather(1, best)
        rows, columns = maps[layer]
        middle = torch.stack([_pixel(at // columns, rows, size[0]), _pixel(at % columns, columns, size[1])], dim=2)
        extent = fields[layer]
        field = (max(1, round(extent[0] * size[0] / height)), max(1, round(extent[1] * size[1] / width)))
        peaks[layer] = Peaks(best, middle, field)
    return Pictures(tuple(_source(image, size) for image in images.cpu()), size, peaks)


def _first(model: nn.Module, data: Data, count: int) -> Tensor | None:
    """The first images, on the model's device and in its dtype."""
    kept: list[Tensor] = []
    for images, _ in batches(model, data, _READ):
        kept.append(images[: count - sum(map(len, kept))])
        if sum(map(len, kept)) >= count:
            break
    if not kept or kept[0].ndim != 4 or any(chunk.shape[1:] != kept[0].shape[1:] for chunk in kept):
        return None
    return torch.cat(kept)


def _signs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """-1 for channels that a batch norm with a negative gain turns round, ``(C, 1, 1)`` by layer."""
    try:
        norms = following_norms(model, images)
    except UserError:  # a gain that is not the model's own: responses are then those of the outputs themselves
        return {}
    return {
        layer: torch.where(model.get_parameter(norm.weight).detach() < 0, -1.0, 1.0)[:, None, None]
        for layer, norm in norms.items()
        if norm.weight is not None
    }


def _by_position(values: Tensor, kind: str) -> Tensor:
    """``(N, C, H, W)``; a linear map's positions stand in one row."""
    if kind == "conv2d":
        return values
    return values.movedim(-1, 1).flatten(2).unsqueeze(2) if values.ndim > 2 else values[:, :, None, None]


def _fields(model: nn.Module, image: Tensor, *, linear: bool) -> dict[str, tuple[int, int]]:
    """Height and width of the part of the image on which the middle position of each layer depends."""
    middles: dict[str, Tensor] = {}
    whole = (image.shape[2], image.shape[3])
    fields: dict[str, tuple[int, int]] = {}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        if call.kind == "conv2d" and output.shape[2] * output.shape[3] > 1 and output.requires_grad:
            middles[call.name] = output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum()
        else:
            fields[call.name] = whole
        return output

    start = image.detach().clone().requires_grad_()
    with torch.enable_grad(), LayerCalls(model, visit, linear=linear):
        model(start.clone())
    for layer, middle in middles.items():
        (slope,) = torch.autograd.grad(middle, start, retain_graph=True, allow_unused=True)
        touched = None if slope is None else slope[0].abs().sum(0) > 0
        fields[layer] = (
            whole if touched is None else (_extent(touched.any(1), whole[0]), _extent(touched.any(0), whole[1]))
        )
    return fields


def _extent(touched: Tensor, whole: int) -> int:
    at = touched.nonzero().flatten()
    return int(at[-1] - at[0]) + 1 if len(at) else whole


def _pixel(at: Tensor, positions: int, pixels: int) -> Tensor:
    """The middle of a position of a map, in pixels of the picture."""
    return ((at.double() + 0.5) * pixels / positions).floor().long()


def _source(image: Tensor, size: tuple[int, int]) -> str:
    """An image as a ``data:`` address: three channels in colour, others as their mean in grey."""
    values = image.float().clamp(0, 1)
    values = values if len(values) == 3 else values.mean(0, keepdim=True)
    levels = (values * 255).round().to(torch.uint8).movedim(0, 2).numpy()
    picture = Image.fromarray(levels if levels.shape[2] == 3 else levels[:, :, 0])
    if picture.size != (size[1], size[0]):
        picture = picture.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if max(size) <= _LOSSLESS:
        picture.save(stream, "PNG", optimize=True)
        return _address("image/png", stream.getvalue())
    picture.save(stream, "JPEG", quality=85)
    return _address("image/jpeg", stream.getvalue())


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
