"""Robustness evaluation: accuracy under attacks and corruptions, of one model or of several side by side."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.analysis.tables import save_result
from attackroute.core.accuracy import Accuracy
from attackroute.core.batches import BatchStream, Data, derived_seed, samples_in
from attackroute.core.checks import checked_labels, checked_logits
from attackroute.core.distributed import current
from attackroute.core.errors import UserError
from attackroute.core.journal import MEASUREMENTS, Journal, Key
from attackroute.core.model_state import frozen, placement, seeded, weights_digest
from attackroute.robustness.attack_labels import short
from attackroute.robustness.balls import ball_of, out_of_range
from attackroute.robustness.contract import Perturbation, check_images
from attackroute.robustness.evaluation_table import EVALUATION, Evaluation, Row, library_versions
from attackroute.robustness.examples import ExampleFolder, Examples, examples_of
from attackroute.robustness.masking import Check, check_masking
from attackroute.robustness.registry import parse_attack
from attackroute.robustness.sample_choice import Candidates, SampleChoice

CLEAN = "clean"


DEFAULT_ATTACKS = ("fgsm", "mi-fgsm", "pgd", "gaussian-noise")


_DEFAULT_EPS = 8 / 255  # of the checks, where no attack states a radius


_SUM_TOLERANCE = 1e-3


Progress = Callable[[int, "int | None", str], None]
"""Called with the images that were attacked so far, how many there will be, and what is under way."""


def evaluate(
    model: nn.Module | Mapping[str, nn.Module],
    data: Data,
    attacks: Iterable[str | Perturbation] = DEFAULT_ATTACKS,
    *,
    batch_size: int = 128,
    seed: int = 0,
    checks: int = 256,
    twin: nn.Module | None = None,
    save_examples: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    origin: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Accuracy on clean images and under each attack, with signs of masked gradients.

    Models run in eval mode on the devices of their parameters and come back as they were. Random numbers belong to the
    image and the seed, so that accuracies depend neither on batch size nor on order, but for rounding; ``autoattack``
    and ``square`` alone draw for a batch as a whole, and models that draw random numbers do so too. All models see the
    same corrupted images.

    Args:
        model: Maps images ``(N, C, H, W)`` in [0, 1] to logits ``(N, classes)``; or several of them by name.
        data: A DataLoader (any iterable) of ``(images, labels)``, or one such pair of tensors.
        attacks: Specifications as :func:`attackroute.attacks.parse_attack` reads them, or attacks; clean images are
            always measured first.
        batch_size: Rows at a time when ``data`` is tensors, and in the checks; a DataLoader brings its own.
        seed: Of attacks that are given as text without a seed of their own, of the choice of images for the checks, and
            of PyTorch's global generators, which random models draw from; those come back as they were.
        checks: On how many images to look for masked gradients (:mod:`attackroute.masking`), at the largest L-infinity
            radius among the attacks; 0 for no checks. The choice does not depend on the images' order.
        twin: A network of the same task that was not defended, for the check by transfer.
        save_examples: A folder for the adversarial examples (:mod:`attackroute.adversarial_examples`).
        folder: Where results are kept as they come, and the tables at the end; None keeps nothing.
        resume: Go on with the evaluation in ``folder``, if it holds one, to the same numbers as without a break. The
            data must come in the same batches.
        origin: Further entries of the result, such as the data's name, as JSON values; to resume, they must be equal.
        progress: See :data:`Progress`.

    Returns:
        One row for each model and attack, and the checks.

    Raises:
        UserError: Labels are missing or do not fit, images are not in [0, 1], a model does not return logits, an attack
            is unknown or breaks its own rules, or the folder holds something else.
    """
    models = _named_models(model)
    chosen = _chosen(attacks, seed)
    if checks < 0:
        raise UserError(f"checks {checks} is not a number of images; give 0 for no checks")
    if resume and folder is None:
        raise UserError("resume goes on with the evaluation in a folder; name the folder")
    total = samples_in(data)
    digests = {name: weights_digest(network) for name, network in models.items()}
    about = {
        **(origin or {}),
        "models": digests,
        "attacks": [attack.to_json() for attack in chosen],
        "samples_in_all": total,
        "batch_size": batch_size,
        "seed": seed,
        "check_samples": checks,
        "twin": None if twin is None else weights_digest(twin),
        "devices": {name: placement(network)[0].type for name, network in models.items()},
    }
    terms = {**about, "save_examples": save_examples is not None}
    team = current()
    journal = team.first(lambda: _open_journal(folder, terms, resume=resume))
    examples = None
    if save_examples is not None:
        names = [*models, *map(str, chosen)]
        examples = team.first(lambda: ExampleFolder.open(save_examples, names, resume=resume and len(journal) > 0))
    if not team.leads:
        journal = journal.in_memory()
    with ExitStack() as stack:
        for network in {id(item): item for item in (*models.values(), *([twin] if twin is not None else []))}.values():
            stack.enter_context(frozen(network))
        # the widest number format, so that no model gets images that were rounded for another
        reader = max(models.values(), key=lambda network: torch.finfo(placement(network)[1]).bits)
        choice = SampleChoice(checks, seed)
        rows = None if total is None else total * len(models) * (1 + len(chosen))
        run = _Run(models, digests, chosen, seed, journal, examples, progress, rows)
        stream = BatchStream(reader, data, batch_size)

        def once(images: Tensor, given: Tensor | None) -> tuple[Iterable[_Found], Candidates | None, int]:
            labels = _required(given)
            check_images(images, labels)
            found = run.measure(stream.number, images, labels)
            # alone, each measurement is written down before the next one is made
            return found if team.count == 1 else list(found), choice.candidates(images, labels), len(images)

        run.probe_corruptions(*stream.first)
        for measurements, candidates, size in stream.map(once):
            for measurement in measurements:
                run.take(measurement)
            choice.take(candidates)
            run.start += size
        found = _check(models, choice, _checked_eps(chosen), seed, batch_size, twin, journal, progress)
    evaluation = Evaluation(run.rows(), found, {**about, "libraries": library_versions()})
    if examples is not None and team.leads:
        examples.finish()
    if folder is not None and team.leads:
        save_result(evaluation, {}, folder, EVALUATION)
    return evaluation


