"""Groups of options that commands share, and the network, the images and the output that they name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attackroute.cli.arguments import (
    given,
    integer,
    one_of,
    option,
    parse_factor,
    parse_number,
    parse_path,
    settings_of,
    switch,
)
from attackroute.cli.console import Output, Progress
from attackroute.core.distributed import current, leading, own_device
from attackroute.core.errors import UserError
from attackroute.tracing.config import CARRIERS, RAW, UNIT, UNITS, TraceConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from attackroute.hardening.settings import TrainSettings
    from attackroute.robustness.attack import Perturbation
    from attackroute.zoo.data import ImageBatches, ImageData

NETWORK, ROUTE, RUN, FILES = "The network", "The route", "The run", "The files"  # headings in the help
_BESIDE = ".new"  # folder of what is to replace the files above it

EXPECTED_MODELS = (
    "A folder that attackroute train wrote, preset:NAME (small networks for CIFAR-10 that come along: vgg16-cifar10, "
    "alexnet-cifar10, resnet18-cifar10), or vgg16, alexnet, resnet18, vgg_small, torchvision:NAME, timm:NAME or "
    "package.module:factory."
)


def count(flags: str, help: str, default: int | None = None, *, least: int = 1, **how: Any) -> Any:
    """The field of an option that is a number of things."""
    return option(flags, help, integer(least), "N", default=default, **how)


def out_option(help: str, **how: Any) -> Any:
    """The field of ``--out FOLDER``."""
    return option("--out", help, parse_path, "FOLDER", group=FILES, **how)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a command runs and what it says."""

    title: ClassVar[str] = RUN
    batch_size: int = count("--batch-size", "Images at a time.", 128)
    workers: int = option("--workers", "Processes that read the images.", integer(0, 1024), "N", default=0)
    seed: int = count("--seed", "Same seed, same machine: same result.", 0, least=0)
    device: str = option("--device", "cpu, cuda, cuda:1, mps; auto takes what is there.", str, "NAME", default="auto")
    overwrite: bool = switch("--overwrite", "Replace earlier results in --out, once this run is done.", group=FILES)
    as_json: bool = switch("--json", "Print the result as JSON on stdout and nothing else there.")
    quiet: bool = switch("-q --quiet", "Print nothing but errors (and JSON, with --json).")

    @property
    def output(self) -> Output:
        return Output(self.as_json, self.quiet)


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The network that is looked at."""

    title: ClassVar[str] = NETWORK
    model: str = option("--model", EXPECTED_MODELS, str, "MODEL")
    weights: Path | None = option(
        "--weights", "A state dict as .safetensors or .pt. A train folder brings its own.", parse_path, "FILE",
        default=None,
    )  # fmt: skip
    model_width: float | None = option(
        "--model-width", "Factor on the channels of a built-in network; a train folder knows its own.", parse_factor,
        "FACTOR", default=None,
    )  # fmt: skip
    classes: int | None = count("--classes", "Outputs of the network; else as the data has.")

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
    split: str = option("--split", "Which part of the data.", one_of("train", "test"), default="test")
    samples: int | None = count("--samples", "Only so many images, drawn with --seed; else all.")
    image_size: int | None = option(
        "--image-size", "Resize the images to this size; else as the data set or the train folder has it.",
        integer(1, 1 << 14), "PIXELS", default=None,
    )  # fmt: skip
    grey: bool = switch("--grey", "Read image files in grey, as a train folder of one channel does anyway.")

    def open(self, run: RunOptions, models: Sequence[str] = (), split: str | None = None) -> ImageData:
        """The images, of the size and channels that the first train folder among the models says."""
        from attackroute.zoo.data import load_data
        from attackroute.zoo.weights import find_card

        spec = next((card[1].spec for model in models if (card := find_card(model)) is not None), None)
        images = load_data(
            self.data, split=split or self.split, samples=self.samples, seed=run.seed,  # type: ignore[arg-type]
            image_size=self.image_size or getattr(spec, "image_size", None),
        )  # fmt: skip
        if images.shape[0] != 3 or not (self.grey or getattr(spec, "in_channels", None) == 1):
            return images
        dataset: Any = _Grey(images.dataset)
        return replace(images, dataset=dataset, shape=(1, *images.shape[1:]))


@dataclass(frozen=True)
class _Grey:
    """A data set of images (3, H, W) with their luma (1, H, W) instead, ITU-R 601."""

    images: Any

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.images[index]
        return (0.299 * image[:1] + 0.587 * image[1:2] + 0.114 * image[2:]), label


@dataclass(frozen=True, kw_only=True)
class TracingOptions:
    """What a traced route follows."""

    title: ClassVar[str] = ROUTE
    carrier: str = option(
        "--carrier", "What a traced route follows: unit, how strongly channels could act on the next layer's (the "
        "paper's), or noise, how much of what --attack changes they pass on.", one_of(*CARRIERS), default=UNIT,
    )  # fmt: skip
    units: str = option(
        "--units", "In what neurons are measured: raw, their values (the paper's), or std, their standard deviation "
        "over the images, so that nothing depends on how the network is written down.", one_of(*UNITS), default=RAW,
    )  # fmt: skip
    linear: bool = switch(
        "--linear", "Linear maps are route layers too: in ViT and Swin the attention's projections and the MLPs. Their "
        "neurons are output features, their positions tokens.",
    )  # fmt: skip
    sketches: int | None = count(
        "--sketches", "Estimate edges without a closed form (attention, layer norm) from N random products each, such "
        "as 32: approximate, and far quicker.",
    )  # fmt: skip

    def config(self, seed: int) -> TraceConfig:
        """The same for the library, which refuses what cannot be used or combined."""
        return TraceConfig(seed=seed, **given(self))


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a network is trained."""

    title: ClassVar[str] = "The training"
    epochs: int = count("--epochs", "Passes over the images.", 30)
    lr: float = option("--lr", "Largest learning rate.", parse_factor, "RATE", default=0.1)
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
    robust_samples: int = count(
        "--robust-samples", "Images that are attacked to choose the best epoch, with --attack.", 500
    )
    holdout: float = option(
        "--holdout", "Share of the training images that is not learnt from but chooses the best epoch; with 0, the "
        "test images do, and their accuracy is a little too good.", parse_number, "SHARE", default=0.1,
    )  # fmt: skip
    amp: bool = switch("--amp", "Mixed precision, for speed on GPUs.")
    channels_last: bool = switch("--channels-last", "Hold images and weights channels last, for speed on GPUs.")
    resume: bool = switch("--resume", "Go on with the run in --out; start one if there is none.", group=RUN)

    @property
    def parsed_attack(self) -> Perturbation | None:
        """What is trained against; None for clean images."""
        from attackroute.robustness.registry import parse_attack

        return None if self.attack is None else parse_attack(self.attack)

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
    """What a command on one network works with; the network is on its device, in eval mode.

    Results depend on the settings: model, data, split, samples, seed, number and shape of the images, device.
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
        settings: dict[str, Any] = {"model": network.model, "data": images.data, "split": data.split}
        settings |= {"samples": images.samples, "seed": run.seed, "images": [len(data), *data.shape]}
        settings["device"] = device.type
        return cls(network.open(data).to(device), data, settings, run)

    @contextmanager
    def reading(self, unit: str, kept: str | None = None) -> Iterator[tuple[ImageBatches, Progress]]:
        """The images batch by batch, and what moves a progress bar."""
        from attackroute.zoo.data import ImageBatches

        batches = ImageBatches(self.images, self.run.batch_size, workers=self.run.workers)
        with self.run.output.progress(unit, kept) as progress:
            yield batches, progress

    def measured(self, config: TraceConfig) -> TraceConfig:
        """The config with the images' deviations, where it asks for such units."""
        if config.units == RAW:
            return config
        with self.reading("images measured for their units") as (batches, progress):
            return config.measured(self.network, batches, progress=progress)


