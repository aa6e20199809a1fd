"""Training of a classifier that repeats bit for bit and goes on after a kill as if nothing had happened.

Data order, augmentation and dropout of an epoch derive from the seed and the epoch's number, and the learning rate and
an attack's random numbers from the step's, so a checkpoint at an epoch's end needs no generator or schedule state:
weights, momentum, history and what the objective holds are all there is. An epoch that is broken off is begun again.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attackroute.core.batches import Data, as_dataset, count_samples, shuffled
from attackroute.core.checks import check_logits, checked_batch, require_no_probabilities
from attackroute.core.distributed import current
from attackroute.core.errors import UserError
from attackroute.core.files import locked
from attackroute.core.layers import LayerCall, LayerCalls
from attackroute.core.model_state import in_format, kept_modes, placement
from attackroute.core.random import derived_generator, derived_seed
from attackroute.core.statistics import Accuracy, BrokenLogits, count_correct
from attackroute.hardening.augmentation import augment
from attackroute.hardening.checkpoint import Checkpoint, EpochRecord, best_epoch, open_run
from attackroute.hardening.objective import Batch, Objective, samples_of
from attackroute.hardening.settings import TrainSettings, learning_rate
from attackroute.robustness.attack import Attack, Perturbation
from attackroute.zoo.data import drawn

Progress = Callable[[int, int, str], None]

_TRAIN, _TEST = "training data", "test data"
_DEFAULTS = TrainSettings()
_CONTIGUOUS = (
    "note: training takes images and weights in the contiguous format: on a CPU, PyTorch crashes in channels_last with "
    "a 1x1 convolution of 2 to 15 channels and a stride"
)


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        history: One record an epoch, those before a resumption included.
        resumed_from: Epochs that were taken from the folder; 0 for a fresh run.
        folder: Where the checkpoints are; None if none were asked for.
    """

    history: tuple[EpochRecord, ...]
    resumed_from: int
    folder: Path | None

    @property
    def last(self) -> EpochRecord:
        """The last epoch."""
        return self.history[-1]

    @property
    def best(self) -> EpochRecord | None:
        """The first epoch of the highest accuracy, see :func:`best_epoch`; None without test data."""
        return best_epoch(self.history)


