"""Routes made from random scores, and loading that must fail, for the tests of routes and of their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from attackroute.core.errors import UserError
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.masks import top_k
from attackroute.routes.provenance import Provenance
from attackroute.routes.route import Route

CHANNELS = {"features.0": 5, "features.3": 8, "classifier#2": 1, "features.8": 19}
ORIGIN = Provenance(samples=12, width=0.4, model="vgg16", data="cifar10", attack="PGD (ε = 8/255)", seed=7)


def instances(
    samples: int = 12,
    channels: Mapping[str, int] = CHANNELS,
    *,
    width: float = 0.4,
    seed: int = 0,
    labelled: bool = True,
    keep_scores: bool = False,
    provenance: Provenance | None = None,
) -> InstanceRoutes:
    """Instance routes along a chain of layers, labels counting modulo three."""
    generator = torch.Generator().manual_seed(seed)
    scores = {layer: torch.rand(samples, count, generator=generator) for layer, count in channels.items()}
    masks = {layer: top_k(values, width) for layer, values in scores.items()}
    labels = torch.arange(samples) % 3 if labelled else None
    predictions = (torch.arange(samples) + 1) % 3 if labelled else None
    return InstanceRoutes.from_masks(
        masks,
        replace(provenance or Provenance(samples, width), samples=samples, width=width),
        labels=labels,
        predictions=predictions,
        methods={edge: "closed-form" for edge in pairwise(channels)},
        scores=scores if keep_scores else None,
    )


SAMPLES: dict[str, tuple[Any, Callable[[], Any]]] = {
    "route": (Route, lambda: instances(provenance=ORIGIN).aggregate(0.3)),
    "instances": (InstanceRoutes, lambda: instances(provenance=ORIGIN, keep_scores=True)),
}
"""For both kinds of file, the class that loads it and something to save."""


def refused(kind: Any, path: str | Path, message: str | None = None, **options: Any) -> str:
    """Load, which must fail with one line that begins with the path; returns the line."""
    with pytest.raises(UserError, match=message) as caught:
        kind.load(path, **options)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return line
