"""What a run's folder holds: documents of the commands, routes and a network, one level deep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attackroute.core.document import Document
from attackroute.core.errors import UserError
from attackroute.core.files import file_errors, printable
from attackroute.robustness.registry import by_radius
from attackroute.routes.folder import RouteFolder, has_routes
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route
from attackroute.zoo.weights import CARD, ModelCard

# kinds of documents that have a section of their own; all others are experiments
TRACE, HARDNESS, EVALUATION, HARDENING = "trace", "hardness", "evaluation", "hardening"

_ROUTE = "route.json"
_ENDINGS = (".svg", ".png")


@dataclass(frozen=True)
class StoredDocument:
    """A document in a run's folder, and the figures beside it."""

    path: str  # of its JSON file, relative to the run's folder
    folder: str  # name of the folder that the file is in
    document: Document
    figures: Mapping[str, Mapping[str, Path]]  # by title and ending: called as the document, or so with - and more

    @classmethod
    def open(cls, file: Path, run: Path) -> StoredDocument:
        """Read a document; a `UserError` says if it is damaged."""
        figures: dict[str, dict[str, Path]] = {}
        for path in sorted(file.parent.iterdir(), key=lambda path: path.stem):
            if path.suffix not in _ENDINGS or path.is_symlink() or not path.is_file():
                continue  # a link may lead to what is not to be mailed
            if path.stem == file.stem or path.stem.startswith(f"{file.stem}-"):
                figures.setdefault(path.stem, {})[path.suffix] = path
        return cls(str(file.relative_to(run)), file.resolve().parent.name, Document.load(file), figures)

    @property
    def title(self) -> str:
        return str(self.document.about.get("title") or self.document.kind)

    @property
    def order(self) -> tuple[float, str]:
        """Its place among experiments: where it says so itself, else behind those, by kind."""
        order = self.document.about.get("order")
        return (order if isinstance(order, (int, float)) else math.inf, self.document.kind)

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of all that it measured, settings among it."""
        return {**self.document.settings, **self.document.about}


@dataclass(frozen=True)
class RunFolder:
    """What was read."""

    path: Path
    routes: InstanceRoutes | None = None  # of samples as they are
    attacked: tuple[InstanceRoutes, ...] = ()  # of attacked samples, one for each attack, by rising radius
    route: Route | None = None  # the model's, of clean samples where there are any
    trace: StoredDocument | None = None  # sums up that of samples as they are
    attacked_traces: tuple[StoredDocument, ...] = ()
    experiments: tuple[StoredDocument, ...] = ()  # what no other command found, in the order they ask for
    hardness: StoredDocument | None = None
    evaluation: StoredDocument | None = None
    hardenings: tuple[StoredDocument, ...] = ()  # controls included
    model: Path | None = None  # the folder of a trained network
    left_out: tuple[str, ...] = ()  # of the same kind as something that is shown

    @classmethod
    def open(cls, folder: Path) -> RunFolder:
        """Read a run's folder and the folders directly in it; nearer files come first, then by name."""
        places = _places(folder)
        kinds: dict[str, list[StoredDocument]] = {}
        for file in (file for place in places for file in sorted(place.glob("*.json")) if Document.is_at(file)):
            stored = StoredDocument.open(file, folder)
            kinds.setdefault(stored.document.kind, []).append(stored)
        hardenings = kinds.pop(HARDENING, [])
        summaries = kinds.get(TRACE, [])
        kinds[TRACE] = [stored for stored in summaries if stored.document.about.get("attack") is None]
        traces = [RouteFolder.open(place).load() for place in places if has_routes(place)]
        clean = [routes for routes in traces if routes.provenance.attack is None]
        attacked: dict[str, InstanceRoutes] = {}
        for routes in traces:
            attack = routes.provenance.attack
            if attack is not None and _fits(routes, [*clean, *attacked.values()]):
                attacked.setdefault(attack, routes)
        # beside a hardening lies the route that was punished, which is not that of the hardened network
        punished = {(folder / stored.path).parent for stored in hardenings}
        files = [place / _ROUTE for place in places if (place / _ROUTE).is_file() and place not in punished]
        model_routes = [route for route in map(Route.load, files) if _fits(route, clean)]
        model_routes = [route for route in model_routes if route.provenance is None or not route.provenance.attack]
        counts = {**{kind: len(documents) - 1 for kind, documents in kinds.items()}, "routes": len(clean) - 1}
        cards = [place for place in places if (place / CARD).is_file()]  # hardened ones among them
        firsts = {kind: documents[0] for kind, documents in kinds.items() if documents}
        run = cls(
            path=folder,
            routes=next(iter(clean), None),
            attacked=tuple(attacked[name] for name in sorted(attacked, key=by_radius)),
            route=next(iter(model_routes), None),
            trace=firsts.pop(TRACE, None),
            attacked_traces=tuple(stored for stored in summaries if stored not in kinds[TRACE]),
            hardness=firsts.pop(HARDNESS, None),
            evaluation=firsts.pop(EVALUATION, None),
            experiments=tuple(sorted(firsts.values(), key=lambda stored: stored.order)),
            hardenings=tuple(hardenings),
            model=next((place for place in (folder, folder / "model", *cards) if place in cards), None),
            left_out=tuple(f"{count} more {kind}" for kind, count in counts.items() if count > 0),
        )
        if run == cls(folder):
            raise UserError(
                f"{printable(folder)} holds no run: there is no result, no route and no network in it or one level "
                "below; name a folder that attackroute wrote"
            )
        return run

    @property
    def documents(self) -> tuple[StoredDocument, ...]:
        """All that is shown of the run but its trace."""
        singles = (self.hardness, self.evaluation)
        return (*self.experiments, *(item for item in singles if item is not None), *self.hardenings)

    @property
    def network(self) -> str | None:
        """What the files call the network: its folder's own description, else what commands were given."""
        name = self.settings.get("model") if self.model is None else ModelCard.load(self.model).spec.name
        return name if isinstance(name, str) else None

    @property
    def settings(self) -> dict[str, Any]:
        """What the files say of the network and the images: ``model``, ``data``, ``split``, ``weights``, ..."""
        merged: dict[str, Any] = {}
        for stored in (self.trace, *self.experiments, self.evaluation, self.hardness, *self.attacked_traces):
            for name, value in {} if stored is None else stored.document.settings.items():
                merged.setdefault(name, value)  # also None, such as samples=None, all of them
        return merged


def _places(folder: Path) -> list[Path]:
    if not folder.is_dir():
        fault = "is a file" if folder.exists() else "there is no such folder"
        raise UserError(f"{printable(folder)}: {fault}; name a folder that attackroute trace or demo wrote")
    with file_errors(folder):
        below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [folder, *below]


def _fits(routes: InstanceRoutes | Route, others: list[InstanceRoutes]) -> bool:
    """Whether it is of the same network as the first of the others, as far as layers tell."""
    return not others or dict(routes.channels) == dict(others[0].channels)
