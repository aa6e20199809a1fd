"""What a network's channels do on data: their activation, the loss gradient at them, and what an attack changes.

A *measure* gives one number per sample and channel of a batch; means over samples are in float64, from one reading of
the data in constant memory, so that batch size and order do not matter. Section 4.2.1 of the paper has two of them:
:func:`sensitivity` to an attack, and :func:`loss_gradient`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import Tensor, nn

from attackroute.core.batches import BatchStream, Data, batches, samples_in
from attackroute.core.checks import checked_labels, checked_logits, require_no_probabilities
from attackroute.core.errors import UserError
from attackroute.core.layers import CHANNEL_DIM, LayerCall, LayerCalls, two_of
from attackroute.core.loss import log_doubt, seed_gradients
from attackroute.core.model_state import explained, frozen
from attackroute.robustness.attack import Attack, attacked
from attackroute.robustness.registry import as_attack
from attackroute.routes.layer_map import require_channels
from attackroute.tracing.config import RAW, TraceConfig
from attackroute.tracing.deviations import Deviations
from attackroute.tracing.pass_checks import require_rows_apart
from attackroute.tracing.trace import Progress

T = TypeVar("T")

PATH_POINTS = tuple((step - 0.5) / 8 for step in range(1, 9))
"""Where :func:`path_attributions` takes gradients between an image (0) and the attacked one (1): midpoints."""
_LOG_SMALLEST = -600.0  # exp(-600) and quotients of it are far above float64's smallest number


def sensitivity(
    model: nn.Module,
    x: Data,
    x_adv: Data | None = None,
    *,
    attack: Attack | str | None = None,
    batch_size: int = 128,
    linear: bool = False,
    units: str | Deviations = RAW,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Neuron sensitivity (Fig. 2a): mean over pairs of ``||Z^m(x) - Z^m(x')||_1 / dim Z^m``, Z the layer's own output.

    A batch costs one forward pass of x and one of x', apart from those of the attack and of a look at two images.

    Args:
        model: Any network of images ``(N, C, H, W)``.
        x: Clean images: a tensor, or a DataLoader (any iterable) of ``(images, labels)`` or of images.
        x_adv: The attacked images in the same order, and, if both come in batches, in the same batches.
        attack: Instead of ``x_adv``, what makes x' of x for the labels of ``x``, or the model's predictions: a
            specification such as ``"pgd"``, or any ``(model, images, labels) -> images``.
        batch_size: Rows per forward pass of tensors.
        linear: Whether linear maps are layers too; their neurons are output features.
        units: As of :class:`attackroute.TraceConfig`; ``"std"`` takes the deviations over ``x``.
        progress: Called with (samples done, samples in all or None) after every batch.

    Returns:
        For each route layer in forward order, float64 ``(C,)`` on the CPU.

    Raises:
        UserError: Neither or both of ``x_adv`` and ``attack`` are given, the images are no pairs, there is no route
            layer, or an input does not fit the model.
    """
    if (x_adv is None) == (attack is None):
        raise UserError("sensitivity compares two: pass the attacked images x_adv, or the attack that makes them")
    measure: Measure = changes if attack is None else under_attack(changes, as_attack(attack))
    with frozen(model), torch.inference_mode(False):
        data = x if x_adv is None else _paired(batches(model, x, batch_size), batches(model, x_adv, batch_size))
        stream = BatchStream(model, data, batch_size)
        stream.total = samples_in(x)  # which the pairs do not tell
        means = mean_over(stream, model, measure, linear, progress).by_layer()
        return in_units(means, TraceConfig(units=units).measured(model, x, batch_size).deviations, -1)


