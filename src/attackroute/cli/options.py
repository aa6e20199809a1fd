"""Groups of options that commands share, and the network, the images and the output that they name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attackroute.cli.arguments import (
    given,
    integer,
    one_of,
    option,
    parse_factor,
    parse_number,
    parse_sketches,
    settings_of,
    switch,
)
from attackroute.cli.console import Output
from attackroute.core.errors import UserError
from attackroute.tracing.config import CARRIERS, UNIT, Sketches, TraceConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from attackroute.hardening.settings import TrainSettings
    from attackroute.zoo.data import ImageBatches, ImageData

ROUTE, RUN, FILES = "The route", "The run", "The files"
"""Headings in the help."""

SPLITS = ("train", "test")
EXPECTED_MODELS = (
    "A folder that attackroute train wrote, preset:NAME (small networks for CIFAR-10 that come along: vgg16-cifar10, "
    "alexnet-cifar10, resnet18-cifar10), or vgg16, alexnet, resnet18, vgg_small, torchvision:NAME, timm:NAME or "
    "package.module:factory."
)
EXPECTED_WEIGHTS = "A state dict as .safetensors or .pt. A train folder brings its own."


def model_width_option() -> Any:
    """The field of ``--model-width``."""
    text = "Factor on the channels of a built-in network; a train folder knows its own."
    return option("--model-width", text, parse_factor, "FACTOR", default=None)


def classes_option() -> Any:
    """The field of ``--classes``."""
    return option("--classes", "Outputs of the network; else as the data has.", integer(1), "N", default=None)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a command runs and what it says."""

    title: ClassVar[str] = RUN
    batch_size: int = option("--batch-size", "Images at a time.", integer(1), "N", default=128)
    workers: int = option("--workers", "Processes that read the images.", integer(0), "N", default=0)
    seed: int = option("--seed", "Same seed, same machine: same result.", integer(0), "N", default=0)
    device: str = option("--device", "cpu, cuda, cuda:1, mps; auto takes what is there.", str, "NAME", default="auto")
    as_json: bool = switch("--json", "Print the result as JSON on stdout and nothing else there.")
    quiet: bool = switch("-q --quiet", "Print nothing but errors (and JSON, with --json).")

    @property
    def output(self) -> Output:
        """Where the command's words go."""
        return Output(self.as_json, self.quiet)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The network that is looked at."""

    title: ClassVar[str] = "The network"
    model: str = option("--model", EXPECTED_MODELS, str, "MODEL")
    weights: Path | None = option("--weights", EXPECTED_WEIGHTS, Path, "FILE", default=None)
    model_width: float | None = model_width_option()
    classes: int | None = classes_option()

    def open(self, images: ImageData) -> nn.Module:
        """The network for the images, with its weights, on the CPU."""
        from attackroute.zoo.weights import open_network

        return open_network(self.model, images, weights=self.weights, width=self.model_width, classes=self.classes)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """The images that are taken."""

    title: ClassVar[str] = "The images"
    data: str = option(
        "--data", "mnist-sample (digits, no download), cifar10:PATH, svhn:PATH, imagenet:PATH or folder:PATH.", str,
        "DATA",
    )  # fmt: skip
    split: str = option("--split", "Which part of the data.", one_of(*SPLITS), default="test")
    samples: int | None = option(
        "--samples", "Only so many images, drawn with --seed; else all.", integer(1), "N", default=None
    )
    image_size: int | None = option(
        "--image-size", "Resize the images to this size; else as the data set or the train folder has it.", integer(1),
        "PIXELS", default=None,
    )  # fmt: skip
    skip_unreadable: bool = switch("--skip-unreadable", "Leave out image files that cannot be read.")

    def open(self, run: RunOptions, models: Sequence[str] = (), split: str | None = None) -> ImageData:
        """The images, in the size that the first train folder among the models says; files left out are named."""
        from attackroute.zoo.data import load_data
        from attackroute.zoo.weights import find_card

        size = self.image_size
        if size is None:
            cards = (card for model in models if (card := find_card(model)) is not None)
            size = next((card.spec.image_size for _, card in cards), None)
        images = load_data(
            self.data, split=split or self.split, image_size=size, samples=self.samples, seed=run.seed,  # type: ignore[arg-type]
            skip_unreadable=self.skip_unreadable,
        )  # fmt: skip
        for path in images.skipped:
            run.output.note(f"note: left out {path}, which cannot be read")
        return images


@dataclass(frozen=True, kw_only=True)
class TracingOptions:
    """What a traced route follows."""

    title: ClassVar[str] = ROUTE
    carrier: str = option(
        "--carrier", "What a traced route follows: unit, how strongly channels could act on the next layer's (the "
        "paper's), or noise, how much of what --attack changes they pass on.", one_of(*CARRIERS), default=UNIT,
    )  # fmt: skip
    linear: bool = switch(
        "--linear", "Linear maps are route layers too: in ViT and Swin the attention's projections and the MLPs. Their "
        "neurons are output features, their positions tokens.",
    )  # fmt: skip
    sketches: Sketches = option(
        "--sketches", "Estimate edges without a closed form (attention, layer norm) from N random products each, such "
        "as 32: approximate, and far quicker; auto doubles N until the routes are clear.", parse_sketches, "N|auto",
        default=None,
    )  # fmt: skip

    def config(self, seed: int, *, freeze_gates: bool = False) -> TraceConfig:
        """The same for the library, which refuses what cannot be combined."""
        return TraceConfig(seed=seed, freeze_gates=freeze_gates, **given(self))


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a network is trained."""

    title: ClassVar[str] = "The training"
    epochs: int = option("--epochs", "Passes over the images.", integer(1), "N", default=30)
    lr: float = option("--lr", "Largest learning rate.", parse_factor, "RATE", default=0.1)
    schedule: str = option(
        "--schedule", "Course of the learning rate.", one_of("one-cycle", "cosine"), default="one-cycle"
    )
    weight_decay: float = option(
        "--weight-decay", "L2 penalty on all parameters.", parse_number, "FACTOR", default=5e-4
    )
    augment: str = option(
        "--augment", "Random shifts, also with mirror images.", one_of("none", "crop", "crop-flip"), default="none"
    )
    attack: str | None = option(
        "--attack", "Train against this attack, as pgd or pgd:eps=4/255,steps=7.", str, "NAME", default=None,
        unset="clean images",
    )  # fmt: skip
    robust_samples: int = option(
        "--robust-samples", "Images that are attacked to choose the best epoch, with --attack.", integer(1), "N",
        default=500,
    )  # fmt: skip
    accumulate: int = option(
        "--accumulate", "Take each batch in N parts, one after the other, for less memory.", integer(1), "N", default=1
    )
    clip_norm: float | None = option(
        "--clip-norm", "Largest norm of a step's whole gradient.", parse_factor, "NORM", default=None, unset="no limit"
    )
    holdout: float = option(
        "--holdout", "Share of the training images that is not learnt from but chooses the best epoch; with 0, the "
        "test images do, and their accuracy is a little too good.", parse_number, "SHARE", default=0.1,
    )  # fmt: skip
    amp: bool = switch("--amp", "Mixed precision, for speed on GPUs.")
    channels_last: bool = switch("--channels-last", "Hold images and weights channels last, for speed on GPUs.")
    resume: bool = switch("--resume", "Go on with the run in --out; start one if there is none.", group=RUN)

    @property
    def chosen_on(self) -> str:
        """What images choose the best epoch, in a word."""
        return "held-out" if self.holdout else "test"

    def settings(self, run: RunOptions) -> TrainSettings:
        """The same for the library, which refuses what is out of range."""
        from attackroute.hardening.settings import TrainSettings

        return TrainSettings(**settings_of(TrainSettings, run, self))


