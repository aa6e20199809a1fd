"""Common corruptions (Hendrycks and Dietterich, 2019): noise, blur, weather and digital artefacts.

All constants are those of ImageNet-C, made for photographs of 224x224. On smaller images the same constants are other,
mostly stronger corruptions; CIFAR-10-C has constants of its own, which these are not.
"""

from __future__ import annotations

import io
import math
from contextlib import redirect_stdout
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from attackroute.core.checks import check_attackable
from attackroute.core.errors import UserError, did_you_mean
from attackroute.core.random import image_keys, normals
from attackroute.robustness.attack import Perturbation, kept_generators, require_extra

Pixels = NDArray[np.uint8]

KINDS = (
    *("shot-noise", "impulse-noise", "speckle-noise"),
    *("gaussian-blur", "defocus-blur", "glass-blur", "motion-blur", "zoom-blur"),
    *("snow", "frost", "fog", "brightness", "spatter"),
    *("contrast", "elastic-transform", "pixelate", "jpeg-compression", "saturate"),
)
"""Names of the corruptions that come from an extra: ImageNet-C without Gaussian noise, and its four further ones."""

_STDS = (0.08, 0.12, 0.18, 0.26, 0.38)  # ImageNet-C's, by severity
_SEVERITY = 3
_OWN_GENERATOR = ("glass-blur", "impulse-noise")  # these do not draw from numpy's global generator, but take a seed
_SMALLEST = 32


@dataclass(frozen=True)
class GaussianNoise(Perturbation):
    """Independent normal noise on every value, cut off at 0 and 1; for images of any shape.

    Attributes:
        severity: 1 to 5, ImageNet-C's standard deviations 0.08, 0.12, 0.18, 0.26 and 0.38. Unlike ImageNet-C's, the
            result is not rounded to 8 bits. None where ``std`` is given.
        std: A standard deviation of one's own, for values in [0, 1], in place of the severity's.
        seed: Of the noise.
    """

    name: ClassVar[str] = "gaussian-noise"
    uses_model: ClassVar[bool] = False
    severity: int | None = _SEVERITY
    std: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        severity = _SEVERITY if self.severity is None else self.severity
        _check_severity(severity)
        if self.std is not None and not (isinstance(self.std, (int, float)) and 0 <= self.std < math.inf):
            raise UserError(f"{self.name}: std {self.std} is not a standard deviation; give a number, 0 or more")
        # what prints and compares is what counts
        object.__setattr__(self, "severity", severity if self.std is None else None)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """See :class:`Perturbation`; the model is not used."""
        check_attackable(x, y)
        with torch.inference_mode(False), torch.no_grad():
            keys = image_keys(x, self.seed, self.name, generator)
            noise = normals(keys, x.shape[1:]).to(x.dtype)
            return torch.add(x.detach(), noise, alpha=self.scale).clamp_(0, 1)

    @property
    def scale(self) -> float:
        """The noise's standard deviation."""
        return _STDS[(self.severity or _SEVERITY) - 1] if self.std is None else self.std


@dataclass(frozen=True)
class Corruption(Perturbation):
    """A corruption of ImageNet-C, by the package ``imagecorruptions-imaug`` (the extra ``corruptions``).

    It works on 8-bit colour images, one after the other, on the CPU, and its results are 8-bit values. A grey image is
    corrupted as a colour image with three equal channels, and their mean is the result. The package's ``spatter``
    turns a small image black if no drop falls on it; here such an image stays as it is.

    Attributes:
        name: One of :data:`KINDS`.
        severity: 1 to 5, ImageNet-C's.
        seed: Of what is random, where anything is.
    """

    uses_model: ClassVar[bool] = False
    name: str  # type: ignore[misc]  # of the corruption, not of the class
    severity: int = _SEVERITY
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise UserError(
                f"unknown corruption {self.name!r}{did_you_mean(self.name, KINDS)}; choose from {', '.join(KINDS)}"
            )
        _check_severity(self.severity)
        require_extra("imagecorruptions", "corruptions", self.name)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """See :class:`Perturbation`; the model is not used.

        Raises:
            UserError: The images are smaller than 32x32, or have neither one nor three channels.
        """
        check_attackable(x, y)
        if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < _SMALLEST:
            raise UserError(
                f"{self.name} is for images (N, 3, H, W) or (N, 1, H, W) of {_SMALLEST}x{_SMALLEST} or larger, and "
                f"these are {tuple(x.shape)}; gaussian-noise takes any"
            )
        library = _library()
        with torch.inference_mode(False), torch.no_grad():
            keys = image_keys(x, self.seed, self.name, generator).tolist()
            values = x.detach().to(torch.float32).clamp(0, 1).mul_(255).round_().to("cpu", torch.uint8)
            pixels: Pixels = values.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()
            with kept_generators(), redirect_stdout(io.StringIO()):  # it prints where sizes do not match
                for index, key in enumerate(keys):
                    np.random.seed([key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF])
                    pixels[index] = self._corrupted(library, pixels[index], key & 0x7FFFFFFF)
            changed = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32)
            if x.shape[1] == 1:
                changed = changed.mean(1, keepdim=True).round_()
            return torch.empty_like(x).copy_(changed).div_(255)

    def _corrupted(self, library: ModuleType, image: Pixels, seed: int) -> Pixels:
        seeding = {"seed": seed} if self.name in _OWN_GENERATOR else {}
        with np.errstate(invalid="raise" if self.name == "spatter" else "warn"):
            try:
                changed: Pixels = library.corrupt(image, self.severity, self.name.replace("-", "_"), **seeding)
            except FloatingPointError:  # it divides by the largest drop, and there is none
                return image
        return changed


def _check_severity(severity: int) -> None:
    if isinstance(severity, bool) or not isinstance(severity, int) or not 1 <= severity <= len(_STDS):
        raise UserError(f"severity {severity!r} is not a level of ImageNet-C; give 1, 2, 3, 4 or 5")


def _library() -> ModuleType:
    try:
        import imagecorruptions
    except ImportError as error:
        raise UserError(
            f"the package imagecorruptions cannot be loaded ({error}); if libGL is what it lacks, "
            "put opencv-python-headless in the place of opencv-python"
        ) from error
    return imagecorruptions  # type: ignore[no-any-return]
