"""A folder of image files, one folder a class (torchvision's ImageFolder), divided into splits or not."""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from attackroute.core.errors import UserError
from attackroute.zoo.files import FileImages, ImageReader, read_image, select
from attackroute.zoo.images import ImageData, Request

_SPLITS = {"train": ("train",), "test": ("test", "val")}


_SPLIT_FOLDERS = ("train", "test", "val")


_EXPECTED = "expected CLASS/IMAGE below it, or train/CLASS/IMAGE and test/CLASS/IMAGE (or val/)"


def folder(request: Request) -> ImageData:
    """Images in class folders.

    Labels count the classes in alphabetical order, over all splits together: a class that is missing from one split
    does not shift the others. Images are resized (shorter side) and cut to a square of ``image_size``; without it, they
    keep their own size, which must be the same for all.

    Raises:
        UserError: No such folder, or another layout.
    """
    root = existing_folder(request.path, _EXPECTED)
    home, classes, split = _layout(root, request.split)
    labels = {name: label for label, name in enumerate(classes)}
    files = ImageFolder.make_dataset(str(home), labels, extensions=IMG_EXTENSIONS, allow_empty=True)
    if not files:
        raise UserError(f"{home} has no images in its class folders ({', '.join(IMG_EXTENSIONS)})")
    samples, skipped = select(files, request)
    if request.image_size is None:
        first = read_image(samples[0][0])
        reader = ImageReader(first.height, first.width)
    else:
        reader = ImageReader(request.image_size, request.image_size, shorter=request.image_size)
    shape = (3, reader.height, reader.width)
    return ImageData(FileImages(samples, reader), tuple(classes), shape, "folder", split, skipped)


def existing_folder(path: Path, expected: str) -> Path:
    """The path, once it is sure to be a folder.

    Raises:
        UserError: It is not; the message ends with what was expected there.
    """
    if not path.is_dir():
        state = "is a file, not a folder" if path.exists() else "does not exist"
        raise UserError(f"data folder {path} {state}; {expected}")
    return path


def _layout(root: Path, split: str) -> tuple[Path, list[str], str]:
    """The folder that holds the class folders, the names of all classes, and the name of the split."""
    divided = {name: _folders(root / name) for name in _SPLIT_FOLDERS if _folders(root / name)}
    if not divided:
        classes = _folders(root)
        if not classes:
            raise UserError(f"data folder {root} has no class folders; {_EXPECTED}")
        return root, classes, "all"
    home = next((name for name in _SPLITS[split] if name in divided), None)
    if home is None:
        wanted = " or ".join(f"{name}/" for name in _SPLITS[split])
        raise UserError(f"{root} has no {wanted} with class folders for the {split} split, only {', '.join(divided)}/")
    return root / home, sorted(set().union(*divided.values())), split


def _folders(path: Path) -> list[str]:
    """Names of the folders in a folder, in order, without hidden ones; none where there is no such folder."""
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
