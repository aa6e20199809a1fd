"""Criteria that rank channels by what an attack does, and variants of the route that follows the noise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attackroute.analysis.channel_statistics import attributions
from attackroute.analysis.criteria import channel_scores
from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall, LayerCalls
from attackroute.core.model_state import frozen
from attackroute.routes.masks import top_k
from attackroute.tracing.config import NOISE, RAW, STD, TraceConfig
from attackroute.tracing.recorder import record
from attackroute.tracing.trace import trace_routes
from attackroute.tracing.windows import Axis

INFLUENCE, INFLUENCE_ATTACKED, INFLUENCE_STD = "influence", "influence, attacked", "influence, std"
NOISE_ROUTE, NOISE_MEAN, NOISE_SIGNED, NOISE_GRADIENT = "noise", "noise, mean", "noise, signed", "noise x gradient"
ATTRIBUTION, SENSITIVITY, RANDOM = "attribution", "sensitivity", "random"
PATH, EQUAL_COMPUTE = "path", "attribution, equal compute"
"""Attribution with its gradients averaged along the path of one attack, and over as many attacks: the control."""
FIRST_LAYERS = "first layers"
"""A control for budgets of any layer: layer after layer from the input on, since clean values in all of the first layer
make the image clean."""
VARIANTS = (NOISE_ROUTE, NOISE_MEAN, NOISE_SIGNED, NOISE_GRADIENT)
"""Of the route that follows the noise, the plainest first."""

_WIDTH = 0.2  # the paper's, of a sample's route
_BATCH = 128

Layers = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images before and after an attack.

    Attributes:
        clean: ``(N, ...)``.
        attacked: The same images after it.
        labels: ``(N,)``.
        restarts: The same images after the same attack from other random starts, for ``"attribution, equal compute"``.
    """

    clean: Tensor
    attacked: Tensor
    labels: Tensor
    restarts: Sequence[Tensor] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, start: int, stop: int) -> Pairs:
        """Some of the images."""
        restarts = [each[start:stop] for each in self.restarts]
        return Pairs(self.clean[start:stop], self.attacked[start:stop], self.labels[start:stop], restarts)

    def parts(self, rows: int | None = None) -> list[Pairs]:
        """All of them, in batches."""
        step = rows or _BATCH
        return [self.part(start, start + step) for start in range(0, len(self), step)]


def criterion_scores(model: nn.Module, pairs: Pairs, by: str, *, seed: int = 0) -> Layers:
    """Scores of every layer's channels on some images, larger is better.

    * ``"influence"``, ``"influence, attacked"``: how often a channel is on the paper's routes of the clean or of the
      attacked images (Eqs. (3)-(8)). ``"influence, std"``: of the clean ones, per standard deviation of the neurons.
    * ``"noise"``: how often it is on the routes that follow the noise.
    * ``"noise, mean"``: the mean of the scores that rank these, each sample's divided by the sum of their absolute
      values in the layer.
    * ``"noise, signed"``: as ``"noise"``, but ``C[j, i] = |sum over positions of what the noise of i adds to j|``, so
      that noise of either sign cancels, and so do weights; for chains of convolutions without groups.
    * ``"noise x gradient"``: how often a channel is among a sample's best by ``sum of (Z(x') - Z(x)) dL/dZ(x')``, which
      is the noise route's seed at every layer instead of its recursion.
    * ``"attribution"``, ``"path"``, ``"sensitivity"``: as :func:`attackroute.analysis.channel_scores`.
    * ``"attribution, equal compute"``: the mean of attribution over the attack and its restarts, of which the study has
      seven: as many gradients as ``"path"`` has, and seven attacks more. Attribution itself where nothing is random.
    * ``"random"``: a number in [0, 1) that depends on nothing but the seed, the layer's name and the channel.

    Args:
        model: The network.
        pairs: The images.
        by: The criterion.
        seed: Of ``"random"``.

    Returns:
        For each layer, in forward order, float64 ``(C,)``.

    Raises:
        UserError: The criterion is unknown, or not defined for the network.
    """
    if by in (INFLUENCE, INFLUENCE_ATTACKED, INFLUENCE_STD):
        images = pairs.attacked if by == INFLUENCE_ATTACKED else pairs.clean
        config = TraceConfig(units=STD if by == INFLUENCE_STD else RAW)
        return trace_routes(model, (images, pairs.labels), _WIDTH, config=config, batch_size=_BATCH).frequency()
    if by in (NOISE_ROUTE, NOISE_MEAN):
        routes = trace_routes(
            model, (pairs.clean, pairs.labels), _WIDTH, attack=_Replayed(pairs.attacked),
            config=TraceConfig(carrier=NOISE), keep_scores=by == NOISE_MEAN, batch_size=_BATCH,
        )  # fmt: skip
        if by == NOISE_ROUTE:
            return routes.frequency()
        return {layer: _shares(routes.scores[layer].double()).mean(0) for layer in routes.layers}
    if by in _EACH:
        return _frequencies(model, pairs, _EACH[by])
    if by in (ATTRIBUTION, EQUAL_COMPUTE, PATH, SENSITIVITY):
        starts, own = (pairs.restarts, ATTRIBUTION) if by == EQUAL_COMPUTE else ((), by)
        data = (pairs.clean, pairs.labels)
        each = [
            channel_scores(model, data, own, attack=_Replayed(images), batch_size=_BATCH).values
            for images in (pairs.attacked, *starts)
        ]
        return {layer: torch.stack([scores[layer] for scores in each]).mean(0) for layer in each[0]}
    if by == RANDOM:
        layers = channel_scores(model, (pairs.clean[:2], pairs.labels[:2]), "kernel").values
        return {layer: _uniforms(seed, layer, len(values)) for layer, values in layers.items()}
    raise UserError(f"unknown criterion {by!r}")