@dataclass
class _Tally:
    correct: int = 0
    total: int = 0
    seconds: float = 0.0
    right: list[bool] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Found:
    """One model under one attack on one batch.

    Attributes:
        model: The model's name.
        title: The attack's.
        batch: Number of the batch.
        samples: Digest of its images and labels.
        record: Labels, predictions and seconds.
        new: Whether it was measured now.
        examples: The attacked images, if they are to be kept; ``start`` is not known yet.
    """

    model: str
    title: str
    batch: int
    samples: str
    record: Mapping[str, Any]
    new: bool
    examples: Examples | None

    @property
    def key(self) -> Key:
        """Where it is written down."""
        return ("samples", self.batch, self.model, self.title)


@dataclass
class _Run:
    """The models, the attacks, and what was counted so far."""

    models: Mapping[str, nn.Module]
    digests: Mapping[str, str]
    attacks: Sequence[Perturbation]
    seed: int
    journal: Journal
    examples: ExampleFolder | None
    progress: Progress | None
    total: int | None
    start: int = 0
    done: int = 0
    tallies: dict[tuple[str, str], _Tally] = field(default_factory=dict)

    def measure(self, batch: int, images: Tensor, labels: Tensor) -> Iterator[_Found]:
        """Measure one batch: clean images first, then each attack on each model."""
        digest = _digest(images, labels)
        for attack in (None, *self.attacks):
            corrupted: list[Tensor] = []  # at most one: the same images for all models
            for name in self.models:
                yield self._measure(name, attack, batch, images, labels, digest, corrupted)

    def take(self, found: _Found) -> None:
        """Write a measurement down, if it is new, and count it; they come in the data's order."""
        if found.examples is not None and current().leads:
            assert self.examples is not None
            self.examples.save(found.batch, replace(found.examples, start=self.start))
        if found.new:
            self.journal.keep(found.key, found.samples, **found.record)
        right = list(map(int.__eq__, found.record["labels"], found.record["predictions"]))
        correct = sum(right)
        tally = self.tallies.setdefault((found.model, found.title), _Tally())
        tally.correct += correct
        tally.total += len(right)
        tally.seconds += found.record["seconds"]
        tally.right += right
        self.done += len(right)
        if self.examples is not None and found.title != CLEAN:
            self.examples.note(found.model, found.title, found.batch, self.start, len(right), correct)
        if self.progress is not None:
            self.progress(self.done, self.total, f"{found.model}: {found.title}")

    def probe_corruptions(self, images: Tensor, labels: Tensor | None) -> None:
        """Let a corruption that cannot take such images say so before any work is done."""
        answers = _required(labels)
        check_images(images, answers)
        with seeded(self.seed):
            for attack in self.attacks:
                if not attack.uses_model:
                    attack(next(iter(self.models.values())), images[:1], answers[:1])

    def rows(self) -> tuple[Row, ...]:
        """One row for each model and attack."""
        return tuple(
            Row(
                name,
                _title(attack),
                CLEAN if attack is None else short(attack),
                Accuracy(tally.correct, tally.total),
                {} if attack is None else attack.to_json(),
                tally.seconds,
                tuple(tally.right),
            )
            for name in self.models
            for attack in (None, *self.attacks)
            for tally in [self.tallies[name, _title(attack)]]
        )

    def _measure(
        self,
        name: str,
        attack: Perturbation | None,
        batch: int,
        images: Tensor,
        labels: Tensor,
        digest: str,
        corrupted: list[Tensor],
    ) -> _Found:
        title = _title(attack)
        if self.progress is not None:
            self.progress(self.done, self.total, f"{name}: {title}")
        known = self.journal.recall(("samples", batch, name, title), digest)
        if known is not None:
            return _Found(name, title, batch, digest, known, False, None)
        started = time.perf_counter()
        with seeded(derived_seed(self.seed, f"{title}/{digest}", 0)):
            predictions, examples = self._predictions(name, attack, images, labels, corrupted)
        seconds = round(time.perf_counter() - started, 4)
        record = {"labels": labels.tolist(), "predictions": predictions, "seconds": seconds}
        return _Found(name, title, batch, digest, record, True, examples)

    def _predictions(
        self, name: str, attack: Perturbation | None, images: Tensor, labels: Tensor, corrupted: list[Tensor]
    ) -> tuple[list[int], Examples | None]:
        model = self.models[name]
        device, dtype = placement(model)
        x, y = images.to(device, dtype), labels.to(device)
        shown = x
        if attack is not None and attack.uses_model:
            shown = _sound(attack, attack(model, x, y), x)
        elif attack is not None:
            if not corrupted:
                corrupted.append(_sound(attack, attack(model, images, labels), images))
            shown = corrupted[0].to(device, dtype)
        with torch.no_grad():
            logits = checked_logits(model(shown.clone()), len(shown))
        checked_labels(y, logits.shape[1], len(y))
        examples = None
        if attack is None:
            _require_logits(name, logits)
        elif self.examples is not None:
            examples = examples_of(attack, name, self.digests[name], 0, logits, x, shown, y)
        return logits.argmax(1).tolist(), examples


