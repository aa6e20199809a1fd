"""Criteria by which to rank channels, other than influence: baselines of the route's size for the paper's route.

Data are read once, in constant memory. Sums over samples are in float64, so that batch size and order do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attackroute.analysis.channel_statistics import COMPARISONS, MEASURES, in_units, mean_over, under_attack
from attackroute.core.batches import BatchStream, Data
from attackroute.core.errors import UserError, require_known
from attackroute.core.layers import two_of
from attackroute.core.model_state import frozen
from attackroute.robustness.attack import Attack, attack_name
from attackroute.robustness.registry import as_attack
from attackroute.routes.masks import check_width, top_k
from attackroute.routes.provenance import Provenance
from attackroute.routes.route import Route
from attackroute.tracing.closed_form import per_deviation
from attackroute.tracing.config import RAW, TraceConfig
from attackroute.tracing.deviations import Deviations
from attackroute.tracing.recorder import RecordedLayer, record_first
from attackroute.tracing.trace import Progress

CRITERIA = (*MEASURES, *COMPARISONS, "weight", "kernel")
_POWERS = {"gradient": 1, "attribution": 0, "path": 0}  # of the neurons' deviations, by which raw values are multiplied
NEED_ATTACK = tuple(COMPARISONS)
"""The criteria that compare images with attacked ones."""


@dataclass(frozen=True, eq=False)
class ChannelScores:
    """What a criterion makes of every channel.

    Attributes:
        by: The criterion.
        values: For each layer, in forward order, one score per channel: float64 ``(C,)`` on the CPU; larger is better.
        samples: How many samples were read; 0 for a criterion that needs none.
        attack: The attack of a criterion that compares images with attacked ones, else None.
    """

    by: str
    values: Mapping[str, Tensor]
    samples: int = 0
    attack: str | None = None

    def route(self, width: float = 0.3) -> Route:
        """The channels with the largest scores, ``max(1, round(width * C))`` of each layer, ties to the lower index."""
        origin = Provenance(self.samples, width, attack=self.attack, criterion=self.by)
        return Route.from_masks({layer: top_k(scores, width) for layer, scores in self.values.items()}, None, origin)


def rank_channels(
    model: nn.Module,
    data: Data,
    by: str,
    width: float = 0.3,
    *,
    attack: Attack | str | None = None,
    batch_size: int = 128,
    linear: bool = False,
    units: str | Deviations = RAW,
    progress: Progress | None = None,
) -> Route:
    """A route of the paper's size by another criterion: in each layer the channels with the largest scores.

    Args:
        model: Any network of images ``(N, C, H, W)`` to logits ``(N, classes)``.
        data: A DataLoader (any iterable) of ``(images, labels)`` or of images, or one such pair or batch of tensors.
        by: The criterion, see :func:`channel_scores`.
        width: Share of each layer's channels to keep, in (0, 1].
        attack: What the criteria of :data:`NEED_ATTACK` compare the images with: a specification such as ``"pgd"``, or
            any ``(model, images, labels) -> images``; the other criteria read the images as they are.
        batch_size: Rows per forward pass when ``data`` is tensors; a DataLoader brings its own.
        linear: Whether linear maps are route layers too; their neurons are output features.
        units: Of the scores, as of :class:`attackroute.TraceConfig`.
        progress: Called with (samples done, samples in all or None) after every batch.

    Returns:
        The route; ``route.provenance.criterion`` is ``by``.

    Raises:
        UserError: As :func:`channel_scores`, or the width is outside (0, 1].
    """
    check_width(width)
    scores = channel_scores(
        model, data, by, attack=attack, batch_size=batch_size, linear=linear, units=units, progress=progress
    )
    return scores.route(width)


def channel_scores(
    model: nn.Module,
    data: Data,
    by: str,
    *,
    attack: Attack | str | None = None,
    batch_size: int = 128,
    linear: bool = False,
    units: str | Deviations = RAW,
    progress: Progress | None = None,
) -> ChannelScores:
    """The scores that :func:`rank_channels` ranks; one call serves routes of several widths.

    The model runs in eval mode on the device of its parameters and comes back as it was. Criteria:

    * ``"activation"``: mean over samples and positions of ``|Z^m|``, at the layer's own output.
    * ``"sensitivity"``: mean over samples and positions of ``|Z^m(x) - Z^m(x')|``, x' the attacked image.
    * ``"attribution"``: attribution patching, mean over samples of ``- sum over positions of (Z^m(x) - Z^m(x')) *
      dL/dZ^m(x')``: the first-order estimate of the loss on x' that a transplant of the channel takes away, with L as
      for ``"gradient"``. Below zero for channels whose clean values would raise the loss.
    * ``"path"``: the same with the mean of dL/dZ^m over eight points of the path from x to x', ``x + t (x' - x)`` with
      ``t = 1/16, 3/16, ..., 15/16``, instead of dL/dZ^m(x'): eight times the backward passes.
    * ``"weight"``: outgoing weight norm ``|W|_1`` times the batch-norm gain, :func:`outgoing_weight_norms`.
    * ``"kernel"``: plain norm of the channel's own kernel, ``sum over i, u of |W^l[m, i, u]|``.
    * ``"gradient"``: mean over samples of ``sum over positions of |dL/dZ^m|``, through all paths, with L the cross
      entropy for the sample's label, or for the model's own prediction where there is none. Right at any confidence;
      only if every sample's ``1 - p_y`` is below 1e-260, the scores share a factor that keeps them above zero.

    ``"weight"`` and ``"kernel"`` read no more than two samples, to see which layers run. With ``units="std"`` gradients
    are times the neurons' deviations, attributions what they are, weight norms as influence, and all else over the
    deviations.

    Args:
        model: As for :func:`rank_channels`, and so are ``data``, ``by``, ``batch_size``, ``linear``
            and ``units``.
        attack: For the criteria that compare images with attacked ones. A sample without a label is attacked for the
            model's prediction on its clean image, and L is that of this label.
        progress: Called after every batch that is read in full.

    Raises:
        UserError: The criterion is unknown, or needs an attack and has none; there is no route layer, an input does
            not fit the model, values are not finite, or ``by="weight"`` is not defined for the network.
    """
    require_known("criterion", by, CRITERIA)
    measure, named = MEASURES.get(by), None
    if by in NEED_ATTACK:
        if attack is None:
            raise UserError(
                f"criterion {by!r} compares images with attacked ones: pass attack=..., such as attack='pgd'"
            )
        made = as_attack(attack)
        measure, named = under_attack(COMPARISONS[by], made), attack_name(made)
    with frozen(model), torch.inference_mode(False):
        deviations = TraceConfig(units=units).measured(model, data, batch_size).deviations
        stream = BatchStream(model, data, batch_size)
        if measure is not None:
            mean = mean_over(stream, model, measure, linear, progress)
            values = in_units(mean.by_layer(), deviations, _POWERS.get(by, -1))
            return ChannelScores(by, values, mean.samples, attack=named)
        layers = record_first(model, two_of(stream.first[0]), linear=linear).layers
    own = in_units({layer.name: _kernel_norms(layer) for layer in layers}, deviations, -1)
    return ChannelScores(by, own if by == "kernel" else outgoing_weight_norms(layers, deviations))


class MixedChannelsError(UserError):
    """What stands between two layers mixes channels, so that no weight belongs to a channel."""


def outgoing_weight_norms(layers: Sequence[RecordedLayer], deviations: Deviations | None = None) -> dict[str, Tensor]:
    """Weight norm ``|W|_1`` by which each channel is read: the influence of Eqs. (1)-(2) with its masks left out.

    For channel i of layer l it is the sum, over the layers l' directly after l, of
    ``|s_i| * sum over j, u of |W_l'[j, i, u]|``, where s_i is the factor that the channel meets on its way, such as
    batch norm's ``gamma / sigma``. Derivatives that differ between positions (activations, pooling, gates) count as
    one. A sink, which no route layer follows, is scored by its own kernel, ``sum over i, u of |W_l[m, i, u]|``.

    For each layer, float64 ``(C,)`` on the CPU, per one of the ``deviations`` as influence is, if there are any.
    """
    if deviations is not None:
        layers = [per_deviation(layer, deviations) for layer in layers]
    norms = {index: torch.zeros(layer.channels, dtype=torch.float64) for index, layer in enumerate(layers)}
    sinks = set(norms)
    for layer in layers:
        sinks -= layer.sources
        if layer.mixing:
            raise MixedChannelsError(
                f"there is no weight norm for the channels of layer {layers[min(layer.mixing)].name!r}: what stands "
                f"between it and {layer.name!r} mixes channels or positions; choose another criterion"
            )
        weight = _wide(layer.weight).abs().unflatten(0, (layer.groups, -1))  # (groups, outputs, C_in / groups, kh, kw)
        norm_of_input = weight.sum((1, 3, 4)).flatten()
        for piece in layer.pieces:
            norm = norm_of_input[piece.dst : piece.dst + piece.length]
            if piece.scale is not None:
                norm = norm * _wide(piece.scale).abs()
            norms[piece.source][piece.src : piece.src + piece.length] += norm
    of_layers = in_units({layer.name: norms[index] for index, layer in enumerate(layers)}, deviations, 1)
    return of_layers | {layers[index].name: _kernel_norms(layers[index]) for index in sinks}


def _kernel_norms(layer: RecordedLayer) -> Tensor:
    return _wide(layer.weight).abs().flatten(1).sum(1)


def _wide(values: Tensor) -> Tensor:
    return values.detach().cpu().to(torch.float64)
