"""``attackroute train``: train a network and keep it in a folder that the other commands can open."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attackroute.cli import options
from attackroute.cli.console import Output
from attackroute.errors import UserError

if TYPE_CHECKING:
    from attackroute.accuracy import Accuracy
    from attackroute.data import ImageData
    from attackroute.training import EpochRecord, TrainResult

EXAMPLES = """
 Examples:

   A network in about a minute, without a download
   $ attackroute train --model vgg_small --data mnist-sample --epochs 3 --out runs/digits

   A quarter-width VGG-16 on CIFAR-10, with the usual augmentation
   $ attackroute train --model vgg16 --width 0.25 --data cifar10:~/data --augment crop-flip \\
       --epochs 30 --out runs/vgg

   Go on after an interruption: the same command with --resume, for the same result
   $ attackroute train --model vgg16 --width 0.25 --data cifar10:~/data --augment crop-flip \\
       --epochs 30 --out runs/vgg --resume

   A network of your own, made by make_net() in mynets.py, on your own images
   $ attackroute train --model mynets:make_net --data folder:photos --image-size 64 --out runs/photos

 The folder, which other commands take as --model:

   best.safetensors, last.safetensors   weights; the best ones are loaded
   model.json                           how to build the network
   log.jsonl, settings.json             one line an epoch; how it was trained
   state.pt                             what --resume needs besides
"""


class Schedules(str, Enum):
    """Names of learning rate schedules."""

    ONE_CYCLE = "one-cycle"
    COSINE = "cosine"


class Augmentations(str, Enum):
    """Names of augmentations."""

    NONE = "none"
    CROP = "crop"
    CROP_FLIP = "crop-flip"


_TRAINING = "The training"


def train(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where checkpoints and the log go.")],
    width: Annotated[
        float,
        typer.Option(
            "--width",
            metavar="FACTOR",
            parser=options.parse_factor,
            rich_help_panel="The network",
            help="Factor on the channels of a built-in network.",
        ),
    ] = 1.0,
    image_size: options.ImageSize = None,
    skip_unreadable: options.SkipUnreadable = False,
    epochs: Annotated[
        int, typer.Option("--epochs", metavar="N", min=1, rich_help_panel=_TRAINING, help="Passes over the images.")
    ] = 30,
    lr: Annotated[
        float,
        typer.Option(
            "--lr",
            metavar="RATE",
            parser=options.parse_factor,
            rich_help_panel=_TRAINING,
            help="Largest learning rate.",
        ),
    ] = 0.1,
    schedule: Annotated[
        Schedules, typer.Option("--schedule", rich_help_panel=_TRAINING, help="Course of the learning rate.")
    ] = Schedules.ONE_CYCLE,
    weight_decay: Annotated[
        float,
        typer.Option(
            "--weight-decay",
            metavar="FACTOR",
            parser=options.parse_number,
            rich_help_panel=_TRAINING,
            help="L2 penalty on all parameters.",
        ),
    ] = 5e-4,
    augment: Annotated[
        Augmentations,
        typer.Option("--augment", rich_help_panel=_TRAINING, help="Random shifts, also with mirror images."),
    ] = Augmentations.NONE,
    amp: Annotated[
        bool, typer.Option("--amp", rich_help_panel=_TRAINING, help="Mixed precision, for speed on GPUs.")
    ] = False,
    batch_size: options.BatchSize = 128,
    workers: Annotated[
        int,
        typer.Option(
            "--workers", metavar="N", min=0, rich_help_panel="The run", help="Processes that read the images."
        ),
    ] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", rich_help_panel="The run", help="Go on with the run in --out; start one if there is none."
        ),
    ] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a network with cross entropy.

    The run repeats bit for bit with the same seed on the same machine, keeps a checkpoint after every epoch, and goes
    on with --resume after Ctrl-C, SIGTERM or a crash as if it had never stopped.
    """
    import torch

    from attackroute.cli.networks import ModelCard, spec_for, with_own_normalisation
    from attackroute.data import load_data
    from attackroute.models import build
    from attackroute.training import TrainSettings
    from attackroute.training import train as run_training

    output = Output(as_json, quiet)
    settings = TrainSettings(
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        schedule=schedule.value,
        augment=augment.value,
        amp=amp,
        seed=seed,
        workers=workers,
    )
    home = options.resolve_device(device)
    train_data = load_data(data, split="train", image_size=image_size, skip_unreadable=skip_unreadable)
    test_data = _test_data(data, train_data, output, image_size, skip_unreadable)
    for part in (train_data, test_data):
        options.report_skipped(part, output)
    spec = spec_for(model, train_data, width=width)
    torch.manual_seed(seed)
    network = build(spec).to(home)
    card = ModelCard(with_own_normalisation(spec, network), train_data.classes)
    _prepare(options.open_folder(out), card, resume=resume)
    with output.progress("steps") as progress:
        result = run_training(
            network,
            train_data.dataset,
            None if test_data is None else test_data.dataset,
            settings,
            folder=out,
            resume=resume,
            on_epoch=lambda record: output.note(_epoch_line(record, epochs)),
            progress=progress,
        )
    _report(result, out, output)


def _test_data(
    spec: str, train_data: ImageData, output: Output, image_size: int | None, skip_unreadable: bool
) -> ImageData | None:
    if train_data.split == "all":
        output.note("note: the folder has no train/ and test/ (or val/), so there is nothing to test on")
        return None
    from attackroute.data import load_data

    return load_data(spec, split="test", image_size=image_size, skip_unreadable=skip_unreadable)


def _prepare(folder: Path, card: Any, *, resume: bool) -> None:
    """Describe the network in its folder before the first step, so that a run that is killed can be opened too."""
    from attackroute.checkpoints import STATE

    if (folder / STATE).exists() and not resume:
        raise UserError(f"{folder} already holds a run; pass --resume to go on with it, or choose another folder")
    card.save(folder)


def _epoch_line(record: EpochRecord, epochs: int) -> str:
    test = "" if record.test is None else f", test accuracy {record.test.value:.2%}"
    return (
        f"epoch {record.epoch}/{epochs}: loss {record.loss:.3f}, "
        f"training accuracy {record.train.value:.2%}{test}, {record.seconds:.0f} s"
    )


def _report(result: TrainResult, folder: Path, output: Output) -> None:
    best, last = result.best, result.last
    output.result(
        {
            "folder": str(folder),
            "epochs": last.epoch,
            "resumed_from": result.resumed_from,
            "loss": last.loss,
            "train_accuracy": last.train.value,
            "test_accuracy": None if last.test is None else last.test.value,
            "best_epoch": None if best is None else best.epoch,
            "best_test_accuracy": None if best is None or best.test is None else best.test.value,
        }
    )
    if best is not None and best.test is not None:
        output.line(f"best test accuracy {_with_interval(best.test)}, epoch {best.epoch} of {last.epoch}")
    output.line(f"training accuracy {last.train.value:.2%}; weights and log are in {folder}")
    output.line(f"next: attackroute trace --model {folder} --data ...")


def _with_interval(accuracy: Accuracy) -> str:
    low, high = accuracy.interval
    return f"{accuracy.value:.2%} (95 % interval {low:.2%} to {high:.2%})"
