"""What autograd itself says of the edges: a check on the structure that the recording found.

The recording follows the operations that a forward pass executes. A custom ``autograd.Function`` can declare another
derivative than that of its operations, and only the graph of autograd shows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction


@dataclass(frozen=True)
class GraphSources:
    """Direct predecessors of one route layer, as autograd sees them.

    Attributes:
        reached: Names of the layers whose output the layer's own depends on.
        custom: Those of them that a path through a custom ``autograd.Function`` joins.
    """

    reached: frozenset[str]
    custom: frozenset[str]


class GraphWalk:
    """Walks the graph of a forward pass back from each route layer's output to the outputs of earlier ones.

    Attributes:
        found: Predecessors of every layer that has run, by name.
    """

    def __init__(self) -> None:
        self.found: dict[str, GraphSources] = {}
        self._outputs: dict[Any, str] = {}

    def visit(self, name: str, output: Tensor) -> Tensor:
        """Note the predecessors of a layer that has just run; returns the output that is to flow on."""
        reached, passed = self._walk([output.grad_fn])
        self.found[name] = GraphSources(reached, self._walk(passed)[0])
        if output.grad_fn is None:  # behind a detach: what follows depends on the output all the same
            output = output.requires_grad_().clone()
        self._outputs[output.grad_fn] = name
        return output

    def _walk(self, start: Iterable[Any]) -> tuple[frozenset[str], list[Any]]:
        """Names of the outputs below some nodes of the graph, and the custom functions on the way."""
        seen, reached, custom = set[Any](), set[str](), list[Any]()
        todo = [node for node in start if node is not None]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            name = self._outputs.get(node)
            if name is not None:
                reached.add(name)
                continue
            if isinstance(node, BackwardCFunction):
                custom.append(node)
            todo += [following for following, _ in node.next_functions if following is not None]
        return frozenset(reached), custom
