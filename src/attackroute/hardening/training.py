"""Training of a classifier that repeats bit for bit and goes on after a kill as if nothing had happened.

Data order, augmentation and dropout of an epoch derive from the seed and the epoch's number, and the learning rate and
an attack's random numbers from the step's, so a checkpoint at an epoch's end needs no generator or schedule state:
weights, momentum, counters and what the objective holds are all there is. Within an epoch, which is saved every ten
minutes and when it is interrupted, the generators' states join them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from attackroute.core.accuracy import Accuracy, BrokenLogits, count_correct
from attackroute.core.batches import count_samples, count_steps, derived_generator, derived_seed, load, shuffled
from attackroute.core.checks import check_logits, checked
from attackroute.core.distributed import current
from attackroute.core.errors import UserError
from attackroute.core.interruption import HeldSignals, terminated_as_interrupted
from attackroute.core.model_state import in_channels_last, kept_modes, placement
from attackroute.hardening.augmentation import augment
from attackroute.hardening.checkpoint import LOG, SETTINGS, Checkpoint, RunFolder
from attackroute.hardening.data_parallel import Replicas, take_from_first
from attackroute.hardening.devices import autocast_type, loss_interval, seed_device
from attackroute.hardening.history import EpochRecord, TrainResult, best_epoch, from_plain, log_line, to_plain
from attackroute.hardening.objective import Batch, Objective, backward_in_parts
from attackroute.hardening.partial_epoch import PartialEpoch, RandomStates
from attackroute.hardening.schedules import learning_rate
from attackroute.hardening.settings import TrainSettings
from attackroute.robustness.contract import Perturbation

__all__ = ["EpochRecord", "TrainResult", "TrainSettings", "fit", "train"]


_TRAIN, _TEST = "training data", "test data"


_DEFAULTS = TrainSettings()


_SAVE_SECONDS = 600.0


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
        KeyboardInterrupt: On SIGINT, and in the main thread also on SIGTERM, after the step that is under way; the
            folder keeps all steps. A second one does not wait, and the folder keeps what was saved before.
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
        stack.enter_context(run.signals)
        stack.enter_context(kept_modes(model))
        stack.enter_context(torch.random.fork_rng([run.device] if run.device.type == "cuda" else []))
        if settings.channels_last:
            stack.enter_context(in_channels_last(model))
        # several processes stop together, where they have agreed to
        stack.enter_context(run.signals.held() if run.team.count > 1 else nullcontext())
        run.check_fit()
        run.open(resume)
        resumed_from = len(run.history)
        for epoch in range(resumed_from + 1, settings.epochs + 1):
            record = run.epoch(epoch, progress)
            with run.undisturbed():
                run.save(record)
            if on_epoch is not None:
                on_epoch(record)
            run.stop_together()
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
        self.team = current()
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
        self.replicas = Replicas(model, self.trainable, self.team)
        self.replicas.check(self.samples // self.steps)
        self.amp = autocast_type(self.device) if settings.amp else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp is torch.float16)
        self.history: list[EpochRecord] = []
        self.partial: PartialEpoch | None = None
        self.unread: list[tuple[Tensor, Tensor, Tensor]] = []
        self.torn = False
        self.agreed = [0, 0]  # how many processes want to stop, and to save
        self.started = 0.0
        self.signals = HeldSignals()

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
        weights = sum(value.numel() * value.element_size() for value in self.model.state_dict().values())
        files = 2 if self.test_data is None else 3  # last, state with the momentum, best
        folder = self.folder
        checkpoint = self.team.first(
            lambda: None if folder is None else folder.open(resume=resume, space=2 * files * weights)
        )
        if checkpoint is not None and folder is not None:
            self._restore(checkpoint, folder.path)
        else:
            take_from_first(self.model, self.team)
            self.objective.start(self.model, self.train_data, self.settings.seed)
        if folder is not None and self.team.leads:
            if checkpoint is None:
                folder.save(self._checkpoint(), best=False)
            folder.write_text(SETTINGS, json.dumps(self._terms(), indent=2) + "\n")
            self._write_log(folder)

    def save(self, record: EpochRecord) -> None:
        """Add an epoch to the history and put its checkpoint on disk."""
        self.history.append(record)
        self.partial = None
        if self.folder is not None and self.team.leads:
            self.folder.save(self._checkpoint(), best=best_epoch(self.history) is record)
            self._write_log(self.folder)

    def epoch(self, epoch: int, progress: Callable[[int, int, str], None] | None) -> EpochRecord:
        """Train for one epoch and test; an interruption leaves a checkpoint of the steps that were taken."""
        settings = self.settings
        self.started = time.perf_counter()
        views = derived_generator(settings.seed, "augment", epoch)
        if self.partial is None:
            purpose = "model" if self.team.leads else f"model/{self.team.rank}"  # dropout, other in each process
            seed_device(self.device, derived_seed(settings.seed, purpose, epoch))
            self.objective.begin_epoch(self.model, self.train_data, epoch)
            self.partial = PartialEpoch(RandomStates.read(views, self.device))
        batches = shuffled(self.samples, settings.batch_size, settings.seed, epoch)
        try:
            self._learn(self.partial, batches, views, epoch, progress)
            self.stop_together()
            take_from_first(self.model, self.team, buffers_alone=True)
            return self._finished(self.partial, batches, epoch)
        except KeyboardInterrupt:
            self._save_partial(epoch)
            raise

    def undisturbed(self) -> AbstractContextManager[None]:
        """Context at whose end signals are handled; several processes hold them back longer."""
        return self.signals.held() if self.team.count == 1 else nullcontext()

    def stop_together(self) -> None:
        """Let all of several processes stop here, if one of them was told to.

        Raises:
            KeyboardInterrupt: One was.
        """
        if self.team.count > 1 and any(self.team.all(self.signals.waiting)):
            raise KeyboardInterrupt("several processes stop together")

    def _learn(
        self,
        part: PartialEpoch,
        batches: list[list[int]],
        views: torch.Generator,
        epoch: int,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        """Take the epoch's steps that are left."""
        settings, saved = self.settings, time.monotonic()
        first, total = (epoch - 1) * self.steps, settings.epochs * self.steps
        interval = loss_interval(self.device)
        self.model.train()
        # workers have random states of their own, which only replaying brings back
        skipped = part.step if settings.workers == 0 else 0
        replayed = part.step - skipped
        loader = load(
            self.train_data,
            [batch[self.replicas.rows(len(batch))] for batch in batches[skipped:]],
            generator=derived_generator(settings.seed, "workers", epoch),
            workers=settings.workers,
            pin_memory=self.device.type == "cuda",
        )
        part.random.write(views, self.device)
        for batch in itertools.islice(loader, replayed, None):
            number = first + part.step
            rate = learning_rate(settings.schedule, settings.lr, number, total)
            draws = derived_generator(settings.seed, "attack", number + 1)
            due = time.monotonic() - saved > _SAVE_SECONDS and part.step + 1 < len(batches)
            with self.undisturbed():
                self.torn = True
                wanted = torch.tensor([self.signals.waiting, due and self.team.leads])
                try:
                    names, losses, hits, wanted = self._step(
                        *checked(batch, _TRAIN), len(batches[part.step]), rate, views, draws, wanted
                    )
                except UserError as error:
                    if self._finite_weights():
                        raise
                    reason = f"the weights are no longer finite ({error})"
                    raise self._diverged(epoch, part.step + 1, reason) from error
                part.names = names
                self.unread.append((losses, hits, wanted))
                part.step += 1
                part.random = RandomStates.read(views, self.device)
                self.torn = False
            if len(self.unread) == interval or part.step == len(batches):
                self._read_losses(part, epoch)
            if progress is not None:
                latest = f", loss {part.losses[-1][0]:.3f}" if part.losses else ""
                progress(first + part.step, total, f"epoch {epoch}/{settings.epochs}{latest}")
            stop, save = self.agreed
            if stop and self.team.count > 1:
                raise KeyboardInterrupt("several processes stop together")
            if save and part.step < len(batches):
                self._save_partial(epoch)
                saved, self.agreed = time.monotonic(), [0, 0]

    def _finished(self, part: PartialEpoch, batches: list[list[int]], epoch: int) -> EpochRecord:
        """Test, and sum up."""
        self._check_weights(epoch)
        loss, *penalties = part.means([len(batch) for batch in batches])
        test, robust = self._test(epoch), self._test(epoch, self.objective.attack) if self.objective.attack else None
        rate = learning_rate(
            self.settings.schedule, self.settings.lr, epoch * self.steps - 1, self.settings.epochs * self.steps
        )
        return EpochRecord(
            epoch,
            loss,
            Accuracy(part.correct, self.samples),
            test,
            rate,
            part.seconds + time.perf_counter() - self.started,
            robust,
            dict(zip(part.names, penalties, strict=True)),
        )

    def _read_losses(self, part: PartialEpoch, epoch: int) -> None:
        """Look at the losses of the last steps; on an accelerator, this waits for it."""
        if not self.unread:
            return
        losses, hits, wanted = zip(*self.unread, strict=True)
        self.unread.clear()
        self.agreed = torch.stack(wanted).sum(0).tolist()
        part.losses += self._finite(torch.stack(losses).tolist(), epoch, len(part.losses))
        part.correct += int(torch.stack(hits).sum())

    def _save_partial(self, epoch: int) -> None:
        """Put the steps of the epoch so far on disk, unless a step broke off in the middle."""
        if self.folder is None or self.partial is None or self.torn:
            return
        others: list[RandomStates] = []
        if self.team.count > 1 and self.partial.step < self.steps:  # after the last one, no generator counts any more
            if not any(self.agreed):  # another process is somewhere else; what was saved before remains
                return
            others = self.team.all(self.partial.random)[1:]
        self._read_losses(self.partial, epoch)
        self._check_weights(epoch)
        seconds = self.partial.seconds + time.perf_counter() - self.started
        if self.team.leads:
            self.folder.save(self._checkpoint(replace(self.partial, others=others, seconds=seconds)), best=False)

    def _step(
        self,
        images: Tensor,
        labels: Tensor,
        whole: int,
        rate: float,
        views: torch.Generator,
        draws: torch.Generator,
        wanted: Tensor,
    ) -> tuple[list[str], Tensor, Tensor, Tensor]:
        """One step on this process's part of a batch of ``whole`` images.

        Returns:
            The penalties' names, and of the whole batch the losses, how many images were classified correctly, and how
            many processes want what.
        """
        start = self.replicas.rows(whole).start
        images = images.to(self.device, self.dtype, non_blocking=True)
        images = augment(images, self.settings.augment, views, start=start, whole=whole)
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        targets = labels.to(self.device, non_blocking=True)
        batch = Batch(images, labels, targets, draws, self._autocast)
        self.optimiser.zero_grad(set_to_none=True)
        losses = backward_in_parts(self.objective, self.model, batch, self.settings.accumulate, self.scaler.scale)
        values = torch.stack([losses.task, *losses.penalties.values()])
        hits = (losses.logits.argmax(1) == targets).sum()
        if self.team.count > 1:
            sums = torch.cat([hits[None], wanted.to(hits)])
            values, sums = self.replicas.combine(len(labels) / whole, values, sums)
            hits, wanted = sums[0].long(), sums[1:].long()
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.trainable.values(), self.settings.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return list(losses.penalties), values, hits, wanted

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
            "processes": self.team.count,
        }

    def _checkpoint(self, partial: PartialEpoch | None = None) -> Checkpoint:
        state = {
            "terms": self._terms(),
            "epoch": len(self.history),
            "step": len(self.history) * self.steps + (partial.step if partial is not None else 0),
            "partial": None if partial is None else partial.to_plain(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": [to_plain(record) for record in self.history],
            "objective": self.objective.state(),
        }
        return Checkpoint(self.model.state_dict(), state)

    def _restore(self, checkpoint: Checkpoint, path: Path) -> None:
        checkpoint.require_fit(self._terms(), self.model.state_dict(), path)
        self.model.load_state_dict(dict(checkpoint.weights))
        self.optimiser.load_state_dict(checkpoint.state["optimiser"])
        if checkpoint.state["scaler"]:  # empty where the loss was not scaled
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.history = [from_plain(stored) for stored in checkpoint.state["history"]]
        partial = checkpoint.state["partial"]
        self.partial = None if partial is None else PartialEpoch.from_plain(partial).seen_by(self.team.rank)
        self.objective.restore(self.model, self.train_data, checkpoint.state["objective"])

    def _write_log(self, folder: RunFolder) -> None:
        folder.write_text(LOG, "".join(log_line(record) + "\n" for record in self.history))
