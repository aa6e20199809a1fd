"""A small network that gets many of a few digits right, in a folder, for tests of commands."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from attackroute.zoo.data import load_data
from attackroute.zoo.networks import build
from attackroute.zoo.weights import ModelCard, spec_for

SAMPLES = 24


def digit_network(folder: Path, *, width: float, steps: int) -> dict[str, Tensor]:
    """Train a network on the digits, write its ``model.json``, and give its weights."""
    digits = load_data("mnist-sample", samples=SAMPLES)
    torch.manual_seed(0)
    spec = spec_for("vgg_small", digits, width=width)
    network = build(spec)
    images, labels = map(torch.stack, zip(*((x, torch.tensor(y)) for x, y in digits.dataset), strict=True))
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        optimiser.step()
    folder.mkdir(exist_ok=True)
    ModelCard(spec, digits.classes).save(folder)
    return network.state_dict()
