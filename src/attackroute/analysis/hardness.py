"""Adversarial hardness of samples (section 5.2, Eqs. (16)-(18)): how hard it is to fool the model on each.

Nothing is perturbed: in every layer the samples are ranked by the loss gradient on the layer's route neurons, and the
lower the gradient the more votes a sample gets. V, the metric, is the sum of a sample's votes over the layers.
Gradients are in logarithms, right at any confidence: a sample with ``p = 1.0`` in floating point keeps its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attackroute.analysis.channel_statistics import gradients, in_units, labelled, worked_on
from attackroute.analysis.figures.style import Axes
from attackroute.core.batches import BatchStream, Data
from attackroute.core.errors import UserError
from attackroute.core.model_state import explained, frozen
from attackroute.core.table import Shown, Table, plural
from attackroute.routes.layer_map import require_model, require_same
from attackroute.routes.route import Route
from attackroute.tracing.config import RAW, TraceConfig
from attackroute.tracing.deviations import Deviations
from attackroute.tracing.pass_checks import require_rows_apart
from attackroute.tracing.trace import Progress

_LINEAR_BELOW = -40.0  # here softplus(x) = exp(x) in float64


def hardness(
    model: nn.Module,
    route: Route,
    data: Data,
    *,
    batch_size: int = 128,
    units: str | Deviations = RAW,
    progress: Progress | None = None,
) -> Hardness:
    """Rank samples by how hard the model is to fool on them, from one forward and one backward pass.

    The model runs in eval mode on the device of its parameters and comes back as it was. Memory grows by one number a
    layer and two more for each sample.

    Args:
        model: Any network of images ``(N, C, H, W)`` to logits ``(N, classes)``.
        route: A route of the model, such as :meth:`attackroute.InstanceRoutes.aggregate` gives.
        data: A DataLoader (any iterable) of ``(images, labels)``, or one such pair of tensors; at least two samples.
        batch_size: Rows per pass when ``data`` is tensors; a DataLoader brings its own.
        units: Of the gradients, as of :class:`attackroute.TraceConfig`; ``"std"`` takes the deviations over ``data``.
        progress: Called with (samples done, samples in all or None) after every batch.

    Raises:
        UserError: The model cannot carry the route, the data hold fewer than two samples or no labels, an input does
            not fit the model, or values are not finite.
    """
    with frozen(model), torch.inference_mode(False):
        stream = BatchStream(model, data, batch_size)
        deviations = TraceConfig(units=units).measured(model, data, batch_size).deviations
        read = GradientReader(model, {"route": route}, deviations).read
        samples = SampleGradients.concatenate(batch for _, batch in worked_on(stream, read, progress))
    return Hardness.from_gradients(samples, route)


@dataclass(frozen=True, eq=False, repr=False)
class Hardness(Shown):
    """Samples and how hard the model is to fool on each.

    Attributes:
        route: The route on whose neurons gradients were taken.
        log_gradients: ``(N, L)`` float64: log of Eq. (16) for each sample, in the data's order, and layer of the route.
        labels: ``(N,)`` int64.
        predictions: ``(N,)`` int64, the model's classes.
    """

    route: Route
    log_gradients: Tensor
    labels: Tensor
    predictions: Tensor

    @classmethod
    def from_gradients(cls, samples: SampleGradients, route: Route, index: int = 0) -> Hardness:
        """Hardness by the route of that index among those that were read, of two samples or more."""
        if len(samples) < 2:
            raise UserError("the data hold one sample, which cannot be ranked: give two or more")
        return cls(route, samples.log_gradients[:, index].clone(), samples.labels, samples.predictions)

    @cached_property
    def votes(self) -> Tensor:
        """Votes of each sample in each layer (Eq. (17)), ``(N, L)`` float64: from 1 to N, more for lower gradients.

        Equal gradients share the mean of their ranks.
        """
        gradients = self.log_gradients.T.contiguous()
        ascending = gradients.sort().values
        # with b of the samples below and e equal: N - b - e above, and the mean of e ranks from there on
        places = torch.searchsorted(ascending, gradients) + torch.searchsorted(ascending, gradients, right=True)
        return len(self) + 0.5 - places.T.double() / 2

    @property
    def values(self) -> Tensor:
        """V (Eq. (18)), the sum of a sample's votes over the layers, ``(N,)`` float64: larger is harder to fool.

        ``values.argsort()`` begins with the samples that the model has learned worst, as a rule misclassified ones.
        """
        return self.votes.sum(1)

    @property
    def correct(self) -> Tensor:
        """Whether the model classifies each sample correctly, bool ``(N,)``."""
        return self.labels == self.predictions

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        low, high = (float(value) for value in self.values.aminmax())
        sizes = f"{plural(len(self), 'sample')}, {plural(len(self.route.layers), 'layer')}"
        return f"Hardness({sizes}, V from {low:g} to {high:g})"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw how V is spread over images that the model gets right, and over those that it does not."""
        axes = self._axes(ax)
        groups = {"classified correctly": self.correct, "misclassified": ~self.correct}
        values = [self.values[chosen].numpy() for chosen in groups.values()]
        axes.hist(values, bins=20, stacked=True, label=list(groups), color=["#8A8A8A", "#D55E00"])
        axes.set_xlabel("V: larger is harder to fool")
        axes.set_ylabel("images")
        axes.legend(frameon=False)
        return axes

    def hardest(self, count: int) -> Tensor:
        """Indices of the samples with the largest V, hardest first, ties to the lower index, int64 ``(count,)``.

        They are the ones that the model has learned best; nothing is perturbed to find them.
        """
        return self._first(count, descending=True)

    def weakest(self, count: int) -> Tensor:
        """Indices of the samples with the smallest V, weakest first, ties to the lower index, int64 ``(count,)``.

        They are the ones that the model has learned worst, as a rule misclassified ones.
        """
        return self._first(count, descending=False)

    @property
    def table(self) -> Table:
        """One row a sample: index, label, prediction, V, and ``votes:LAYER`` for each layer in forward order."""
        columns = (each.tolist() for each in (self.labels, self.predictions, self.values, *self.votes.T))
        return Table(
            ("index", "label", "prediction", "V", *(f"votes:{layer}" for layer in self.route.layers)),
            tuple(zip(range(len(self)), *columns, strict=True)),
        )

    def _first(self, count: int, *, descending: bool) -> Tensor:
        if not 0 < count <= len(self):
            raise UserError(f"{count} samples are wanted of {len(self)}: give a number from 1 to {len(self)}")
        order: Tensor = self.values.sort(descending=descending, stable=True).indices
        return order[:count]


