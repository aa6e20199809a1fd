"""Folders of runs to report on: a tiny network, a few pictures, and what the commands leave of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.utils import save_image
from typer.testing import CliRunner

import attackroute as ar
from attackroute.cli.app import app
from attackroute.zoo.card import ModelCard
from attackroute.zoo.spec import ModelSpec

CLASSES = ("<script>alert(1)</script>", 'light & "bright"')
"""Names that must be harmless."""


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def done(*arguments: object) -> None:
    result = run(*arguments)
    assert result.exit_code == 0, result.output


def make_pictures(root: Path, count: int = 8) -> None:
    random = torch.Generator().manual_seed(0)
    for label, name in enumerate(("dark", "light")):
        (root / name).mkdir(parents=True)
        for number in range(count):
            save_image(0.6 * torch.rand(3, 32, 32, generator=random) + 0.3 * label, root / name / f"{number:02}.png")


def make_network(folder: Path, classes: tuple[str, ...] = ("dark", "light")) -> nn.Module:
    """A folder as attackroute train writes it, with random weights."""
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    model = ar.build_model("vgg_small", width=0.25, num_classes=2)
    ModelCard(ModelSpec("vgg_small", num_classes=2, width=0.25, image_size=32, in_channels=3), classes).save(folder)
    save_file(model.state_dict(), folder / "best.safetensors")
    return model.eval()


def make_run(root: Path) -> Path:
    """All that a run can hold, from the commands themselves, with the demo's names of folders."""
    make_pictures(root / "pictures")
    make_network(root / "run" / "model")
    common = ("--model", root / "run" / "model", "--data", f"folder:{root / 'pictures'}", "--quiet")
    done("trace", *common, "--out", root / "run")
    done("trace", *common, "--attack", "fgsm:eps=0.1", "--out", root / "run" / "attacked")
    done("evaluate", *common, "--attack", "fgsm:eps=0.1", "--check-samples", 4, "--out", root / "run" / "evaluation")
    done("hardness", *common, "--attack", "fgsm:eps=0.1", "--out", root / "run" / "hardness")
    done("analyze", *common, "--attack", "fgsm:eps=0.1", "--only", "occurrence", "--out", root / "run" / "analysis")
    return root / "run"


def data_of(page: Path) -> dict[str, Any]:
    """The data that the page holds."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    content = json.loads(found[1])
    assert isinstance(content, dict)
    return content