def train(
    model: nn.Module,
    train_data: Data,
    test_data: Data | None = None,
    settings: TrainSettings = _DEFAULTS,
    *,
    attack: Attack | str | None = None,
    objective: Objective | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
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
        train_data: Float images (C, H, W) with integer labels: a data set, that of a DataLoader, or two tensors.
        test_data: The same; tested after every epoch.
        settings: See :class:`TrainSettings`.
        attack: What to train against, as :func:`attackroute.parse_attack` reads it, or any callable
            ``(model, images, labels) -> images``; None for clean images.
        objective: What is minimised in place of the cross entropy; it has an attack of its own.
        folder: Where a checkpoint is kept from before the first step on, and replaced after every epoch; see
            :mod:`attackroute.hardening.checkpoint` for its files. None keeps nothing.
        resume: Go on with the run in the folder, after its last finished epoch, to the result of a run that was never
            broken off. An empty folder starts one, so the same command can be repeated until it is done.
        on_epoch: Called after every epoch, when its checkpoint is on disk.
        progress: Called after every step with the steps done, the steps in all and a message.
        note: Called with what there is to say in passing; None warns.

    Returns:
        The run's history.

    Raises:
        UserError: Malformed data or labels outside the logits, a folder that cannot be used, a run with other
            settings in it, a loss or weights that are no longer finite, or one of several processes.
    """
    if current().count > 1:
        raise UserError("train and harden run in one process; start them without torchrun")
    if objective is not None and attack is not None:
        raise UserError("an objective has an attack of its own; leave out attack")
    if resume and folder is None:
        raise UserError("resume needs the folder of the run; give the folder too")
    path = None if folder is None else Path(folder)
    train_data, test_data = as_dataset(train_data), None if test_data is None else as_dataset(test_data)
    run = _Run(model, train_data, test_data, settings=settings, objective=objective or Objective(attack), folder=path)
    with ExitStack() as stack:
        stack.enter_context(kept_modes(model))
        stack.enter_context(torch.random.fork_rng([run.device] if run.device.type == "cuda" else []))
        parts = ((train_data, _TRAIN), (test_data, _TEST))
        if any([_check_fit(model, data, what) for data, what in parts if data is not None]):
            run.format = torch.contiguous_format
            if settings.channels_last:
                (note or warnings.warn)(_CONTIGUOUS)
        if run.format is not None:
            stack.enter_context(in_format(model, run.format))
        if run.folder is not None:
            stack.enter_context(locked(run.folder))
        history = _begin(run, resume)
        _save(run, history)  # where the run goes on too, since a kill may have come between two files
        resumed_from = len(history)
        for epoch in range(resumed_from + 1, settings.epochs + 1):
            try:
                history.append(_epoch(run, epoch, progress))
            except KeyboardInterrupt as error:
                go_on = "" if run.folder is None else f"{run.kept(epoch - 1)}, from which --resume goes on"
                raise KeyboardInterrupt(f"epoch {epoch} of {settings.epochs} is lost{go_on}") from error
            _save(run, history)
            if on_epoch is not None:
                on_epoch(history[-1])
    return TrainResult(tuple(history), resumed_from, run.folder)


@dataclass(eq=False)
class _Run:
    """What is trained, on what and how, and what goes with the model from step to step."""

    model: nn.Module
    train_data: Dataset[Any]
    test_data: Dataset[Any] | None
    settings: TrainSettings
    objective: Objective
    folder: Path | None

    def __post_init__(self) -> None:
        model, settings = self.model, self.settings
        self.samples = count_samples(self.train_data, _TRAIN)
        self.steps = -(-self.samples // settings.batch_size)  # of an epoch
        self.device, self.dtype = placement(model)
        self.trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if not self.trainable:
            raise UserError("the model has no parameter that requires a gradient, so there is nothing to train")
        if self.dtype not in (torch.float32, torch.float64):
            raise UserError(f"the model is in {self.dtype}; train it in float32, with amp for speed")
        for name, value in model.state_dict().items():
            if not isinstance(value, Tensor):
                raise UserError(f"the model's state {name} is not a tensor, so no checkpoint can hold it")
        # of weights and images; None leaves them as they are
        self.format = torch.channels_last if settings.channels_last else None
        parameters, momentum, decay = self.trainable.values(), settings.momentum, settings.weight_decay
        self.optimiser = torch.optim.SGD(parameters, settings.lr, momentum, weight_decay=decay, nesterov=momentum > 0)
        emulated = self.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        short = settings.amp and torch.amp.is_autocast_available(self.device.type) and not emulated
        self.precision = partial(torch.autocast, self.device.type, dtype=torch.bfloat16) if short else nullcontext

    @property
    def identity(self) -> dict[str, Any]:
        """All that must be the same for the run to go on."""
        return {
            **asdict(self.settings),
            **self.objective.settings,
            "train_samples": self.samples,
            "test_samples": None if self.test_data is None else count_samples(self.test_data, _TEST),
            "trainable": list(self.trainable),
        }

    def rate(self, number: int) -> float:
        """The learning rate of a step, counted from 1 over the whole run."""
        return learning_rate(self.settings.lr, number - 1, self.settings.epochs * self.steps)

    def kept(self, epochs: int) -> str:
        """What is kept after so many epochs, as the end of a message."""
        return "" if self.folder is None else f"; {self.folder} keeps epoch {epochs}"

    def diverged(self, epoch: int, step: int, what: str) -> UserError:
        """The error of an epoch whose numbers are no longer finite."""
        return UserError(
            f"epoch {epoch}, step {step}: {what}; check the images, or lower lr (now {self.settings.lr})"
            f"{self.kept(epoch - 1)}"
        )


def _check_fit(model: nn.Module, data: Dataset[Any], what: str) -> bool:
    """Try the first sample, so that most misfits show before anything is written; does channels_last crash on it?

    A CPU's weight gradient of a 1x1 convolution with a stride and 2 to 15 channels writes past its end in that format
    (uxlfoundation/oneDNN#6035).
    """
    count_samples(data, what)
    images, labels = samples_of(model, data, [0], what)
    crashing: list[str] = []

    def visit(call: LayerCall) -> Tensor:
        output, (channels, *size) = call.run(), call.weight.shape[1:]
        if size == [1, 1] and 2 <= channels <= 15 and output.shape[2:] != call.input.shape[2:]:
            crashing.append(call.name)
        return output

    model.eval()
    try:
        with torch.no_grad(), LayerCalls(model, visit):
            output = model(images)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"the model does not take the {what}'s {tuple(images.shape[1:])}: {reason}") from error
    require_no_probabilities(check_logits(output, labels, what))
    return bool(crashing) and images.device.type == "cpu"


def _begin(run: _Run, resume: bool) -> list[EpochRecord]:
    """Go on from the folder's checkpoint, or start; gives the epochs that are done."""
    model, folder = run.model, run.folder
    checkpoint = None if folder is None else open_run(folder, resume=resume)
    if checkpoint is None or folder is None:
        run.objective.start(model, run.train_data, run.settings.seed)
        return []
    checkpoint.require_fit(run.identity, model.state_dict(), folder)
    try:
        model.load_state_dict(dict(checkpoint.weights))
        run.optimiser.load_state_dict(dict(checkpoint.optimiser))
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"the state in {folder} is of another run or damaged ({error}); choose another folder"
        ) from None
    run.objective.start(model, run.train_data, run.settings.seed, checkpoint.objective)
    return list(checkpoint.history)


def _save(run: _Run, history: Sequence[EpochRecord]) -> None:
    """Put all that a run needs in order to go on into its folder."""
    if run.folder is not None:
        weights, optimiser = dict(run.model.state_dict()), run.optimiser.state_dict()
        state = run.objective.state()
        Checkpoint(run.identity, weights, optimiser, history=history, objective=state).save(run.folder)
        run.objective.save(run.folder)


def _epoch(run: _Run, epoch: int, progress: Progress | None) -> EpochRecord:
    """Train for one epoch and test."""
    started = time.perf_counter()
    seed_device(run.device, derived_seed(run.settings.seed, "model", epoch))  # for dropout
    loss, penalties, correct = _learn(run, epoch, progress)
    for name, value in run.model.state_dict().items():  # the last step can spoil them after its loss was computed
        if value.is_floating_point() and not value.isfinite().all():
            raise run.diverged(epoch, run.steps, f"the weights in {name} are no longer finite")
    attack, train = run.objective.attack, Accuracy(correct, run.samples)
    test, robust = _tested(run, epoch), None if attack is None else _tested(run, epoch, attack)
    lr, seconds = run.rate(epoch * run.steps), time.perf_counter() - started
    return EpochRecord(
        epoch=epoch, loss=loss, train=train, test=test, lr=lr, seconds=seconds, robust=robust, penalties=penalties
    )


def _learn(run: _Run, epoch: int, progress: Progress | None) -> tuple[float, dict[str, float], int]:
    """Take an epoch's steps; gives the mean over the samples of the cross entropy and of each penalty, and the hits."""
    settings = run.settings
    batches = shuffled(run.samples, settings.batch_size, settings.seed, epoch)
    before, total = (epoch - 1) * run.steps, settings.epochs * run.steps
    views, interval = derived_generator(settings.seed, "augment", epoch), loss_interval(run.device)
    names: list[str] = []
    losses: list[list[float]] = []
    unread: list[tuple[Tensor, Tensor]] = []  # losses and hits of the steps since, still on the device
    correct = 0
    run.model.train()
    loader = DataLoader(  # workers that lived on would carry a random state over epochs, which cannot be resumed
        run.train_data,
        batch_sampler=batches,
        num_workers=settings.workers,
        generator=derived_generator(settings.seed, "workers", epoch),
        pin_memory=run.device.type == "cuda",
    )
    for step, batch in enumerate(loader, start=1):
        try:
            images, labels = checked_batch(batch, _TRAIN)
            values, hits, names = _step(run, before + step, images, labels, views)
        except UserError as error:
            if all(bool(value.isfinite().all()) for value in run.model.parameters()):
                raise
            raise run.diverged(epoch, step, f"the weights are no longer finite ({error})") from error
        unread.append((values, hits))
        if len(unread) == interval or step == len(batches):
            columns, counts = zip(*unread, strict=True)
            losses += torch.stack(columns).tolist()
            correct += int(torch.stack(counts).sum())
            for number in range(step - len(unread), step):
                for column, loss in enumerate(losses[number]):
                    if not math.isfinite(loss):
                        raise run.diverged(epoch, number + 1, f"the {'penalty' if column else 'loss'} is {loss}")
            unread.clear()
        if progress is not None:
            latest = f", loss {losses[-1][0]:.3f}" if losses else ""
            progress(before + step, total, f"epoch {epoch}/{settings.epochs}{latest}")
    loss, *penalties = [
        math.fsum(value * len(indices) for value, indices in zip(column, batches, strict=True)) / run.samples
        for column in zip(*losses, strict=True)
    ]
    return loss, dict(zip(names, penalties, strict=True)), correct


def _step(
    run: _Run, number: int, images: Tensor, labels: Tensor, views: torch.Generator
) -> tuple[Tensor, Tensor, list[str]]:
    """Step ``number``, from 1 over the whole run, on a batch; gives the losses, the hits and the penalties' names."""
    settings = run.settings
    images = images.to(run.device, run.dtype, non_blocking=True)
    images = augment(images, settings.augment, views)
    if run.format is not None:
        images = images.contiguous(memory_format=run.format)
    batch = Batch(
        images=images,
        labels=labels,
        targets=labels.to(run.device, non_blocking=True),
        draws=derived_generator(settings.seed, "attack", number),
        autocast=run.precision,
    )
    run.optimiser.zero_grad(set_to_none=True)
    losses = run.objective.losses(run.model, batch)
    losses.total.backward()  # type: ignore[no-untyped-call]
    values = torch.stack([losses.task, *losses.penalties.values()])
    hits = (losses.logits.argmax(1) == batch.targets).sum()
    for group in run.optimiser.param_groups:
        group["lr"] = run.rate(number)
    run.optimiser.step()
    return values, hits, list(losses.penalties)


def _tested(run: _Run, epoch: int, attack: Perturbation | None = None) -> Accuracy | None:
    """Accuracy on the test data, or on some of them under an attack, the same after every epoch."""
    data, settings = run.test_data, run.settings
    if data is None:
        return None
    if attack is not None:
        data = drawn(data, settings.robust_samples, derived_seed(settings.seed, "robust", 0))
    try:
        with run.precision():
            return count_correct(run.model, data, workers=settings.workers, attack=attack)
    except BrokenLogits as error:  # weights can be finite and yet too large
        raise run.diverged(epoch, run.steps, f"the logits for the {_TEST} are NaN") from error


def loss_interval(device: torch.device) -> int:
    """Steps between looks at the loss; on an accelerator, each look waits for it."""
    return 1 if device.type == "cpu" else 50


def seed_device(device: torch.device, seed: int) -> None:
    """Seed the generators that dropout draws from, and no other device's."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
