"""An epoch of training that is under way, so that a run can go on in the middle of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class RandomStates:
    """Where the generators stand that an epoch draws from.

    Attributes:
        views: That of the augmentation.
        host: PyTorch's on the CPU, for dropout and for data that draw from it.
        device: The GPU's; None elsewhere.
    """

    views: Tensor
    host: Tensor
    device: Tensor | None

    @classmethod
    def read(cls, views: torch.Generator, device: torch.device) -> RandomStates:
        """Look at the generators."""
        on_gpu = device.type == "cuda"
        return cls(views.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None)

    def write(self, views: torch.Generator, device: torch.device) -> None:
        """Put the generators back."""
        views.set_state(self.views)
        torch.set_rng_state(self.host)
        if self.device is not None and device.type == "cuda":  # else the run goes on elsewhere
            torch.cuda.set_rng_state(self.device, device)


@dataclass
class PartialEpoch:
    """What is known after some steps of an epoch.

    Attributes:
        random: The generators after the last step.
        others: Those of the other processes, if several train together.
        step: Steps that were taken.
        losses: For each of them, the cross entropy and then each penalty.
        names: Of the penalties.
        correct: Samples that were classified correctly.
        seconds: That they took.
    """

    random: RandomStates
    others: list[RandomStates] = field(default_factory=list)
    step: int = 0
    losses: list[list[float]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    correct: int = 0
    seconds: float = 0.0

    def means(self, sizes: Sequence[int]) -> list[float]:
        """Mean over the samples of every loss, for batches of these sizes."""
        return [
            math.fsum(value * size for value, size in zip(column, sizes, strict=True)) / sum(sizes)
            for column in zip(*self.losses, strict=True)
        ]

    def to_plain(self) -> dict[str, Any]:
        """Tensors and numbers in nested dicts, for :meth:`from_plain`."""
        return asdict(self)

    @classmethod
    def from_plain(cls, stored: Mapping[str, Any]) -> PartialEpoch:
        """What :meth:`to_plain` took apart."""
        others = [RandomStates(**states) for states in stored["others"]]
        return cls(**{**stored, "random": RandomStates(**stored["random"]), "others": others})

    def seen_by(self, rank: int) -> PartialEpoch:
        """The same for the process of that rank, with its own generators."""
        if rank == 0 or not self.others:
            return self
        return replace(self, random=self.others[rank - 1], others=[])
