"""What the page's route view draws, as plain values: layers, channels, edges, samples, under several conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attackroute.report.measuring import Condition, same_samples
from attackroute.report.pictures import Peaks, Pictures
from attackroute.tracing.influence import MeanInfluence

_NEIGHBOURS = 5  # strongest edges into and out of each channel, which are always kept
_FEWEST = 100  # pairs of an edge at least


@dataclass(frozen=True)
class Limits:
    """How much of a large network the page carries.

    Attributes:
        channels: Channels of a layer, the most frequent ones, whose edges and pictures are kept.
        pairs: Pairs of channels that are kept for their influence alone, over the whole network and all conditions.
        samples: Samples whose own routes are kept, with their pictures.
    """

    channels: int = 256
    pairs: int = 80_000
    samples: int = 64


@dataclass(frozen=True)
class Network:
    """A network under its conditions.

    Attributes:
        name: What tells it from others; empty where there is one alone.
        conditions: What is known of it.
        pictures: The images shown, and where in them its channels respond most.
    """

    name: str
    conditions: Sequence[Condition]
    pictures: Pictures | None = None


def route_view(
    networks: Sequence[Network], classes: Sequence[str] = (), limits: Limits | None = None
) -> dict[str, Any] | None:
    """The route view's data; None where there is neither a trace nor a route.

    Args:
        networks: One, or several with the same layers, with pictures of the same images.
        classes: Names of the labels.
        limits: How much to keep; None is the default.
    """
    limits = Limits() if limits is None else limits
    conditions = [item for network in networks for item in network.conditions]
    first = next((item for item in conditions if not item.is_empty), None)
    if first is None:
        return None
    channels = dict(first.channels)
    names = list(channels)
    frequencies = [_frequency(item) for item in conditions]
    methods = next((dict(item) for item in map(_methods, conditions) if item), {})
    measured = sum(item.influence is not None for item in conditions)
    most = max(_FEWEST, limits.pairs // max(1, len(methods) * measured))
    candidates = {
        layer: _candidates(count, conditions, layer, [item[layer] for item in frequencies if item], limits)
        for layer, count in channels.items()
    }
    pictures = next((network.pictures for network in networks if network.pictures is not None), None)
    samples = _samples(conditions, limits.samples, pictured=pictures is not None)
    pictured = 0 if pictures is None else min(limits.samples, len(pictures.sources))
    return {
        "width": next(
            (item.route.provenance.width for item in conditions if item.route and item.route.provenance), 0.3
        ),
        "classes": list(classes),
        "networks": [network.name for network in networks],
        "conditions": [
            {
                "name": f"{network.name}: {item.name}" if network.name else item.name,
                "network": number,
                "trace": _origin(item),
                "influence_samples": None if item.influence is None else item.influence.samples,
            }
            for number, network in enumerate(networks)
            for item in network.conditions
        ],
        "layers": [
            {
                "name": layer,
                "channels": count,
                "route": [None if item.route is None else list(item.route.indices[layer]) for item in conditions],
                "frequency": [item[layer].tolist() if item else None for item in frequencies],
                "gradient": [_values(item.gradient, layer) for item in conditions],
                "sensitivity": [_values(item.sensitivity, layer) for item in conditions],
                "arriving": [
                    None if item.influence is None else _rounded(_arriving(item.influence, layer, count))
                    for item in conditions
                ],
                "peaks": [
                    None
                    if network.pictures is None
                    else _peaks(network.pictures.peaks.get(layer), candidates[layer], pictured)
                    for network in networks
                ],
            }
            for layer, count in channels.items()
        ],
        "edges": [
            {
                "source": names.index(source),
                "target": names.index(target),
                "method": method,
                "influence": [
                    None
                    if item.influence is None or (source, target) not in item.influence.matrices
                    else _pairs(item.influence.matrices[source, target], candidates[target], candidates[source], most)
                    for item in conditions
                ],
            }
            for (source, target), method in methods.items()
        ],
        "samples": samples,
        "pictures": None
        if pictures is None
        else {"size": list(pictures.size), "sources": list(pictures.sources[:pictured])},
    }


def spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``count`` rows, evenly apart, since data often come sorted by class."""
    wanted = min(count, wanted)
    return [number * count // wanted for number in range(wanted)]


def _frequency(condition: Condition) -> Mapping[str, Tensor] | None:
    if condition.routes is not None:
        return condition.routes.frequency()
    return None if condition.route is None else condition.route.frequency


def _methods(condition: Condition) -> Mapping[tuple[str, str], str]:
    if condition.influence is not None:
        return condition.influence.methods
    return {} if condition.routes is None else condition.routes.methods


def _candidates(
    count: int, conditions: Sequence[Condition], layer: str, shares: Sequence[Tensor], limits: Limits
) -> Tensor:
    """Channels whose edges are kept: the most frequent ones, those of a route first where nothing is known."""
    rank = torch.zeros(count, dtype=torch.float64)
    for item in conditions:
        if item.route is not None:
            rank[item.route[layer]] = 1e-9
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


def _peaks(peaks: Peaks | None, candidates: Tensor, pictured: int) -> dict[str, Any] | None:
    """Where channels respond most: image, row and column in turn, the strongest first; of candidates only."""
    if peaks is None or not pictured:
        return None
    kept = set(candidates.tolist())
    places = torch.cat([peaks.images[:, :, None], peaks.places], dim=2).tolist()
    return {
        "field": list(peaks.field),
        "places": [
            [place for place in found if place[0] < pictured] if channel in kept else None
            for channel, found in enumerate(places)
        ],
    }


def _samples(conditions: Sequence[Condition], limit: int, *, pictured: bool) -> list[dict[str, Any]]:
    """The samples that are shown, with their own routes under every condition that has them."""
    pictured = pictured and any(item.rows is not None for item in conditions)
    rows = _rows(conditions, limit)
    count = max((len(found) for found in rows if found is not None), default=0)
    shown = [
        None if item.routes is None or found is None else item.routes.select(list(found))
        for item, found in zip(conditions, rows, strict=True)
    ]
    labels = next((routes.labels for routes in shown if routes is not None and routes.labels is not None), None)
    masks = [None if routes is None else [routes.masks[layer] for layer in routes.layers] for routes in shown]
    return [
        {
            "row": next(found[number] for found in rows if found is not None),
            "label": None if labels is None else int(labels[number]),
            "picture": number if pictured else None,
            "routes": [
                None if found is None else [mask[number].nonzero().flatten().tolist() for mask in found]
                for found in masks
            ],
            "predictions": [
                None if routes is None or routes.predictions is None else int(routes.predictions[number])
                for routes in shown
            ],
        }
        for number in range(count)
    ]


def _rows(conditions: Sequence[Condition], limit: int) -> list[Sequence[int] | None]:
    """For each condition which of its routes' samples are shown: those of the pictures, else some of all."""
    if any(item.rows is not None for item in conditions):
        return [None if item.rows is None else list(item.rows)[:limit] for item in conditions]
    main = next((item.routes for item in conditions if item.routes is not None), None)
    if main is None:
        return [None for _ in conditions]
    rows = spread(len(main), limit)
    return [rows if item.routes is main or same_samples(main, item.routes) else None for item in conditions]


def _origin(condition: Condition) -> Mapping[str, Any] | None:
    found = condition.routes if condition.routes is not None else condition.route
    return None if found is None or found.provenance is None else found.provenance.to_json()


def _values(found: Mapping[str, Tensor] | None, layer: str) -> list[float] | None:
    return None if found is None else _rounded(found[layer])


def _rounded(values: Tensor) -> list[float]:
    return [_digits(value) for value in values.tolist()]


def _digits(value: float) -> float:
    """Four digits: enough to draw, and a fraction of the size."""
    return float(f"{value:.4g}")
