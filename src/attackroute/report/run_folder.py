"""What a run's folder holds: files of trace, analyze, hardness, evaluate, harden and demo, one level deep."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attackroute.core.errors import UserError
from attackroute.core.files import shown
from attackroute.robustness.attack_order import by_radius
from attackroute.routes.folder import StoredRoutes, has_routes
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route

_ROUTES, _ROUTE, _SUMMARY = "routes.safetensors", "route.json", "summary.json"
_HARDNESS, _EVALUATION, _CARD = "hardness.json", "evaluation.json", "model.json"
_HARDENING, _SETTINGS = "hardening.json", "settings.json"
_PICTURES = (".svg", ".png")


@dataclass(frozen=True)
class Document:
    """A JSON file of a command, and the figures beside it.

    Attributes:
        name: What it is called: the experiment's name, or the file's without ending.
        path: The file, relative to the run's folder.
        content: What it holds.
        figures: Files of each figure by ending, by title.
    """

    name: str
    path: str
    content: Mapping[str, Any]
    figures: Mapping[str, Mapping[str, Path]]


@dataclass(frozen=True)
class RunFolder:
    """What was found.

    Attributes:
        path: The folder.
        routes: Routes of samples as they are; None where no trace is there.
        attacked: Routes of attacked samples, one for each attack, by rising radius.
        route: The model's route, of clean samples where there are any.
        summary: The summary of the trace or of the demo.
        experiments: What ``attackroute analyze`` measured, in order of name.
        hardness: What ``attackroute hardness`` found.
        evaluation: What ``attackroute evaluate`` found.
        hardenings: What ``attackroute harden`` compared, its control runs included.
        model: The folder of a trained network.
        left_out: Files of the same kind as one that is shown.
    """

    path: Path
    routes: InstanceRoutes | None
    attacked: tuple[InstanceRoutes, ...]
    route: Route | None
    summary: Mapping[str, Any] | None
    experiments: tuple[Document, ...]
    hardness: Document | None
    evaluation: Document | None
    hardenings: tuple[Document, ...]
    model: Path | None
    left_out: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> RunFolder:
        """Read a run's folder and the folders directly in it; nearer files come first, then by name.

        Raises:
            UserError: There is no such folder, it holds nothing of this package, or a file is damaged.
        """
        places = _places(folder)
        finds = _Finds(folder)
        traces = [StoredRoutes.open(place).load() for place in places if has_routes(place)]
        # beside hardening.json lies the route that was punished, which is not that of the hardened network
        routes = [Route.load(file) for file in _files(places, _ROUTE) if not (file.parent / _HARDENING).is_file()]
        clean = finds.first([trace for trace in traces if trace.provenance.attack is None], _ROUTES)
        attacked: dict[str, InstanceRoutes] = {}
        for trace in traces:
            if trace.provenance.attack is not None and _fits(trace, clean or next(iter(attacked.values()), None)):
                attacked.setdefault(trace.provenance.attack, trace)
        own = [
            route
            for route in routes
            if (route.provenance is None or route.provenance.attack is None) and _fits(route, clean)
        ]
        summaries = finds.documents(_files(places, _SUMMARY))
        whole = [item for item in summaries if item.content.get("attack") is None]
        experiments = finds.documents(
            [file for place in places for file in sorted(place.glob("*.json")) if _is_experiment(file)]
        )
        experiments += [part for item in whole[:1] for part in _silencing(item, folder)]
        first = {item.name: item for item in reversed(experiments)}
        found = cls(
            folder,
            clean,
            tuple(attacked[name] for name in sorted(attacked, key=by_radius)),
            next(iter(own), None),
            next((item.content for item in whole), None),
            tuple(first[name] for name in sorted(first)),
            finds.first(finds.documents(_files(places, _HARDNESS)), _HARDNESS),
            finds.first(finds.documents(_files(places, _EVALUATION)), _EVALUATION),
            tuple(
                [
                    *map(_hardening, finds.documents(_files(places, _HARDENING))),
                    *(part for item in whole[:1] for part in _demo_hardening(item)),
                ]
            ),
            _network(folder, _files(places, _CARD)),
            tuple(finds.left_out),
        )
        if found.is_empty:
            raise UserError(
                f"{shown(folder)} holds no run: there is no {_ROUTE}, {_ROUTES}, {_HARDNESS}, {_EVALUATION}, "
                f"{_CARD} or experiment in it or one level below; name a folder that attackroute wrote"
            )
        return found

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to report on."""
        parts = (self.routes, self.route, self.summary, self.hardness, self.evaluation, self.model)
        return all(part is None for part in parts) and not (self.attacked or self.experiments or self.hardenings)

    @property
    def network(self) -> str | None:
        """What the files call the network: its folder's own description, else what commands were given."""
        card = None if self.model is None else read_object(self.model / _CARD).get("model")
        name = _mapping(card).get("name") or self.terms.get("model")
        return name if isinstance(name, str) else None

    @property
    def terms(self) -> dict[str, Any]:
        """What the files say of the network and the images: ``model``, ``data``, ``split``, ``weights``, ..."""
        sources: list[Mapping[str, Any]] = [_mapping(item.content.get("terms")) for item in self.experiments]
        if self.summary is not None:
            sources = [_mapping(self.summary.get("terms")), self.summary, *sources]
        if self.evaluation is not None:
            content = self.evaluation.content
            sources.append({name: content.get(name) for name in ("data", "split", "seed")})
        if self.hardness is not None:
            content = self.hardness.content
            data, _, split = str(content.get("data") or "").rpartition(" ")  # "cifar10:~/data test"
            sources.append(
                {
                    "model": content.get("model"),
                    "data": data or None,
                    "split": split or None,
                    "linear": content.get("linear"),
                }
            )
        found: dict[str, Any] = {}
        for source in sources:
            for name, value in source.items():
                if value is not None:
                    found.setdefault(name, value)
        return found


