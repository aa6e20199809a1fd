"""A batch's trace as one CUDA graph: what a GPU does is the same for every batch of one shape, and Python is slower.

The kernels that a pass starts are recorded once and started again for the next batches, without the model's Python
code. A graph is used only where its results for one batch are those of an ordinary pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attackroute.tracing.open_edges import RankedBatch

_CLOSE = 1e-3  # of a score: kernels that add in no fixed order may differ a little


Pass = Callable[[Tensor, "Tensor | None"], RankedBatch]
"""Called with images and labels."""


@dataclass(eq=False)
class Graph:
    """A recorded pass; its inputs and results stay in the same memory."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    labels: Tensor | None
    results: RankedBatch

    @classmethod
    def capture(cls, run: Pass, images: Tensor, labels: Tensor | None) -> Graph | None:
        """Record a pass; None where the model does what cannot be recorded, such as waiting for the device."""
        images, labels = images.clone(), None if labels is None else labels.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                results = run(images, labels)
        except Exception:  # whatever it was, an ordinary pass says it better, or has no such trouble
            torch.cuda.synchronize()
            return None
        return cls(graph, images, labels, results)

    def replay(self, images: Tensor, labels: Tensor | None) -> RankedBatch:
        """The pass for other images; what it gives is overwritten by the next one."""
        self.images.copy_(images)
        if self.labels is not None and labels is not None:
            self.labels.copy_(labels)
        self.graph.replay()
        return self.results


@dataclass(eq=False)
class GraphedPasses:
    """Passes of which every shape's second one is recorded, and replayed from then on."""

    graphs: dict[object, Graph | None] = field(default_factory=dict)
    seen: set[object] = field(default_factory=set)

    def run(self, run: Pass, images: Tensor, labels: Tensor | None) -> RankedBatch:
        """What ``run(images, labels)`` gives, which is to be read before the next call."""
        key = (images.shape, images.stride(), images.dtype, labels is None)
        graph = self.graphs.get(key)
        if graph is not None:
            return graph.replay(images, labels)
        results = run(images, labels)
        if key in self.seen and key not in self.graphs:
            self.graphs[key] = self._checked(run, images, labels, results)
        self.seen.add(key)
        return results

    def _checked(self, run: Pass, images: Tensor, labels: Tensor | None, expected: RankedBatch) -> Graph | None:
        """The recorded pass, if it repeats what an ordinary one has given."""
        graph = Graph.capture(run, images, labels)
        if graph is None:
            return None
        pairs = zip(expected.compared(), graph.replay(images, labels).compared(), strict=True)
        close = [torch.isclose(one, other, rtol=_CLOSE, equal_nan=True).all() for one, other in pairs]
        return graph if bool(torch.stack(close).all()) else None
