"""What criteria are approximations of: choices by the true effect of a transplant, which are slow to make.

The effect of a set of channels is how much their clean values lower the mean cross entropy of attacked images. Every
effect is measured by a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from attackroute.analysis.interventions import record_outputs, transplant
from attackroute.core.journal import Journal, Key
from attackroute.core.model_state import frozen
from attackroute.routes.masks import kept
from attackroute.routes.route import Route
from studies.repair.criteria import Layers, Pairs

OWN_EFFECT, GREEDY = "own effect", "greedy"
ORACLES = (OWN_EFFECT, GREEDY)
"""Each channel by the effect that it has alone, and channel after channel by the effect beside those chosen before."""

_ROWS = 256

Channel = tuple[str, int]


class Effects:
    """True effects of transplants into some attacked images.

    Args:
        model: The network.
        pairs: The images.
        channels: The layers' channel counts, in forward order.
        journal: Where each layer's own effects and each greedy step are kept.
        key: What they are of, such as the names of a network and an attack.
        advance: Called after every channel that is tried.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Pairs,
        channels: dict[str, int],
        journal: Journal,
        key: Key,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._channels, self._advance = model, channels, advance
        self._journal, self._key = journal, key
        self._batches = pairs.parts(_ROWS)
        with frozen(model):
            self._outputs = [record_outputs(model, batch.clean, channels) for batch in self._batches]

    def loss(self, chosen: Iterable[Channel]) -> float:
        """Mean cross entropy of the attacked images with the clean values of some channels."""
        indices: dict[str, list[int]] = {layer: [] for layer in self._channels}
        for layer, channel in chosen:
            indices[layer].append(channel)
        route = Route(indices, self._channels)
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        with frozen(self._model), torch.no_grad():
            for batch, outputs in zip(self._batches, self._outputs, strict=True):
                with transplant(self._model, outputs, route):
                    logits = self._model(batch.attacked)
                total += functional.cross_entropy(logits.double(), batch.labels, reduction="sum").cpu()
                count += len(batch)
        return float(total) / count

    def alone(self) -> dict[str, Tensor]:
        """How much each channel's clean values lower the loss, for each layer float64 ``(C,)``."""
        attacked = self.loss(())
        scores: dict[str, Tensor] = {}
        for layer, count in self._channels.items():
            key = (*self._key, OWN_EFFECT, layer)
            record = self._journal.recall(key, "")
            if record is None:
                effects = [attacked - self._tried((), (layer, channel)) for channel in range(count)]
                record = self._journal.keep(key, "", effects=effects)
            scores[layer] = torch.tensor(record["effects"], dtype=torch.float64)
        return scores

    def greedy(self, layers: Sequence[str], count: int) -> list[Channel]:
        """Channels of some layers, each the one that lowers the loss most beside those chosen before.

        Args:
            layers: Where they may be.
            count: How many.
        """
        left = [(layer, channel) for layer in layers for channel in range(self._channels[layer])]
        chosen: list[Channel] = []
        for _ in range(count):
            best = self._best(chosen, left, layers)
            chosen.append(best)
            left.remove(best)
        return chosen

    def _best(self, chosen: Sequence[Channel], left: Sequence[Channel], layers: Sequence[str]) -> Channel:
        """The next greedy step."""
        key = (*self._key, GREEDY, *layers, len(chosen))
        record = self._journal.recall(key, "")
        if record is None:
            layer, channel = min(left, key=lambda each: self._tried(chosen, each))
            record = self._journal.keep(key, "", layer=layer, channel=channel)
        return record["layer"], record["channel"]

    def _tried(self, chosen: Sequence[Channel], more: Channel) -> float:
        loss = self.loss([*chosen, more])
        self._advance()
        return loss


def greedy_scores(effects: Effects, alone: Layers, share: float, budget: float) -> tuple[Layers, Layers]:
    """Scores that rank channels in the order in which the greedy choice takes them.

    Args:
        effects: Of the transplants.
        alone: Each channel's own effect, which ranks those that the greedy choice does not come to.
        share: Of each layer's channels, how far to go within a layer.
        budget: Of all channels, how far to go in the whole network.

    Returns:
        Scores within each layer, and scores that compare channels of all layers.
    """
    counts = {layer: len(values) for layer, values in alone.items()}
    within = {
        layer: _ranked(effects.greedy([layer], kept(share, count)), {layer: alone[layer]})[layer]
        for layer, count in counts.items()
    }
    return within, _ranked(effects.greedy(list(counts), kept(budget, sum(counts.values()))), alone)


def _ranked(chosen: Sequence[Channel], others: Layers) -> dict[str, Tensor]:
    """Scores: above all others the chosen channels, the first one highest; then the others by their own."""
    top = max(float(values.max()) for values in others.values())
    scores = {layer: values.clone() for layer, values in others.items()}
    for place, (layer, channel) in enumerate(chosen):
        scores[layer][channel] = top + len(chosen) - place
    return scores
