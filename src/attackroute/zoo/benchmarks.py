"""CIFAR-10, SVHN and ImageNet, read by torchvision from files that are there already. Nothing is downloaded."""

from __future__ import annotations

import functools
import pickle
from typing import Any

from torch.utils.data import Subset
from torchvision.datasets import CIFAR10, SVHN, ImageNet
from torchvision.datasets.imagenet import load_meta_file

from attackroute.core.errors import UserError
from attackroute.zoo.files import FileImages, ImageReader, select, to_tensor
from attackroute.zoo.folder import existing_folder
from attackroute.zoo.images import ImageData, Request

_SIZE = 32


_IMAGENET_SIZE = 224


_IMAGENET_RESIZE = 256  # the usual protocol: shorter side to 256, then the middle 224


_DAMAGED = "checksums differ from the original's; get the files again"


_IMAGENET_FILES = (
    "expected val/ or train/ with a folder for each of the 1,000 classes (or their ILSVRC2012_img_*.tar), "
    "and ILSVRC2012_devkit_t12.tar.gz or meta.bin; any other folder of images is read as folder:PATH"
)


def cifar10(request: Request) -> ImageData:
    """The Python version of CIFAR-10: 50,000 training and 10,000 test images.

    Raises:
        UserError: Files are missing or are not the original ones.
    """
    names = [*(name for name, _ in CIFAR10.train_list + CIFAR10.test_list), CIFAR10.meta["filename"]]
    expected = f"expected {CIFAR10.base_folder}/ in the given path, unpacked from {CIFAR10.filename}"
    root = existing_folder(request.path, expected)
    batches = existing_folder(root / CIFAR10.base_folder, expected)
    missing = [name for name in names if not (batches / name).is_file()]
    if missing:
        raise UserError(f"{batches} has no {', '.join(missing)}; {expected}")
    try:
        images = CIFAR10(root, train=request.split == "train", transform=_resizing(request), download=False)
    except RuntimeError as error:
        raise UserError(f"{batches}: {_DAMAGED} ({CIFAR10.filename})") from error
    return _in_memory(images, tuple(images.classes), "cifar10", request)


def svhn(request: Request) -> ImageData:
    """The cropped digits of Street View House Numbers: 73,257 training and 26,032 test images.

    Raises:
        UserError: The file is missing or is not the original one, or scipy is not installed.
    """
    name = SVHN.split_list[request.split][1]
    root = existing_folder(request.path, f"expected {name} in it")
    if not (root / name).is_file():
        raise UserError(f"{root} has no {name}, the {request.split} split of SVHN's cropped digits")
    try:
        images = SVHN(str(root), split=request.split, transform=_resizing(request), download=False)
    except ImportError as error:
        raise UserError("SVHN's files need the scipy package: pip install scipy") from error
    except RuntimeError as error:
        raise UserError(f"{root / name}: {_DAMAGED}") from error
    return _in_memory(images, tuple("0123456789"), "svhn", request)


def imagenet(request: Request) -> ImageData:
    """ImageNet 2012; the test split is its validation set. torchvision unpacks its archives where they are still whole.

    Shorter sides are brought to 256 pixels and the middle 224 are cut out; another ``image_size`` keeps the proportion.

    Raises:
        UserError: Files are missing, or the folders are not the 1,000 classes (labels would not be a model's).
    """
    root = existing_folder(request.path, _IMAGENET_FILES)
    try:
        listing = ImageNet(root, split="train" if request.split == "train" else "val")
        known = load_meta_file(root)[0]
    except ImportError as error:
        raise UserError("ImageNet's development kit needs the scipy package: pip install scipy") from error
    except (RuntimeError, OSError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise UserError(f"{root} cannot be read as ImageNet ({_gist(error)}); {_IMAGENET_FILES}") from error
    if len(listing.wnids) != len(known):
        raise UserError(
            f"{listing.split_folder} has {len(listing.wnids)} of ImageNet's {len(known)} classes, so its labels would "
            "not be a model's; read it as folder:PATH"
        )
    samples, skipped = select(listing.samples, request)
    size = request.image_size or _IMAGENET_SIZE
    reader = ImageReader(size, size, shorter=round(size * _IMAGENET_RESIZE / _IMAGENET_SIZE))
    classes = tuple(", ".join(names) for names in listing.classes)
    return ImageData(FileImages(samples, reader), classes, (3, size, size), "imagenet", request.split, skipped)


def _resizing(request: Request) -> functools.partial[Any]:
    return functools.partial(to_tensor, size=request.image_size)


def _in_memory(images: Any, classes: tuple[str, ...], name: str, request: Request) -> ImageData:
    if request.samples is not None:
        images = Subset(images, request.choose(len(images)))
    size = request.image_size or _SIZE
    return ImageData(images, classes, (3, size, size), name, request.split)


def _gist(error: BaseException) -> str:
    """The first sentence of a message; torchvision's second one advises on downloads."""
    return str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
