"""Training of a classifier that repeats bit for bit and goes on after a kill as if nothing had happened.

Data order, augmentation and dropout of an epoch derive from the seed and the epoch's number, and the learning rate and
an attack's random numbers from the step's, so a checkpoint at an epoch's end needs no generator or schedule state:
weights, momentum, history and what the objective holds are all there is. An epoch that is broken off is begun again.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from attackroute.core.batches import count_samples, count_steps, load, shuffled
from attackroute.core.checks import check_logits, checked_batch
from attackroute.core.distributed import current, take_from_first
from attackroute.core.errors import UserError
from attackroute.core.model_state import in_channels_last, kept_modes, placement
from attackroute.core.random import derived_generator, derived_seed
from attackroute.core.statistics import Accuracy, BrokenLogits, count_correct
from attackroute.hardening.augmentation import augment
from attackroute.hardening.checkpoint import Checkpoint, RunFolder
from attackroute.hardening.data_parallel import Replicas
from attackroute.hardening.history import EpochRecord, TrainResult, best_epoch
from attackroute.hardening.objective import Batch, Objective, backward_in_parts
from attackroute.hardening.settings import TrainSettings, learning_rate
from attackroute.robustness.attack import Perturbation

Progress = Callable[[int, int, str], None]

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
    progress: Progress | None = None,
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
        folder: Where a checkpoint is kept from before the first step on, and replaced after every epoch; see
            :mod:`attackroute.hardening.checkpoint` for its files. None keeps nothing.
        resume: Go on with the run in the folder, after its last finished epoch, to the result of a run that was never
            broken off. An empty folder starts one, so the same command can be repeated until it is done.
        on_epoch: Called after every epoch, when its checkpoint is on disk.
        progress: Called after every step with the steps done, the steps in all and a message.

    Returns:
        The run's history.

    Raises:
        UserError: Malformed data or labels outside the logits, a folder that cannot be used, a run with other
            settings in it, or a loss or weights that are no longer finite.
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
    progress: Progress | None = None,
) -> TrainResult:
    """Train for any objective; for the rest see :func:`train`."""
    if resume and folder is None:
        raise UserError("resume needs the folder of the run; give the folder too")
    run = _Run(
        model=model,
        train_data=train_data,
        test_data=test_data,
        settings=settings,
        objective=objective,
        folder=None if folder is None else RunFolder(folder),
    )
    _check_model(run)
    with ExitStack() as stack:
        stack.enter_context(kept_modes(model))
        stack.enter_context(torch.random.fork_rng([run.device] if run.device.type == "cuda" else []))
        if settings.channels_last:
            stack.enter_context(in_channels_last(model))
        for data, what in ((train_data, _TRAIN), (test_data, _TEST)):
            if data is not None:
                _check_fit(model, data, what)
        history = _begin(run, resume)
        resumed_from = len(history)
        for epoch in range(resumed_from + 1, settings.epochs + 1):
            try:
                history.append(_epoch(run, epoch, progress))
            except KeyboardInterrupt as error:
                go_on = "" if run.folder is None else f"{run.kept(epoch - 1)}, from which --resume goes on"
                raise KeyboardInterrupt(f"epoch {epoch} of {settings.epochs} is lost{go_on}") from error
            if run.folder is not None and current().leads:
                run.folder.save(_checkpoint(run, history), best=_is_best(history), log=_log(history))
            if on_epoch is not None:
                on_epoch(history[-1])
    return TrainResult(tuple(history), resumed_from, None if run.folder is None else run.folder.path)


@dataclass(frozen=True, eq=False)
class _Run:
    """What is trained, on what and how, and what goes with the model from step to step."""

    model: nn.Module
    train_data: Dataset[Any]
    test_data: Dataset[Any] | None
    settings: TrainSettings
    objective: Objective
    folder: RunFolder | None

    @cached_property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    @cached_property
    def optimiser(self) -> torch.optim.SGD:
        """Of these parameters."""
        settings = self.settings
        return torch.optim.SGD(
            self.trainable.values(),
            settings.lr,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=settings.weight_decay,
        )

    @cached_property
    def replicas(self) -> Replicas:
        """The model's copies in all processes."""
        return Replicas(self.model, self.trainable, current())

    @cached_property
    def autocast(self) -> torch.dtype | None:
        """The short number format of mixed precision; None for none."""
        return autocast_type(self.device) if self.settings.amp else None

    @cached_property
    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss where that format needs it."""
        return torch.amp.GradScaler(self.device.type, enabled=self.autocast is torch.float16)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return placement(self.model)[0]

    @property
    def samples(self) -> int:
        """Of an epoch."""
        return count_samples(self.train_data, _TRAIN)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return count_steps(self.samples, self.settings.batch_size)

    def rate(self, number: int) -> float:
        """The learning rate of a step, counted from 1 over the whole run."""
        settings = self.settings
        return learning_rate(settings.schedule, settings.lr, number - 1, settings.epochs * self.steps)

    def precision(self) -> AbstractContextManager[Any]:
        """The context in which the model runs."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)

    def kept(self, epochs: int) -> str:
        """What is kept after so many epochs, as the end of a message."""
        return "" if self.folder is None else f"; {self.folder.path} keeps epoch {epochs}"

    def diverged(self, epoch: int, step: int, what: str) -> UserError:
        """The error of an epoch whose numbers are no longer finite."""
        return UserError(
            f"epoch {epoch}, step {step}: {what}; check the images, lower lr (now {self.settings.lr}) "
            f"or set clip_norm{self.kept(epoch - 1)}"
        )


