"""What ``attackroute reproduce`` does: experiments on networks, a hardening study, and the page made of their files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attackroute.analysis.hardening_plan import StudyPlan
from attackroute.analysis.study import Study
from attackroute.cli.console import Output
from attackroute.cli.hardening_study_run import STUDY, run_study
from attackroute.cli.options import open_folder
from attackroute.cli.paper_experiments import PARTS, paper_attacks
from attackroute.core.accuracy import count_correct
from attackroute.core.errors import UserError
from attackroute.core.files import replace_file
from attackroute.core.layers import OUTPUT
from attackroute.core.model_state import weights_digest
from attackroute.paper.page import DATA_OF, SECTIONS, blocks, claims_of, fill, skeleton
from attackroute.paper.results import Content, NetworkResults
from attackroute.routes.folder import write_json
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.images import ImageData
from attackroute.zoo.networks import find_card, open_network
from attackroute.zoo.sources import load_data

PAGE = "reproduction.md"
_NETWORK = "network.json"
_SHARE = 0.3  # of a layer's channels on the model's route, the paper's
_DRAWS = 5
_TABLE1 = "table1"


@dataclass(frozen=True)
class Run:
    """A reproduction and its folder.

    Args:
        folder: Where everything goes; it exists.
        data: Value of ``--data``.
        batch_size: Images at a time.
        seed: Of the images that are drawn, and of their halves.
        device: Where networks run.
        resume: Whether what the folder holds on the same terms is left as it is.
        output: Where the words go.
    """

    folder: Path
    data: str
    batch_size: int
    seed: int
    device: torch.device
    resume: bool
    output: Output

    def network(self, model: str, targets: Sequence[str], every: ImageData, some: ImageData) -> None:
        """Run the experiments of tables and figures on one network.

        Args:
            model: Value of ``--model``.
            targets: Names of tables and figures.
            every: All test images, for Table 1.
            some: Those for the other experiments.
        """
        network = open_network(model, every).to(self.device)
        home = open_folder(self.folder / _name(model))
        self._describe(network, model, every, home)
        studies = {
            images: Study(
                network, images, paper_attacks(), None, _SHARE, OUTPUT, _DRAWS, self.batch_size, self.seed,
                {"model": model, "data": self.data, "device": self.device.type}, home, self.output,
            )
            for images in (every, some)
        }  # fmt: skip
        parts = {
            part: (experiment, studies[every if target == _TABLE1 else some])
            for target in targets
            for part, experiment in PARTS[target].items()
        }
        for part, (experiment, study) in parts.items():
            done = study.finished(part) if self.resume else None
            if done is None:
                _, done = study.run(part, experiment)
            self.output.line(f"{home.name}, {part} ({done['seconds']:.0f} s)")

    def _describe(self, network: nn.Module, model: str, images: ImageData, home: Path) -> None:
        """Write what the page says about the network."""
        digest = weights_digest(network)
        known = _read(home / _NETWORK)
        if known is not None and known["weights"] != digest:  # else the page would show them under one name
            raise UserError(f"{home} holds results of other weights ({known['model']}); choose another --out")
        if known is not None and (known["images"], known["data"]) == (len(images), self.data):
            return
        image, label = images.dataset[0]
        routes = trace_routes(network, (image[None], torch.tensor([label])))
        found = count_correct(network, images.dataset, batch_size=self.batch_size)
        content = {
            "model": model,
            "data": self.data,
            "weights": digest,
            "layers": list(routes.layers),
            "neurons": sum(routes.channels.values()),
            "parameters": sum(value.numel() for value in network.parameters()),
            "accuracy": found.value,
            "images": found.total,
        }
        write_json(home / _NETWORK, content)

    def hardening(
        self, table: str, plan: StudyPlan, width: float, train_samples: int | None, test_samples: int
    ) -> None:
        """Carry out the study of Table 2 or 3, with a VGG-16."""
        train = load_data(self.data, split="train", samples=train_samples, seed=self.seed)
        test = load_data(self.data, split="test", samples=test_samples, seed=self.seed)
        study = run_study(
            plan, "vgg16", width, self.data, train, test, self.folder / table,
            resume=self.resume, device=self.device, output=self.output,
        )  # fmt: skip
        for sentence in study.sentences():
            self.output.line(sentence)

    def write_page(self, page: Path | None, targets: Sequence[str]) -> None:
        """Write the page from all that the folder holds, and say what became of the targets' claims."""
        results, studies = self._results(), self._studies()
        texts = blocks(results, studies)
        path = page or self.folder / PAGE
        text = path.read_text() if page is not None else skeleton()
        replace_file(path, fill(text, texts).encode())
        found = {target: claims_of(target, results, studies) for target in targets}
        self.output.result(
            {
                "page": str(path),
                "claims": [{"target": target, **vars(claim)} for target, claims in found.items() for claim in claims],
            }
        )
        for target, claims in found.items():
            self.output.line(f"\n{target}")
            for claim in claims:
                equals = f"; as good: {', '.join(claim.equals)}" if claim.equals else ""
                self.output.line(f"  {claim.verdict}, {claim.network}: {claim.text}: {claim.found}{equals}")
        self.output.line(f"\nAll of it is in {path}; tables and figures in {self.folder}")

    def _results(self) -> list[NetworkResults]:
        found = []
        for home in sorted(path.parent for path in self.folder.glob(f"*/{_NETWORK}")):
            about = _read(home / _NETWORK)
            if about is not None:
                names = {part for parts in PARTS.values() for part in parts}
                contents = {name: content for name in names if (content := _read(home / f"{name}.json")) is not None}
                found.append(NetworkResults(home.name, tuple(about["layers"]), about, contents))
        return found

    def _studies(self) -> dict[str, Content]:
        found = {table: _read(self.folder / table / f"{STUDY}.json") for table in DATA_OF}
        return {table: content for table, content in found.items() if content is not None}


def check_page(page: Path) -> None:
    """Make sure that a page can be filled, before hours of work.

    Raises:
        UserError: It cannot be read, or has no marks.
    """
    try:
        text = page.read_text()
    except OSError as error:
        raise UserError(f"--page {page} cannot be read ({error.strerror}); name a Markdown file") from error
    fill(text, dict.fromkeys(SECTIONS, ""))


def _name(model: str) -> str:
    """What a network's folder is called: the preset's name, or the train folder's."""
    found = find_card(model)
    if found is None:
        raise UserError(
            f"--model {model} is no preset and no folder of attackroute train; give preset:NAME or a folder"
        )
    return found[0].resolve().name


def _read(path: Path) -> dict[str, Any] | None:
    """An experiment's file, if there is a whole one."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