def _check(
    models: Mapping[str, nn.Module],
    choice: SampleChoice,
    eps: float,
    seed: int,
    batch_size: int,
    twin: nn.Module | None,
    journal: Journal,
    progress: Progress | None,
) -> tuple[Check, ...]:
    if not len(choice):
        return ()
    images, labels = choice.samples()
    digest = _digest(images, labels)
    found: list[Check] = []
    for name, model in models.items():

        def remember(probe: str, compute: Callable[[], list[int]], name: str = name) -> list[int]:
            key = ("checks", name, probe)
            record = journal.recall(key, digest)
            if record is None:
                if progress is not None:
                    progress(0, None, f"{name}: check for masking, {probe}")
                with seeded(derived_seed(seed, f"{probe}/{digest}", 0)):
                    record = journal.keep(key, digest, outcomes=current().first(compute))
            return list(record["outcomes"])

        device, dtype = placement(model)
        found += check_masking(
            model,
            images.to(device, dtype),
            labels.to(device),
            eps=eps,
            name=name,
            seed=seed,
            batch_size=batch_size,
            twin=twin,
            remember=remember,
        )
    return tuple(found)


def _open_journal(folder: str | os.PathLike[str] | None, terms: Mapping[str, Any], *, resume: bool) -> Journal:
    """The measurements of a folder; those of a finished evaluation make way for a new one, others only with a word.

    Raises:
        UserError: The folder cannot be made, or what it holds does not go together with this evaluation.
    """
    if folder is None:
        return Journal(None, terms)
    home = Path(folder)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{home} cannot be a folder ({error.strerror}); name another") from None
    path = home / MEASUREMENTS
    results = [home / f"{EVALUATION}.json", home / f"{EVALUATION}.csv"]
    if resume:
        journal = Journal(path, terms)
        journal.resume()
        return journal
    if path.exists() and not results[0].exists():
        raise UserError(
            f"{home} holds an unfinished evaluation; pass --resume to go on with it, or choose another folder"
        )
    return Journal(path, terms, results)