def loss_gradient(
    model: nn.Module,
    data: Data,
    *,
    batch_size: int = 128,
    linear: bool = False,
    units: str | Deviations = RAW,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Loss gradient at each neuron (Fig. 2b): mean over samples of ``sum over positions of |dL/dZ^m|``.

    L is the cross entropy for the sample's label, or for the model's own prediction where there is none, and all paths
    to the logits count. Right at any confidence, see :func:`attackroute.analysis.channel_scores`.

    Args:
        model: Any network of images ``(N, C, H, W)`` to logits ``(N, classes)``.
        data: A DataLoader (any iterable) of ``(images, labels)`` or of images, or one such pair or batch of tensors.
        batch_size: As for :func:`sensitivity`, as are ``linear``, ``units``, ``progress`` and what it returns.

    Raises:
        UserError: There is no route layer, or an input does not fit the model.
    """
    with frozen(model), torch.inference_mode(False):
        means = mean_over(BatchStream(model, data, batch_size), model, gradients, linear, progress).by_layer()
        return in_units(means, TraceConfig(units=units).measured(model, data, batch_size).deviations, 1)


def in_units(values: Mapping[str, Tensor], deviations: Deviations | None, power: int) -> dict[str, Tensor]:
    """Numbers of each layer's channels, ``(..., C)``, times a power of the neurons' deviations; None for raw units.

    What is divided by the deviation of a neuron that never varies is zero.
    """
    if deviations is None or not power:
        return dict(values)
    return {layer: each * deviations.power(power, layer, each) for layer, each in values.items()}


@dataclass(frozen=True, eq=False)
class ChannelMeans:
    """One number per sample and channel, times a factor per sample; what follows them is known for gradients alone."""

    values: dict[str, Tensor]  # for each layer, in forward order, (n, C)
    log_factor: Tensor  # (n,), float64 on the CPU
    logits: Tensor | None = None  # (n, K), detached
    at_images: Tensor | None = None  # the gradient at the images, in their shape and up to the factor
    tokens: frozenset[str] = frozenset()  # layers whose outputs have positions between samples and channels

    def on(self, channels: Mapping[str, int]) -> ChannelMeans:
        """Those of a route's layers, which must have run and have so many channels."""
        for layer, count in channels.items():
            if layer not in self.values:
                raise UserError(
                    f"layer {layer!r} of the route did not run in the model's forward pass: "
                    "use the model that the route was made for, uncompiled"
                )
            require_channels(layer, count, self.values[layer].shape[1])
        return replace(self, values={layer: self.values[layer] for layer in channels})


Measure = Callable[..., ChannelMeans]
"""``(model, images, labels or None, linear=...) -> ChannelMeans``, for a frozen model."""


def activations(model: nn.Module, images: Tensor, labels: Tensor | None, *, linear: bool = False) -> ChannelMeans:
    """Mean over positions of ``|Z^m|``, the layer's own output."""
    values = _read(model, images, lambda call, output: _position_means(output.abs(), call.kind), linear=linear)
    return ChannelMeans(values, torch.zeros(len(images), dtype=torch.float64))


def changes(
    model: nn.Module, images: Tensor, attacked: Tensor, _labels: Tensor | None = None, *, linear: bool = False
) -> ChannelMeans:
    """Mean over positions of ``|Z^m(x) - Z^m(x')|``, from two forward passes, with clean outputs held meanwhile."""
    change = _change_from(model, images, linear=linear)

    def size(call: LayerCall, output: Tensor) -> Tensor:
        return _position_means(change(call.name, output).abs_(), call.kind)

    return ChannelMeans(_read(model, attacked, size, linear=linear), torch.zeros(len(images), dtype=torch.float64))


def gradients(model: nn.Module, images: Tensor, labels: Tensor | None, *, linear: bool = False) -> ChannelMeans:
    """Sum over positions of ``|dL/dZ^m|``, through all paths, L the cross entropy.

    The factor ``1 - p_y``, which a confident sample's logits cannot hold, is kept apart as a logarithm.
    """
    return _differentiated(model, images, labels, lambda _layer, _output: torch.abs, linear=linear)


def attributions(
    model: nn.Module, images: Tensor, attacked: Tensor, labels: Tensor | None, *, linear: bool = False
) -> ChannelMeans:
    """Attribution patching: the first-order estimate of the loss that a transplant of each channel takes away.

    ``- sum over positions of (Z^m(x) - Z^m(x')) * dL/dZ^m(x')``, through all paths, L the cross entropy of the
    attacked image; above zero where clean values would lower the loss. From one forward pass of the images, and one
    forward and one backward pass of the attacked ones. The factor ``1 - p_y`` of the attacked image is kept apart.
    """
    change = _change_from(model, images, linear=linear)
    return _differentiated(model, attacked, labels, lambda *output: change(*output).neg_().mul_, linear=linear)


def path_attributions(
    model: nn.Module, images: Tensor, attacked: Tensor, labels: Tensor, *, linear: bool = False
) -> ChannelMeans:
    """Noise times gradient averaged along the straight path from the images to the attacked ones.

    ``- sum over positions of (Z^m(x) - Z^m(x')) * mean over t of dL/dZ^m(x + t (x' - x))``, L the cross entropy: the
    gradient's mean is that of integrated gradients (Sundararajan et al., 2017), at a layer instead of the image. With
    one point at x' it is :func:`attributions`. From a forward pass of either image, and a forward and a backward pass
    at each of :data:`PATH_POINTS`, which counts with its own ``1 - p_y``; the largest of these is kept apart.
    """
    change = _change_from(model, images, linear=linear)
    noise = _read(model, attacked, lambda call, output: change(call.name, output).neg_(), linear=linear)
    each = [
        _differentiated(
            model, images.lerp(attacked, at), labels, lambda *output: _matching(noise, *output).mul, linear=linear
        )
        for at in PATH_POINTS
    ]
    doubts = torch.stack([point.log_factor for point in each])
    largest = doubts.amax(0)
    shares = (doubts - largest).exp() / len(each)  # of float64, on the CPU
    values = {
        layer: torch.einsum("pn,pnc->nc", shares, torch.stack([point.values[layer].cpu().double() for point in each]))
        for layer in each[0].values
    }
    return ChannelMeans(values, largest, tokens=each[0].tokens)


MEASURES: dict[str, Measure] = {"activation": activations, "gradient": gradients}
"""By criterion, those of images as they are, which rank the channels for one sample, too."""

COMPARISONS: dict[str, Callable[..., ChannelMeans]] = {
    "sensitivity": changes,
    "attribution": attributions,
    "path": path_attributions,
}
"""By criterion, those of images, attacked images and labels."""


def _differentiated(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    weighing: Callable[[str, Tensor], Callable[[Tensor], Tensor]],
    *,
    linear: bool,
) -> ChannelMeans:
    """Sums over positions of what ``weighing(layer, output)`` makes of the loss gradient at each layer; else zeros."""
    values: dict[str, Tensor] = {}
    tokens: set[str] = set()
    start = images.detach().requires_grad_()
    leaves = {"": start}  # where gradients end: all that lies between these and the logits is differentiated

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        if not output.requires_grad:  # the model cut the graph before this layer
            leaves[call.name] = output.detach().requires_grad_()
            output = leaves[call.name].clone()  # a copy, since what follows may work in place
        shape = (output.shape[0], output.shape[CHANNEL_DIM[call.kind]])
        values[call.name] = torch.zeros(shape, device=output.device)
        if call.kind == "linear" and output.ndim > 2:
            tokens.add(call.name)
        if output.requires_grad:
            output.register_hook(partial(keep, call.name, call.kind, weighing(call.name, output)))
        return output

    def keep(layer: str, kind: str, weigh: Callable[[Tensor], Tensor], gradient: Tensor) -> None:
        values[layer] = _position_sums(weigh(gradient.detach()), kind)

    with torch.enable_grad(), LayerCalls(model, visit, linear=linear):
        logits = checked_logits(model(start.clone()), images.shape[0])
        require_no_probabilities(logits)
    answers = logits.detach().argmax(1) if labels is None else checked_labels(labels, logits.shape[1], images.shape[0])
    ends = seed_gradients(logits, answers, leaves, None)
    logits = logits.detach()
    doubt = log_doubt(logits.cpu().to(torch.float64), answers.cpu())
    return ChannelMeans(values, doubt, logits=logits, at_images=ends[""], tokens=frozenset(tokens))


@dataclass
class RunningMean:
    """Mean over samples, in float64, that no factor can push below what float64 holds."""

    samples: int = 0
    _total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    _log_scale: float = -math.inf
    _channels: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, measured: ChannelMeans) -> RunningMean:
        """That of one batch alone."""
        values = torch.cat(list(measured.values.values()), dim=1).cpu().to(torch.float64)
        scale = float(measured.log_factor.max())
        total = (measured.log_factor - scale).exp() @ values
        return cls(len(values), total, scale, {layer: each.shape[1] for layer, each in measured.values.items()})

    def add(self, mean: RunningMean) -> None:
        """Add other samples; the same parts in the same order give the same sum, bit for bit."""
        scale = max(self._log_scale, mean._log_scale)
        here, there = math.exp(self._log_scale - scale), math.exp(mean._log_scale - scale)
        self._total = self._total * here + mean._total * there
        self._log_scale = scale
        self._channels = mean._channels
        self.samples += mean.samples

    def by_layer(self) -> dict[str, Tensor]:
        """The means of each layer's channels, ``(C,)``: float64, on the CPU.

        If all factors are below about 1e-260, the means are too large by a common factor.
        """
        means = self._total / self.samples * math.exp(max(self._log_scale, _LOG_SMALLEST))
        return dict(zip(self._channels, means.split(list(self._channels.values())), strict=True))


