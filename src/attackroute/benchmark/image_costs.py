"""What an image costs where several processes trace many: processor time and bytes, measured in one of them.

Processor time and not time on the clock, since these are added up to say what a job of another size costs.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.functional import resize, to_pil_image

from attackroute.benchmark.cases import SPEED_CASES, Case, seeded, workload
from attackroute.benchmark.timing import Spread, Stopclock, interleaved
from attackroute.core.distributed import Processes, apart
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.batched import ImageBatches
from attackroute.zoo.sources import load_data

CASES = SPEED_CASES[:2]
"""Small images, and images of ImageNet's size."""

FORWARD, TRACE, READING = "plain inference", "trace", "reading a JPEG"
PACKING, EXCHANGING, UNPACKING = "packing its routes", "sending and receiving them", "unpacking them"
WRITING, LOADING = "joining and writing them", "reading them back"
PARTS = (FORWARD, TRACE, READING, PACKING, EXCHANGING, UNPACKING, WRITING, LOADING)
"""Parts, as they follow each other."""

IN_FILE, SENT, JPEG = "routes in a file", "routes as they are sent", "JPEG"
SIZES = (JPEG, SENT, IN_FILE)

FILE_SAMPLES = 8192  # as ``attackroute trace`` writes them
_JPEG_SIZE = (375, 500)
_LARGE = 224  # images of this size come from JPEGs


@dataclass(frozen=True)
class ImageCosts:
    """What an image of one case costs.

    Attributes:
        case: Its name.
        image_size: Height and width.
        batch_size: Images in a batch.
        channels: Of all route layers.
        seconds: Processor seconds an image, by part, one entry a repeat. Packing is done by the process that traced
            the image, writing by the first one, sending, receiving and unpacking by all.
        sizes: Bytes an image.
    """

    case: str
    image_size: int
    batch_size: int
    channels: int
    seconds: Mapping[str, tuple[float, ...]]
    sizes: Mapping[str, float]

    def of(self, part: str) -> Spread | None:
        """Seconds an image of a part; None where there is no such part."""
        return Spread(tuple(self.seconds[part])) if part in self.seconds else None

    def to_json(self) -> dict[str, Any]:
        """All that was measured."""
        return asdict(self)


def measure_costs(
    team: Processes, case: Case, batch_size: int, batches: int, *, repeats: int, seed: int
) -> ImageCosts | None:
    """Measure one case on the CPU in the first process; the others only send and receive.

    Args:
        team: The processes; each must ask at the same point.
        case: The network.
        batch_size: Images in a batch.
        batches: Batches in one run of a measurement.
        repeats: How often each is run.
        seed: For weights and images.
    """
    load = workload(case, batch_size, batches, seed=seed)
    with apart():
        part = trace_routes(load.model, load.batches[0], batch_size=batch_size)
    packed = pickle.dumps((part,))
    clock = Stopclock(time.process_time)
    exchange = {EXCHANGING: clock.whole(lambda: [team.all((part,)) for _ in range(batches)])}
    if not team.leads:
        interleaved(exchange, repeats)
        return None
    file_batches = -(-FILE_SAMPLES // batch_size)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "routes.safetensors"
        actions: dict[str, Callable[[], object]] = {
            FORWARD: load.forward,
            TRACE: lambda: _trace_alone(load.model, load.batches),
            PACKING: lambda: [pickle.dumps((part,)) for _ in range(batches)],
            UNPACKING: lambda: [pickle.loads(packed) for _ in range(batches)],
            WRITING: lambda: InstanceRoutes.concatenate([part] * file_batches).save(file),
            LOADING: lambda: InstanceRoutes.load(file),
        }
        images = dict.fromkeys(actions, load.images) | {EXCHANGING: load.images * team.count}
        images |= dict.fromkeys((WRITING, LOADING), batch_size * file_batches)
        sizes = {SENT: len(packed) / batch_size}
        if case.image_size == _LARGE:
            sizes[JPEG] = _write_jpegs(Path(folder) / "pictures", load.images, seed)
            pictures = load_data(f"folder:{folder}/pictures", image_size=_LARGE)
            actions[READING] = lambda: sum(len(labels) for _, labels in ImageBatches(pictures, batch_size))
            images[READING] = load.images
        runs = interleaved({name: clock.whole(action) for name, action in actions.items()} | exchange, repeats)
        sizes[IN_FILE] = file.stat().st_size / images[WRITING]
    seconds = {name: tuple(total / images[name] for total in found.totals) for name, found in runs.items()}
    return ImageCosts(case.name, case.image_size, batch_size, sum(part.channels.values()), seconds, sizes)


def _trace_alone(model: torch.nn.Module, batches: Any) -> None:
    with apart():
        trace_routes(model, batches)


def _write_jpegs(folder: Path, count: int, seed: int) -> float:
    """Write pictures about as rough as photographs; returns the mean size in bytes."""
    (folder / "one").mkdir(parents=True)
    with seeded(seed):
        for number in range(count):
            height, width = _JPEG_SIZE
            rough = resize(torch.rand(3, height // 16, width // 16), list(_JPEG_SIZE), antialias=True)
            fine = resize(torch.rand(3, height // 2, width // 2), list(_JPEG_SIZE), antialias=True)
            picture = to_pil_image(0.75 * rough + 0.25 * fine)
            picture.save(folder / "one" / f"{number:05}.jpg", quality=90)
    return sum(path.stat().st_size for path in folder.rglob("*.jpg")) / count
