"""Training by several processes: the gradient of the whole batch, copies that stay equal, runs that can be resumed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import attackroute as ar
from attackroute.core.batches import shuffled
from attackroute.core.distributed import Processes
from attackroute.core.errors import UserError
from attackroute.core.model_state import weights_digest
from attackroute.core.statistics import Accuracy, count_correct
from attackroute.hardening.settings import TrainSettings

SAMPLES = 23  # batches of 8, 8 and 7
TOLERANCE = 1e-12


def pictures(count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64), torch.arange(count) % 3


def pairs() -> TensorDataset:
    return TensorDataset(*pictures())


def network(team: Processes, *, norm: bool = False, dropout: bool = False) -> nn.Module:
    """A small network, with other weights in each process, which are to take those of the first."""
    torch.manual_seed(team.rank)
    layers: list[nn.Module] = [nn.Conv2d(3, 6, 3, padding=1)]
    layers += [nn.BatchNorm2d(6)] if norm else []
    layers += [nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2)]
    layers += [nn.BatchNorm2d(5)] if norm else []
    layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers += [nn.Dropout(0.3)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(5, 3)).double()


def settings(**more: Any) -> TrainSettings:
    return TrainSettings(**{"epochs": 2, "batch_size": 8, "lr": 0.05, **more})


def folder_of(root: Path, team: Processes) -> Path:
    """The folder that a process names for its results, each one of its own; no process but the first is to write."""
    return root / (str(team.count) if team.leads else f"{team.count}-of-process-{team.rank}")


Run = Callable[[nn.Module, Path], Any]
RUNS: dict[str, Run] = {
    "plain": lambda model, folder: ar.train(
        model, pairs(), pairs(), settings(augment="crop-flip", accumulate=2, clip_norm=0.5), folder=folder
    ),
    "adversarial": lambda model, folder: ar.train(
        model, pairs(), pairs(), settings(), attack="pgd:eps=0.1,steps=2", folder=folder
    ),
    "hardened": lambda model, folder: ar.harden(
        model, pictures(), pictures(), penalty=("gradient", "weight"), lam=0.1, attack="pgd:eps=0.05,steps=2",
        settings=ar.HardenSettings(route_samples=0.5, refresh=1), train=settings(), folder=folder,
    ),
}  # fmt: skip
"""Runs of networks whose samples do not meet; they come out alike, but for rounding, whoever shares them."""


def require_equal(team: Processes, model: nn.Module) -> None:
    assert len(set(team.all(weights_digest(model)))) == 1, "copies differ"


def check_gradients(root: Path, team: Processes) -> None:
    """What each run came to goes into a file, for comparison."""
    for name, run in RUNS.items():
        model = network(team)
        result = run(model, folder_of(root, team) / f"run-{name}")
        require_equal(team, model)
        history = getattr(result, "training", result).history
        numbers = [
            [record.loss, record.train.value, record.test.value, *record.penalties.values()] for record in history
        ]
        assert len(set(map(str, team.all(numbers)))) == 1
        outcome = {**model.state_dict(), "history": torch.tensor(numbers, dtype=torch.float64)}
        if team.leads:
            save_file(outcome, folder_of(root, team) / f"weights-{name}.safetensors")
    assert count_correct(model, pairs()) == team.first(lambda: alone(model))


def alone(model: nn.Module) -> object:
    images, labels = pictures()
    with torch.no_grad():
        return Accuracy(int((model.eval()(images).argmax(1) == labels).sum()), SAMPLES)


def check_batch_norms(root: Path, team: Processes) -> None:
    """After one step, running statistics are the means, by size, of what each part's would have been."""
    images, labels = pictures(7)
    data = TensorDataset(images, labels)
    model = network(team, norm=True)
    expected: dict[str, Tensor] = {}
    start = team.first(lambda: {name: value.clone() for name, value in model.state_dict().items()})
    order = shuffled(7, 7, 0, 1)[0]
    bounds = [7 * rank // team.count for rank in range(team.count + 1)]
    for first, last in itertools.pairwise(bounds):
        part = network(team, norm=True).train()
        part.load_state_dict(start)
        part(images[order[first:last]])
        for name, value in part.named_buffers():
            if "running" in name:
                expected[name] = expected.get(name, 0) + value * (last - first) / 7
    ar.train(model, data, None, settings(epochs=1, batch_size=7))
    require_equal(team, model)
    for name, value in expected.items():
        assert torch.allclose(model.get_buffer(name), value, rtol=1e-12, atol=0), name
    assert not torch.equal(model.get_parameter("0.weight"), start["0.weight"])


def check_mixed_precision(root: Path, team: Processes) -> None:
    """Under autocast copies stay equal, too, and they learn."""
    model = network(team).float()
    start = team.first(lambda: {name: value.clone() for name, value in model.state_dict().items()})
    ar.train(model, pairs(), None, settings(epochs=1, amp=True))
    require_equal(team, model)
    assert not torch.equal(model.get_parameter("0.weight"), start["0.weight"])


def check_resuming(root: Path, team: Processes) -> None:
    """A run that is broken off goes on as if it had not been, whichever epoch was under way."""

    def run(folder: Path, *, stop: int | None = None, resume: bool = False) -> nn.Module:
        model = network(team, norm=True, dropout=True)

        def progress(done: int, _total: int, _message: str) -> None:
            if done == stop:
                raise KeyboardInterrupt

        try:
            ar.train(model, pairs(), None, settings(), folder=folder, resume=resume, progress=progress)
        except KeyboardInterrupt:
            assert stop is not None
        else:
            assert stop is None
        return model

    whole = run(folder_of(root, team) / "whole")
    for stop in (1, 4):  # in the first epoch, and after it
        folder = folder_of(root, team) / f"stopped-{stop}"
        run(folder, stop=stop)
        model = run(folder, resume=True)
        require_equal(team, model)
        assert weights_digest(model) == weights_digest(whole), stop


def check_number(root: Path, team: Processes) -> None:
    """More processes than images cannot begin a run."""
    if team.count > 1:
        with pytest.raises(UserError, match="take larger batches or fewer processes"):
            ar.train(network(team), pairs(), None, settings(batch_size=1))


CHECKS = (check_gradients, check_batch_norms, check_mixed_precision, check_resuming, check_number)