def _uniforms(seed: int, layer: str, channels: int) -> Tensor:
    """A number in [0, 1) for each channel of a layer, float64 ``(channels,)``."""
    digests = [hashlib.sha256(f"rank/{seed}/{layer}/{channel}".encode()).digest() for channel in range(channels)]
    return torch.tensor([(int.from_bytes(digest[:8], "big") >> 11) / 2**53 for digest in digests], dtype=torch.float64)


def first_layers(others: Layers) -> dict[str, Tensor]:
    """Scores of :data:`FIRST_LAYERS`, within a layer in the order of others'."""
    last = len(others)
    return {layer: last - at + _shares(values[None])[0] for at, (layer, values) in enumerate(others.items())}


def signed_scores(model: nn.Module, pairs: Pairs) -> dict[str, Tensor]:
    """The recursion of Eq. (5) with signed noise, for a batch and a chain of convolutions; see ``"noise, signed"``.

    Raises:
        UserError: The network is no such chain.
    """
    changes: dict[str, Tensor] = {}

    def visit(call: LayerCall) -> Tensor:
        clean, attacked = call.input.detach().chunk(2)
        changes[call.name] = attacked - clean
        return call.run()

    with frozen(model):
        layers = {layer.name: layer for layer in record(model, pairs.clean[:2], linear=False, sums=False).layers}
        with torch.no_grad(), LayerCalls(model, visit):
            model(torch.cat([pairs.clean, pairs.attacked]))
    names = list(layers)
    seeds = attributions(model, *_three(pairs)).values
    scores = {names[-1]: seeds[names[-1]]}
    for source, target in zip(reversed(names[:-1]), reversed(names[1:]), strict=True):
        weight, axes = layers[target].weight.detach(), layers[target].axes
        if layers[target].sources != {names.index(source)} or weight.shape[1] != layers[source].channels or not axes:
            raise UserError(f"layers {source!r} and {target!r} are no chain, for which the signed noise is defined")
        sums = _signed_sums(changes[target], *axes)
        added = torch.einsum("oiu,niu->noi", weight.flatten(2), sums).abs()
        critical = top_k(scores[target], _WIDTH)
        scores[source] = (added * critical[:, :, None]).sum(1)
    return {name: scores[name] for name in names}


def _signed_sums(change: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Sums of a map over the positions that each kernel offset pairs with a valid output, ``(n, C, kh * kw)``."""
    return torch.stack(
        [
            change[:, :, _cut(rows, down), _cut(columns, right)].sum((2, 3))
            for down in range(len(rows.starts))
            for right in range(len(columns.starts))
        ],
        dim=2,
    )


def _cut(axis: Axis, offset: int) -> slice:
    span = axis.positions(offset)
    return slice(span.start, max(span.start, span.stop), span.step)


class _Replayed:
    """An attack whose result is known: it answers batch after batch, in order."""

    def __init__(self, attacked: Tensor) -> None:
        self._attacked = attacked
        self._done = 0

    def __call__(self, _: nn.Module, images: Tensor, __: Tensor) -> Tensor:
        start, self._done = self._done, self._done + len(images)
        return self._attacked[start : self._done]


def _three(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    return pairs.clean, pairs.attacked, pairs.labels


def _shares(scores: Tensor) -> Tensor:
    return scores / scores.abs().sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


_EACH: Mapping[str, Callable[[nn.Module, Pairs], Mapping[str, Tensor]]] = {
    NOISE_SIGNED: signed_scores,
    NOISE_GRADIENT: lambda model, pairs: attributions(model, *_three(pairs)).values,
}
"""Scores of single samples."""


def _frequencies(
    model: nn.Module, pairs: Pairs, score: Callable[[nn.Module, Pairs], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """How often each channel is among the best of a sample."""
    counts: dict[str, Tensor] = {}
    with frozen(model):
        for part in pairs.parts():
            for layer, values in score(model, part).items():
                chosen = top_k(values, _WIDTH).sum(0, dtype=torch.float64)
                counts[layer] = counts[layer] + chosen if layer in counts else chosen
    return {layer: count / len(pairs) for layer, count in counts.items()}
