"""What autograd itself says of the edges: a check on the structure that the recording found.

The recording follows the operations that a forward pass executes. A custom ``autograd.Function`` can declare another
derivative than that of its operations, and only the graph of autograd shows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from attackroute.layers import LayerCall, LayerCalls, require_gradients


@dataclass(frozen=True)
class GraphSources:
    """Direct predecessors of one route layer, as autograd sees them.

    Attributes:
        reached: Names of the layers whose output the layer's own depends on.
        custom: Those of them that a path through a custom ``autograd.Function`` joins.
    """

    reached: frozenset[str]
    custom: frozenset[str]


def graph_sources(model: nn.Module, images: Tensor, *, linear: bool) -> dict[str, GraphSources]:
    """Run a frozen ``model`` on a few images with every route layer's output cut, and walk the graph between the cuts.

    Raises:
        UserError: A route layer runs where gradients are switched off.
    """
    leaves: dict[Tensor, str] = {}
    found: dict[str, GraphSources] = {}

    def visit(call: LayerCall) -> Tensor:
        require_gradients(call.name)
        output = call.run()
        reached, passed = _walk([output.grad_fn], leaves)
        found[call.name] = GraphSources(reached, _walk(passed, leaves)[0])
        leaf = output.detach().requires_grad_()
        leaves[leaf] = call.name
        return leaf.clone()

    with torch.inference_mode(False), torch.enable_grad(), LayerCalls(model, visit, linear=linear):
        model(images.clone())
    return found


def _walk(start: Iterable[Any], leaves: dict[Tensor, str]) -> tuple[frozenset[str], list[Any]]:
    """Names of the leaves below some nodes of the graph, and the custom functions on the way."""
    seen, reached, custom = set[Any](), set[str](), list[Any]()
    todo = [node for node in start if node is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        name = leaves.get(getattr(node, "variable", None))  # type: ignore[arg-type]
        if name is not None:
            reached.add(name)
        if isinstance(node, BackwardCFunction):
            custom.append(node)
        todo += [following for following, _ in node.next_functions if following is not None]
    return frozenset(reached), custom