def under_attack(compare: Callable[..., ChannelMeans], attack: Attack) -> Measure:
    """A measure of images and labels from one of images, attacked images and labels."""

    def measure(model: nn.Module, images: Tensor, labels: Tensor | None, *, linear: bool = False) -> ChannelMeans:
        changed, answers = attacked(model, attack, images, labels)
        return compare(model, images, changed, answers, linear=linear)

    return measure


def layer_channels(model: nn.Module, images: Tensor, *, linear: bool) -> dict[str, int]:
    """Names and channels, in forward order, of the route layers that a frozen model runs, with samples in rows."""

    def shape(call: LayerCall, output: Tensor) -> tuple[int, bool]:
        return output.shape[CHANNEL_DIM[call.kind]], call.kind == "linear" and output.ndim > 2

    with torch.no_grad(), explained(images):
        shapes = _read(model, images, shape, linear=linear)
        if any(tokens for _, tokens in shapes.values()):
            require_rows_apart(model, images)
    channels = {layer: count for layer, (count, _) in shapes.items()}
    if not channels:
        hint = "" if linear else "; for networks of linear maps pass linear=True"
        raise UserError(f"no 2-D convolution ran in the model's forward pass, so there is no route layer{hint}")
    return channels


def worked_on(
    stream: BatchStream, work: Callable[[Tensor, Tensor | None], T], progress: Progress | None
) -> Iterator[tuple[int, T]]:
    """Of each batch, how many samples it has and what ``work(images, labels)`` gives; progress is in samples."""
    done = 0
    for samples, result in stream.map(lambda images, labels: (len(images), work(images, labels))):
        yield samples, result
        done += samples
        if progress is not None:
            progress(done, stream.total)


