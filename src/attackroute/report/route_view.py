"""What the page's route views draw, as plain values: layers, channels, edges, samples, conditions to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attackroute.report.measuring import Condition, Measured, same_samples
from attackroute.robustness.registry import radii
from attackroute.tracing.influence import MeanInfluence

_NEIGHBOURS = 5  # strongest edges into and out of each channel, which are always kept
_FEWEST = 100  # pairs of an edge at least


@dataclass(frozen=True)
class Limits:
    """How much of a large network the page carries."""

    channels: int = 256  # of a layer, the most frequent ones, whose edges and pictures are kept
    pairs: int = 80_000  # of channels, kept for their influence alone, over the whole network and all conditions
    samples: int = 64  # whose own routes are kept, with their pictures


def setup(
    pairs: Sequence[tuple[int, int | None, str]], control: str, words: tuple[str, str, str], *, linked: bool = False
) -> dict[str, Any]:
    """One route view, as plain values.

    It can show pairs, one at a time: two conditions, by number, whose routes are laid over one another, and a label;
    without a second, one is drawn alone. What moves between them is ``control``: ``"eps"`` is a slider, anything else a
    list of that name. The words are for a channel on the first route only, on the second only, and on both. A linked
    view has its width and choices from the view before it.
    """
    named = [dict(zip(("first", "second", "label"), pair, strict=True)) for pair in pairs]
    told = dict(zip(("first", "second", "both"), words, strict=True))
    return {"pairs": named, "control": control, **told, "linked": linked}


def run_setup(conditions: Sequence[Condition], start: int = 0, *, linked: bool = False) -> dict[str, Any]:
    """Clean images beside those after each attack: conditions from number ``start`` on."""
    attacks = [item.attack or "" for item in conditions[1:]]
    labels = radii(attacks)
    pairs = [(start, start + number, name) for number, name in enumerate(labels or attacks, start=1)]
    words = ("clean images only", "attacked images only", "clean and attacked images")
    return setup(pairs or [(start, None, "")], "attack" if labels is None else "eps", words, linked=linked)


def route_view(
    networks: Mapping[str, Measured], classes: Sequence[str] = (), limits: Limits | None = None
) -> dict[str, Any] | None:
    """The route view's data; None where there is neither a trace nor a route.

    The networks have the same layers, and pictures of the same images. They are by name, which is empty where there is
    but one; ``classes`` are the labels' names.
    """
    limits = limits or Limits()
    conditions = [condition for measured in networks.values() for condition in measured.conditions]
    channels = next((condition.channels for condition in conditions if condition.channels), None)
    if channels is None:
        return None
    names = list(channels)
    frequencies = [
        each.routes.frequency() if each.routes is not None else None if each.route is None else each.route.frequency
        for each in conditions
    ]
    influences = [condition.influence for condition in conditions]
    known = [each.routes if each.influence is None else each.influence for each in conditions]
    methods = next((dict(each.methods) for each in known if each is not None and each.methods), {})
    count = sum(influence is not None for influence in influences)
    most = max(_FEWEST, limits.pairs // max(1, len(methods) * count))
    candidates = {layer: _candidates(conditions, frequencies, layer, limits.channels) for layer in channels}
    pictures = next((each.pictures for each in networks.values() if each.pictures), ())
    origins = (condition.route.provenance for condition in conditions if condition.route is not None)
    return {
        "width": next((origin.width for origin in origins if origin is not None), 0.3),
        "classes": list(classes),
        "networks": list(networks),
        "conditions": [
            {
                "name": f"{name}: {condition.name}" if name else condition.name,
                "network": number,
                "trace": None if origin is None or origin.provenance is None else origin.provenance.to_json(),
                "influence_samples": None if condition.influence is None else condition.influence.samples,
            }
            for number, (name, measured) in enumerate(networks.items())
            for condition in measured.conditions
            for origin in [condition.route if condition.routes is None else condition.routes]
        ],
        "layers": [
            {
                "name": layer,
                "channels": count,
                "route": [None if item.route is None else list(item.route.indices[layer]) for item in conditions],
                "frequency": [None if frequency is None else frequency[layer].tolist() for frequency in frequencies],
                "gradient": [item.gradient and _rounded(item.gradient[layer]) for item in conditions],
                "sensitivity": [item.sensitivity and _rounded(item.sensitivity[layer]) for item in conditions],
                "arriving": [_arriving(influence, layer, count) for influence in influences],
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
                    if influence is None or (source, target) not in influence.matrices
                    else _pairs(influence.matrices[source, target], candidates[target], candidates[source], most)
                    for influence in influences
                ],
            }
            for (source, target), method in methods.items()
        ],
        "samples": _samples(conditions, limits.samples, pictured=bool(pictures)),
        "pictures": list(pictures[: limits.samples]),
    }


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` rows, evenly apart, since data often come sorted by class."""
    most = min(count, most)
    return [number * count // most for number in range(most)]


def _candidates(
    conditions: Sequence[Condition], frequencies: Sequence[Mapping[str, Tensor] | None], layer: str, most: int
) -> Tensor:
    """Channels whose edges are kept: the most frequent ones, those of a route first where nothing is known."""
    ranks = [frequency[layer] for frequency in frequencies if frequency is not None]
    ranks += [1e-9 * item.route.mask(layer).double() for item in conditions if item.route is not None]
    if not ranks:
        return torch.zeros(0, dtype=torch.int64)
    rank = torch.stack(ranks).amax(0)
    order = rank.argsort(descending=True, stable=True)[:most]
    return order[rank[order] > 0].sort().values


def _arriving(influence: MeanInfluence | None, layer: str, count: int) -> list[float] | None:
    """Influence on each channel of a layer, over all its sources."""
    if influence is None:
        return None
    sums = (matrix.sum(1) for (_, target), matrix in influence.matrices.items() if target == layer)
    return _rounded(sum(sums, torch.zeros(count, dtype=torch.float64)))


def _pairs(matrix: Tensor, targets: Tensor, sources: Tensor, limit: int) -> dict[str, Any]:
    """The pairs of channels with the largest influence, and of every channel its own strongest, strongest first."""
    block = matrix[targets][:, sources]
    strong = torch.zeros_like(block, dtype=torch.bool)
    if block.numel():
        strong.view(-1)[block.flatten().topk(min(limit, block.numel())).indices] = True
        for axis in (0, 1):
            strong.scatter_(axis, block.topk(min(_NEIGHBOURS, block.shape[axis]), dim=axis).indices, True)
    rows, columns = (strong & (block > 0)).nonzero(as_tuple=True)
    values = block[rows, columns]
    order = values.argsort(descending=True, stable=True)
    total = matrix.sum().item()
    return {
        "sources": sources[columns[order]].tolist(),
        "targets": targets[rows[order]].tolist(),
        "influence": _rounded(values[order]),
        "share_kept": round(values.sum().item() / total, 4) if total > 0 else None,
        "total": float(f"{total:.4g}"),
    }


def _samples(conditions: Sequence[Condition], limit: int, *, pictured: bool) -> list[dict[str, Any]]:
    """The samples that are shown, with their own routes under every condition that has them."""
    pictured = pictured and any(condition.rows is not None for condition in conditions)
    rows = _rows(conditions, limit)
    chosen = [
        None if condition.routes is None or indices is None else condition.routes.select(list(indices))
        for condition, indices in zip(conditions, rows, strict=True)
    ]
    labels = next((routes.labels for routes in chosen if routes is not None and routes.labels is not None), None)
    masks = [None if routes is None else [routes.masks[layer] for layer in routes.layers] for routes in chosen]
    return [
        {
            "row": row,
            "label": None if labels is None else int(labels[number]),
            "picture": number if pictured else None,
            "routes": [
                None if layers is None else [mask[number].nonzero().flatten().tolist() for mask in layers]
                for layers in masks
            ],
            "predictions": [
                None if routes is None or routes.predictions is None else int(routes.predictions[number])
                for routes in chosen
            ],
        }
        for number, row in enumerate(next((indices for indices in rows if indices is not None), ()))
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


def _rounded(values: Tensor) -> list[float]:
    """Four digits: enough to draw, and a fraction of the size."""
    return [float(f"{value:.4g}") for value in values.tolist()]
