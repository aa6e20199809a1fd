"""Edges without a closed form: by exact products, by sketches, or, for noise, by replays of the pass.

Layers are ranked from the last to the first, and what a target's critical neurons owe to its sources is added up on
the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from attackroute.core.layers import CHANNEL_DIM, LayerCall, LayerCalls
from attackroute.core.random import image_keys
from attackroute.routes.masks import largest
from attackroute.tracing.closed_form import chosen_rows
from attackroute.tracing.noise import noise_sums
from attackroute.tracing.recorder import RecordedLayer
from attackroute.tracing.segments import Segments

_ROWS = 256  # of a replayed batch


@dataclass(frozen=True, eq=False)
class Ranked:
    """A layer whose critical channels are known: scores ``(n, C)`` and mask, bool ``(n, C)``."""

    scores: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class RankedBatch:
    """What the trace of one batch gives, on its device: layers in forward order, logits ``(n, K)``, predictions."""

    layers: Mapping[str, Ranked]
    logits: Tensor
    predictions: Tensor

    def compared(self) -> list[Tensor]:
        """By what two traces of the same batch are compared."""
        return [*(layer.scores for layer in self.layers.values()), self.logits]


class OpenEdges:
    """What computes a batch's edges without a closed form; this one serves a batch that has none.

    ``width`` is the share of each layer's channels that is critical.
    """

    def __init__(self, width: float) -> None:
        self._width = width

    def follow(self, target: str, critical: Tensor) -> None:
        """Take note of a target's critical neurons, bool ``(n, C)``, for all its sources."""

    def rank(self, name: str, partial: Tensor, unit: Tensor | None = None) -> Ranked:
        """Rank a layer all of whose targets have been followed; ``partial`` ``(n, C)`` is the other edges' share.

        Scores are per ``unit``, ``(C,)``, of the layer's own neurons; None for one.
        """
        share = self._share(name)
        scores = partial if share is None else partial + share
        scores = scores if unit is None else scores * unit
        return Ranked(scores, largest(scores, self._width))

    def _share(self, source: str) -> Tensor | None:
        """Eq. (5) over the open edges of a source, ``(n, C)``; None where it has none."""
        return None


class Products(OpenEdges):
    """Vector-Jacobian products over the batch's segments between layers: exact, or ``sketches`` random ones an edge.

    Each of the images has random numbers of its own, by ``seed``.
    """

    def __init__(self, segments: Segments, images: Tensor, *, width: float, sketches: int | None, seed: int) -> None:
        super().__init__(width)
        self._products: Callable[[str, Tensor], dict[str, Tensor]] = segments.scores
        if sketches is not None:
            self._products = partial(segments.sketched, keys=image_keys(images, seed, "sketches"), draws=sketches)
        self._scores: dict[str, Tensor] = {}

    def follow(self, target: str, critical: Tensor) -> None:
        """Add the target's share to the scores of its sources."""
        for source, score in self._products(target, critical).items():
            self._scores[source] = score + self._scores[source] if source in self._scores else score

    def _share(self, source: str) -> Tensor | None:
        return self._scores.pop(source, None)


class Replays(OpenEdges):
    """Noise: each neuron is cleaned by itself, and what later layers read is compared.

    All route layers' outputs are kept from one pass, of n clean images and the n attacked ones, and put in place of the
    layers, which do not run again. So a replay costs what lies between the layers, once for each channel of a source.
    ``layers`` are a recording of this batch, ``edges`` by target the sources without a closed form.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        *,
        layers: Sequence[RecordedLayer],
        edges: Mapping[str, Iterable[str]],
        width: float,
        linear: bool,
    ) -> None:
        super().__init__(width)
        self._model, self._linear = model, linear
        self._pairs = len(images) // 2
        self._images = images[self._pairs :]
        self._layers = {layer.name: layer for layer in layers}
        self._targets: dict[str, list[str]] = {}
        for target, sources in edges.items():
            for source in sources:
                self._targets.setdefault(source, []).append(target)
        self._clean: dict[str, Tensor] = {}
        self._attacked: dict[str, Tensor] = {}
        self._reached: dict[str, Tensor] = {}

        def visit(call: LayerCall) -> Tensor:
            output = call.run()
            self._attacked[call.name] = output[self._pairs :].clone()
            if call.name in self._targets:
                self._clean[call.name] = output[: self._pairs].clone()
            return output

        self._run(images, visit)

    def follow(self, target: str, critical: Tensor) -> None:
        """Take note of what of a target's input reaches its critical neurons."""
        layer = self._layers[target]
        chosen = critical.to(torch.promote_types(layer.weight.dtype, torch.float32))
        self._reached[target] = chosen_rows(chosen, layer.weight, layer.groups)

    def _share(self, source: str) -> Tensor | None:
        if source not in self._targets:
            return None
        channels = self._layers[source].channels
        step = max(1, _ROWS // self._pairs - 1)
        chunks = (range(start, min(start + step, channels)) for start in range(0, channels, step))
        return torch.cat([self._cleaned(source, chosen) for chosen in chunks], dim=1)

    def _cleaned(self, source: str, chosen: range) -> Tensor:
        """Scores of some channels, ``(n, len(chosen))``; the batch is repeated for each, and once as it is."""
        copies, dim = len(chosen) + 1, CHANNEL_DIM[self._layers[source].kind]
        total: list[Tensor] = []

        def visit(call: LayerCall) -> Tensor:
            output = torch.cat([self._attacked[call.name]] * copies)
            if call.name == source:
                for copy, channel in enumerate(chosen, start=1):
                    rows = output[copy * self._pairs : (copy + 1) * self._pairs]
                    rows.select(dim, channel).copy_(self._clean[source].select(dim, channel))
            if call.name in self._targets[source]:
                total.append(self._carried(call, copies))
            return output

        self._run(torch.cat([self._images] * copies), visit)
        return torch.stack(total).sum(0)

    def _carried(self, call: LayerCall, copies: int) -> Tensor:
        """``sum over input channels and kernel offsets of |W| * N`` for each channel that was cleaned, ``(n, k)``."""
        layer, reached = self._layers[call.name], self._reached[call.name]
        attacked, *cleaned = call.input.detach().unflatten(0, (copies, -1)).unbind(0)
        scores = []
        for values in cleaned:
            if layer.axes is not None:
                # padding="same" pads by one more behind than before, which is no part of what the call reads
                rows, columns = (axis.size - size for axis, size in zip(layer.axes, values.shape[2:], strict=True))
                read, cleaned_read = (functional.pad(each, (0, columns, 0, rows)) for each in (attacked, values))
                sums = noise_sums(read, cleaned_read, layer.axes)
            else:  # (n, ..., C_in): the weight acts on the last dimension, at every position
                noise = (attacked.to(reached.dtype) - values).abs_()
                sums = (noise.flatten(1, -2).sum(1) if noise.ndim > 2 else noise).view(-1, *reached.shape[1:])
            scores.append((reached * sums).flatten(1).sum(1))
        return torch.stack(scores, dim=1)

    def _run(self, images: Tensor, visit: Callable[[LayerCall], Tensor]) -> None:
        def visit_layer(call: LayerCall) -> Tensor:
            return visit(call) if call.name in self._layers else call.run()

        with torch.inference_mode(False), torch.no_grad(), LayerCalls(self._model, visit_layer, linear=self._linear):
            self._model(images.clone())
