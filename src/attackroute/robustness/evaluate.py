"""Robustness evaluation: accuracy under attacks, of one model or of several side by side."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attackroute.core.batches import BatchStream, Data, samples_in
from attackroute.core.checks import check_attackable, checked_labels, checked_logits, require_no_probabilities
from attackroute.core.distributed import current
from attackroute.core.document import library_versions
from attackroute.core.errors import UserError
from attackroute.core.files import made_folder
from attackroute.core.journal import MEASUREMENTS, Journal, samples_digest
from attackroute.core.model_state import frozen, placement, weights_digest
from attackroute.core.random import derived_seed, seeded
from attackroute.robustness.attack import Attack, Perturbation, checked_result
from attackroute.robustness.evaluation import CLEAN, EVALUATION, Evaluation
from attackroute.robustness.masking import SIGNS, Candidates, Check, masking_probes, probed
from attackroute.robustness.registry import named_attacks

DEFAULT_ATTACKS = ("fgsm", "mi-fgsm", "pgd", "gaussian-noise")

_DEFAULT_EPS = 8 / 255  # of the checks, where no attack states a radius

Progress = Callable[[int, "int | None", str], None]
"""Called with the images that were attacked so far, how many there will be, and what is under way."""


def evaluate(
    model: nn.Module | Mapping[str, nn.Module],
    data: Data,
    attacks: Mapping[str, Attack | str] | Iterable[Attack | str] | Attack | str = DEFAULT_ATTACKS,
    *,
    batch_size: int = 128,
    seed: int = 0,
    checks: int = 256,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    origin: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Accuracy on clean images and under each attack, with signs of masked gradients.

    Models run in eval mode on the devices of their parameters and come back as they were. Random numbers belong to the
    image and the seed, so that accuracies depend neither on batch size nor on order, but for rounding; ``autoattack``
    and ``square`` alone draw for a batch as a whole, and models that draw random numbers do so too. All models see the
    same noise.

    Args:
        model: Maps images ``(N, C, H, W)`` in [0, 1] to logits ``(N, classes)``; or several of them by name.
        data: A DataLoader (any iterable) of ``(images, labels)``, or one such pair of tensors.
        attacks: Specifications as :func:`attackroute.parse_attack` reads them, attacks, callables
            ``(model, images, labels) -> images``, or objects of torchattack, torchattacks and foolbox; one, several, or
            several by name. Clean images are always measured first.
        batch_size: Rows at a time when ``data`` is tensors, and in the checks; a DataLoader brings its own.
        seed: Of attacks that are given as text without a seed of their own, of the choice of images for the checks, and
            of PyTorch's global generators, which random models draw from; those come back as they were.
        checks: On how many images to look for masked gradients (:mod:`attackroute.robustness.masking`), at the largest
            radius among the attacks; 0 for no checks. The choice does not depend on the images' order.
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
    if isinstance(attacks, Iterable) and not isinstance(attacks, (str, Mapping)):
        attacks = [attack for attack in attacks if attack != CLEAN]
    chosen = () if attacks == [] else tuple(named_attacks(attacks, seed=seed).values())
    if checks < 0:
        raise UserError(f"checks {checks} is not a number of images; give 0 for no checks")
    if resume and folder is None:
        raise UserError("resume goes on with the evaluation in a folder; name the folder (with --out)")
    total = samples_in(data)
    settings = {
        **(origin or {}),
        "models": {name: weights_digest(network) for name, network in models.items()},
        "attacks": [attack.to_json() for attack in chosen],
        "samples_in_all": total,
        "batch_size": batch_size,
        "seed": seed,
        "check_samples": checks,
        "devices": {name: placement(network)[0].type for name, network in models.items()},
    }
    team = current()
    journal = team.first(lambda: _open_journal(folder, settings, resume=resume))
    run = _Run(models, seed, journal, progress)
    if total is not None:
        run.total = total * (1 + len(chosen)) * len(models)
    with ExitStack() as stack:
        for network in {id(item): item for item in models.values()}.values():
            stack.enter_context(frozen(network))
        # the widest number format, so that no model gets images that were rounded for another
        reader = max(models.values(), key=lambda network: torch.finfo(placement(network)[1]).bits)
        stream = BatchStream(reader, data, batch_size)
        to_check = run.measure(stream, (None, *chosen), checks)
        eps = max((attack.radius for attack in chosen if attack.radius is not None), default=_DEFAULT_EPS)
        signs = run.check_masking(to_check, eps, batch_size)
    order = [(name, _title(attack)) for name in models for attack in (None, *chosen)]
    evaluation = Evaluation.of(
        {key: tuple(run.right[key]) for key in order},
        run.seconds,
        chosen,
        signs,
        settings={**settings, "libraries": library_versions()},
    )
    if team.leads and folder is not None:
        evaluation.document().save(folder)
    return evaluation


_Measurement = tuple[tuple[str, int, str, str], str, Mapping[str, Any]]
"""Of one model under one attack on one batch: ``("samples", number of the batch, model, attack)``, under which it is
written down; the batch's digest; and labels, predictions and seconds."""


