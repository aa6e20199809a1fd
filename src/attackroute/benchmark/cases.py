"""What is measured: networks, sizes of images and batches, and the limits that are to be kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attackroute.zoo.registry import build_model


@dataclass(frozen=True)
class Case:
    """A network and its images.

    Attributes:
        name: As on the command line.
        model: As :func:`attackroute.models.build_model` takes it.
        image_size: Height and width of the images.
        classes: Number of logits.
        batch_size: Images at a time.
        limit: Ratio of a trace's time to a plain forward pass's that is to be kept at this batch size.
    """

    name: str
    model: str
    image_size: int
    classes: int
    batch_size: int
    limit: float

    def build(self) -> nn.Module:
        """The network with random weights."""
        return build_model(self.model, num_classes=self.classes, image_size=self.image_size)


SPEED_CASES = (
    Case("vgg16", "vgg16", 32, 10, 128, 1.30),
    Case("resnet18", "resnet18", 224, 1000, 16, 1.40),
    Case("resnet50", "torchvision:resnet50", 224, 1000, 16, 1.40),
    Case("mobilenet_v2", "torchvision:mobilenet_v2", 224, 1000, 16, 1.60),
)


@dataclass(frozen=True, eq=False)
class Workload:
    """A network in eval mode and batches for it, on one device and in one memory format.

    Attributes:
        model: The network.
        batches: Images (n, 3, H, W) in [0, 1] with labels (n,).
    """

    model: nn.Module
    batches: tuple[tuple[Tensor, Tensor], ...]

    @property
    def images(self) -> int:
        """Number of images in all batches."""
        return sum(len(images) for images, _ in self.batches)

    def forward(self) -> None:
        """Plain inference of every batch."""
        with torch.no_grad():
            for images, _ in self.batches:
                self.model(images)


def workload(
    case: Case,
    batch_size: int,
    batches: int,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    channels_last: bool = False,
) -> Workload:
    """Build a case: random images, random weights, batch norms as after training.

    Args:
        case: What to build.
        batch_size: Images a batch.
        batches: Number of batches.
        seed: For weights, images and labels.
        device: Where they go; None is the CPU.
        channels_last: Memory format of weights and images.
    """
    form = torch.channels_last if channels_last else torch.contiguous_format
    with seeded(seed):
        model = case.build().to(device=device).to(memory_format=form)  # type: ignore[call-overload]
        data = tuple(
            (
                torch.rand(batch_size, 3, case.image_size, case.image_size).to(device).contiguous(memory_format=form),
                torch.randint(case.classes, (batch_size,)).to(device),
            )
            for _ in range(batches)
        )
        adapt_batch_norms(model, data[0][0])
    return Workload(model.eval(), data)


def adapt_batch_norms(model: nn.Module, images: Tensor) -> None:
    """Give batch norms the statistics of a batch, then change statistics and gains a little at random.

    With the statistics of a new network, activations grow or fade from layer to layer; a trained one's do neither.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.8, 1.25)
            norm.weight.uniform_(0.7, 1.4)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the global random generators as after ``seed``, and put them back afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
