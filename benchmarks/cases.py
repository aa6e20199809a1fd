"""What to measure and how often: networks with random weights, sizes of images and batches, limits to be kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError, did_you_mean
from attackroute.zoo.networks import build_model


@dataclass(frozen=True)
class Case:
    """A network and its images.

    Attributes:
        name: As on the command line.
        model: As :func:`attackroute.build_model` takes it.
        limit: Ratio of a trace's time to a plain forward pass's that is to be kept at this batch size.
        image_size: Height and width of the images.
        classes: Number of logits.
        batch_size: Images at a time.
    """

    name: str
    model: str
    limit: float
    image_size: int = 224
    classes: int = 1000
    batch_size: int = 16

    def build(self) -> nn.Module:
        """The network with random weights."""
        return build_model(self.model, num_classes=self.classes, image_size=self.image_size)


SPEED_CASES = (
    Case("vgg16", "vgg16", limit=1.20, image_size=32, classes=10, batch_size=128),
    Case("resnet18", "torchvision:resnet18", limit=1.30),
    Case("resnet50", "torchvision:resnet50", limit=1.30),
    Case("mobilenet_v2", "torchvision:mobilenet_v2", limit=1.40),
    Case("efficientnet_b0", "torchvision:efficientnet_b0", limit=1.80),
    Case("densenet121", "torchvision:densenet121", limit=1.80),
)

HARDNESS, NAIVE, MEMORY, ATTACK, HARDENING = "hardness", "naive", "memory", "pgd", "hardening"
ARCHITECTURES, PROCESSES, GPU = "architectures", "processes", "gpu"
CASE_NAMES = (
    *(case.name for case in SPEED_CASES), HARDNESS, NAIVE, MEMORY, ATTACK, HARDENING, ARCHITECTURES, PROCESSES, GPU,
)  # fmt: skip

# architectures takes as long as all the others, and the last two want a machine to themselves
_USUAL_CASES = tuple(name for name in CASE_NAMES if name not in (ARCHITECTURES, PROCESSES, GPU))
_QUICK_CASES = (SPEED_CASES[0].name, NAIVE, MEMORY)


@dataclass(frozen=True)
class Plan:
    """The settings of a benchmark.

    Attributes:
        cases: What to measure, of :data:`CASE_NAMES`; none means all but architectures, processes and gpu,
            or vgg16, naive and memory if quick.
        repeats: Turns of interleaved runs; None is 7, or 2 if quick.
        batch_size: Images at a time; None is each case's own.
        threads: Number of PyTorch's threads; None leaves it as it is.
        quick: Less of everything, for a look within a minute.
        seed: For weights, images and the choice of products.
        device: Where the networks run.

    Raises:
        UserError: An unknown case, or a number that is not positive.
    """

    cases: Sequence[str] = ()
    repeats: int | None = None
    batch_size: int | None = None
    threads: int | None = None
    quick: bool = False
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        for name in self.cases:
            if name not in CASE_NAMES:
                raise UserError(
                    f"no benchmark case {name!r}{did_you_mean(name, CASE_NAMES)} (there are {', '.join(CASE_NAMES)})"
                )
        for name, number in (("repeats", self.repeats), ("batch size", self.batch_size), ("threads", self.threads)):
            if number is not None and number < 1:
                raise UserError(f"{name} must be at least 1, not {number}")

    @property
    def speed_cases(self) -> tuple[Case, ...]:
        """The networks whose trace is timed."""
        return tuple(case for case in SPEED_CASES if self.includes(case.name))

    @property
    def turns(self) -> int:
        """How often everything is measured."""
        return self.repeats or (2 if self.quick else 7)

    @property
    def batches(self) -> int:
        """Batches that one run of a speed case consists of."""
        return 2 if self.quick else 4

    @property
    def memory_repeats(self) -> int:
        """How often each peak is measured, since peaks hardly vary."""
        return 1 if self.quick else min(3, self.turns)

    def includes(self, name: str) -> bool:
        """Whether a case is to be measured."""
        return name in (self.cases or (_QUICK_CASES if self.quick else _USUAL_CASES))


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
        for head in model.modules():  # those of new transformers are zeros
            if isinstance(head, nn.Linear) and not head.weight.any():
                nn.init.normal_(head.weight, std=0.02)
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


@contextmanager
def small_vgg(batch_size: int, device: torch.device, seed: int) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
    """A quarter-width VGG-16 with random weights, images of 32x32 and labels; random numbers go on from the seed."""
    with seeded(seed):
        model = build_model("vgg16", width=0.25, num_classes=10, image_size=32).to(device)
        images = torch.rand(batch_size, 3, 32, 32).to(device)
        labels = torch.randint(10, (batch_size,)).to(device)
        adapt_batch_norms(model, images)
        yield model, images, labels
