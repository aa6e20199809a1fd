"""Training of a classifier that repeats bit for bit and goes on after a kill as if nothing had happened.

Data order, augmentation and dropout of an epoch derive from the seed and the epoch's number, and the learning rate and
an attack's random numbers from the step's, so a checkpoint at an epoch's end needs no generator or schedule state:
weights, momentum, counters and what the objective holds are all there is. An epoch that was cut short is repeated.
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
from torch.utils.data import Dataset, Subset

from attackroute.accuracy import Accuracy, BrokenLogits, count_correct
from attackroute.attacks import Perturbation
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
from attackroute.objectives import Batch, Objective, StepLosses
from attackroute.schedules import learning_rate
from attackroute.train_settings import TrainSettings

__all__ = ["EpochRecord", "TrainResult", "TrainSettings", "fit", "train"]

_TRAIN, _TEST = "training data", "test data"
_DEFAULTS = TrainSettings()


def train(
    model: nn.Module,
    train_data: Dataset[Any],
    test_data: Dataset[Any] | None = None,
    settings: TrainSettings = _DEFAULTS,
    *,
    attack: str | Perturbation | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> TrainResult:
    """Train a classifier in place with cross entropy and stochastic gradient descent.

    With an attack such as ``"pgd:eps=8/255"`` this is adversarial training (Madry et al., 2018): every step learns from
    attacked images alone, which are made from a random start for the network in eval mode.

    On the CPU, the same initial weights, data, settings and thread count give the same weights bit for bit, whatever
    the global random generators hold; these are left as they were, as are the model's ``training`` flags, device and
    memory format.

    Args:
        model: Maps float images (N, C, H, W) in [0, 1] to logits (N, classes). It is trained where it is, in all
            parameters that require a gradient, and holds the last epoch's weights at the end.
        train_data: Gives pairs of a float image (C, H, W) and an integer label.
        test_data: The same; tested after every epoch.
        settings: See :class:`TrainSettings`.
        attack: What to train against, as :func:`attackroute.attacks.parse_attack` reads it; None for clean images.
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
    return fit(
        model, train_data, test_data, settings, Objective(attack),
        folder=folder, resume=resume, on_epoch=on_epoch, progress=progress,
    )  # fmt: skip


def fit(
    model: nn.Module,
    train_data: Dataset[Any],
    test_data: Dataset[Any] | None,
    settings: TrainSettings,
    objective: Objective,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> TrainResult:
    """Train for any objective; for the rest see :func:`train`."""
    if resume and folder is None:
        raise UserError("resume needs the folder of the run; give the folder too")
    run = _Run(model, train_data, test_data, settings, objective, RunFolder(folder) if folder is not None else None)
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
        objective: Objective,
        folder: RunFolder | None,
    ) -> None:
        self.model, self.train_data, self.test_data = model, train_data, test_data
        self.settings, self.objective, self.folder = settings, objective, folder
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
            self.objective.start(self.model, self.train_data, self.settings.seed)
            return
        weights = sum(value.numel() * value.element_size() for value in self.model.state_dict().values())
        files = 2 if self.test_data is None else 3  # last, state with the momentum, best
        checkpoint = self.folder.open(resume=resume, space=2 * files * weights)
        if checkpoint is not None:
            self._restore(checkpoint, self.folder.path)
        else:
            self.objective.start(self.model, self.train_data, self.settings.seed)
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
        losses: list[list[float]] = []
        unread: list[Tensor] = []
        names: list[str] = []
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        rate = settings.lr
        self.objective.begin_epoch(self.model, self.train_data, epoch)
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
            draws = derived_generator(settings.seed, "attack", first + step)
            try:
                step_losses, hits = self._step(*checked(batch, _TRAIN), rate, views, draws)
            except UserError as error:
                if self._finite_weights():
                    raise
                raise self._diverged(epoch, step, f"the weights are no longer finite ({error})") from error
            correct += hits
            names = list(step_losses.penalties)
            unread.append(torch.stack([step_losses.task, *step_losses.penalties.values()]))
            if len(unread) == interval or step == len(batches):
                losses += self._finite(torch.stack(unread).tolist(), epoch, len(losses))
                unread.clear()
            if progress is not None:
                latest = f", loss {losses[-1][0]:.3f}" if losses else ""
                progress(first + step, total, f"epoch {epoch}/{settings.epochs}{latest}")
        self._check_weights(epoch)
        loss, *penalties = (
            math.fsum(value * len(batch) for value, batch in zip(column, batches, strict=True)) / self.samples
            for column in zip(*losses, strict=True)
        )
        hits_in_all = Accuracy(int(correct), self.samples)
        test, robust = self._test(epoch), self._test(epoch, self.objective.attack) if self.objective.attack else None
        seconds = time.perf_counter() - started
        return EpochRecord(
            epoch, loss, hits_in_all, test, rate, seconds, robust, dict(zip(names, penalties, strict=True))
        )

    def _step(
        self, images: Tensor, labels: Tensor, rate: float, views: torch.Generator, draws: torch.Generator
    ) -> tuple[StepLosses, Tensor]:
        images = augment(images.to(self.device, self.dtype, non_blocking=True), self.settings.augment, views)
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        targets = labels.to(self.device, non_blocking=True)
        losses = self.objective.losses(self.model, Batch(images, labels, targets, draws, self._autocast))
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(losses.total).backward()  # type: ignore[no-untyped-call]
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.trainable.values(), self.settings.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return losses, (losses.logits.argmax(1) == targets).sum()

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.amp is None else torch.autocast(self.device.type, dtype=self.amp)

    def _test(self, epoch: int, attack: Perturbation | None = None) -> Accuracy | None:
        if self.test_data is None:
            return None
        data = self.test_data if attack is None else self._robust_data(self.test_data)
        try:
            with self._autocast():
                return count_correct(self.model, data, workers=self.settings.workers, attack=attack)
        except BrokenLogits as error:  # weights can be finite and yet too large
            raise self._diverged(epoch, self.steps, f"the logits for the {_TEST} are NaN") from error

    def _robust_data(self, data: Dataset[Any]) -> Dataset[Any]:
        """The test images that are attacked, the same after every epoch."""
        samples = count_samples(data, _TEST)
        order = torch.randperm(samples, generator=derived_generator(self.settings.seed, "robust", 0))
        return Subset(data, order[: self.settings.robust_samples].sort().values.tolist())

    def _finite(self, losses: list[list[float]], epoch: int, done: int) -> list[list[float]]:
        for step, values in enumerate(losses, start=done + 1):
            for name, value in zip(("loss", *("penalty",) * len(values)), values, strict=False):
                if not math.isfinite(value):
                    raise self._diverged(epoch, step, f"the {name} is {value}")
        return losses

    def _finite_weights(self) -> bool:
        return all(bool(value.isfinite().all()) for value in self.model.parameters())

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
            **self.objective.terms,
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
            "objective": self.objective.state(),
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
        self.objective.restore(self.model, self.train_data, checkpoint.state["objective"])

    def _write_log(self, folder: RunFolder) -> None:
        folder.write_text(LOG, "".join(log_line(record) + "\n" for record in self.history))


def _check_terms(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    for name in dict.fromkeys([*wanted, *stored]):
        value = wanted.get(name)
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