def _check_model(run: _Run) -> None:
    smallest_batch = run.samples // run.steps
    _, dtype = placement(run.model)
    if not run.trainable:
        raise UserError("the model has no parameter that requires a gradient, so there is nothing to train")
    if dtype not in (torch.float32, torch.float64):
        raise UserError(f"the model is in {dtype}; train it in float32, with amp for speed")
    for name, value in run.model.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(f"the model's state {name} is not a tensor, so no checkpoint can hold it")
    run.replicas.check(smallest_batch)


def _check_fit(model: nn.Module, data: Dataset[Any], what: str) -> None:
    """Try the first sample, so that most misfits show before anything is written."""
    count_samples(data, what)
    (batch,) = load(data, [[0]], generator=torch.Generator())
    images, labels = checked_batch(batch, what)
    device, dtype = placement(model)
    model.eval()
    try:
        with torch.no_grad():
            logits = model(images.to(device, dtype))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"the model does not take the {what}'s {tuple(images.shape[1:])}: {reason}") from error
    check_logits(logits, labels, what)


def _begin(run: _Run, resume: bool) -> list[EpochRecord]:
    """Go on from the folder's checkpoint, or put the initial one there; gives the epochs that are done."""
    model, objective, folder, team = run.model, run.objective, run.folder, current()
    checkpoint = team.first(lambda: None if folder is None else folder.open(resume=resume))
    if checkpoint is None or folder is None:
        take_from_first(model, team)
        objective.start(model, run.train_data, run.settings.seed)
        if folder is not None and team.leads:
            folder.save(_checkpoint(run, []), best=False, log="")
        return []
    checkpoint.require_fit(_settings(run), model.state_dict(), folder.path)
    model.load_state_dict(dict(checkpoint.weights))
    run.optimiser.load_state_dict(dict(checkpoint.optimiser))
    if checkpoint.scaler:
        run.scaler.load_state_dict(dict(checkpoint.scaler))
    objective.restore(model, run.train_data, checkpoint.objective)
    history = [EpochRecord.from_plain(stored) for stored in checkpoint.history]
    if team.leads:
        folder.publish(checkpoint, best=_is_best(history), log=_log(history))
    return history


def _settings(run: _Run) -> dict[str, Any]:
    """All that must be the same for a run to go on."""
    return {
        **asdict(run.settings),
        **run.objective.settings,
        "train_samples": run.samples,
        "test_samples": None if run.test_data is None else count_samples(run.test_data, _TEST),
        "trainable": list(run.trainable),
        "processes": current().count,
    }