@dataclass
class _Run:
    """The models, and what was counted so far."""

    models: Mapping[str, nn.Module]
    seed: int
    journal: Journal
    progress: Progress | None
    total: int | None = None
    done: int = 0
    right: defaultdict[tuple[str, str], list[bool]] = field(default_factory=lambda: defaultdict(list))
    seconds: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))

    def measure(self, stream: BatchStream, attacks: Sequence[Perturbation | None], checks: int) -> Candidates:
        """Measure all models under attacks (None: on clean images), and choose some images for the checks."""
        alone = current().count == 1

        def once(images: Tensor, given: Tensor | None) -> tuple[Iterable[_Measurement], Candidates]:
            labels = _required(given)
            check_attackable(images, labels)
            measurements = self._measured(stream.number, images, labels, attacks)
            # alone, each measurement is written down before the next one is made
            candidates = Candidates.of(images, labels, self.seed).first(checks)
            return measurements if alone else list(measurements), candidates

        chosen: Candidates | None = None
        for measurements, candidates in stream.map(once):
            for measurement in measurements:
                self._take(measurement)
            chosen = candidates if chosen is None else chosen.joined(candidates, checks)
        if chosen is None:
            raise UserError("the data hold no sample: the loader is empty")
        return chosen

    def check_masking(self, chosen: Candidates, eps: float, batch_size: int) -> tuple[Check, ...]:
        """Look for masked gradients of each model on the chosen images."""
        _, images, labels = chosen
        if not len(images):
            return ()
        digest = samples_digest(images, labels)
        probes = masking_probes(eps, self.seed)
        checks: list[Check] = []
        for name, model in self.models.items():
            device, dtype = placement(model)
            x, y = images.to(device, dtype), labels.to(device)
            outcomes: dict[str, list[int] | str] = {}
            for title, probe in probes.items():
                if isinstance(probe, str):  # why it cannot be made
                    outcomes[title] = probe
                    continue
                key = ("checks", name, title)
                record = self.journal.recall(key, digest)
                if record is None:
                    if self.progress is not None:
                        self.progress(0, None, f"{name}: check for masking, {title}")
                    with seeded(derived_seed(self.seed, f"{title}/{digest}", 0)):
                        outcome = current().first(partial(probed, probe, model, x, y, batch_size))
                    record = self.journal.keep(key, digest, outcomes=outcome)
                outcomes[title] = record["outcomes"]
            checks += [sign.judge(name, outcomes) for sign in SIGNS]
        return tuple(checks)

    def _measured(
        self, number: int, images: Tensor, labels: Tensor, attacks: Sequence[Perturbation | None]
    ) -> Iterator[_Measurement]:
        """Each attack on each model, made now or before, on the batch of that number in the data's order."""
        digest = samples_digest(images, labels)
        for attack in attacks:
            for name in self.models:
                title = _title(attack)
                self._tell(f"{name}: {title}")
                key = ("samples", number, name, title)
                record = self.journal.recall(key, digest)
                if record is None:
                    started = time.perf_counter()
                    with seeded(derived_seed(self.seed, f"{title}/{digest}", 0)):
                        predictions = self._predictions(name, attack, images, labels)
                    seconds = round(time.perf_counter() - started, 4)
                    record = {"labels": labels.tolist(), "predictions": predictions, "seconds": seconds}
                yield key, digest, record

    def _predictions(self, name: str, attack: Perturbation | None, images: Tensor, labels: Tensor) -> list[int]:
        model = self.models[name]
        device, dtype = placement(model)
        x, y = images.to(device, dtype), labels.to(device)
        attacked = x if attack is None else checked_result(attack, attack(model, x, y), x)
        with torch.no_grad():
            logits = checked_logits(model(attacked.clone()), len(attacked))
        checked_labels(y, logits.shape[1], len(y))
        if attack is None:
            require_no_probabilities(logits, f"the model {name!r}")
        predictions: list[int] = logits.argmax(1).tolist()
        return predictions

    def _take(self, measurement: _Measurement) -> None:
        """Write a measurement down, if it is new, and count it; they come in the data's order."""
        key, digest, record = measurement
        _, _, model, title = key
        if self.journal.recall(key, digest) is None:
            self.journal.keep(key, digest, **record)
        self.seconds[model, title] += record["seconds"]
        self.right[model, title] += map(int.__eq__, record["labels"], record["predictions"])
        self.done += len(record["labels"])
        self._tell(f"{model}: {title}")

    def _tell(self, message: str) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total, message)


def _open_journal(folder: str | os.PathLike[str] | None, settings: Mapping[str, Any], *, resume: bool) -> Journal:
    """The measurements of a folder; those of a finished evaluation make way for a new one, others only with a word."""
    if folder is None:
        return Journal(None, settings)
    path = made_folder(folder)
    results = [path / f"{EVALUATION}.json", path / f"{EVALUATION}.csv"]
    journal = Journal(path / MEASUREMENTS, settings, () if resume else results)
    if resume:
        journal.resume()
    elif (path / MEASUREMENTS).exists() and not results[0].exists():
        raise UserError(
            f"{path} holds an unfinished evaluation; pass --resume to go on with it, or choose another folder"
        )
    return journal


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


def _title(attack: Perturbation | None) -> str:
    return CLEAN if attack is None else str(attack)


def _required(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise UserError("the data have no labels, and accuracy needs them: give (images, labels)")
    return labels
