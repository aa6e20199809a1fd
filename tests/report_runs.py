"""Folders of runs to report on: a tiny network, a few pictures, and what the commands leave of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.utils import save_image

import attackroute as ar
from attackroute.core.document import Document
from attackroute.core.model_state import weights_digest
from attackroute.core.table import Table
from attackroute.zoo.data import ImageBatches, load_data
from attackroute.zoo.spec import ModelSpec
from attackroute.zoo.weights import ModelCard, open_network

CLASSES = ("<script>alert(1)</script>", 'light & "bright"')
"""Names that must be harmless."""
ATTACK = "fgsm:eps=0.1"


def make_pictures(root: Path, count: int = 8) -> None:
    random = torch.Generator().manual_seed(0)
    for label, name in enumerate(("dark", "light")):
        (root / name).mkdir(parents=True)
        for number in range(count):
            save_image(0.6 * torch.rand(3, 32, 32, generator=random) + 0.3 * label, root / name / f"{number:02}.png")


def make_network(folder: Path, seed: int = 1, classes: tuple[str, ...] = ("dark", "light")) -> nn.Module:
    """A folder as attackroute train writes it, with random weights."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model = ar.build_model("vgg_small", width=0.25, num_classes=2)
    ModelCard(ModelSpec("vgg_small", num_classes=2, width=0.25, image_size=32, in_channels=3), classes).save(folder)
    save_file(model.state_dict(), folder / "best.safetensors")
    return model.eval()


def shares(correct: int, samples: int) -> dict[str, Any]:
    """An accuracy as evaluations have it."""
    share = correct / samples
    ends = {"accuracy_low": max(0.0, share - 0.1), "accuracy_high": min(1.0, share + 0.1)}
    return {"accuracy": share, **ends, "correct": correct, "samples": samples}


def save_traces(folder: Path, pictures: Path) -> None:
    """Traces of the network below a folder, clean and attacked, with the document of the clean one."""
    images = load_data(f"folder:{pictures}", image_size=32)
    network = open_network(str(folder / "model"), images)
    for attack, home in ((None, folder), (ar.parse_attack(ATTACK), folder / "attacked")):
        home.mkdir(exist_ok=True)
        routes = ar.trace_routes(network, ImageBatches(images), 0.2, attack=attack)
        routes = replace(routes, provenance=replace(routes.provenance, data=f"folder:{pictures}", seed=0))
        routes.save(home / "routes.safetensors")
        routes.aggregate(0.3).save(home / "route.json")
        right = float((routes.labels == routes.predictions).double().mean())
        settings = {
            "model": str(folder / "model"), "weights": weights_digest(network), "data": f"folder:{pictures}",
            "split": "all", "samples": None, "seed": 0, "images": [len(images), *images.shape], "width": 0.2,
            "linear": False,
        }  # fmt: skip
        about = {"samples": len(routes), "accuracy": right, "attack": routes.provenance.attack}
        Document("trace", settings, "It was traced.", about=about).save(home)


def save_evaluation(folder: Path, clean: int, attacked: int) -> None:
    rows = [
        {"model": "net", "attack": attack, **shares(correct, 16)}
        for attack, correct in (("clean", clean), (str(ar.parse_attack(ATTACK)), attacked))
    ]
    checks = [
        {"model": "net", "check": "one step against many", "verdict": "silent", "samples": 4, "numbers": {"share": 0.5},
         "p": 0.25, "sentence": "Many steps fool what one step fools."},
    ]  # fmt: skip
    settings = {"data": "folder:pictures", "split": "all", "seed": 0, "libraries": {"torch": "2.9", "numpy": "2.0"}}
    reading = f"net is right on {clean} and {attacked} images."
    folder.mkdir()
    Document("evaluation", settings, reading, Table.of(rows), {"checks": checks}).save(folder)


def make_run(root: Path) -> Path:
    """All that a run can hold, with the demo's names of folders."""
    make_pictures(root / "pictures")
    home = root / "run"
    make_network(home / "model")
    save_traces(home, root / "pictures")
    save_evaluation(home / "evaluation", 9, 4)
    for name, files in (("analysis", ("occurrence.svg",)), ("hardness", ("hardness.svg", "hardness-images.png"))):
        (home / name).mkdir()
        for file in files:
            (home / name / file).write_bytes(f"<svg>{file}</svg>".encode())
    about = {
        "attacks": {ATTACK: {"fooled": 3, "bins_hardest_first": [[2, 0], [2, 1], [1, 1]]}},
        "classes": [{"label": 0, "samples": 8, "V_mean": 75.0}],
    }
    judged = Table.of([{"predictor": "loss", "statistic": "AUROC", "value": 0.75}])
    Document("hardness", {"seed": 0}, "The attack fools the weakest.", judged, about).save(home / "hardness")
    occurrence = Table.of([{"layer": "features.0", "of": "clean", "value": 0.75}])
    titled = {"title": "Occurrence, clean and attacked", "order": 1, "seconds": 1.25}
    Document("occurrence", {"attacks": [ATTACK]}, "Most use the same.", occurrence, titled).save(home / "analysis")
    return home


def data_of(page: Path) -> dict[str, Any]:
    """The data that the page holds."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    content = json.loads(found[1])
    assert isinstance(content, dict)
    return content
