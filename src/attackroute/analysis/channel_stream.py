"""Measures of channels, taken batch by batch over data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from attackroute.analysis.channel_means import Measure, Measured
from attackroute.core.errors import UserError
from attackroute.core.layers import CHANNEL_DIM, LayerCall, LayerCalls
from attackroute.core.model_state import explained
from attackroute.robustness.attack import Attack, attacked
from attackroute.tracing.pass_checks import require_rows_apart
from attackroute.tracing.trace import Progress

Batches = Iterator[tuple[Tensor, "Tensor | None"]]
"""Images and what belongs to them: labels, or attacked images."""


def opened(stream: Batches) -> tuple[Tensor, Batches]:
    """Two images of the first batch that show a model's structure, and the whole stream.

    Raises:
        UserError: There is no sample.
    """
    first = next(stream, None)
    if first is None:
        raise UserError("the data hold no sample: the loader is empty")
    return two_of(first[0]), chain([first], stream)


def layer_channels(model: nn.Module, images: Tensor, *, linear: bool) -> dict[str, int]:
    """Names and channels of the route layers that a frozen model runs on images, in forward order.

    Raises:
        UserError: There is none, the model cannot run on the images, or samples do not stand in the first dimension
            of the layers' outputs.
    """
    found: dict[str, int] = {}
    tokens = False

    def visit(call: LayerCall) -> Tensor:
        nonlocal tokens
        output = call.run()
        found[call.name] = output.shape[CHANNEL_DIM[call.kind]]
        tokens |= call.kind == "linear" and output.ndim > 2
        return output

    with torch.no_grad(), explained(images):
        with LayerCalls(model, visit, linear=linear):
            model(images.clone())
        if tokens:
            require_rows_apart(model, images)
    if not found:
        hint = "" if linear else "; for networks of linear maps pass linear=True"
        raise UserError(f"no 2-D convolution ran in the model's forward pass, so there is no route layer{hint}")
    return found


def measured(
    model: nn.Module,
    stream: Batches,
    measure: Measure,
    *,
    linear: bool = False,
    progress: Progress | None = None,
    total: int | None = None,
) -> Iterator[Measured]:
    """Measure batch after batch on a frozen model, all with the layers of the first.

    Raises:
        UserError: There is no sample or no route layer, the model cannot run on the images, or its structure varies.
    """
    probe, stream = opened(stream)
    once = steady(model, probe, measure, linear=linear)
    done = 0
    for images, other in stream:
        yield once(images, other)
        done += images.shape[0]
        if progress is not None:
            progress(done, total)


def steady(
    model: nn.Module, probe: Tensor, measure: Measure, *, linear: bool
) -> Callable[[Tensor, Tensor | None], Measured]:
    """A measure of batches ``(images, what belongs to them)`` that refuses other layers than ``probe`` shows.

    Raises:
        UserError: There is no route layer, or the model cannot run on the images.
    """
    expected = list(layer_channels(model, probe, linear=linear).items())

    def once(images: Tensor, other: Tensor | None) -> Measured:
        with explained(images):
            found = measure(model, images, other, linear=linear)
        if [(layer, values.shape[1]) for layer, values in found.values.items()] != expected:
            raise UserError(
                "the model ran other layers on this batch than on the first one: its structure must not vary"
            )
        return found

    return once


def two_of(images: Tensor) -> Tensor:
    """Two images that show a model's structure, a batch's first and last.

    Two even of one: in a batch of one a gate looks like a constant factor.
    """
    return torch.cat([images[:1], images[-1:]])


def under_attack(compare: Callable[..., Measured], attack: Attack) -> Measure:
    """A measure of images and labels from one of images, attacked images and labels."""

    def measure(model: nn.Module, images: Tensor, labels: Tensor | None, *, linear: bool = False) -> Measured:
        changed, answers = attacked(model, attack, images, labels)
        return compare(model, images, changed, answers, linear=linear)

    return measure
