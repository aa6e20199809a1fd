"""A critical attacking route of a model: one set of channels per layer, with the set algebra that users need."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attackroute.core.errors import UserError
from attackroute.core.files import ROUTE_KIND, expect_mapping, file_errors, read_sealed_json, write_sealed_json
from attackroute.core.random import random_order
from attackroute.core.table import Shown, Table, layer_table, plural
from attackroute.routes.layer_map import (
    LayerMap,
    channel_counts,
    require_fit,
    require_layers,
    require_model,
    require_same,
)
from attackroute.routes.provenance import Provenance

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False, repr=False)
class Route(Shown):
    """The critical neurons of each route layer for a model, or for one class (Eq. 8).

    Two routes are equal when layers, channel counts and channels are; frequency and provenance are notes.

    Attributes:
        indices: for each layer, its channels on the route as a sorted tuple; the constructor takes them in any order.
        channels: for each layer, in forward order, how many channels it has.
        frequency: for each layer, the share of samples whose route uses each channel, float64 (C,); None when the
            route does not come from instance routes.
        provenance: where the route comes from, None for a route made by hand or by set operations.

    Raises:
        UserError: layers differ between the arguments, a channel is out of range or named twice, or a frequency has
            the wrong shape or lies outside [0, 1].
    """

    indices: Mapping[str, Sequence[int]]
    channels: Mapping[str, int]
    frequency: Mapping[str, Tensor] | None = None
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        channels = channel_counts(self.channels)
        require_layers("channels", self.indices, channels)
        indices = {layer: _sorted_indices(layer, self.indices[layer], count) for layer, count in channels.items()}
        object.__setattr__(self, "channels", channels)
        object.__setattr__(self, "indices", LayerMap(indices))
        if self.frequency is not None:
            require_layers("frequencies", self.frequency, channels)
            frequency = {layer: _shares(layer, self.frequency[layer], count) for layer, count in channels.items()}
            object.__setattr__(self, "frequency", LayerMap(frequency))

    @classmethod
    def from_masks(
        cls,
        masks: Mapping[str, Tensor],
        frequency: Mapping[str, Tensor] | None = None,
        provenance: Provenance | None = None,
    ) -> Route:
        """A route from one bool mask (C,) per layer, in forward order."""
        for layer, mask in masks.items():
            if mask.dtype != torch.bool or mask.dim() != 1:
                raise UserError(f"layer {layer!r}: a mask must be bool (C,), not {mask.dtype} {tuple(mask.shape)}")
        indices = {layer: mask.nonzero().flatten().tolist() for layer, mask in masks.items()}
        return cls(indices, {layer: mask.numel() for layer, mask in masks.items()}, frequency, provenance)

    @property
    def layers(self) -> tuple[str, ...]:
        """Route layers' names in forward order."""
        return tuple(self.channels)

    @property
    def size(self) -> int:
        """Number of neurons on the route, over all layers."""
        return sum(len(self.indices[layer]) for layer in self)

    @property
    def share(self) -> float:
        """Share of all the layers' neurons that is on the route."""
        return self.size / sum(self.channels.values())

    def __getitem__(self, layer: str) -> Tensor:
        """Sorted channel indices of a layer, int64 (k,)."""
        return torch.tensor(self.indices[layer], dtype=torch.int64, device="cpu")

    def __iter__(self) -> Iterator[str]:
        return iter(self.channels)

    def __len__(self) -> int:
        return len(self.channels)

    def __contains__(self, layer: object) -> bool:
        return layer in self.channels

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Route):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __or__(self, other: Route) -> Route:
        return self._combine(other, operator.or_)

    def __and__(self, other: Route) -> Route:
        return self._combine(other, operator.and_)

    def __sub__(self, other: Route) -> Route:
        return self._combine(other, operator.sub)

    def __repr__(self) -> str:
        title = [plural(len(self), "layer"), f"{self.size} of {sum(self.channels.values())} channels"]
        if (origin := self.provenance) is not None:
            title += [origin.criterion, f"width {origin.width:g}", plural(origin.samples, "sample")]
        header = ("layer", "channels", "on route", "which")
        rows = [
            (
                layer,
                str(self.channels[layer]),
                str(len(route)),
                " ".join(map(str, route[:6])) + " ..." * (len(route) > 6),
            )
            for layer, route in self.indices.items()
        ]
        return f"Route({', '.join(title)})\n{layer_table(header, rows)}"

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame`` with a row for each channel: ``layer``, ``channel``, ``on_route``, ``frequency``."""
        records = (
            {"layer": layer, "channel": channel, "on_route": on_route}
            | ({} if self.frequency is None else {"frequency": float(self.frequency[layer][channel])})
            for layer in self
            for channel, on_route in enumerate(self.mask(layer).tolist())
        )
        return Table.of(records).to_frame()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw how often samples use each channel, most frequent first, and where the route's share ends.

        Raises:
            UserError: The route has no frequencies, since it was not aggregated from samples' routes.
        """
        if self.frequency is None:
            raise UserError("the route has no frequencies to draw: take one that aggregate() made")
        axes = self._axes(ax)
        for row, layer in enumerate(self):
            shares = self.frequency[layer].sort(descending=True).values
            image = axes.imshow(
                shares[None].numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest",
                extent=(0, 1, row + 0.36, row - 0.36),
            )  # fmt: skip
            cut = len(self[layer]) / self.channels[layer]
            axes.plot([cut, cut], [row - 0.46, row + 0.46], color="#D55E00", linewidth=2.2)
        axes.set_xlim(0, 1)
        axes.set_ylim(len(self) - 0.4, -0.6)
        axes.set_yticks(range(len(self)), [f"{layer} ({self.channels[layer]})" for layer in self])
        axes.set_xlabel("share of the layer's channels (in brackets how many there are), most frequent first")
        axes.set_title("How often images use each channel\nleft of the orange line: the model's route", fontsize=10)
        axes.spines[:].set_visible(False)
        bar = axes.figure.colorbar(image, ax=axes, orientation="horizontal", aspect=50, shrink=0.7)  # its own axis
        bar.set_label("share of images that use the channel", fontsize=8)
        return axes

    def mask(self, layer: str) -> Tensor:
        """The layer's channels on the route as a bool mask (C,)."""
        mask = torch.zeros(self.channels[layer], dtype=torch.bool, device="cpu")
        mask[self[layer]] = True
        return mask

    def complement(self) -> Route:
        """All the neurons of the route's layers that are off the route.

        Its provenance says so in ``criterion``; the width there stays that of this route.
        """
        indices = {layer: self._off_route(layer) for layer in self}
        return Route(indices, self.channels, self.frequency, self._derived("complement of {}"))

    def random_like(self, seed: int) -> Route:
        """A control of the same size: in each layer as many random channels, all of them off this route.

        The draw depends on nothing but the seed, the layer's name and the channels to draw from: not on the other
        layers, on any random state, or on a library's version.

        Raises:
            UserError: a layer has fewer channels off the route than on it.
        """
        indices = {}
        for layer in self:
            size, off_route = len(self.indices[layer]), self._off_route(layer)
            if len(off_route) < size:
                raise UserError(
                    f"layer {layer!r} has {len(off_route)} channels off the route and {size} on it, too few for a "
                    "random control of the same size: use a narrower route, or leave the layer out with restrict()"
                )
            indices[layer] = random_order(seed, layer, off_route)[:size]
        return Route(indices, self.channels, self.frequency, self._derived(f"random (seed {seed}) off {{}}"))

    def restrict(self, layers: Iterable[str]) -> Route:
        """The same route on some of its layers, at least one, in forward order."""
        indices = {layer: self.indices[layer] for layer in ([layers] if isinstance(layers, str) else layers)}
        channels = {layer: count for layer, count in self.channels.items() if layer in indices}
        frequency = self.frequency and {layer: self.frequency[layer] for layer in channels}
        return Route(indices, channels, frequency, self.provenance)

    def overlap(self, other: Route) -> dict[str, float]:
        """``|A & B| / |A|`` for each layer, A this route and B the other, of the same layers; 1 where A is empty."""
        return self._compare(other, lambda a, b: len(a & b) / len(a) if a else 1.0)

    def jaccard(self, other: Route) -> dict[str, float]:
        """``|A & B| / |A | B|`` for each layer of two routes of the same layers; 1 where both are empty."""
        return self._compare(other, lambda a, b: len(a & b) / len(a | b) if a | b else 1.0)

    def check(self, channels: Mapping[str, int], what: str = "model") -> None:
        """Require that something, named ``what`` in the message, has the route's layers with these channel counts."""
        require_fit(self.channels, channels, what)

    def to_json(self) -> dict[str, Any]:
        """All of the route as JSON values, for :meth:`from_json`."""
        return {
            "provenance": self.provenance and self.provenance.to_json(),
            "fingerprint": dict(self.channels),
            "route": {layer: list(self.indices[layer]) for layer in self},
            "frequency": self.frequency and {layer: self.frequency[layer].tolist() for layer in self},
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Route:
        """The route that :meth:`to_json` took apart; a `UserError` says what is missing or malformed."""
        origin = body.get("provenance")
        return cls(
            expect_mapping(body, "route"),
            expect_mapping(body, "fingerprint"),
            None if body.get("frequency") is None else expect_mapping(body, "frequency"),
            None if origin is None else Provenance.from_json(origin),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the route as readable JSON, replacing a file of that name in one step."""
        write_sealed_json(path, ROUTE_KIND, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> Route:
        """Read a route that `save` wrote.

        Args:
            path: the file.
            model: when given, must have the route's layers with their channel counts.

        Raises:
            UserError: the file is missing, damaged or something else, or the model does not fit.
        """
        body = read_sealed_json(path, ROUTE_KIND)
        with file_errors(path):
            route = cls.from_json(body)
            if model is not None:
                require_model(route.channels, model)
        return route

    def _key(self) -> tuple[Any, ...]:
        return tuple(self.channels.items()), tuple(self.indices.values())

    def _off_route(self, layer: str) -> list[int]:
        chosen = set(self.indices[layer])
        return [channel for channel in range(self.channels[layer]) if channel not in chosen]

    def _derived(self, criterion: str) -> Provenance | None:
        if self.provenance is None:
            return None
        return replace(self.provenance, criterion=criterion.format(self.provenance.criterion))

    def _combine(self, other: Route, operation: Callable[[set[int], set[int]], set[int]]) -> Route:
        return Route(self._compare(other, operation), self.channels) if isinstance(other, Route) else NotImplemented

    def _compare(self, other: Route, operation: Callable[[set[int], set[int]], Any]) -> dict[str, Any]:
        require_same(self.channels, other.channels)
        return {layer: operation(set(self.indices[layer]), set(other.indices[layer])) for layer in self}


def _sorted_indices(layer: str, values: object, count: int) -> tuple[int, ...]:
    if isinstance(values, Tensor):
        values = values.tolist()
    try:
        indices = sorted(map(_channel, values))  # type: ignore[call-overload]
    except TypeError:
        raise UserError(f"layer {layer!r}: channels must be a list of integers, not {values!r:.60}") from None
    if indices and not 0 <= indices[0] <= indices[-1] < count:
        wrong = indices[0] if indices[0] < 0 else indices[-1]
        raise UserError(f"layer {layer!r}: channel {wrong} is out of range, the layer has {count} channels")
    if len(set(indices)) != len(indices):
        raise UserError(f"layer {layer!r}: a channel is named twice")
    return tuple(indices)


def _channel(value: object) -> int:
    if isinstance(value, bool):  # an index to Python, but the sign of a mask given by mistake
        raise TypeError
    return operator.index(value)  # type: ignore[arg-type]


def _shares(layer: str, values: object, count: int) -> Tensor:
    if isinstance(values, list) and all(type(value) in (int, float) for value in values):  # as files have them
        values = torch.tensor(values, dtype=torch.float64, device="cpu")
    if not isinstance(values, Tensor):
        raise UserError(f"layer {layer!r}: the frequency must be a tensor, or a list of numbers")
    shares = values.detach().to(device="cpu", dtype=torch.float64).clone()
    if shares.shape != (count,):
        raise UserError(f"layer {layer!r}: the frequency must have shape ({count},), not {tuple(shares.shape)}")
    if not bool(((shares >= 0) & (shares <= 1)).all()):
        raise UserError(f"layer {layer!r}: a frequency lies outside [0, 1]")
    return shares