@dataclass(frozen=True, eq=False)
class SampleGradients:
    """What the loss, the cross entropy, says of N samples in their order: on the CPU, in float64 but for classes."""

    log_gradients: Tensor  # (N, R, L), R routes of L layers: log of Eq. (16), -inf where no gradient arrives
    labels: Tensor  # (N,) int64
    predictions: Tensor  # (N,) int64
    log_losses: Tensor  # (N,), log of the loss
    margins: Tensor  # (N,), the label's logit less the largest other one
    log_input_gradients: Tensor
    """``(N,)``, log of the L1 norm of the loss gradient at the image: what a small step of size eps in the L-infinity
    ball adds to the loss, over eps."""

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def concatenate(cls, batches: Iterable[SampleGradients]) -> SampleGradients:
        """The samples of several batches, one after another; a `UserError` if there is none."""
        batches = list(batches)
        if not batches:
            raise UserError("the data hold no sample: the loader is empty")
        return cls(**{each.name: torch.cat([getattr(batch, each.name) for batch in batches]) for each in fields(cls)})


class GradientReader:
    """Reads batches of a frozen model with one forward and one backward pass each, all layers and routes at once.

    Gradients are per deviation of each neuron, or with None per raw unit.
    """

    def __init__(self, model: nn.Module, routes: Mapping[str, Route], deviations: Deviations | None = None) -> None:
        first = next(iter(routes.values()))
        for name, route in routes.items():
            require_same(first.channels, route.channels, f"route {name!r}")
            if not route.size:
                raise UserError(f"route {name!r} has no neuron in any layer: give one with neurons")
        require_model(first.channels, model)
        self._model, self._deviations = model, deviations
        self._channels = first.channels
        self._apart = False  # whether samples were seen to stand in the first dimension of tokens
        self._neurons = {layer: [route[layer] for route in routes.values()] for layer in first}

    def read(self, images: Tensor, labels: Tensor | None) -> SampleGradients:
        """Read one batch, on the model's device and in its dtype."""
        labels = labelled(labels)
        with explained(images):
            measured = gradients(self._model, images, labels, linear=True)
            if not self._apart and measured.tokens.intersection(self._channels):
                require_rows_apart(self._model, images, self._channels)
        self._apart = True
        assert measured.logits is not None and measured.at_images is not None
        wide = {layer: sizes.cpu().double() for layer, sizes in measured.on(self._channels).values.items()}
        wide = in_units(wide, self._deviations, 1)
        # each row alone, where a product of matrices might round equal rows in different ways
        by_layer = [
            torch.stack([wide[layer][:, on_route].sum(1) for on_route in neurons], dim=1)
            for layer, neurons in self._neurons.items()
        ]
        sums = torch.stack(by_layer, dim=2)  # Eq. (16), (n, R, L), up to the sample's factor
        # summed in float64, away from the device, which may not have it
        at_images = measured.at_images.flatten(1).abs().sum(1, dtype=torch.promote_types(images.dtype, torch.float32))
        inputs = at_images.cpu().double()
        if not (sums.isfinite().all() and inputs.isfinite().all()):
            raise UserError(
                "a gradient of the loss is not finite: check the model's weights and the range of its inputs"
            )
        logits, answers = measured.logits.cpu().double(), labels.cpu().long()
        log_losses, margins = log_loss_and_margin(logits, answers)
        return SampleGradients(
            log_gradients=sums.log() + measured.log_factor[:, None, None], labels=answers,
            predictions=logits.argmax(1), log_losses=log_losses, margins=margins,
            log_input_gradients=inputs.log() + measured.log_factor,
        )  # fmt: skip


def log_loss_and_margin(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the cross entropy, and the label's logit less the largest other one; both ``(n,)``.

    With s the log odds against the label, the loss is ``log(1 + exp(s))``, whose logarithm is s itself where the loss
    is too small for floating point. Logits are ``(n, K)`` float64, K >= 2, labels ``(n,)`` int64.
    """
    label = F.one_hot(labels, logits.shape[1]).bool()
    of_label = logits.gather(1, labels[:, None])[:, 0]
    others = logits.masked_fill(label, -torch.inf)
    odds = others.logsumexp(1) - of_label
    log_loss = torch.where(odds < _LINEAR_BELOW, odds, F.softplus(odds.clamp(min=_LINEAR_BELOW), threshold=700).log())
    return log_loss, of_label - others.amax(1)
