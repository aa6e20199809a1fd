"""Adversarial hardness of samples (section 5.2, Eqs. (16)-(18)): how hard it is to fool the model on each.

Nothing is perturbed: in every layer the samples are ranked by the loss gradient on the layer's route neurons, and the
lower the gradient the more votes a sample gets. V, the metric, is the sum of a sample's votes over the layers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.analysis.sample_readings import SampleReader, SampleReadings
from attackroute.analysis.votes import rank_votes, votes_among
from attackroute.core.batches import BatchStream, Data
from attackroute.core.errors import UserError
from attackroute.core.files import HARDNESS_KIND, file_errors, read_tensors, write_tensors
from attackroute.core.model_state import frozen
from attackroute.core.table import plural
from attackroute.routes.route import Route
from attackroute.tracing.trace import Progress

_TENSORS = ("log_gradients", "labels", "predictions")


_REFERENCE = "reference"


def hardness(
    model: nn.Module, route: Route, data: Data, *, batch_size: int = 128, progress: Progress | None = None
) -> Hardness:
    """Rank samples by how hard the model is to fool on them, from one forward and one backward pass.

    The model runs in eval mode on the device of its parameters and comes back as it was. Memory grows by one number a
    layer and two more for each sample.

    Args:
        model: Any network of images ``(N, C, H, W)`` to logits ``(N, classes)``.
        route: A route of the model, such as :meth:`attackroute.InstanceRoutes.aggregate` gives.
        data: A DataLoader (any iterable) of ``(images, labels)``, or one such pair of tensors; at least two samples.
        batch_size: Rows per pass when ``data`` is tensors; a DataLoader brings its own.
        progress: Called with (samples done, samples in all or None) after every batch.

    Raises:
        UserError: The model cannot carry the route, the data hold fewer than two samples or no labels, an input does
            not fit the model, or values are not finite.
    """
    result = Hardness.of_readings(read_samples(model, {"route": route}, data, batch_size, progress), route)
    if len(result) < 2:
        raise UserError(
            "the data hold one sample, which cannot be ranked: give two or more, or score it against others"
        )
    return result


def read_samples(
    model: nn.Module, routes: Mapping[str, Route], data: Data, batch_size: int, progress: Progress | None
) -> SampleReadings:
    """Readings of every sample, for several routes at once; see :class:`SampleReader`."""
    parts: list[SampleReadings] = []
    done = 0
    with frozen(model), torch.inference_mode(False):
        stream = BatchStream(model, data, batch_size)
        for part in stream.map(SampleReader(model, routes).read):
            parts.append(part)
            done += len(part)
            if progress is not None:
                progress(done, stream.total)
    return SampleReadings.concatenate(parts)


@dataclass(frozen=True, eq=False, repr=False)
class Hardness:
    """Samples and how hard the model is to fool on each.

    Attributes:
        route: The route on whose neurons gradients were taken.
        log_gradients: ``(N, L)`` float64: log of Eq. (16) for each sample, in the data's order, and layer of the route.
        labels: ``(N,)`` int64.
        predictions: ``(N,)`` int64, the model's classes.
        reference: ``(M, L)`` float64, ascending in each column: what the samples are ranked among. None where that
            is the samples themselves.
    """

    route: Route
    log_gradients: Tensor
    labels: Tensor
    predictions: Tensor
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        shape = (len(self.labels), len(self.route))
        if self.log_gradients.shape != shape or self.predictions.shape != shape[:1] or self.labels.ndim != 1:
            raise UserError(
                f"hardness of {shape[0]} samples on {plural(shape[1], 'layer')} needs gradients of shape {shape}, not "
                f"{tuple(self.log_gradients.shape)}, and one label and prediction for each sample"
            )
        for values in (self.log_gradients, self.reference):
            if values is not None and (values.dtype != torch.float64 or not bool((values < torch.inf).all())):
                raise UserError("hardness needs float64 logarithms of gradients, none of them NaN or infinite")
        if self.reference is not None and (
            self.reference.shape[1:] != shape[1:] or not bool((self.reference[1:] >= self.reference[:-1]).all())
        ):
            raise UserError("the reference needs one column for each layer of the route, each in ascending order")

    @classmethod
    def of_readings(cls, readings: SampleReadings, route: Route, index: int = 0) -> Hardness:
        """Hardness by the readings' route of that index, the samples ranked among themselves.

        Raises:
            UserError: There is one sample alone.
        """
        if len(readings) < 2:
            raise UserError("the data hold one sample, which cannot be ranked: give two or more, or score it by others")
        return cls(route, readings.log_gradients[:, index].clone(), readings.labels, readings.predictions)

    @cached_property
    def votes(self) -> Tensor:
        """Votes of each sample in each layer (Eq. (17)), ``(N, L)`` float64: from 1 to N, more for lower gradients.

        Equal gradients share the mean of their ranks. Among a reference of M samples, votes go from 1/2 to M + 1/2.
        """
        if self.reference is None:
            return rank_votes(self.log_gradients)
        return votes_among(self.reference, self.log_gradients)

    @property
    def values(self) -> Tensor:
        """V (Eq. (18)), the sum of a sample's votes over the layers, ``(N,)`` float64: larger is harder to fool."""
        return self.votes.sum(1)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers that vote, in forward order."""
        return self.route.layers

    @property
    def correct(self) -> Tensor:
        """Whether the model classifies each sample correctly, bool ``(N,)``."""
        return self.labels == self.predictions

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        ranked = "" if self.reference is None else f", among {len(self.reference)} others"
        low, high = (float(value) for value in self.values.aminmax())
        sizes = f"{plural(len(self), 'sample')}, {plural(len(self.layers), 'layer')}"
        return f"Hardness({sizes}, V from {low:g} to {high:g}{ranked})"

    def hardest(self, count: int, among: Tensor | None = None) -> Tensor:
        """Indices of the samples with the largest V, hardest first, ties to the lower index, int64 ``(count,)``.

        They are the ones that the model has learned best; nothing is perturbed to find them.

        Args:
            count: How many.
            among: Bool ``(N,)``, to choose from these samples alone, such as :attr:`correct`.
        """
        return self._first(count, among, descending=True)

    def weakest(self, count: int, among: Tensor | None = None) -> Tensor:
        """Indices of the samples with the smallest V, weakest first, ties to the lower index, int64 ``(count,)``.

        They are the model's criticisms: the ones that it has learned worst, as a rule misclassified ones. Arguments
        are those of :meth:`hardest`.
        """
        return self._first(count, among, descending=False)

    def quantiles(self) -> Tensor:
        """The samples' log-gradients in ascending order, ``(N, L)``: what others are scored against."""
        return self.log_gradients.sort(dim=0).values if self.reference is None else self.reference

    def score(
        self, model: nn.Module, data: Data, *, batch_size: int = 128, progress: Progress | None = None
    ) -> Hardness:
        """Hardness of other samples among these ones, which are not ranked anew.

        Every sample of the reference is kept, so these same samples get the votes that they have. Batches of another
        size can change the last digits of a gradient, and with them the order of two samples that are that close.

        Args:
            model: The model of this hardness.
            data: Images with labels; one sample will do.
            batch_size: As for :func:`hardness`.
            progress: As for :func:`hardness`.

        Raises:
            UserError: As for :func:`hardness`.
        """
        readings = read_samples(model, {"route": self.route}, data, batch_size, progress)
        return Hardness(
            self.route, readings.log_gradients[:, 0].clone(), readings.labels, readings.predictions, self.quantiles()
        )

    def by_class(self) -> list[dict[str, Any]]:
        """For each label: how many samples bear it, how many are classified correctly, and the spread of their V."""
        rows = []
        for label in self.labels.unique().tolist():
            own = self.labels == label
            low, middle, high = self.values[own].quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
            rows.append(
                {
                    "label": label,
                    "samples": int(own.sum()),
                    "correct": int(self.correct[own].sum()),
                    "V_mean": float(self.values[own].mean()),
                    "V_quartiles": [low, middle, high],
                }
            )
        return rows

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as safetensors, replacing a file of that name in one step.

        Raises:
            UserError: The file cannot be written.
        """
        body = replace(self.route, frequency=None).to_json()
        tensors = {name: getattr(self, name) for name in _TENSORS}
        if self.reference is not None:
            tensors[_REFERENCE] = self.reference
        write_tensors(path, HARDNESS_KIND, body, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Hardness:
        """Read what `save` wrote.

        Raises:
            UserError: The file is missing, damaged or something else.
        """
        body, tensors = read_tensors(path, HARDNESS_KIND)
        with file_errors(path):
            if missing := set(_TENSORS) - set(tensors):
                raise UserError(f"holds no {sorted(missing)[0]}")
            route = Route.from_json(body)
            return cls(route, **{name: tensors[name] for name in _TENSORS}, reference=tensors.get(_REFERENCE))

    def _first(self, count: int, among: Tensor | None, *, descending: bool) -> Tensor:
        order: Tensor = self.values.sort(descending=descending, stable=True).indices
        if among is not None:
            order = order[among[order]]
        if not 0 < count <= len(order):
            raise UserError(f"{count} samples are wanted of {len(order)}: give a number from 1 to {len(order)}")
        return order[:count]
