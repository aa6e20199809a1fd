"""Measurements of neurons (section 4.2.1 of the paper): their sensitivity to an attack, and the loss gradient at them.

Means are over samples, in float64, from one reading of the data; the ``per_sample`` forms keep every sample's number,
for distributions. The model runs in eval mode on the device of its parameters and comes back as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest

import torch
from torch import Tensor, nn

from attackroute.analysis.channel_means import Measure, Measured, RunningMean, changes, gradients
from attackroute.analysis.channel_stream import Batches, measured, under_attack
from attackroute.core.batches import Data, batches, samples_in
from attackroute.core.errors import UserError
from attackroute.core.model_state import frozen
from attackroute.robustness.attack import Attack
from attackroute.tracing.trace import Progress


def sensitivity(
    model: nn.Module,
    x: Data,
    x_adv: Data | None = None,
    *,
    attack: Attack | None = None,
    batch_size: int = 128,
    linear: bool = False,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Neuron sensitivity (Fig. 2a): mean over pairs of ``||Z^m(x) - Z^m(x')||_1 / dim Z^m``, Z the layer's own output.

    A batch costs one forward pass of x and one of x', apart from those of the attack and of a look at two images.

    Args:
        model: Any network of images ``(N, C, H, W)``.
        x: Clean images: a tensor, or a DataLoader (any iterable) of ``(images, labels)`` or of images.
        x_adv: The attacked images in the same order, and, if both come in batches, in the same batches.
        attack: Instead of ``x_adv``, what makes x' of x, as in ``ar.parse_attack("pgd")``, for the labels of ``x`` or
            the model's predictions.
        batch_size: Rows per forward pass of tensors.
        linear: Whether linear maps are layers too; their neurons are output features.
        progress: Called with (samples done, samples in all or None) after every batch.

    Returns:
        For each route layer in forward order, float64 ``(C,)`` on the CPU.

    Raises:
        UserError: Neither or both of ``x_adv`` and ``attack`` are given, the images are no pairs, there is no route
            layer, or an input does not fit the model.
    """
    with _pairs(model, x, x_adv, attack, batch_size) as (stream, measure):
        return _mean(measured(model, stream, measure, linear=linear, progress=progress, total=samples_in(x)))


def sensitivity_per_sample(
    model: nn.Module,
    x: Data,
    x_adv: Data | None = None,
    *,
    attack: Attack | None = None,
    batch_size: int = 128,
    linear: bool = False,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """As :func:`sensitivity`, for every pair: float64 ``(N, C)``."""
    with _pairs(model, x, x_adv, attack, batch_size) as (stream, measure):
        return _rows(measured(model, stream, measure, linear=linear, progress=progress, total=samples_in(x)))


def gradient(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 128,
    linear: bool = False,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Loss gradient at each neuron (Fig. 2b): mean over samples of ``sum over positions of |dL/dZ^m|``.

    L is the cross entropy for the sample's label, or for the model's own prediction where there is none, and all paths
    to the logits count. Right at any confidence, see :func:`attackroute.rivals.channel_scores`.

    Args:
        model: Any network of images ``(N, C, H, W)`` to logits ``(N, classes)``.
        data: A DataLoader (any iterable) of ``(images, labels)`` or of images, or one such pair or batch of tensors.
        batch_size: Rows per forward pass of tensors.
        linear: Whether linear maps are layers too.
        progress: Called with (samples done, samples in all or None) after every batch.

    Returns:
        For each route layer in forward order, float64 ``(C,)`` on the CPU.

    Raises:
        UserError: There is no route layer, or an input does not fit the model.
    """
    with _still(model):
        stream = batches(model, data, batch_size)
        return _mean(measured(model, stream, gradients, linear=linear, progress=progress, total=samples_in(data)))


def gradient_per_sample(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 128,
    linear: bool = False,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """As :func:`gradient`, for every sample: float64 ``(N, C)``; zero where it is below what float64 holds."""
    with _still(model):
        stream = batches(model, data, batch_size)
        return _rows(measured(model, stream, gradients, linear=linear, progress=progress, total=samples_in(data)))


def _mean(found: Iterator[Measured]) -> dict[str, Tensor]:
    mean = RunningMean()
    for batch in found:
        mean.add(batch)
    return mean.by_layer()


def _rows(found: Iterator[Measured]) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {}
    for batch in found:
        factors = batch.log_factor.exp()[:, None]
        for layer, values in batch.values.items():
            rows.setdefault(layer, []).append(values.cpu().to(torch.float64) * factors)
    return {layer: torch.cat(parts) for layer, parts in rows.items()}


@contextmanager
def _still(model: nn.Module) -> Iterator[None]:
    with frozen(model), torch.inference_mode(False):
        yield


@contextmanager
def _pairs(
    model: nn.Module, x: Data, x_adv: Data | None, attack: Attack | None, batch_size: int
) -> Iterator[tuple[Batches, Measure]]:
    """The stream to read and the measure for it, on a frozen model."""
    if (x_adv is None) == (attack is None):
        raise UserError("sensitivity compares two: pass the attacked images x_adv, or the attack that makes them")
    with _still(model):
        stream = batches(model, x, batch_size)
        if attack is not None:
            yield stream, under_attack(changes, attack)
        else:
            assert x_adv is not None
            yield _paired(stream, batches(model, x_adv, batch_size)), changes


def _paired(clean: Batches, attacked: Batches) -> Batches:
    """Clean images with the attacked ones in the place of labels."""
    for first, second in zip_longest(clean, attacked):
        if first is None or second is None or first[0].shape != second[0].shape:
            here, there = ("no more" if batch is None else str(tuple(batch[0].shape)) for batch in (first, second))
            raise UserError(
                f"a batch of x has the shape {here}, that of x_adv {there}: give one attacked image for each image"
            )
        yield first[0], second[0]
