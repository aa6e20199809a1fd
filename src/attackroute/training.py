"""Plain training of a classifier that repeats bit for bit and goes on after a kill as if nothing had happened.

Data order, augmentation and dropout of an epoch derive from the seed and the epoch's number, and the learning rate
from the step's, so a checkpoint at an epoch's end needs no generator or schedule state: weights, momentum and counters
are all there is. An epoch that was cut short is repeated.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from attackroute.accuracy import Accuracy, BrokenLogits, count_correct
from attackroute.augmentation import augment
from attackroute.batches import (
    check_logits,
    checked,
    count_samples,
    count_steps,
    derived_generator,
    derived_seed,
    load,
    placement,
    shuffled,
)
from attackroute.checkpoints import LOG, SETTINGS, Checkpoint, RunFolder
from attackroute.errors import UserError
from attackroute.history import EpochRecord, TrainResult, best_epoch, from_plain, log_line, to_plain
from attackroute.interruption import terminated_as_interrupted
from attackroute.modes import in_channels_last, kept_modes
from attackroute.schedules import learning_rate
from attackroute.train_settings import TrainSettings

__all__ = ["EpochRecord", "TrainResult", "TrainSettings", "train"]

_TRAIN, _TEST = "training data", "test data"
_DEFAULTS = TrainSettings()


def train(
    model: nn.Module,
    train_data: Dataset[Any],
    test_data: Dataset[Any] | None = None,
    settings: TrainSettings = _DEFAULTS,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> TrainResult:
    """Train a classifier in place with cross entropy and stochastic gradient descent.

    On the CPU, the same initial weights, data, settings and thread count give the same weights bit for bit, whatever
    the global random generators hold; these are left as they were, as are the model's ``training`` flags, device and
    memory format.

    Args:
        model: Maps float images (N, C, H, W) in [0, 1] to logits (N, classes). It is trained where it is, in all
            parameters that require a gradient, and holds the last epoch's weights at the end.
        train_data: Gives pairs of a float image (C, H, W) and an integer label.
        test_data: The same; tested after every epoch.
        settings: See :class:`TrainSettings`.
        folder: Where a checkpoint is kept from before the first step on; see :mod:`attackroute.checkpoints` for its
            files. None keeps nothing.
        resume: Go on with the run in the folder, to the result of a run that was never broken off. An empty folder
            starts one, so the same command can be repeated until it is done.
        on_epoch: Called after every epoch, when its checkpoint is on disk.
        progress: Called after every step with the steps done, the steps in all and a message.

    Returns:
        The run's history.

    Raises:
        UserError: Malformed data or labels outside the logits, a folder that cannot be used, a run with other
            settings in it, or a loss or weights that are no longer finite.
        KeyboardInterrupt: On SIGINT, and in the main thread also on SIGTERM. The folder keeps the last whole epoch.
    """
    if resume and folder is None:
        raise UserError("resume needs the folder of the run; give the folder too")
    run = _Run(model, train_data, test_data, settings, RunFolder(folder) if folder is not None else None)
    with ExitStack() as stack:
        stack.enter_context(terminated_as_interrupted())
        stack.enter_context(kept_modes(model))
        stack.enter_context(torch.random.fork_rng([run.device] if run.device.type == "cuda" else []))
        if settings.channels_last:
            stack.enter_context(in_channels_last(model))
        run.check_fit()
        run.open(resume)
        resumed_from = len(run.history)
        for epoch in range(resumed_from + 1, settings.epochs + 1):
            record = run.epoch(epoch, progress)
            run.save(record)
            if on_epoch is not None:
                on_epoch(record)
    return TrainResult(tuple(run.history), resumed_from, Path(folder) if folder is not None else None)


class _Run:
    """The moving parts of one run around the caller's model: optimiser, loss scale and history."""

    def __init__(
        self,
        model: nn.Module,
        train_data: Dataset[Any],
        test_data: Dataset[Any] | None,
        settings: TrainSettings,
        folder: RunFolder | None,
    ) -> None:
        self.model, self.train_data, self.test_data = model, train_data, test_data
        self.settings, self.folder = settings, folder
        self.samples = count_samples(train_data, _TRAIN)
        self.steps = count_steps(self.samples, settings.batch_size)
        self.device, self.dtype = placement(model)
        self.trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._check_model()
        self.optimiser = torch.optim.SGD(
            self.trainable.values(),
            settings.lr,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=settings.weight_decay,
        )
        self.amp = _autocast_type(self.device) if settings.amp else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.history: list[EpochRecord] = []

    def _check_model(self) -> None:
        if not self.trainable:
            raise UserError("the model has no parameter that requires a gradient, so there is nothing to train")
        if self.dtype not in (torch.float32, torch.float64):
            raise UserError(f"the model is in {self.dtype}; train it in float32, with amp for speed")
        for name, value in self.model.state_dict().items():
            if not isinstance(value, Tensor):
                raise UserError(f"the model's state {name} is not a tensor, so no checkpoint can hold it")

    def check_fit(self) -> None:
        """Try the first sample of every data set, so that most misfits show before anything is written."""
        for data, what in ((self.train_data, _TRAIN), (self.test_data, _TEST)):
            if data is None:
                continue
            count_samples(data, what)
            (batch,) = load(data, [[0]], generator=torch.Generator())
            images, labels = checked(batch, what)
            self.model.eval()
            try:
                with torch.no_grad():
                    logits = self.model(images.to(self.device, self.dtype))
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise UserError(f"the model does not take the {what}'s {tuple(images.shape[1:])}: {reason}") from error
            check_logits(logits, labels, what)

    def open(self, resume: bool) -> None:
        """Go on from the folder's checkpoint or put the initial one there."""
        if self.folder is None:
            return
        weights = sum(value.numel() * value.element_size() for value in self.model.state_dict().values())
        files = 2 if self.test_data is None else 3  # last, state with the momentum, best
        checkpoint = self.folder.open(resume=resume, space=2 * files * weights)
        if checkpoint is not None:
            self._restore(checkpoint, self.folder.path)
        else:
            self.folder.save(self._checkpoint(), best=False)
        self.folder.write_text(SETTINGS, json.dumps(self._terms(), indent=2) + "\n")
        self._write_log(self.folder)

    def save(self, record: EpochRecord) -> None:
        """Add an epoch to the history and put its checkpoint on disk."""
        self.history.append(record)
        if self.folder is not None:
            self.folder.save(self._checkpoint(), best=best_epoch(self.history) is record)
            self._write_log(self.folder)

    def epoch(self, epoch: int, progress: Callable[[int, int, str], None] | None) -> EpochRecord:
        """Train for one epoch and test."""
        started = time.perf_counter()
        settings = self.settings
        first, total = (epoch - 1) * self.steps, settings.epochs * self.steps
        _seed_device(self.device, derived_seed(settings.seed, "model", epoch))
        views = derived_generator(settings.seed, "augment", epoch)
        batches = shuffled(self.samples, settings.batch_size, settings.seed, epoch)
        interval = _loss_interval(self.device)
        losses: list[float] = []
        unread: list[Tensor] = []
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        rate = settings.lr
        self.model.train()
        loader = load(
            self.train_data,
            batches,
            generator=derived_generator(settings.seed, "workers", epoch),
            workers=settings.workers,
            pin_memory=self.device.type == "cuda",
        )
        for step, batch in enumerate(loader, start=1):
            rate = learning_rate(settings.schedule, settings.lr, first + step - 1, total)
            loss, hits = self._step(*checked(batch, _TRAIN), rate, views)
            correct += hits
            unread.append(loss)
            if len(unread) == interval or step == len(batches):
                losses += self._finite(torch.stack(unread).tolist(), epoch, len(losses))
                unread.clear()
            if progress is not None:
                latest = f", loss {losses[-1]:.3f}" if losses else ""
                progress(first + step, total, f"epoch {epoch}/{settings.epochs}{latest}")
        self._check_weights(epoch)
        mean = math.fsum(loss * len(batch) for loss, batch in zip(losses, batches, strict=True)) / self.samples
        hits_in_all = Accuracy(int(correct), self.samples)
        return EpochRecord(epoch, mean, hits_in_all, self._test(epoch), rate, time.perf_counter() - started)

    def _step(self, images: Tensor, labels: Tensor, rate: float, views: torch.Generator) -> tuple[Tensor, Tensor]:
        images = augment(images.to(self.device, self.dtype, non_blocking=True), self.settings.augment, views)
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            logits = self.model(images)
        check_logits(logits, labels, _TRAIN)
        targets = labels.to(self.device, non_blocking=True)
        loss = functional.cross_entropy(logits.to(self.dtype), targets)
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.trainable.values(), self.settings.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return loss.detach(), (logits.detach().argmax(1) == targets).sum()

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.amp is None else torch.autocast(self.device.type, dtype=self.amp)

    def _test(self, epoch: int) -> Accuracy | None:
        if self.test_data is None:
            return None
        try:
            with self._autocast():
                return count_correct(self.model, self.test_data, workers=self.settings.workers)
        except BrokenLogits as error:  # weights can be finite and yet too large
            raise self._diverged(epoch, self.steps, f"the logits for the {_TEST} are NaN") from error

    def _finite(self, losses: list[float], epoch: int, done: int) -> list[float]:
        for step, loss in enumerate(losses, start=done + 1):
            if not math.isfinite(loss):
                raise self._diverged(epoch, step, f"the loss is {loss}")
        return losses

    def _check_weights(self, epoch: int) -> None:
        """The last step can spoil the weights after the last loss was looked at."""
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise self._diverged(epoch, self.steps, f"the weights in {name} are no longer finite")

    def _diverged(self, epoch: int, step: int, what: str) -> UserError:
        kept = f"; {self.folder.path} keeps epoch {len(self.history)}" if self.folder is not None else ""
        return UserError(
            f"epoch {epoch}, step {step}: {what}; check the images, lower lr (now {self.settings.lr}) "
            f"or set clip_norm{kept}"
        )

    def _terms(self) -> dict[str, Any]:
        """All that must be the same for a run to go on."""
        return {
            **asdict(self.settings),
            "train_samples": self.samples,
            "test_samples": None if self.test_data is None else count_samples(self.test_data, _TEST),
            "trainable": list(self.trainable),
        }

    def _checkpoint(self) -> Checkpoint:
        state = {
            "terms": self._terms(),
            "epoch": len(self.history),
            "step": len(self.history) * self.steps,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": [to_plain(record) for record in self.history],
        }
        return Checkpoint(self.model.state_dict(), state)

    def _restore(self, checkpoint: Checkpoint, path: Path) -> None:
        _check_terms(checkpoint.state["terms"], self._terms(), path)
        _check_weights_fit(checkpoint.weights, self.model.state_dict(), path)
        self.model.load_state_dict(dict(checkpoint.weights))
        self.optimiser.load_state_dict(checkpoint.state["optimiser"])
        if checkpoint.state["scaler"]:  # empty where the loss was not scaled
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.history = [from_plain(stored) for stored in checkpoint.state["history"]]

    def _write_log(self, folder: RunFolder) -> None:
        folder.write_text(LOG, "".join(log_line(record) + "\n" for record in self.history))


def _check_terms(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    for name, value in wanted.items():
        if stored.get(name) == value:
            continue
        if name == "trainable":
            raise UserError(f"the run in {path} trains other parameters of the model; choose another folder")
        raise UserError(
            f"the run in {path} has {name} {stored.get(name)!r}, not {value!r}; "
            "give the same value to resume it, or choose another folder"
        )


def _check_weights_fit(stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    for name in [*wanted, *stored]:
        kinds = [
            f"{tuple(side[name].shape)} {side[name].dtype}" if name in side else "missing" for side in (stored, wanted)
        ]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"the run in {path} is of another model: {name} is {kinds[0]} there and {kinds[1]} here; "
                "give the same model or choose another folder"
            )


def _loss_interval(device: torch.device) -> int:
    """Steps between looks at the loss; on an accelerator, each look waits for it."""
    return 1 if device.type == "cpu" else 50


def _autocast_type(device: torch.device) -> torch.dtype | None:
    if not torch.amp.is_autocast_available(device.type):
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def _seed_device(device: torch.device, seed: int) -> None:
    """Seed the generators that dropout draws from, and no other device's."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
