"""Maps from layer names, and whether two of them, or a route and a network, belong together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any, TypeVar

from torch import nn

from attackroute.core.errors import UserError
from attackroute.core.layers import unwrapped

T = TypeVar("T")

_CALL_INDEX = re.compile(r"#\d+$")


class UnknownLayerError(UserError, KeyError):
    """A layer name that the route does not have."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would print the message in quotes


class LayerMap(Mapping[str, T]):
    """Read-only mapping from layer names, in forward order, that says which names it has when one is unknown."""

    def __init__(self, values: Mapping[str, T]) -> None:
        self._values = dict(values)

    def __getitem__(self, layer: str) -> T:
        try:
            return self._values[layer]
        except KeyError:
            names = list(self._values)
            listed = ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]])
            raise UnknownLayerError(f"no layer {layer!r} in the route: its layers are {listed}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._values!r})"


def channel_counts(channels: Mapping[str, Any]) -> LayerMap[int]:
    """Check and freeze channel counts: positive integers for one layer or more, whose names are strings."""
    if not channels:
        raise UserError("a route needs at least one layer")
    for layer, count in channels.items():
        if not isinstance(layer, str):
            raise UserError(f"layer names must be strings, not {layer!r}")
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"layer {layer!r} must have a positive number of channels, not {count!r}")
    return LayerMap(channels)


def require_layers(what: str, values: Mapping[str, Any], channels: Mapping[str, int]) -> None:
    """Raise a `UserError` naming the first layer that only one of them has; ``what`` says what the values are."""
    for layer in dict.fromkeys((*values, *channels)):
        if layer not in channels:
            raise UserError(f"there are {what} for layer {layer!r}, but no channel count")
        if layer not in values:
            raise UserError(f"there are no {what} for layer {layer!r}")


def require_same(ours: Mapping[str, int], theirs: Mapping[str, int], other: str = "the other route") -> None:
    """Raise a `UserError` naming the first layer in which two routes' names, order or channel counts differ."""
    for pair in zip_longest(ours.items(), theirs.items()):
        if pair[0] != pair[1]:
            here, there = ("nothing" if each is None else f"layer {each[0]!r} ({each[1]} channels)" for each in pair)
            raise UserError(f"{here} stands where {other} has {there}: they come from different networks")


def require_fit(ours: Mapping[str, int], theirs: Mapping[str, int], what: str) -> None:
    """Raise a `UserError` naming the first of our layers that is missing or of another size in ``what``.

    Layers of ``what`` that the route lacks are no fault: a route may cover a part of a network.
    """
    for layer, count in ours.items():
        if layer not in theirs:
            raise UserError(
                f"layer {layer!r} ({count} channels) of the route is not in the {what}: "
                f"use the {what} that the route was made for"
            )
        require_channels(layer, count, theirs[layer], what)


def require_channels(layer: str, ours: int, theirs: int, what: str = "model") -> None:
    """Raise a `UserError` if a layer has another number of channels in ``what`` than in the route."""
    if theirs != ours:
        raise UserError(
            f"layer {layer!r} has {ours} channels in the route but {theirs} in the {what}: "
            f"use the {what} that the route was made for"
        )


def require_model(channels: Mapping[str, int], model: nn.Module) -> None:
    """Raise a `UserError` naming the first layer that ``model`` lacks or has with another number of channels.

    Names are those of the tracer: ``"conv#2"`` is the second call of the module ``conv``, ``"model"`` a call made by
    the root module itself. Only a leaf that states ``out_channels`` or ``out_features`` has its count compared: a
    module with children may contain several calls, of other sizes than the one that it states.
    """
    modules = {unwrapped(model, name): module for name, module in model.named_modules(remove_duplicate=False)}
    modules.setdefault("model", model)
    counts: dict[str, int] = {}
    for layer, count in channels.items():
        module = modules.get(_CALL_INDEX.sub("", layer))
        if module is not None:
            stated = getattr(module, "out_channels", getattr(module, "out_features", None))
            is_leaf = not any(module.children())
            counts[layer] = stated if is_leaf and isinstance(stated, int) else count
    require_fit(channels, counts, "model")
