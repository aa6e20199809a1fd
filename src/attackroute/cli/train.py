"""``attackroute train``: train a network and keep it in a folder that the other commands can open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attackroute.cli.arguments import given, shared
from attackroute.cli.console import Output
from attackroute.cli.options import (
    ImageOptions,
    NetworkOptions,
    RunOptions,
    TrainingOptions,
    out_option,
    resolve_device,
    results_in,
)

if TYPE_CHECKING:
    from attackroute.hardening.checkpoint import EpochRecord
    from attackroute.hardening.training import TrainResult
    from attackroute.zoo.data import ImageData

KEPT = "finished epochs are kept; give the same command with --resume to go on"
TRAINING = "training"  # kind of the result, and name of its file
RUN_FILES = ("state.pt", "last.safetensors", "best.safetensors", "log.jsonl", "settings.json")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Train a network with cross entropy, on clean images or, with --attack, on attacked ones (adversarial training).

    The run repeats bit for bit with the same seed on the same machine, keeps a checkpoint after every epoch, and goes
    on with --resume after Ctrl-C, SIGTERM or a crash as if it had never stopped.
    """

    out: Path = out_option("Where checkpoints and the log go.")
    network: NetworkOptions = shared(hide=("weights", "classes"))
    images: ImageOptions = shared(hide=("split", "samples"))
    training: TrainingOptions
    run: RunOptions


def train(options: TrainOptions) -> None:
    """Train a network into a folder."""
    import torch

    from attackroute.core.document import Document
    from attackroute.hardening.training import train as train_network
    from attackroute.zoo.networks import build
    from attackroute.zoo.weights import ModelCard, spec_for, with_own_normalisation

    output, training = options.run.output, options.training
    settings, attack = training.settings(options.run), training.parsed_attack
    device = resolve_device(options.run.device)
    train_images = options.images.open(options.run, split="train")
    test_images = None if training.holdout else open_test_images(options.images, options.run, train_images)
    learnt, chosen_by = divided(train_images, test_images, training.holdout, options.run.seed)
    spec = spec_for(options.network.model, train_images, width=options.network.model_width)
    torch.manual_seed(options.run.seed)
    network = build(spec).to(device)
    card = ModelCard(with_own_normalisation(spec, network), train_images.classes)
    files = (*RUN_FILES, f"{TRAINING}.json")
    with results_in(options.out, files, options.run, resume=training.resume) as folder:
        card.save(folder)  # so that a run that is killed can be opened too
        with output.progress("steps", KEPT) as progress:
            result = train_network(
                network, learnt.dataset, None if chosen_by is None else chosen_by.dataset, settings, attack=attack,
                folder=folder, resume=training.resume, on_epoch=epoch_notes(output, training), progress=progress,
                note=output.note,
            )  # fmt: skip
        best, last = result.best, result.last
        lines = [] if best is None else [best_line(best, last.epoch, training.chosen_on)]
        lines.append(f"training accuracy {last.train.value:.2%}")
        shown = given(options, "network", "images", "training")
        shown |= {"batch_size": settings.batch_size, "seed": settings.seed}
        document = Document(TRAINING, shown, reading="; ".join(lines), about=_summary(result, options))
        document.save(folder)
    output.result({**document.to_json(), "folder": str(options.out)})
    output.line("\n".join(lines) + f"; weights and log are in {options.out}")
    output.line(f"next: attackroute trace --model {options.out} --data ...")


def _summary(result: TrainResult, options: TrainOptions) -> dict[str, Any]:
    best, last = result.best, result.last
    return {
        "title": "Training",
        "epochs": last.epoch,
        "resumed_from": result.resumed_from,
        "loss": last.loss,
        "train_accuracy": last.train.value,
        "test_accuracy": None if last.test is None else last.test.value,
        "tested_on": f"{options.training.chosen_on} images",
        "best_epoch": None if best is None else best.epoch,
        "best_test_accuracy": None if best is None or best.test is None else best.test.value,
        "best_robust_accuracy": None if best is None or best.robust is None else best.robust.value,
    }


# What the commands which train have in common


def open_test_images(images: ImageOptions, run: RunOptions, train_images: ImageData, *models: str) -> ImageData | None:
    """The test images that belong to the training images; None, with a note, where the folder has none."""
    if train_images.split == "all":
        run.output.note("note: the folder has no train/ and test/ (or val/), so there is nothing to test on")
        return None
    return images.open(run, models, split="test")


def divided(
    train_images: ImageData, test_images: ImageData | None, holdout: float, seed: int
) -> tuple[ImageData, ImageData | None]:
    """The images to learn from, and those that choose the best epoch: held out of the former, or the test images."""
    if not holdout:
        return train_images, test_images
    from attackroute.zoo.data import held_out

    learnt, kept = held_out(train_images.dataset, holdout, seed)
    return replace(train_images, dataset=learnt), replace(train_images, dataset=kept)


def epoch_notes(output: Output, training: TrainingOptions) -> Callable[[EpochRecord], None]:
    """What to call after every epoch: it says what the epoch did."""

    def told(record: EpochRecord) -> None:
        test = "" if record.test is None else f", {training.chosen_on} accuracy {record.test.value:.2%}"
        robust = "" if record.robust is None else f", under the attack {record.robust.value:.2%}"
        penalties = "".join(f", {name} penalty {value:.4g}" for name, value in record.penalties.items())
        output.note(
            f"epoch {record.epoch}/{training.epochs}: loss {record.loss:.3f}{penalties}, "
            f"training accuracy {record.train.value:.2%}{test}{robust}, {record.seconds:.0f} s"
        )

    return told


def best_line(best: EpochRecord, epochs: int, tested_on: str) -> str:
    """What the best epoch reached, with intervals."""
    accuracies = []
    for name, accuracy in ((f"{tested_on} accuracy", best.test), ("under the attack", best.robust)):
        if accuracy is not None:
            low, high = accuracy.interval
            accuracies.append(f"{name} {accuracy.value:.2%} (95 % interval {low:.2%} to {high:.2%})")
    return f"best epoch {best.epoch} of {epochs}: {', '.join(accuracies)}"
