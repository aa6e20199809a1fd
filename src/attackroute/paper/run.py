"""What ``attackroute reproduce`` does: experiments on trained networks, and the page made of their files.

Tables 2 and 3 come from hardening studies, which train networks for hours: ``python -m studies.hardening``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attackroute.analysis.study import Study
from attackroute.core.document import Document, read_object
from attackroute.core.errors import UserError, did_you_mean
from attackroute.core.files import file_errors, replace_file, write_json
from attackroute.core.model_state import weights_digest
from attackroute.core.statistics import count_correct
from attackroute.paper.claims import Claim, Findings, NetworkResults
from attackroute.paper.experiments import PARTS, paper_attacks
from attackroute.paper.hardening_tables import STUDY
from attackroute.paper.page import DATA_OF, HEADINGS, blocks, claims_of, fill, skeleton
from attackroute.tracing.trace import Progress, trace_routes
from attackroute.zoo.data import ImageData, load_data
from attackroute.zoo.weights import ModelCard, find_card, open_network, preset_folder, preset_names

PAGE = "reproduction.md"
ALL = "all"
TARGETS = tuple(sorted([*PARTS, *DATA_OF]))
"""Names of the tables and figures, figures first."""

_NETWORK = "network.json"
_SHARE = 0.3  # of a layer's channels on the model's route, the paper's
_TABLE1 = "table1"


@dataclass(frozen=True, kw_only=True)
class ReproductionSettings:
    """What is reproduced, on what, and where it goes.

    Raises:
        UserError: A target is unknown, a study is not there or about other data, or the data are not named.
    """

    targets: Sequence[str]  # of :data:`TARGETS`, or "all": all of them, of tables 2 and 3 those whose study is there
    folder: Path  # exists
    data: str | None = None  # as :func:`attackroute.load_data` takes it; None where only tables 2 and 3 are wanted
    models: Sequence[str] = ()  # preset:NAME or train folders; none means every preset for the data
    samples: int = 2500  # half decide on routes and ranks, half are measured; Table 1 takes all images there are
    page: Path | None = None  # the Markdown file whose marks are filled; None writes :data:`PAGE` into the folder
    batch_size: int = 128
    seed: int = 0  # of the images that are drawn, and of their halves
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    resume: bool = False  # whether what the folder holds on the same terms is left as it is

    def __post_init__(self) -> None:
        names = [*TARGETS, ALL]
        for target in self.targets:
            if target not in names:
                close = did_you_mean(target, names)
                raise UserError(f"no table or figure {target!r}{close}; choose from {', '.join(names)}")
            if target in DATA_OF and target not in self.studies:
                raise UserError(self.missing(target))
        if self.experiments and self.data is None:
            raise UserError(f"{self.experiments[0]} needs images; give --data")

    @cached_property
    def studies(self) -> dict[str, Findings]:
        """The hardening studies that the folder holds, by table."""
        studies = {}
        for table, data in DATA_OF.items():
            file = self.folder / table / f"{STUDY}.json"
            if file.exists():
                study = studies[table] = Findings.of(Document.load(file))
                if study["data"].startswith("svhn:") != (data == "svhn"):
                    raise UserError(f"{file} is a study of {study['data']}, but {table} is about {data}")
        return studies

    @property
    def filled(self) -> Path:
        """The page that is filled."""
        return self.page or self.folder / PAGE

    @property
    def chosen(self) -> list[str]:
        """The targets, each once, figures before tables."""
        every = [target for target in TARGETS if target not in DATA_OF or target in self.studies]
        return every if ALL in self.targets else [target for target in TARGETS if target in self.targets]

    @property
    def experiments(self) -> list[str]:
        """Those of them that take trained networks."""
        return [target for target in self.chosen if target in PARTS]

    def missing(self, table: str) -> str:
        """Says that a study is not there, and which command makes it."""
        return (
            f"{self.folder / table} holds no study for {table}; from a clone, "
            f"python -m studies.hardening --data {DATA_OF[table]}:PATH --out {self.folder / table} makes it"
        )


def reproduce(
    settings: ReproductionSettings,
    *,
    line: Callable[[str], None],
    note: Callable[[str], None],
    progress: Callable[[str], AbstractContextManager[Progress]],
) -> dict[str, list[Claim]]:
    """Reproduce tables and figures, fill the page from all that the folder holds, and judge the targets' claims.

    Called are ``line`` with what is done, ``note`` with what there is to say in passing, and ``progress`` as
    :class:`attackroute.analysis.study.Study` does. What comes back are the paper's claims by target.

    Raises:
        UserError: The page, the data or a network cannot be used, or the folder holds results of other weights.
    """
    if settings.page is not None:
        fill(_text(settings.page), dict.fromkeys(HEADINGS, ""))  # whether it can be filled, before hours of work
    for table in DATA_OF if ALL in settings.targets else ():
        if table not in settings.studies:
            note(f"note: {table} is left out: {settings.missing(table)}")
    if settings.data is not None and settings.experiments:
        every = load_data(settings.data, split="test")
        some = load_data(settings.data, split="test", samples=settings.samples, seed=settings.seed)
        for model in _models(settings, every):
            network = open_network(model, every).to(settings.device)
            folder = settings.folder / _name(model)
            folder.mkdir(exist_ok=True)
            _describe(settings, network, model, every, folder)
            origin = {"model": model, "data": settings.data, "device": settings.device.type}
            studies = {
                images: Study(
                    model=network, images=images, attacks=paper_attacks(), share=_SHARE,
                    batch_size=settings.batch_size, seed=settings.seed, folder=folder, settings=origin, note=note,
                    progress=progress,
                )
                for images in (every, some)
            }  # fmt: skip
            experiments = {
                name: (experiment, studies[every if target == _TABLE1 else some])
                for target in settings.experiments
                for name, experiment in PARTS[target].items()
            }
            for name, (experiment, study) in experiments.items():
                document = experiment.finished(study) if settings.resume else None
                if document is None:
                    _, document = experiment.carry_out(study)
                line(f"{folder.name}, {name} ({document.about['seconds']:.0f} s)")
    results = _results(settings.folder)
    text = skeleton() if settings.page is None else _text(settings.page)
    replace_file(settings.filled, fill(text, blocks(results, settings.studies)).encode())
    return {target: claims_of(target, results, settings.studies) for target in settings.chosen}


def _models(settings: ReproductionSettings, images: ImageData) -> list[str]:
    """The networks to look at."""
    if settings.models:
        return list(dict.fromkeys(settings.models))
    fitting = [name for name in preset_names() if ModelCard.load(preset_folder(name)).classes == images.classes]
    if not fitting:
        raise UserError(f"no preset knows the classes of {images.name}'s images; name a network with --model")
    return [f"preset:{name}" for name in fitting]


def _describe(settings: ReproductionSettings, network: nn.Module, model: str, images: ImageData, folder: Path) -> None:
    """Write what the page says about the network."""
    digest = weights_digest(network)
    earlier = _read(folder / _NETWORK)
    if earlier is not None:
        if earlier["weights"] != digest:  # else the page would show them under one name
            raise UserError(f"{folder} holds results of other weights ({earlier['model']}); choose another --out")
        if (earlier["images"], earlier["data"]) == (len(images), settings.data):
            return
    image, label = images.dataset[0]
    routes = trace_routes(network, (image[None], torch.tensor([label])))
    accuracy = count_correct(network, images.dataset, batch_size=settings.batch_size)
    content = {
        "model": model,
        "data": settings.data,
        "weights": digest,
        "layers": list(routes.layers),
        "neurons": sum(routes.channels.values()),
        "parameters": sum(value.numel() for value in network.parameters()),
        "accuracy": accuracy.value,
        "images": accuracy.total,
    }
    write_json(folder / _NETWORK, content)


def _results(folder: Path) -> list[NetworkResults]:
    """What the folder holds of networks, whole files alone."""
    names = {name for experiments in PARTS.values() for name in experiments}
    networks = []
    for file in sorted(folder.glob(f"*/{_NETWORK}")):
        about = _read(file)
        if about is not None:
            experiments = {}
            for name in names:
                with suppress(UserError):
                    experiments[name] = Findings.of(Document.load(file.parent / f"{name}.json"))
            networks.append(NetworkResults(file.parent.name, about, experiments))
    return networks


def _read(file: Path) -> dict[str, Any] | None:
    """What a file says about a network, if there is a whole one."""
    with suppress(UserError):
        return read_object(file)
    return None


def _text(page: Path) -> str:
    with file_errors(page):
        return page.read_text()


def _name(model: str) -> str:
    """What a network's folder is called: the preset's name, or the train folder's."""
    card = find_card(model)
    if card is None:
        raise UserError(
            f"--model {model} is no preset and no folder of attackroute train; give preset:NAME or a folder"
        )
    return card[0].resolve().name