@dataclass(frozen=True, eq=False)
class Session:
    """What a command on one network works with.

    Attributes:
        network: On its device, in eval mode.
        images: What it is shown.
        settings: What results depend on: model, data, split, samples, seed, number and shape of the images, device.
        run: How it runs and what it says.
    """

    network: nn.Module
    images: ImageData
    settings: Mapping[str, Any]
    run: RunOptions

    @classmethod
    def open(cls, network: NetworkOptions, images: ImageOptions, run: RunOptions) -> Session:
        """Open what the options name."""
        device = resolve_device(run.device)
        data = images.open(run, [network.model])
        settings = {
            "model": network.model,
            "data": images.data,
            "split": data.split,
            "samples": images.samples,
            "seed": run.seed,
            "images": [len(data), *data.shape],
            "device": device.type,
        }
        return cls(network.open(data).to(device), data, settings, run)

    @property
    def batches(self) -> ImageBatches:
        """The images, batch by batch."""
        from attackroute.zoo.data import ImageBatches

        return ImageBatches(self.images, self.run.batch_size, workers=self.run.workers)

    @contextmanager
    def reading(
        self, unit: str, kept: str | None = None
    ) -> Iterator[tuple[ImageBatches, Callable[[int, int | None], None]]]:
        """The images batch by batch, and what moves a progress bar that says how their reading goes."""
        batches = self.batches
        with self.run.output.progress(unit, kept) as progress:
            yield batches, lambda done, total: progress(done, total, batches.reading)


def resolve_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes an accelerator where there is one, and each process one of its own.

    Raises:
        UserError: PyTorch does not know the device, or the machine lacks it.
    """
    import torch

    from attackroute.core.distributed import own_device

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return own_device("cpu" if accelerator is None else accelerator.type)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); leave it out, or take cpu") from error
    return own_device(name)


def open_folder(folder: Path) -> Path:
    """Create the folder where it is missing, or say in one line why that cannot be; of processes, the first does."""
    from attackroute.core.distributed import leading

    try:
        if leading():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be a folder ({error.strerror}); name another") from error
    return folder