def labelled(labels: Tensor | None) -> Tensor:
    """A batch's labels, which must be there."""
    if labels is None:
        raise UserError("the data have no labels: give (images, labels)")
    return labels


def mean_over(
    stream: BatchStream, model: nn.Module, measure: Measure, linear: bool, progress: Progress | None
) -> RunningMean:
    """Mean of a measure over the samples of a frozen model, whose layers are those of the first batch."""
    expected = list(layer_channels(model, two_of(stream.first[0]), linear=linear).items())

    def batch_mean(images: Tensor, other: Tensor | None) -> RunningMean:
        with explained(images):
            measured = measure(model, images, other, linear=linear)
        if [(layer, values.shape[1]) for layer, values in measured.values.items()] != expected:
            raise UserError(
                "the model ran other layers on this batch than on the first one: its structure must not vary"
            )
        return RunningMean.of(measured)

    mean = RunningMean()
    for _, each in worked_on(stream, batch_mean, progress):
        mean.add(each)
    return mean


def _read(model: nn.Module, images: Tensor, measure: Callable[[LayerCall, Tensor], T], *, linear: bool) -> dict[str, T]:
    """What ``measure`` makes of the output of every layer, in one forward pass without a graph."""
    values: dict[str, T] = {}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        values[call.name] = measure(call, output.detach())
        return output

    with torch.no_grad(), LayerCalls(model, visit, linear=linear):
        model(images.clone())  # a copy, since a model may work on its input in place
    return values


def _change_from(model: nn.Module, images: Tensor, *, linear: bool) -> Callable[[str, Tensor], Tensor]:
    """``(layer, Z(x')) -> Z(x) - Z(x')`` in a tensor of its own, float32 or wider; that clean output is given up."""
    clean = _read(model, images, lambda _, output: output.clone(), linear=linear)  # what follows may work in place

    def change(layer: str, output: Tensor) -> Tensor:
        dtype = torch.promote_types(output.dtype, torch.float32)
        difference = _matching(clean, layer, output).to(dtype).sub_(output.detach())
        del clean[layer]
        return difference

    return change


def _matching(values: Mapping[str, Tensor], layer: str, output: Tensor) -> Tensor:
    """A layer's values, one for each of those in an output of other images."""
    if layer not in values or values[layer].shape != output.shape:
        raise UserError("the model ran other layers on the attacked images: its structure must not vary")
    return values[layer]


def _position_means(values: Tensor, kind: str) -> Tensor:
    totals = _position_sums(values, kind)
    return totals * (totals.numel() / values.numel())


def _position_sums(values: Tensor, kind: str) -> Tensor:
    """Sum over positions: ``(n, C)``, in float32 or wider."""
    channels = CHANNEL_DIM[kind] % values.ndim
    positions = [dim for dim in range(1, values.ndim) if dim != channels]
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.sum(positions, dtype=dtype) if positions else values.to(dtype)


def _paired(
    clean: Iterator[tuple[Tensor, Tensor | None]], attacked: Iterator[tuple[Tensor, Tensor | None]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Clean images with the attacked ones in the place of labels."""
    for first, second in zip_longest(clean, attacked):
        if first is None or second is None or first[0].shape != second[0].shape:
            raise UserError("x and x_adv are no pairs: give one attacked image for each image, in batches of one size")
        yield first[0], second[0]
