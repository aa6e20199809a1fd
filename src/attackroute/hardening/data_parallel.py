"""Copies of a model that several processes train together, each on its part of every batch.

Each process has the gradient of its part; before the step all get the gradient of the whole batch, the mean of the
parts' weighted by size. It is averaged once a step, when everything has been differentiated, and not as
``DistributedDataParallel`` does while a backward pass runs: the gradient penalty differentiates twice, adversarial
training runs the model in between, and several forward passes belong to one step. All of them see the plain model, and
no gradient can stay behind.

Batch normalisation takes its statistics over each process's part, as under ``DistributedDataParallel``. The running
means and variances are averaged, weighted by size, after every step. (``SyncBatchNorm`` has no second derivative and
does not run on a CPU.) Other buffers become those of the first process at the end of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from attackroute.core.distributed import Processes
from attackroute.core.errors import UserError


class Replicas:
    """A model's copies in the processes of a team, seen from one of them, whose copy it is.

    Each process is to have a part of every batch, the smallest of which has ``least`` images; an error if it cannot.
    """

    def __init__(self, model: nn.Module, trainable: Sequence[nn.Parameter], team: Processes, least: int) -> None:
        if least < team.count:
            raise UserError(
                f"{team.count} processes share batches of {least} images; take larger batches or fewer processes"
            )
        self._model, self._parameters, self._team = model, trainable, team

    def rows(self, batch_size: int) -> slice:
        """This process's part of a batch; parts differ in size by one at most."""
        rank, count = self._team.rank, self._team.count
        return slice(batch_size * rank // count, batch_size * (rank + 1) // count)

    def combine(self, share: float, means: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Replace gradients and running statistics by those of the whole batch.

        This process's part of it is ``share``, in (0, 1]. Numbers that are ``means`` over the part become those over
        the whole batch, and ``sums`` those over all processes.

        Raises:
            LostProcessError: A process is gone; the gradients are then as they were.
        """
        present = [parameter.grad is not None for parameter in self._parameters]
        averaged = [
            *(torch.zeros_like(item) if item.grad is None else item.grad for item in self._parameters),
            *self._statistics(),
            means,
        ]
        added = [torch.tensor(present, device=means.device), sums]
        dtype = max((item.dtype for item in averaged), key=lambda kind: torch.finfo(kind).bits)
        flat = torch.cat([item.detach().flatten().to(dtype) for item in [*averaged, *added]])
        sizes = [item.numel() for item in [*averaged, *added]]
        flat[: sum(sizes[: len(averaged)])] *= share
        self._team.sum_(flat)
        *averages, counts, totals = flat.split(sizes)
        for parameter, average, count in zip(self._parameters, averages, counts.tolist(), strict=False):
            if count:  # one without a gradient anywhere keeps none, and is not decayed
                parameter.grad = average.view_as(parameter).to(parameter.dtype)
        for buffer, average in zip(self._statistics(), averages[len(self._parameters) :], strict=False):
            buffer.copy_(average.view_as(buffer))
        return averages[-1].to(means.dtype), totals

    def _statistics(self) -> Iterator[Tensor]:
        """Running means and variances that the last forward pass moved."""
        for module in self._model.modules():
            for name in ("running_mean", "running_var"):
                buffer = getattr(module, name, None)
                if module.training and isinstance(buffer, Tensor):
                    yield buffer
