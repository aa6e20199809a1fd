"""Instance routes of any number of samples, in files of a few thousand each that are read when they are asked for.

A folder holds ``routes.safetensors`` or, of more samples, ``routes-00000-of-00157.safetensors`` and so on: the samples
in their order, every file but the last with as many, each with a checksum of its own and complete by itself
(:meth:`attackroute.InstanceRoutes.load`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from attackroute import bits, routefile
from attackroute.errors import UserError
from attackroute.files import shown
from attackroute.fingerprint import LayerMap, require_model, require_same
from attackroute.instances import InstanceRoutes, aggregated, mean_of_most_frequent
from attackroute.invariants import Edge, sample_rows
from attackroute.provenance import Provenance
from attackroute.routes import Route

ROUTES = "routes"
_NAME = re.compile(r"-(\d{5,})-of-(\d{5,})\.safetensors")


def shard_name(number: int, count: int, stem: str = ROUTES) -> str:
    """Name of one of ``count`` files; a file that is the only one has no number."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05}-of-{count:05}.safetensors"


def has_routes(folder: Path) -> bool:
    """Whether a folder holds instance routes."""
    return bool(_present(folder))


@dataclass(frozen=True)
class Shard:
    """One file of instance routes.

    Attributes:
        path: The file.
        start: Number of its first sample.
        samples: How many it holds.
        checksum: Of all that it holds.
    """

    path: Path
    start: int
    samples: int
    checksum: str

    def load(self) -> InstanceRoutes:
        """Read it.

        Raises:
            UserError: It is missing, damaged, or not the file that was there when the folder was opened.
        """
        routes = InstanceRoutes.load(self.path)
        if routefile.read_header(self.path, routefile.INSTANCE_ROUTES)["checksum"] != self.checksum:
            raise UserError(f"{shown(self.path)} is not the file that was there before: open the folder again")
        return routes


@dataclass(frozen=True, eq=False, repr=False)
class StoredRoutes:
    """Instance routes in a folder, as :class:`attackroute.InstanceRoutes` in memory; one file is read at a time.

    Attributes:
        shards: The files.
        channels: For each layer, in forward order, how many channels it has.
        provenance: Where the routes come from.
        methods: For each edge (source layer, target layer), how its influence was computed.
    """

    shards: tuple[Shard, ...]
    channels: Mapping[str, int]
    provenance: Provenance
    methods: Mapping[Edge, str]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], model: nn.Module | None = None) -> StoredRoutes:
        """Look at a folder that ``attackroute trace`` wrote; only the files' headers are read.

        Args:
            folder: The folder.
            model: When given, must have the routes' layers with their channel counts.

        Raises:
            UserError: A file is missing, damaged or something else, or the files do not belong together.
        """
        home = Path(folder)
        names = _present(home)
        if not names:
            raise UserError(f"{shown(home)} holds no instance routes: name a folder that attackroute trace wrote")
        count = len(names) if (match := _NAME.search(names[0])) is None else int(match[2])
        shards: list[Shard] = []
        origins: list[Provenance] = []
        methods: dict[Edge, list[str]] = {}
        channels: Mapping[str, int] = {}
        for name in (shard_name(number, count) for number in range(count)):
            path = home / name
            body = routefile.read_header(path, routefile.INSTANCE_ROUTES)
            with routefile.reading(path):
                origin = Provenance.from_json(body.get("provenance"))
                own = LayerMap(routefile.expect_mapping(body, "fingerprint"))
                if shards:
                    require_same(channels, own, shown(path))
                channels = own
                for source, target, method in body["methods"]:
                    methods.setdefault((source, target), []).append(method)
            start = shards[-1].start + shards[-1].samples if shards else 0
            shards.append(Shard(path, start, origin.samples, str(body["checksum"])))
            origins.append(origin)
        if model is not None:
            require_model(channels, model)
        joined = {edge: " + ".join(dict.fromkeys(found)) for edge, found in methods.items()}
        return cls(tuple(shards), channels, Provenance.merge(origins), joined)

    @property
    def layers(self) -> tuple[str, ...]:
        """Route layers' names in forward order."""
        return tuple(self.channels)

    @property
    def width(self) -> float:
        """Share of each layer's channels that is on each sample's route."""
        return self.provenance.width

    def __len__(self) -> int:
        return self.provenance.samples

    def __repr__(self) -> str:
        return f"StoredRoutes({len(self)} samples, {len(self.channels)} layers, {len(self.shards)} files)"

    def parts(self) -> Iterator[InstanceRoutes]:
        """The routes file by file, in the samples' order.

        Raises:
            UserError: A file is damaged.
        """
        for shard in self.shards:
            yield shard.load()

    def load(self) -> InstanceRoutes:
        """All of them in memory: a bit for each channel of each sample."""
        return InstanceRoutes.concatenate(self.parts())

    def select(self, index: slice | Sequence[int] | Tensor) -> InstanceRoutes:
        """The routes of some samples; files that hold none of them are not read.

        Args:
            index: As for :meth:`attackroute.InstanceRoutes.select`.

        Raises:
            UserError: The index selects no sample or is out of range, or a file is damaged.
        """
        rows = sample_rows(index, len(self)).remainder(len(self))  # negative ones count from the end
        starts = torch.tensor([shard.start for shard in self.shards])
        home = torch.searchsorted(starts, rows, right=True) - 1
        found: list[InstanceRoutes] = []
        places: list[Tensor] = []
        for number in home.unique().tolist():
            places.append((home == number).nonzero().flatten())
            found.append(self.shards[number].load().select(rows[places[-1]] - self.shards[number].start))
        order = torch.cat(places).argsort()
        return InstanceRoutes.concatenate(found).select(order)

    def frequency(self) -> dict[str, Tensor]:
        """Share of the samples whose route uses each channel, float64 (C,) for each layer."""
        return frequency_of(self.parts())

    def occurrence(self, share: float = 0.2) -> dict[str, float]:
        """See :meth:`attackroute.InstanceRoutes.occurrence`."""
        return mean_of_most_frequent(self.frequency(), share)

    def aggregate(self, width: float = 0.3) -> Route:
        """See :meth:`attackroute.InstanceRoutes.aggregate`."""
        return aggregated(self.frequency(), width, self.provenance)


def frequency_of(parts: Iterator[InstanceRoutes]) -> dict[str, Tensor]:
    """Share of all parts' samples whose route uses each channel: counts are added, which is exact."""
    counts: dict[str, Tensor] = {}
    samples = 0
    for part in parts:
        samples += len(part)
        for layer, channels in part.channels.items():
            own = bits.count(part.packed[layer], channels)
            counts[layer] = own if layer not in counts else counts[layer] + own
    return {layer: count.double() / samples for layer, count in counts.items()}


def _present(folder: Path) -> list[str]:
    if (folder / shard_name(0, 1)).is_file():
        return [shard_name(0, 1)]
    return sorted(path.name for path in folder.glob(f"{ROUTES}-*.safetensors") if _NAME.search(path.name))
