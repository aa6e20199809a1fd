"""Noise on edges without a closed form: each neuron is cleaned by itself, and what later layers read is compared.

All route layers' outputs are kept from one pass and put in place of the layers, which do not run again. So a replay
costs what lies between the layers, once for each channel of a source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from attackroute.core.layers import CHANNEL_DIM, LayerCall, LayerCalls
from attackroute.routes.masks import top_k
from attackroute.tracing.closed_form import chosen_rows
from attackroute.tracing.noise import noise_sums
from attackroute.tracing.open_edges import Ranked
from attackroute.tracing.recorder import RecordedLayer

_ROWS = 256  # of a replayed batch


class Replays:
    """Ranks the layers of a batch from the last to the first, replaying edges without a closed form.

    Args:
        model: A frozen model.
        images: ``(2n, ...)``: n clean images, then the attacked ones.
        layers: The route layers of a recording of this batch.
        edges: ``target -> sources`` that have no closed form.
        width: Share of each layer's channels that is critical.
        linear: Whether linear maps are route layers too.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        layers: Sequence[RecordedLayer],
        edges: Mapping[str, Iterable[str]],
        width: float,
        *,
        linear: bool,
    ) -> None:
        self._model, self._linear, self._width = model, linear, width
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
        """Take note of a target's critical neurons, bool ``(n, C)``: what of its input reaches them."""
        layer = self._layers[target]
        chosen = critical.to(torch.promote_types(layer.weight.dtype, torch.float32))
        self._reached[target] = chosen_rows(chosen, layer.weight, layer.groups)

    def rank(self, name: str, partial: Tensor) -> Ranked:
        """Rank a layer all of whose targets have been followed; ``partial`` ``(n, C)`` is the other edges' share."""
        scores = partial + self._replayed(name) if name in self._targets else partial
        return Ranked(scores, top_k(scores, self._width))

    def _replayed(self, source: str) -> Tensor:
        """Eq. (5) for the noise, over the targets of one source that need a replay: ``(n, C)``."""
        channels = self._layers[source].channels
        step = max(1, _ROWS // self._pairs - 1)
        parts = [self._cleaned(source, range(start, min(start + step, channels))) for start in range(0, channels, step)]
        return torch.cat(parts, dim=1)

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
        with torch.inference_mode(False), torch.no_grad(), LayerCalls(self._model, visit, linear=self._linear):
            self._model(images.clone())