def _named_models(model: object) -> dict[str, nn.Module]:
    models: dict[Any, Any] = dict(model) if isinstance(model, Mapping) else {"model": model}
    if not models:
        raise UserError("there is no model to evaluate; give one, or several by name")
    for name, network in models.items():
        if not isinstance(network, nn.Module):
            raise UserError(f"the model {name!r} is {type(network).__name__}, not a torch.nn.Module")
        if not isinstance(name, str) or not name:
            raise UserError(f"a model's name must be a text, not {name!r}")
    return models


def _chosen(attacks: Iterable[str | Perturbation], seed: int) -> tuple[Perturbation, ...]:
    """The attacks, each once, in the order in which they were given."""
    if isinstance(attacks, (str, Perturbation)):
        raise UserError(f"attacks is {str(attacks)!r}; give a list, as in attacks=[{str(attacks)!r}]")
    found: list[Perturbation] = []
    for attack in attacks:
        if attack == CLEAN:
            continue
        if not isinstance(attack, (str, Perturbation)):
            raise UserError(f"an attack is {type(attack).__name__}; give a text such as 'pgd:steps=20', or an attack")
        found.append(parse_attack(attack, seed=seed) if isinstance(attack, str) else attack)
    return tuple({str(attack): attack for attack in found}.values())


def _title(attack: Perturbation | None) -> str:
    return CLEAN if attack is None else str(attack)


def _checked_eps(attacks: Sequence[Perturbation]) -> float:
    """The largest L-infinity radius among the attacks."""
    balls = [ball for attack in attacks if (ball := ball_of(attack)) is not None and ball.norm == "linf"]
    return max((ball.eps for ball in balls), default=_DEFAULT_EPS)


def _required(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise UserError("the data have no labels, and accuracy needs them: give (images, labels)")
    return labels


def _sound(attack: Perturbation, attacked: object, clean: Tensor) -> Tensor:
    """What an attack returned, if it keeps to the attack's own rules."""
    if not isinstance(attacked, Tensor) or attacked.shape != clean.shape:
        what = tuple(attacked.shape) if isinstance(attacked, Tensor) else type(attacked).__name__
        raise UserError(f"{attack} returns {what} for images of shape {tuple(clean.shape)}")
    attacked = attacked.detach().to(clean)
    if out_of_range(attacked).any():
        raise UserError(f"{attack} returns images with NaN or values outside [0, 1]; its results cannot be trusted")
    ball = ball_of(attack)
    if ball is not None and ball.outside(attacked, clean).any():
        distance = float(ball.distances(attacked, clean).max())
        raise UserError(f"{attack} returns images at {ball.norm} distance {distance:.6g}, outside its ball of {ball}")
    return attacked


def _require_logits(name: str, logits: Tensor) -> None:
    """Probabilities look like logits, but attacks on them follow a gradient that vanishes."""
    wide = logits.double()
    if logits.shape[1] > 1 and bool((wide >= 0).all()) and bool(((wide.sum(1) - 1).abs() < _SUM_TOLERANCE).all()):
        raise UserError(f"the model {name!r} returns probabilities, which add up to 1: leave out its softmax")


def _digest(images: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256(f"{images.dtype}:{tuple(images.shape)}:{labels.tolist()}".encode())
    digest.update(images.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
