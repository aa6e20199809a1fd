"""Image files as tensors of one size, with every fault reported by the file's name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as transforms

from attackroute.core.errors import UserError
from attackroute.zoo.images import Request

Sample = tuple[str, int]


class UnreadableImageError(UserError):
    """An image file that cannot be used.

    Out of a worker process, a DataLoader raises ``type(error)(traceback)``; its last line is all that a reader needs.
    """

    def __init__(self, message: str) -> None:
        prefix = f"{type(self).__module__}.{type(self).__qualname__}: "
        super().__init__(message.rstrip().rpartition("\n")[2].removeprefix(prefix))


def read_image(path: str | Path) -> Image.Image:
    """Decode a file as RGB.

    Raises:
        UnreadableImageError: It is no image, is damaged, or has more than 8 bits a channel (which would be cut off).
    """
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"{image.mode} pixels of more than 8 bits")
            return image.convert("RGB")
    except Exception as error:  # damaged files make decoders raise nearly anything
        reason = str(error).partition("\n")[0]
        raise UnreadableImageError(
            f"image {path} cannot be read ({reason}); mend or remove it, "
            "or leave out such files with --skip-unreadable (skip_unreadable=True)"
        ) from error


def to_tensor(image: Image.Image, size: int | None = None, shorter: int | None = None) -> Tensor:
    """An image as a float tensor (C, H, W) in [0, 1].

    Args:
        image: 8 bits a channel.
        size: Side of the square that is cut out of the middle; None keeps the image's own size.
        shorter: Length that the shorter side is brought to beforehand, in proportion; None takes ``size``.
    """
    if size is not None:
        image = transforms.resize(image, [shorter if shorter is not None else size])
        image = transforms.center_crop(image, [size])
    tensor: Tensor = transforms.to_tensor(image)
    return tensor


@dataclass(frozen=True)
class ImageReader:
    """Reads files as tensors (3, H, W) of one size.

    Attributes:
        height, width: Of every tensor, in pixels.
        shorter: Length that shorter sides are brought to before a square is cut out of the middle; None takes no file
            of another size.
    """

    height: int
    width: int
    shorter: int | None = None

    def __call__(self, path: str) -> Tensor:
        """Read one file.

        Raises:
            UnreadableImageError: See :func:`read_image`; or it has another size and may not be resized.
        """
        image = read_image(path)
        if self.shorter is not None:
            return to_tensor(image, self.height, self.shorter)
        if image.size != (self.width, self.height):
            raise UnreadableImageError(
                f"image {path} is {image.width}x{image.height} where the first one is {self.width}x{self.height}; "
                "give --image-size (image_size=...), to which all are then resized"
            )
        return to_tensor(image)


class FileImages(Dataset[tuple[Tensor, int]]):
    """Images that are read when they are asked for.

    Args:
        samples: Path and label of each image.
        reader: Reads one of them.
    """

    def __init__(self, samples: Sequence[Sample], reader: ImageReader) -> None:
        self.samples = samples
        self.reader = reader

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.reader(path), label


def select(samples: Sequence[Sample], request: Request) -> tuple[list[Sample], tuple[str, ...]]:
    """The files that were asked for, and those among them that are left out because they cannot be read.

    Every file is decoded where unreadable ones are to be left out: a damaged one shows no sooner.

    Raises:
        UserError: None of them can be read.
    """
    chosen = [samples[index] for index in request.choose(len(samples))]
    if not request.skip_unreadable:
        return chosen, ()
    kept = [(path, label) for path, label in chosen if _is_readable(path)]
    if not kept:
        raise UserError(f"none of the {len(chosen)} images in {request.path} can be read; check the folder")
    readable = {path for path, _ in kept}
    return kept, tuple(path for path, _ in chosen if path not in readable)


def _is_readable(path: str) -> bool:
    try:
        read_image(path)
    except UnreadableImageError:
        return False
    return True
