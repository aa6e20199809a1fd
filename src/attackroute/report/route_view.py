"""What the page's route view draws, as plain values: layers, channels, edges, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attackroute.instances import InstanceRoutes
from attackroute.report.mean_influence import MeanInfluence
from attackroute.report.measuring import Measured
from attackroute.routes import Route

_NEIGHBOURS = 5  # strongest edges into and out of each channel, which are always kept


@dataclass(frozen=True)
class Limits:
    """How much of a large network the page carries.

    Attributes:
        channels: Channels of a layer, the most frequent ones, whose edges are kept.
        pairs: Pairs of channels of the whole network that are kept for their influence alone.
        samples: Samples whose own routes are kept.
    """

    channels: int = 256
    pairs: int = 40_000
    samples: int = 40


def route_view(
    measured: Measured,
    route: Route | None,
    classes: Sequence[str] = (),
    limits: Limits | None = None,
) -> dict[str, Any] | None:
    """The route view's data; None where there is neither a trace nor a route.

    Args:
        measured: Traces and influence.
        route: The model's route, as a file has it; its frequencies serve where there is no trace.
        classes: Names of the labels.
        limits: How much to keep; None is the default.
    """
    limits = Limits() if limits is None else limits
    clean = _frequency(measured.clean) or (dict(route.frequency) if route is not None and route.frequency else None)
    attacked = _frequency(measured.attacked)
    first = next((item for item in (measured.clean, route, measured.attacked) if item is not None), None)
    if first is None:
        return None
    channels = dict(first.channels)
    influences = {"clean": measured.clean_influence, "attacked": measured.attacked_influence}
    known = next((item.methods for item in influences.values() if item is not None), None)
    methods = known if known is not None else measured.clean.methods if measured.clean is not None else {}
    candidates = {
        layer: _candidates(count, route, layer, [item[layer] for item in (clean, attacked) if item is not None], limits)
        for layer, count in channels.items()
    }
    names = list(channels)
    origin = None if route is None else route.provenance
    return {
        "width": 0.3 if origin is None else origin.width,
        "classes": list(classes),
        "traces": {"clean": _origin(measured.clean, route), "attacked": _origin(measured.attacked, None)},
        "influence_samples": {name: item.samples for name, item in influences.items() if item is not None},
        "layers": [
            {
                "name": layer,
                "channels": count,
                "route": None if route is None else list(route.indices[layer]),
                "clean": None if clean is None else clean[layer].tolist(),
                "attacked": None if attacked is None else attacked[layer].tolist(),
                "arriving": {
                    name: _rounded(_arriving(item, layer, count))
                    for name, item in influences.items()
                    if item is not None
                },
            }
            for layer, count in channels.items()
        ],
        "edges": [
            {
                "source": names.index(source),
                "target": names.index(target),
                "method": method,
                **{
                    name: _pairs(
                        item.matrices[source, target],
                        candidates[target],
                        candidates[source],
                        max(100, limits.pairs // len(methods)),
                    )
                    for name, item in influences.items()
                    if item is not None and (source, target) in item.matrices
                },
            }
            for (source, target), method in methods.items()
        ],
        "samples": _samples(measured, limits.samples),
    }


def _frequency(routes: InstanceRoutes | None) -> dict[str, Tensor] | None:
    return None if routes is None else routes.frequency()


def _candidates(count: int, route: Route | None, layer: str, shares: Sequence[Tensor], limits: Limits) -> Tensor:
    """Channels whose edges are kept: the most frequent ones, those of the route first where nothing is known."""
    rank = torch.zeros(count, dtype=torch.float64)
    if route is not None:
        rank[route[layer]] = 1e-9
    for share in shares:
        rank = torch.maximum(rank, share)
    order = rank.argsort(descending=True, stable=True)[: limits.channels]
    return order[rank[order] > 0].sort().values


def _arriving(influence: MeanInfluence, layer: str, count: int) -> Tensor:
    """Influence on each channel of a layer, over all its sources."""
    total = torch.zeros(count, dtype=torch.float64)
    for (_, target), matrix in influence.matrices.items():
        if target == layer:
            total += matrix.sum(1)
    return total


def _pairs(matrix: Tensor, targets: Tensor, sources: Tensor, limit: int) -> dict[str, Any]:
    """The pairs of channels with the largest influence, and of every channel its own strongest, strongest first."""
    part = matrix[targets][:, sources]
    wanted = torch.zeros_like(part, dtype=torch.bool)
    if part.numel():
        strongest = part.flatten().topk(min(limit, part.numel())).indices
        wanted.view(-1)[strongest] = True
        for axis in (0, 1):
            wanted.scatter_(axis, part.topk(min(_NEIGHBOURS, part.shape[axis]), dim=axis).indices, True)
    rows, columns = (wanted & (part > 0)).nonzero(as_tuple=True)
    values = part[rows, columns]
    order = values.argsort(descending=True, stable=True)
    total = matrix.sum().item()
    return {
        "sources": sources[columns[order]].tolist(),
        "targets": targets[rows[order]].tolist(),
        "influence": _rounded(values[order]),
        "share_kept": round(values.sum().item() / total, 4) if total > 0 else None,
        "total": _digits(total),
    }


def _samples(measured: Measured, limit: int) -> list[dict[str, Any]]:
    """The first samples with their own routes; attacked ones beside them where they are the same samples."""
    clean, attacked = measured.clean, measured.attacked
    main = clean if clean is not None else attacked
    if main is None:
        return []
    shown = {"clean": clean, "attacked": attacked if _same_samples(clean, attacked) or clean is None else None}
    count = min(limit, len(main))
    traces = {name: routes.select(slice(count)) for name, routes in shown.items() if routes is not None}
    masks = {name: {layer: routes.masks[layer] for layer in routes.layers} for name, routes in traces.items()}
    return [
        {
            "index": index,
            "label": None if main.labels is None else int(main.labels[index]),
            "routes": {
                name: [mask[index].nonzero().flatten().tolist() for mask in masks[name].values()] for name in traces
            },
            "predictions": {
                name: None if routes.predictions is None else int(routes.predictions[index])
                for name, routes in traces.items()
            },
        }
        for index in range(count)
    ]


def _same_samples(clean: InstanceRoutes | None, attacked: InstanceRoutes | None) -> bool:
    """Whether row i of both is the same image, as far as can be told: as many, and their labels agree."""
    if clean is None or attacked is None or len(clean) != len(attacked):
        return False
    ours, theirs = clean.provenance, attacked.provenance
    labels = clean.labels is not None and attacked.labels is not None and torch.equal(clean.labels, attacked.labels)
    return labels and (ours.data, ours.seed) == (theirs.data, theirs.seed)


def _origin(routes: InstanceRoutes | None, route: Route | None) -> Mapping[str, Any] | None:
    if routes is not None:
        return routes.provenance.to_json()
    return None if route is None or route.provenance is None else route.provenance.to_json()


def _rounded(values: Tensor) -> list[float]:
    return [_digits(value) for value in values.tolist()]


def _digits(value: float) -> float:
    """Four digits: enough to draw, and a fraction of the size."""
    return float(f"{value:.4g}")