class _Finds:
    """Reads documents, and remembers those of which only the first is shown."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.left_out: list[str] = []

    def documents(self, files: list[Path]) -> list[Document]:
        return [self._document(file) for file in files]

    def first(self, found: list[Any], what: str) -> Any:
        if len(found) > 1:
            self.left_out.append(f"{len(found) - 1} more {what}")
        return found[0] if found else None

    def _document(self, file: Path) -> Document:
        content = read_object(file)
        if file.name == _HARDENING and (file.parent / _SETTINGS).is_file():
            content = {**content, "settings": read_object(file.parent / _SETTINGS)}
        name = str(content.get("experiment") or file.stem)
        figures: dict[str, dict[str, Path]] = {}
        for path in sorted(file.parent.iterdir()):
            title = path.stem
            mine = (
                title == file.stem
                or title.startswith(f"{file.stem}-")
                or (file.name == _HARDNESS == f"{name}.json" and title == "images")
            )
            if path.suffix in _PICTURES and mine:
                figures.setdefault(title, {})[path.suffix] = path
        return Document(name, str(file.relative_to(self._folder)), content, figures)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: The file cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_bytes(), parse_constant=_refuse)
    except OSError as error:
        raise UserError(f"{shown(file)}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown(file)}: not JSON, or damaged ({error}); write it anew, or move it away") from None
    if not isinstance(content, dict):
        raise UserError(f"{shown(file)}: holds no JSON object; write it anew, or move it away")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _places(folder: Path) -> list[Path]:
    if not folder.exists():
        raise UserError(f"{shown(folder)}: there is no such folder; name one that attackroute trace or demo wrote")
    if not folder.is_dir():
        raise UserError(f"{shown(folder)} is a file; name the folder of a run")
    try:
        below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{shown(folder)}: cannot be read: {error.strerror or error}") from None
    return [folder, *below]


def _files(places: list[Path], name: str) -> list[Path]:
    return [place / name for place in places if (place / name).is_file()]


def _is_experiment(file: Path) -> bool:
    """Whether ``attackroute analyze`` wrote it; those of other commands have names of their own."""
    if file.name in (_ROUTE, _SUMMARY, _HARDNESS, _EVALUATION, _CARD, _HARDENING, _SETTINGS):
        return False
    return file.is_file() and file.stem in _EXPERIMENTS


_EXPERIMENTS = frozenset({"deactivate", "detect", "gradcam", "occurrence", "sensitivity", "transplant", "weaken"})


def _silencing(summary: Document, folder: Path) -> list[Document]:
    """What the demo measures beside its trace, with its figure."""
    content = summary.content.get("silencing")
    if not isinstance(content, dict):
        return []
    files = {kind: (folder / summary.path).parent / f"route{kind}" for kind in _PICTURES}
    found = {kind: file for kind, file in files.items() if file.is_file()}
    return [Document("silencing", summary.path, content, {"route": found} if found else {})]


def _hardening(found: Document) -> Document:
    """A comparison, called after its folder."""
    home, place = Path(found.path).parent, found.content.get("folder")
    name = home.name or (Path(place).name if isinstance(place, str) and place else found.name)
    return replace(found, name=name)


def _demo_hardening(summary: Document) -> list[Document]:
    """What the demo compares, as if ``attackroute harden`` had."""
    content = summary.content.get("hardening")
    if not isinstance(content, dict):
        return []
    own = {name: content[name] for name in ("lambda", "epochs", "penalty_shares") if name in content}
    compared = {name: value for name, value in content.items() if name not in own}
    return [Document("hardening", summary.path, {**own, "evaluation": compared}, {})]


def _network(folder: Path, cards: list[Path]) -> Path | None:
    """The folder of the run's network: the run's own, or the one called so beside others such as hardened ones."""
    homes = [card.parent for card in cards]
    return next((home for home in (folder, folder / "model", *homes) if home in homes), None)


def _fits(found: InstanceRoutes | Route, clean: InstanceRoutes | None) -> bool:
    """Whether it is of the same network as the clean trace, as far as layers tell."""
    return clean is None or dict(found.channels) == dict(clean.channels)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