def _checkpoint(run: _Run, history: Sequence[EpochRecord]) -> Checkpoint:
    return Checkpoint(
        settings=_settings(run),
        weights=dict(run.model.state_dict()),
        optimiser=run.optimiser.state_dict(),
        scaler=run.scaler.state_dict(),
        history=[asdict(record) for record in history],
        objective=run.objective.state(),
    )


def _is_best(history: Sequence[EpochRecord]) -> bool:
    """Whether the last epoch so far is the best one so far."""
    return bool(history) and best_epoch(history) is history[-1]


def _log(history: Sequence[EpochRecord]) -> str:
    return "".join(record.log_line() + "\n" for record in history)


def _epoch(run: _Run, epoch: int, progress: Progress | None) -> EpochRecord:
    """Train for one epoch and test."""
    started, team = time.perf_counter(), current()
    purpose = "model" if team.leads else f"model/{team.rank}"  # dropout, other in each process
    seed_device(run.device, derived_seed(run.settings.seed, purpose, epoch))
    run.objective.begin_epoch(run.model, run.train_data, epoch)
    learnt = _learn(run, epoch, progress)
    take_from_first(run.model, team, buffers_alone=True)
    for name, value in run.model.state_dict().items():  # the last step can spoil them after its loss was computed
        if value.is_floating_point() and not value.isfinite().all():
            raise run.diverged(epoch, run.steps, f"the weights in {name} are no longer finite")
    loss, *penalties = learnt.means()
    attack = run.objective.attack
    test, robust = _tested(run, epoch), None if attack is None else _tested(run, epoch, attack)
    return EpochRecord(
        epoch=epoch,
        loss=loss,
        train=Accuracy(learnt.correct, run.samples),
        test=test,
        lr=run.rate(epoch * run.steps),
        seconds=time.perf_counter() - started,
        robust=robust,
        penalties=dict(zip(learnt.names, penalties, strict=True)),
    )


@dataclass
class _Learnt:
    """What the steps of an epoch met.

    Attributes:
        sizes: Images of each batch of the epoch.
        names: Of the penalties.
        losses: For each step that was looked at, the cross entropy and then each penalty.
        correct: Images that were classified correctly in these steps.
        unread: The same numbers of the steps since, still on the device.
    """

    sizes: list[int]
    names: list[str] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    correct: int = 0
    unread: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def read(self) -> list[list[float]]:
        """Look at the losses of the last steps, and give them; on an accelerator, this waits for it."""
        losses, hits = zip(*self.unread, strict=True)
        self.unread.clear()
        latest: list[list[float]] = torch.stack(losses).tolist()
        self.losses += latest
        self.correct += int(torch.stack(hits).sum())
        return latest

    def means(self) -> list[float]:
        """Mean over the samples of every loss."""
        return [
            math.fsum(value * size for value, size in zip(column, self.sizes, strict=True)) / sum(self.sizes)
            for column in zip(*self.losses, strict=True)
        ]


def _learn(run: _Run, epoch: int, progress: Progress | None) -> _Learnt:
    """Take an epoch's steps."""
    settings, model = run.settings, run.model
    batches = shuffled(run.samples, settings.batch_size, settings.seed, epoch)
    before, total = (epoch - 1) * run.steps, settings.epochs * run.steps
    views, interval = derived_generator(settings.seed, "augment", epoch), loss_interval(run.device)
    learnt = _Learnt([len(batch) for batch in batches])
    model.train()
    loader = load(
        run.train_data,
        [batch[run.replicas.rows(len(batch))] for batch in batches],
        generator=derived_generator(settings.seed, "workers", epoch),
        workers=settings.workers,
        pin_memory=run.device.type == "cuda",
    )
    for step, batch in enumerate(loader, start=1):
        number, size = before + step, learnt.sizes[step - 1]
        try:
            images, labels = checked_batch(batch, _TRAIN)
            losses, hits, learnt.names = _step(run, _placed(run, images, labels, size, number, views), size, number)
        except UserError as error:
            if all(bool(value.isfinite().all()) for value in model.parameters()):
                raise
            raise run.diverged(epoch, step, f"the weights are no longer finite ({error})") from error
        learnt.unread.append((losses, hits))
        if len(learnt.unread) == interval or step == len(batches):
            _require_finite(run, learnt.read(), epoch, step)
        if progress is not None:
            latest = f", loss {learnt.losses[-1][0]:.3f}" if learnt.losses else ""
            progress(number, total, f"epoch {epoch}/{settings.epochs}{latest}")
    return learnt


