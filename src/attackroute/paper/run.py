"""What ``attackroute reproduce`` does: experiments on networks, a hardening study, and the page made of their files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from attackroute.analysis.study import Study
from attackroute.core.errors import UserError, did_you_mean
from attackroute.core.files import replace_file, write_json
from attackroute.core.model_state import weights_digest
from attackroute.core.statistics import count_correct
from attackroute.paper.claims import Claim, Findings, NetworkResults
from attackroute.paper.experiments import PARTS, paper_attacks
from attackroute.paper.hardening_plan import paper_plan
from attackroute.paper.hardening_study import STUDY, study_networks
from attackroute.paper.page import DATA_OF, SECTIONS, blocks, claims_of, fill, skeleton
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.data import ImageData, load_data
from attackroute.zoo.weights import ModelCard, find_card, open_network, preset_folder, preset_names

PAGE = "reproduction.md"
ALL = "all"
TARGETS = tuple(sorted([*PARTS, *DATA_OF]))
"""Names of the tables and figures, figures first."""

_NETWORK = "network.json"
_SHARE = 0.3  # of a layer's channels on the model's route, the paper's
_DRAWS = 5
_TABLE1 = "table1"
_CHECKED = 128  # images for signs of masked gradients


class Output(Protocol):
    """Where the words go."""

    def note(self, text: str) -> None:
        """Say something in passing."""

    def line(self, text: str) -> None:
        """Say a line of the result."""

    def progress(self, unit: str) -> AbstractContextManager[Any]:
        """A context that gives a progress bar, called with what is done, of how much, and a message."""


@dataclass(frozen=True)
class StudySettings:
    """Of the hardening studies of tables 2 and 3, which train networks.

    Attributes:
        width: Factor on the channels of the VGG-16.
        train_samples: Training images; None takes all.
        test_samples: Test images.
        seeds: Networks that are judged.
        epochs: Passes of the training.
        fine_epochs: Of the fine-tuning.
        autoattack_samples: Test images for AutoAttack; 0 leaves it out.
    """

    width: float = 0.125
    train_samples: int | None = None
    test_samples: int = 2000
    seeds: int = 3
    epochs: int = 10
    fine_epochs: int = 1
    autoattack_samples: int = 64


@dataclass(frozen=True)
class ReproductionSettings:
    """What is reproduced, on what, and where it goes.

    Attributes:
        targets: Names of :data:`TARGETS`, or ``"all"``: all of them, of tables 2 and 3 that of the data.
        data: As :func:`attackroute.load_data` takes it.
        folder: Where everything goes; it exists.
        models: Trained networks, ``preset:NAME`` or train folders; none means every preset for the data.
        samples: Test images; half decide on routes and ranks, half are measured. Table 1 takes all there are.
        page: The Markdown file whose marks are filled; None writes :data:`PAGE` into the folder.
        study: Of tables 2 and 3.
        batch_size: Images at a time.
        seed: Of the images that are drawn, and of their halves.
        device: Where networks run.
        resume: Whether what the folder holds on the same terms is left as it is.

    Raises:
        UserError: A target is unknown, or about other data.
    """

    targets: Sequence[str]
    data: str
    folder: Path
    models: Sequence[str] = ()
    samples: int = 2500
    page: Path | None = None
    study: StudySettings = StudySettings()
    batch_size: int = 128
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    resume: bool = False

    def __post_init__(self) -> None:
        _ = self.chosen

    @cached_property
    def chosen(self) -> list[str]:
        """The targets, each once, figures before tables."""
        other = "table2" if self.data.startswith("svhn:") else "table3"
        chosen = set()
        for target in self.targets:
            if target == ALL:
                chosen |= set(TARGETS) - {other}
            elif target == other:
                raise UserError(
                    f"{other} is about {DATA_OF[other]}, not about {self.data}; leave it out, or give other --data"
                )
            elif target in TARGETS:
                chosen.add(target)
            else:
                close = did_you_mean(target, [*TARGETS, ALL])
                raise UserError(f"no table or figure {target!r}{close}; choose from {', '.join([*TARGETS, ALL])}")
        return [target for target in TARGETS if target in chosen]


@dataclass(frozen=True)
class Reproduction:
    """What was reproduced.

    Attributes:
        page: The page that was filled.
        claims: By target, what became of the paper's claims.
    """

    page: Path
    claims: Mapping[str, Sequence[Claim]]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        claims = [{"target": target, **vars(claim)} for target, claims in self.claims.items() for claim in claims]
        return {"page": str(self.page), "claims": claims}


def reproduce(settings: ReproductionSettings, output: Output) -> Reproduction:
    """Reproduce tables and figures, fill the page from all that the folder holds, and judge the targets' claims.

    Args:
        settings: What is reproduced.
        output: Is told what is done, but not the claims.

    Raises:
        UserError: The page, the data or a network cannot be used, or the folder holds results of other weights.
    """
    page = settings.page or settings.folder / PAGE
    if settings.page is not None:
        _check_page(page)
    figures = [target for target in settings.chosen if target in PARTS]
    if figures:
        every = load_data(settings.data, split="test")
        some = load_data(settings.data, split="test", samples=settings.samples, seed=settings.seed)
        for model in _models(settings, every):
            _run_experiments(settings, model, figures, every, some, output)
    for table in settings.chosen:
        if table in DATA_OF:
            _harden(settings, table, output)
    results, studies = _results(settings.folder), _studies(settings.folder)
    text = skeleton() if settings.page is None else page.read_text()
    replace_file(page, fill(text, blocks(results, studies)).encode())
    return Reproduction(page, {target: claims_of(target, results, studies) for target in settings.chosen})


def _models(settings: ReproductionSettings, images: ImageData) -> list[str]:
    """The networks to look at."""
    if settings.models:
        return list(dict.fromkeys(settings.models))
    fitting = [name for name in preset_names() if ModelCard.load(preset_folder(name)).classes == images.classes]
    if not fitting:
        raise UserError(f"no preset knows the classes of {images.name}'s images; name a network with --model")
    return [f"preset:{name}" for name in fitting]


def _run_experiments(
    settings: ReproductionSettings,
    model: str,
    figures: Sequence[str],
    every: ImageData,
    some: ImageData,
    output: Output,
) -> None:
    """Run the experiments of tables and figures on one network: Table 1 on all test images, the others on some."""
    network = open_network(model, every).to(settings.device)
    folder = settings.folder / _name(model)
    folder.mkdir(exist_ok=True)
    _describe(settings, network, model, every, folder)
    origin = {"model": model, "data": settings.data, "device": settings.device.type}
    studies = {
        images: Study(
            model=network, images=images, attacks=paper_attacks(), share=_SHARE, draws=_DRAWS,
            batch_size=settings.batch_size, seed=settings.seed, folder=folder, settings=origin, note=output.note,
            progress=output.progress,
        )
        for images in (every, some)
    }  # fmt: skip
    parts = {
        part: (experiment, studies[every if figure == _TABLE1 else some])
        for figure in figures
        for part, experiment in PARTS[figure].items()
    }
    for part, (experiment, study) in parts.items():
        document = study.finished(experiment) if settings.resume else None
        if document is None:
            _, document = study.run(experiment)
        output.line(f"{folder.name}, {part} ({document.about['seconds']:.0f} s)")


def _describe(settings: ReproductionSettings, network: nn.Module, model: str, images: ImageData, folder: Path) -> None:
    """Write what the page says about the network."""
    digest = weights_digest(network)
    earlier = _read(folder / _NETWORK)
    if earlier is not None and earlier["weights"] != digest:  # else the page would show them under one name
        raise UserError(f"{folder} holds results of other weights ({earlier['model']}); choose another --out")
    if earlier is not None and (earlier["images"], earlier["data"]) == (len(images), settings.data):
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


def _harden(settings: ReproductionSettings, table: str, output: Output) -> None:
    """Carry out the study of Table 2 or 3, with a VGG-16."""
    terms = settings.study
    plan = paper_plan(terms.seeds, terms.epochs, terms.fine_epochs, terms.autoattack_samples, check_samples=_CHECKED)
    train = load_data(settings.data, split="train", samples=terms.train_samples, seed=settings.seed)
    test = load_data(settings.data, split="test", samples=terms.test_samples, seed=settings.seed)
    folder = settings.folder / table
    folder.mkdir(exist_ok=True)
    with output.progress("networks") as progress:
        study = study_networks(
            plan, "vgg16", terms.width, settings.data, train, test, folder,
            resume=settings.resume, device=settings.device, progress=progress,
        )  # fmt: skip
    for sentence in study.sentences():
        output.line(sentence)


def _results(folder: Path) -> list[NetworkResults]:
    networks = []
    for network in sorted(path.parent for path in folder.glob(f"*/{_NETWORK}")):
        about = _read(network / _NETWORK)
        if about is not None:
            names = {part for parts in PARTS.values() for part in parts}
            contents = {name: content for name in names if (content := _read(network / f"{name}.json")) is not None}
            parts = {name: Findings.of(content) for name, content in contents.items()}
            networks.append(NetworkResults(network.name, tuple(about["layers"]), about, parts))
    return networks


def _studies(folder: Path) -> dict[str, Findings]:
    contents = {table: _read(folder / table / f"{STUDY}.json") for table in DATA_OF}
    return {table: Findings.of(content) for table, content in contents.items() if content is not None}


def _check_page(page: Path) -> None:
    """Make sure that a page can be filled, before hours of work."""
    try:
        text = page.read_text()
    except OSError as error:
        raise UserError(f"--page {page} cannot be read ({error.strerror}); name a Markdown file") from error
    fill(text, dict.fromkeys(SECTIONS, ""))


def _name(model: str) -> str:
    """What a network's folder is called: the preset's name, or the train folder's."""
    card = find_card(model)
    if card is None:
        raise UserError(
            f"--model {model} is no preset and no folder of attackroute train; give preset:NAME or a folder"
        )
    return card[0].resolve().name


def _read(path: Path) -> dict[str, Any] | None:
    """An experiment's file, if there is a whole one."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
