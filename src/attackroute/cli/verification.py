"""Saved adversarial examples, checked with the networks that the command line names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from attackroute.core.table import Table
from attackroute.robustness.examples import example_shape, verify_examples
from attackroute.zoo.data import ImageData
from attackroute.zoo.weights import find_card, open_network


def verify_with(
    path: Path,
    models: Sequence[str],
    weights: Sequence[Path | None],
    width: float | None,
    classes: int | None,
    device: torch.device,
) -> Table:
    """Build the networks for the examples' images, and check the examples.

    Args:
        path: A file of examples, or a folder.
        models: Values of ``--model``.
        weights: A file for each model, or None.
        width: Factor on a built-in network's channels.
        classes: Number of logits; None takes that of the examples.
        device: Where the networks run.

    Raises:
        UserError: There are no examples, none can be read, or a network cannot be opened or did not make them.
    """
    shape, logits = example_shape(path)
    networks = []
    for name, file in zip(models, weights, strict=True):
        card = find_card(name)
        labels = tuple(map(str, range(logits))) if card is None else card[1].classes
        images = ImageData(TensorDataset(torch.empty(0, *shape)), labels, shape, "examples", "test")  # type: ignore[arg-type]
        networks.append(open_network(name, images, weights=file, width=width, classes=classes).to(device))
    return verify_examples(path, networks)
