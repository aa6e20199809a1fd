"""Which route layers a model runs, how they are joined, and how each edge is to be computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError
from attackroute.core.layers import two_of
from attackroute.tracing.pass_checks import STATISTIC, GraphWalk, Separation, require_rows_apart, with_logits
from attackroute.tracing.recorder import RecordedLayer, Tracker, record_first

CLOSED_FORM, AUTOGRAD, SKETCH, REPLAY = "closed-form", "autograd", "sketch", "replay"


@dataclass(frozen=True)
class Structure:
    """A model's route layers and edges.

    Attributes:
        names: Route layers in forward order; other attributes refer to them by index.
        counts: Channels of each layer.
        closed: For each layer, the sources whose influence has a closed form.
        jacobian: For each layer, the sources whose edge has no closed form.
        recorded: For each layer, all sources that the recording or autograd found, also those that autograd denies.
        by_elements: For each layer, those of the ``closed`` whose closed form goes element by element.
        ends: Layers on which the model's output depends directly.
        idle: Layers that no longer count, since the output does not depend on them at all; see :meth:`of_the_output`.
        elsewhere: How these are computed, ``"autograd"`` (exact), ``"sketch"``, or for noise ``"replay"`` (exact).
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    closed: tuple[frozenset[int], ...]
    jacobian: tuple[frozenset[int], ...]
    recorded: tuple[frozenset[int], ...]
    by_elements: tuple[frozenset[int], ...]
    ends: frozenset[int]
    idle: frozenset[int] = frozenset()
    elsewhere: str = AUTOGRAD

    @classmethod
    def probe(
        cls,
        model: nn.Module,
        images: Tensor,
        *,
        linear: bool,
        elsewhere: str = AUTOGRAD,
        follow: type[Tracker] | None = None,
    ) -> tuple[Structure, object]:
        """Run a frozen model on the first images of a batch; returns the structure and the model's output.

        Autograd has the last word on which layers are joined, and on edges that pass a custom autograd function, in
        Python or C++. What follows the pass, if not derivatives, is ``follow``.

        Raises:
            UserError: The model cannot run on the images, has no route layer, or lets samples depend on each other.
        """
        images = two_of(images).requires_grad_()
        graph, separation = GraphWalk(keep=linear), Separation(images.shape[0])
        recording = record_first(model, images, linear=linear, graph=graph, separation=separation, follow=follow)
        if not separation.proven:
            if linear:
                require_rows_apart(model, images, graph.outputs, with_logits(recording.output, graph.outputs))
            else:
                _require_independent(images, recording.output)
        layers = recording.layers
        names = tuple(layer.name for layer in layers)
        closed, jacobian = [], []
        for layer in layers:
            reached, custom = (frozenset(map(names.index, of_graph)) for of_graph in graph.sources[layer.name])
            shut = layer.sources - layer.jacobian - custom
            if follow is not None and not reached <= layer.sources:  # noise comes in by a way that was not seen
                shut = frozenset()
            closed.append(shut & reached)
            jacobian.append(reached - shut)
        return cls(
            names,
            tuple(layer.channels for layer in layers),
            closed=tuple(closed),
            jacobian=tuple(jacobian),
            recorded=tuple(layer.sources | one | two for layer, one, two in zip(layers, closed, jacobian, strict=True)),
            by_elements=tuple(layer.passed & shut for layer, shut in zip(layers, closed, strict=True)),
            ends=frozenset(map(names.index, graph.reached_from(recording.output))),
            elsewhere=elsewhere,
        ), recording.output

    def of_the_output(self) -> Structure:
        """The structure without the layers on which the output does not depend, such as heads that are dropped.

        Raises:
            UserError: It depends on none.
        """
        needed = set(self.ends)
        for index in reversed(range(len(self.names))):
            if index in needed:
                needed |= self.closed[index] | self.jacobian[index]
        if not needed:
            raise UserError(
                "the logits do not depend on any route layer: does the model's forward detach, use no_grad, or leave "
                "out what the layers give?"
            )
        idle = frozenset(range(len(self.names))) - needed
        closed, jacobian, by_elements = (
            tuple(frozenset() if index in idle else each for index, each in enumerate(edges))
            for edges in (self.closed, self.jacobian, self.by_elements)
        )
        return replace(self, closed=closed, jacobian=jacobian, by_elements=by_elements, idle=idle)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that count, in forward order."""
        return tuple(name for index, name in enumerate(self.names) if index not in self.idle)

    @property
    def channels(self) -> dict[str, int]:
        """Channels of each layer, by name."""
        counts = dict(zip(self.names, self.counts, strict=True))
        return {name: counts[name] for name in self.layers}

    @property
    def methods(self) -> dict[tuple[str, str], str]:
        """How each edge is computed, by (source, target)."""
        return {
            (self.names[source], name): self.elsewhere if source in jacobian else CLOSED_FORM
            for name, closed, jacobian in zip(self.names, self.closed, self.jacobian, strict=True)
            for source in sorted(closed | jacobian)
        }

    @property
    def sinks(self) -> frozenset[str]:
        """Layers without a successor."""
        followed = self.idle.union(*self.closed, *self.jacobian)
        return frozenset(name for index, name in enumerate(self.names) if index not in followed)

    @property
    def cut(self) -> frozenset[str]:
        """Layers whose outputs a recording must cut off: all, where some closed form is taken through the graph."""
        return frozenset(self.names if any(self.by_elements) else ())

    @property
    def passing(self) -> frozenset[str]:
        """Layers into which some closed form goes element by element."""
        return frozenset(name for name, sources in zip(self.names, self.by_elements, strict=True) if sources)

    @property
    def jacobian_edges(self) -> dict[str, list[str]]:
        """Sources whose edge has no closed form, by target."""
        return {
            name: [self.names[source] for source in sorted(sources)]
            for name, sources in zip(self.names, self.jacobian, strict=True)
            if sources
        }

    def applied(self, layers: Sequence[RecordedLayer]) -> tuple[RecordedLayer, ...]:
        """Another recording of the same model, its edges as this structure has them.

        Raises:
            UserError: The model ran other layers, or joined them in another way.
        """
        unchanged = tuple(layer.name for layer in layers) == self.names and all(
            closed <= layer.sources - layer.jacobian and layer.sources <= recorded
            for layer, closed, recorded in zip(layers, self.closed, self.recorded, strict=True)
        )
        if not unchanged:
            raise UserError(
                "the model ran other layers on this batch than on the first one: its structure must not vary"
            )
        return tuple(
            layer.corrected(closed, jacobian)
            for layer, closed, jacobian in zip(layers, self.closed, self.jacobian, strict=True)
        )


def _require_independent(images: Tensor, output: object) -> None:
    """Check that neither of two images' logits depend on the other image."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or not logits.requires_grad or logits.ndim < 2 or len(logits) != len(images):
        return
    rows = logits.flatten(1)
    weights = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=rows.dtype)  # since probabilities sum to 1
    for row, other in ((0, 1), (1, 0)):
        try:
            (gradient,) = torch.autograd.grad(rows[row], images, weights, retain_graph=True, allow_unused=True)
        except RuntimeError:  # what cannot be differentiated is named where the derivative is needed
            return
        if gradient is not None and gradient.isfinite().all() and gradient[other].count_nonzero():
            raise UserError(STATISTIC)
