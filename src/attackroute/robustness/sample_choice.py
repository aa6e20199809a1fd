"""A choice of samples out of a stream, which the order of the stream does not change."""

from __future__ import annotations

import torch
from torch import Tensor

from attackroute.core.draws import image_keys

Candidates = tuple[Tensor, Tensor, Tensor]
"""Hash numbers, images and labels, by hash number."""


class SampleChoice:
    """The samples whose images have the smallest hash numbers, at most ``count``; they alone are held.

    Args:
        count: How many to choose.
        seed: Another seed, another choice.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._parts: Candidates | None = None

    def candidates(self, images: Tensor, labels: Tensor) -> Candidates | None:
        """What of a batch ``(N, ...)``, ``(N,)`` can still be chosen, on the CPU."""
        if not self._count:
            return None
        keys = image_keys(images, self._seed, "sample choice").cpu()
        rows = keys.argsort(stable=True)[: self._count]
        if self._parts is not None and len(self) == self._count:
            rows = rows[keys[rows] < self._parts[0][-1]]
        return (keys[rows], images.cpu()[rows], labels.cpu()[rows]) if len(rows) else None

    def __len__(self) -> int:
        return 0 if self._parts is None else len(self._parts[0])

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Let a batch ``(N, ...)``, ``(N,)`` take part."""
        self.take(self.candidates(images, labels))

    def take(self, new: Candidates | None) -> None:
        """Let the candidates of the next batch take part."""
        if new is None:
            return
        if self._parts is not None:
            keys, held, answers = (torch.cat(pair) for pair in zip(self._parts, new, strict=True))
            new = keys, held, answers
        order = new[0].argsort(stable=True)[: self._count]
        self._parts = new[0][order], new[1][order], new[2][order]

    def samples(self) -> tuple[Tensor, Tensor]:
        """The chosen images and labels on the CPU, by hash number."""
        assert self._parts is not None
        return self._parts[1], self._parts[2]