def _placed(run: _Run, images: Tensor, labels: Tensor, size: int, number: int, views: torch.Generator) -> Batch:
    """This process's part of the batch of ``size`` images of step ``number``, augmented and on the device."""
    device, dtype = placement(run.model)
    images = images.to(device, dtype, non_blocking=True)
    images = augment(images, run.settings.augment, views, start=run.replicas.rows(size).start, whole=size)
    if run.settings.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    draws = derived_generator(run.settings.seed, "attack", number)
    return Batch(
        images=images,
        labels=labels,
        targets=labels.to(device, non_blocking=True),
        draws=draws,
        autocast=run.precision,
    )


def _step(run: _Run, batch: Batch, size: int, number: int) -> tuple[Tensor, Tensor, list[str]]:
    """Step ``number``, on this process's part of a batch of ``size`` images.

    Returns:
        Of the whole batch the losses and how many images were classified correctly, and the penalties' names.
    """
    run.optimiser.zero_grad(set_to_none=True)
    losses = backward_in_parts(run.objective, run.model, batch, run.settings.accumulate, run.scaler.scale)
    values = torch.stack([losses.task, *losses.penalties.values()])
    hits = (losses.logits.argmax(1) == batch.targets).sum()
    if current().count > 1:
        values, sums = run.replicas.combine(len(batch.labels) / size, values, hits[None])
        hits = sums[0].long()
    if run.settings.clip_norm is not None:
        run.scaler.unscale_(run.optimiser)
        nn.utils.clip_grad_norm_(run.trainable.values(), run.settings.clip_norm)
    for group in run.optimiser.param_groups:
        group["lr"] = run.rate(number)
    run.scaler.step(run.optimiser)
    run.scaler.update()
    return values, hits, list(losses.penalties)


def _require_finite(run: _Run, losses: list[list[float]], epoch: int, step: int) -> None:
    """Require finite losses of the last steps, up to ``step``."""
    for number, (task, *penalties) in enumerate(losses, start=step - len(losses) + 1):
        for name, value in (("loss", task), *(("penalty", penalty) for penalty in penalties)):
            if not math.isfinite(value):
                raise run.diverged(epoch, number, f"the {name} is {value}")


def _tested(run: _Run, epoch: int, attack: Perturbation | None = None) -> Accuracy | None:
    """Accuracy on the test data, or on some of them under an attack, the same after every epoch."""
    data, settings = run.test_data, run.settings
    if data is None:
        return None
    if attack is not None:
        order = torch.randperm(count_samples(data, _TEST), generator=derived_generator(settings.seed, "robust", 0))
        data = Subset(data, order[: settings.robust_samples].sort().values.tolist())
    try:
        with run.precision():
            return count_correct(run.model, data, workers=settings.workers, attack=attack)
    except BrokenLogits as error:  # weights can be finite and yet too large
        raise run.diverged(epoch, run.steps, f"the logits for the {_TEST} are NaN") from error


def loss_interval(device: torch.device) -> int:
    """Steps between looks at the loss; on an accelerator, each look waits for it."""
    return 1 if device.type == "cpu" else 50


def autocast_type(device: torch.device) -> torch.dtype | None:
    """The short number format of mixed precision on a device; None where it has none."""
    if not torch.amp.is_autocast_available(device.type):
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the generators that dropout draws from, and no other device's."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