def resolve_device(name: str) -> torch.device:
    """The device of that name, or a `UserError`; ``auto`` takes an accelerator, each process one of its own."""
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return own_device("cpu" if accelerator is None else accelerator.type)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); leave it out, or take cpu") from error
    return own_device(name)


@contextmanager
def results_in(folder: Path, files: Sequence[str], run: RunOptions, *, resume: bool | None = None) -> Iterator[Path]:
    """The folder into which a command writes; where it replaces an earlier run's files, one beside them until the end.

    The files are patterns of what the command writes: where such are there, the user must resume (None where the
    command cannot) or overwrite. No two commands work in one folder at a time.
    """
    from attackroute.core.files import locked, made_folder

    beside = folder / _BESIDE

    def replaces() -> bool:
        if resume:
            return run.overwrite and beside.is_dir()
        if refuse_earlier(folder, files, run, resume=resume) is None:
            return False
        shutil.rmtree(beside, ignore_errors=True)
        return made_folder(beside).is_dir()

    with ExitStack() as stack:
        if leading():
            stack.enter_context(locked(folder))
        replacing = current().first(replaces)
        yield beside if replacing else folder
        if replacing:
            current().first(lambda: _replace(folder, beside, files))


def refuse_earlier(folder: Path, files: Sequence[str], run: RunOptions, *, resume: bool | None = None) -> Path | None:
    """A file of an earlier run that may be replaced, if there is one; a `UserError` if it may not."""
    earlier = next((file for pattern in files for file in sorted(folder.glob(pattern))), None)
    if earlier is not None and not run.overwrite:
        go_on = "" if resume is None else "--resume to go on with it, "
        raise UserError(
            f"{folder} already holds a run ({earlier.relative_to(folder)}); pass {go_on}--overwrite to replace it, or "
            "choose another folder"
        )
    return earlier


def _replace(folder: Path, beside: Path, files: Sequence[str]) -> None:
    """Let new files take the place of old ones; documents come last, so that where they are, all is there."""
    try:
        new = [file.relative_to(beside) for file in beside.rglob("*") if file.is_file()]
        for old in {file for pattern in files for file in folder.glob(pattern)}:
            if old.relative_to(folder) not in new and not old.is_dir():
                old.unlink()
        for name in sorted(new, key=lambda name: (name.suffix == ".json", name)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(beside / name, folder / name)
        shutil.rmtree(beside)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: cannot be replaced ({reason}); what is new is in {beside}") from None
