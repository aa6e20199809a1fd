"""What a network's loss says of each sample: its gradient on the neurons of routes, its size, its margin.

Everything is in logarithms, right at any confidence: a sample with ``p = 1.0`` in floating point keeps its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attackroute.analysis.channel_means import gradients
from attackroute.core.errors import UserError
from attackroute.core.model_state import explained
from attackroute.routes.layer_map import require_channels, require_model, require_same
from attackroute.routes.route import Route
from attackroute.tracing.pass_checks import require_rows_apart

_LINEAR_BELOW = -40.0  # here softplus(x) = exp(x) in float64


@dataclass(frozen=True, eq=False)
class SampleReadings:
    """Numbers of N samples, in the order in which they came, on the CPU.

    Attributes:
        log_gradients: ``(N, R, L)`` float64, R routes of L layers: log of the sum over the layer's route neurons of
            ``|dL/dZ|`` summed over positions (Eq. (16)), L the cross entropy. ``-inf`` where no gradient arrives.
        labels: ``(N,)`` int64.
        predictions: ``(N,)`` int64.
        log_losses: ``(N,)`` float64, log of the cross entropy.
        margins: ``(N,)`` float64, the label's logit less the largest other one.
        log_input_gradients: ``(N,)`` float64, log of the L1 norm of the loss gradient at the image: what a small
            step of size eps in the L-infinity ball adds to the loss, over eps.
    """

    log_gradients: Tensor
    labels: Tensor
    predictions: Tensor
    log_losses: Tensor
    margins: Tensor
    log_input_gradients: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def concatenate(cls, parts: Iterable[SampleReadings]) -> SampleReadings:
        """The samples of several batches, one after another.

        Raises:
            UserError: There is none.
        """
        parts = list(parts)
        if not parts:
            raise UserError("the data hold no sample: the loader is empty")
        return cls(*(torch.cat([getattr(part, item.name) for part in parts]) for item in fields(cls)))


class SampleReader:
    """Reads batches with one forward and one backward pass each, all layers and routes at once.

    Args:
        model: A frozen model (:func:`attackroute.layers.frozen`).
        routes: At least one route, all with the same layers.

    Raises:
        UserError: The routes differ in their layers, or the model cannot carry them.
    """

    def __init__(self, model: nn.Module, routes: Mapping[str, Route]) -> None:
        first, *others = routes.values()
        for name, route in routes.items():
            require_same(first.channels, route.channels, f"route {name!r}")
            if not route.size:
                raise UserError(f"route {name!r} has no neuron in any layer: give one with neurons")
        require_model(first.channels, model)
        self._model = model
        self._channels = first.channels
        self._apart = False  # whether samples were seen to stand in the first dimension of tokens
        self._neurons = {layer: [route[layer] for route in (first, *others)] for layer in first}

    def read(self, images: Tensor, labels: Tensor | None) -> SampleReadings:
        """Read one batch, on the model's device and in its dtype.

        Raises:
            UserError: There are no labels, a layer did not run or has another number of channels, samples do not
                stand in the first dimension of a layer's output, or a gradient is not finite.
        """
        if labels is None:
            raise UserError("the data have no labels, and the loss is that of a label: give (images, labels)")
        with explained(images):
            measured = gradients(self._model, images, labels, linear=True)
            if not self._apart and measured.tokens.intersection(self._channels):
                require_rows_apart(self._model, images, self._channels)
        self._apart = True
        assert measured.logits is not None and measured.at_images is not None
        sums = torch.stack([self._sums(measured.values, layer) for layer in self._channels], dim=2)
        # summed in float64, away from the device, which may not have it
        at_images = measured.at_images.flatten(1).abs().sum(1, dtype=torch.promote_types(images.dtype, torch.float32))
        inputs = at_images.cpu().double()
        if not (sums.isfinite().all() and inputs.isfinite().all()):
            raise UserError(
                "a gradient of the loss is not finite: check the model's weights and the range of its inputs"
            )
        logits, answers = measured.logits.cpu().double(), labels.cpu().long()
        return SampleReadings(
            sums.log() + measured.log_factor[:, None, None],
            answers,
            logits.argmax(1),
            *log_loss_and_margin(logits, answers),
            inputs.log() + measured.log_factor,
        )

    def _sums(self, values: Mapping[str, Tensor], layer: str) -> Tensor:
        """Eq. (16) for one layer and every route, ``(n, R)``, up to the sample's factor."""
        found = values.get(layer)
        if found is None:
            raise UserError(
                f"layer {layer!r} of the route did not run in the model's forward pass: "
                "use the model that the route was made for, uncompiled"
            )
        require_channels(layer, self._channels[layer], found.shape[1])
        sizes = found.cpu().double()
        # each row alone, where a product of matrices might round equal rows in different ways
        return torch.stack([sizes[:, neurons].sum(1) for neurons in self._neurons[layer]], dim=1)


def log_loss_and_margin(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the cross entropy, and the label's logit less the largest other one; both ``(n,)``.

    With s the log odds against the label, the loss is ``log(1 + exp(s))``, whose logarithm is s itself where the loss
    is too small for floating point.

    Args:
        logits: ``(n, K)`` float64, K >= 2.
        labels: ``(n,)`` int64.
    """
    label = F.one_hot(labels, logits.shape[1]).bool()
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.masked_fill(label, -torch.inf)
    odds = others.logsumexp(1) - own
    log_loss = torch.where(odds < _LINEAR_BELOW, odds, F.softplus(odds.clamp(min=_LINEAR_BELOW), threshold=700).log())
    return log_loss, own - others.amax(1)
