"""Influence by vector-Jacobian products, for edges that have no closed form.

Each route layer's output becomes a leaf, so derivatives run along direct paths only. The exact way takes one product
per output element and critical channel, for all samples at once; sketches take a few products of
random combinations of them instead, which estimate the same sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

from attackroute.core.errors import UserError
from attackroute.core.layers import CHANNEL_DIM, LayerCall, LayerCalls
from attackroute.core.model_state import differentiated
from attackroute.core.random import cauchies, derived_keys
from attackroute.tracing.deviations import Deviations

_ELEMENTS = 1 << 24  # largest cotangent batch, in elements of the widest tensor involved
_DRAWN_ELEMENTS = 1 << 18  # the same for sketches on a CPU: larger batches of dense cotangents leave its caches


class Segments:
    """The graph between route layers of one batch, cut at every layer's output.

    Of a frozen model, for the ``edges``, ``target -> sources``, that will be asked for. ``fused`` runs attention fused:
    quicker for single products, but its backward pass cannot be batched. Targets are in units of ``deviations``.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        edges: Mapping[str, Iterable[str]],
        *,
        linear: bool = False,
        fused: bool = False,
        deviations: Deviations | None = None,
    ) -> None:
        # PyTorch's batched products through batch norm are wrong for one row whose gradient comes permuted (torch 2.14)
        self._samples = len(images)
        images = images.repeat(2, *(1,) * (images.ndim - 1)) if len(images) == 1 else images
        self._sources = {target: tuple(sources) for target, sources in edges.items()}
        cut_layers = frozenset(source for sources in self._sources.values() for source in sources)
        self._leaves: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._kinds: dict[str, str] = {}
        self._inputs: dict[str, _Input] = {}

        def visit(call: LayerCall) -> Tensor:
            output = call.run()
            self._kinds[call.name] = call.kind
            if call.name in self._sources:
                weight = call.weight
                self._outputs[call.name] = output
                if deviations is not None:
                    factor = deviations.power(-1, call.name, output)
                    self._outputs[call.name] = output * factor.view(-1, *(1,) * (-1 - CHANNEL_DIM[call.kind]))
                    weight = weight * factor.to(weight.dtype).view(-1, *(1,) * (weight.ndim - 1))
                if call.kind == "linear" and call.input.requires_grad and not call.weight.requires_grad:
                    self._inputs[call.name] = _Input(get_gradient_edge(call.input), call.input.dtype, weight)
            if call.name not in cut_layers:
                return output.detach()
            leaf = self._leaves[call.name] = output.detach().requires_grad_()  # no derivative goes on beyond it
            return leaf.clone()

        attention = nullcontext() if fused else sdpa_kernel(SDPBackend.MATH)
        with torch.inference_mode(False), torch.enable_grad(), attention, LayerCalls(model, visit, linear=linear):
            model(images.clone())

    def influence(self, target: str) -> dict[str, Tensor]:
        """Eqs. (1)-(2) for every source of ``target``: ``(n, C_target, C_source)``."""
        output = self._outputs[target]
        samples, channels = self._samples, self._channels_last(target, output).shape[-1]
        rows: dict[str, list[Tensor]] = {source: [] for source in self._sources[target]}
        for channel in range(channels):
            only = output.new_zeros(samples, channels, dtype=torch.bool)
            only[:, channel] = True
            for source, score in self.scores(target, only).items():
                rows[source].append(score)
        return {source: torch.stack(scores, dim=1) for source, scores in rows.items()}

    def positions(self, target: str) -> int:
        """Number of positions that each channel of a target has."""
        return math.prod(self._channels_last(target, self._outputs[target]).shape[1:-1])

    def scores(self, target: str, critical: Tensor, *, most: int | None = None) -> dict[str, Tensor]:
        """Eq. (5), one target's share: influence summed over its critical channels, ``(n, C_source)`` by source.

        ``critical`` is bool ``(n, C_target)``, with the same number of channels set in each row. There is one product
        per critical channel and position; ``most`` stops after so many.
        """
        output = self._outputs[target]
        leaves = {source: self._leaves[source] for source in self._sources[target]}
        ranked = _ranked(critical).expand(len(output), -1)
        dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
        totals = {
            source: leaf.new_zeros(self._samples, self._channels_last(source, leaf).shape[-1], dtype=dtype)
            for source, leaf in leaves.items()
        }
        if not output.requires_grad:
            return totals
        widest = max(output.numel(), *(leaf.numel() for leaf in leaves.values()))
        pairs = ranked.shape[1] * self.positions(target)
        pairs = pairs if most is None else min(most, pairs)
        # samples do not interact, so each product is taken for all of them; only the sum over products is kept
        for cotangents in self._cotangents(target, ranked, pairs, max(1, _ELEMENTS // widest)):
            gradients = _products(output, list(leaves.values()), cotangents)
            for source, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    sized = self._channels_last(source, gradient.abs())[:, : self._samples]  # (products, n, ..., C)
                    sized = sized.flatten(2, -2) if sized.ndim > 3 else sized.unsqueeze(2)
                    totals[source] += sized.sum((0, 2), dtype=dtype)
        return totals

    def sketched(self, target: str, critical: Tensor, keys: Tensor, draws: int) -> dict[str, Tensor]:
        """An estimate of :meth:`scores` without bias from K = ``draws`` products, however many neurons are critical.

        A sum of Cauchy numbers ``c_z`` times weights ``a_z`` is Cauchy with scale ``sum of |a_z|``. So with ``c`` over
        the elements z of a target's critical channels, the entry of ``c^T J`` at an element s of a source is Cauchy
        with scale ``sum over z of |dz/ds|``, which is what Eqs. (1)-(2) add up; the scores are sums of such scales.
        ``keys``, ``(n,)`` int64, are those of the samples' random numbers.
        """
        output, names = self._outputs[target], self._sources[target]
        leaves = [self._leaves[name] for name in names]
        source = self._inputs.get(target)
        start, dtype = (output, output.dtype) if source is None else (source.edge, source.dtype)
        if dtype == torch.float16:
            raise UserError(
                f"layer {target!r} runs in float16, whose range is too small for sketches: use float32 or bfloat16"
            )
        ranked, keys = _ranked(critical).expand(len(output), -1), keys.expand(len(output))
        widest = max(output.numel(), *(leaf.numel() for leaf in leaves))
        most = max(1, (_DRAWN_ELEMENTS if output.device.type == "cpu" else _ELEMENTS) // widest)
        logs: dict[str, Tensor] = {}  # sum over the draws of log |gradient|
        alike: dict[str, str] = {}  # layers that add to one residual stream share one gradient
        for first in range(0, draws, most) if output.requires_grad else ():
            chunk = range(first, min(first + most, draws))
            cotangents = self._random(target, ranked, derived_keys(keys, target, chunk)).to(dtype)
            gradients = {
                name: gradient
                for name, gradient in zip(names, _products(start, leaves, cotangents), strict=True)
                if gradient is not None
            }
            if not alike:  # the first draws tell which sources share a gradient, and so all that follows from it
                places: dict[object, str] = {}
                for name, gradient in gradients.items():
                    place = (gradient.data_ptr(), gradient.shape, gradient.stride(), self._kinds[name])
                    alike[name] = places.setdefault(place, name)
            for name in set(alike.values()):
                wide = gradients[name].to(torch.promote_types(gradients[name].dtype, torch.float32))
                drawn = wide.abs().log_().sum(0)
                logs[name] = logs[name] + drawn if name in logs else drawn
        scores = {name: self._per_channel(name, _scale(total, draws)) for name, total in logs.items()}
        return {
            name: scores[alike[name]] if name in alike else torch.zeros_like(self._per_channel(name, leaf.detach()))
            for name, leaf in zip(names, leaves, strict=True)
        }

    def _random(self, target: str, ranked: Tensor, keys: Tensor) -> Tensor:
        """Cauchy cotangents over a target's critical channels, for keys ``(n, draws)``; the draws come first.

        For a linear map they are those of its input: a product with the critical rows of the weight alone.
        """
        output = self._outputs[target]
        shape = self._channels_last(target, output).shape
        samples, draws, critical = *keys.shape, ranked.shape[1]
        numbers = cauchies(keys.flatten(), self.positions(target) * critical).to(output.dtype)
        if target in self._inputs:
            rows = self._inputs[target].weight.detach()[ranked].to(output.dtype)  # (n, k, C_in)
            batch = torch.bmm(numbers.view(samples, -1, critical), rows)
            return batch.view(samples, draws, *shape[1:-1], rows.shape[-1]).movedim(1, 0)
        numbers = numbers.view(samples, draws, *shape[1:-1], critical)
        batch = output.new_zeros(samples, draws, *shape[1:])
        batch.scatter_(-1, ranked.view(samples, *(1,) * (batch.ndim - 2), critical).expand(numbers.shape), numbers)
        return batch.movedim(-1, CHANNEL_DIM[self._kinds[target]]).movedim(1, 0)

    def _per_channel(self, name: str, values: Tensor) -> Tensor:
        """Sum over positions of values shaped like a layer's output: ``(n, C)``."""
        values = self._channels_last(name, values[: self._samples])
        return values.flatten(1, -2).sum(1) if values.ndim > 2 else values

    def _cotangents(self, target: str, ranked: Tensor, pairs: int, chunk: int) -> Iterator[Tensor]:
        """Batches of one-hot cotangents over the first pairs of (rank of critical channel, position)."""
        output = self._outputs[target]
        shape = self._channels_last(target, output).shape
        samples, channels, positions = shape[0], shape[-1], math.prod(shape[1:-1])
        rows = torch.arange(samples, device=output.device)
        for start in range(0, pairs, chunk):
            pair = torch.arange(start, min(start + chunk, pairs), device=output.device)
            batch = output.new_zeros(len(pair), samples, positions, channels)
            index = torch.arange(len(pair), device=output.device)[:, None]
            batch[index, rows[None], (pair % positions)[:, None], ranked.T[pair // positions]] = 1
            batch = batch.view(len(pair), *shape)
            yield batch.movedim(-1, CHANNEL_DIM[self._kinds[target]])

    def _channels_last(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.movedim(CHANNEL_DIM[self._kinds[name]], -1)


class _Input(NamedTuple):
    """What a linear map reads, and the map's weight."""

    edge: GradientEdge  # where it stands in the graph; the tensor itself may be written to by what follows
    dtype: torch.dtype
    weight: Tensor


def _ranked(critical: Tensor) -> Tensor:
    """Each sample's critical channels, ``(n, k)``."""
    return critical.nonzero()[:, 1].view(len(critical), -1)


def _scale(logs: Tensor, draws: int) -> Tensor:
    """The scale of Cauchy numbers from the sum of ``log |g|`` over K draws; zero where all of them are.

    ``cos(pi / 2K)^K * (|g_1| * ... * |g_K|)^(1/K)``, an estimate without bias (P. Li, "Estimators and tail bounds for
    dimension reduction in l_alpha", SODA 2008).
    """
    return logs.div(draws).add_(draws * math.log(math.cos(math.pi / (2 * draws)))).exp_()


def _products(output: Tensor | GradientEdge, leaves: list[Tensor], cotangents: Tensor) -> list[Tensor | None]:
    """Vector-Jacobian products for a batch of cotangents, one gradient per leaf with a leading batch dimension."""
    try:
        if len(cotangents) == 1:
            gradients = torch.autograd.grad(output, leaves, cotangents[0], retain_graph=True, allow_unused=True)
            return [None if gradient is None else gradient[None] for gradient in gradients]
        return list(
            torch.autograd.grad(output, leaves, cotangents, is_grads_batched=True, retain_graph=True, allow_unused=True)
        )
    except RuntimeError:  # an operation whose backward cannot be batched: one product at a time
        with differentiated():
            rows = [
                torch.autograd.grad(output, leaves, row, retain_graph=True, allow_unused=True) for row in cotangents
            ]
        return [None if of_leaf[0] is None else torch.stack(of_leaf) for of_leaf in zip(*rows, strict=True)]
