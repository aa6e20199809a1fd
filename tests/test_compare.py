"""``attackroute compare``: what left and entered, and the differences, from the files themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import attackroute as ar
from attackroute.core.document import Document
from attackroute.report.measuring import unmeasured
from attackroute.report.page import Content
from attackroute.report.run_folder import RunFolder
from attackroute.report.two_runs import RunComparison, build_comparison
from attackroute.zoo.data import ImageBatches, load_data
from attackroute.zoo.weights import open_network
from command_line import done, refused, run
from report_runs import ATTACK, data_of, make_network, make_pictures, save_evaluation, save_traces
from test_report import Elements


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks of the same layers, with traces of the same pictures, clean and attacked, and evaluations."""
    root = tmp_path_factory.mktemp("compare")
    make_pictures(root / "pictures")
    for name, seed in (("before", 1), ("after", 2)):
        make_network(root / name / "model")
        file = root / name / "model" / "best.safetensors"
        torch.manual_seed(seed)
        weights = load_file(file)
        save_file(
            {
                key: value + 0.1 * torch.randn_like(value) if value.ndim == 4 else value
                for key, value in weights.items()
            },
            file,
        )
        save_traces(root / name, root / "pictures")
        save_evaluation(root / name / "evaluation", 8 + seed, 4 * seed)
    return root


def routes_of(root: Path, name: str, attacked: bool = False) -> ar.InstanceRoutes:
    return ar.InstanceRoutes.load(root / name / ("attacked" if attacked else ".") / "routes.safetensors")


def test_differences_are_those_of_the_files(runs: Path) -> None:
    done("compare", runs / "before", runs / "after", "--samples", 4, "--quiet")
    data = data_of(runs / "after" / "compare.html")
    page = Elements((runs / "after" / "compare.html").read_text())
    assert page.sections[:3] == ["route", "channels", "differences"] and page.sections[-1] == "values"
    assert [item["name"] for item in data["runs"]] == ["before", "after"]
    (view,) = data["route_data"]
    assert [item["network"] for item in view["conditions"]] == [0, 0, 1, 1] and view["networks"] == ["before", "after"]
    sides = [routes_of(runs, name, attacked) for name in ("before", "after") for attacked in (False, True)]
    for at, routes in enumerate(sides):
        for layer in view["layers"]:
            assert layer["frequency"][at] == routes.frequency()[layer["name"]].tolist()
    over, ours, theirs = data["route_views"]
    assert [(pair["first"], pair["second"]) for pair in over["pairs"]] == [(0, 2), (1, 3)]
    assert [(pair["first"], pair["second"]) for side in (ours, theirs) for pair in side["pairs"]] == [(0, 1), (2, 3)]
    for kind in (0, 1):
        one, other = sides[kind].aggregate(0.3), sides[kind + 2].aggregate(0.3)
        stayed, left = (one & other).size, (one - other).size
        assert left > 0
        assert (
            f"Of {one.size} channels on the route of before, {stayed} are on that of after too: {left} left and "
            in (page.words["channels"])
        )
        for layer in one:
            for channels in ((one - other).indices[layer], (other - one).indices[layer]):
                assert ", ".join(map(str, channels)) in page.words["channels"]
    numbers = {row["number"]: row for row in data["differences"]}
    right = [float((routes.labels == routes.predictions).double().mean()) for routes in sides]
    assert numbers["accuracy on the 16 clean images traced"]["values"] == [right[0], right[2]]
    assert numbers["accuracy on the 16 images after fgsm:eps=0.1 traced"]["values"] == [right[1], right[3]]
    assert numbers["accuracy on the 16 clean images traced"]["change"] == pytest.approx(100 * (right[2] - right[0]))
    evaluations = [
        json.loads((runs / name / "evaluation" / "evaluation.json").read_text()) for name in ("before", "after")
    ]
    assert len(evaluations[0]["rows"]) == 2
    for rows in zip(*(found["rows"] for found in evaluations), strict=True):
        number = f"accuracy under {rows[0]['attack']}, {rows[0]['samples']} images evaluated"
        assert numbers[number]["values"] == [row["accuracy"] for row in rows]
    pictures = load_data(f"folder:{runs / 'pictures'}", image_size=32)
    chosen = [pictures.dataset[index] for index in (0, 4, 8, 12)]  # evenly apart
    images, labels = torch.stack([image for image, _ in chosen]), torch.tensor([label for _, label in chosen])
    for at, name in enumerate(("before", "after")):
        network = open_network(str(runs / name / "model"), pictures)
        gradient = ar.loss_gradient(network, (images, labels))
        moved = ar.sensitivity(network, (images, labels), attack=ar.parse_attack(ATTACK))
        found = {row["number"]: row["values"][at] for row in data["differences"]}
        occurrence = sides[2 * at].occurrence(0.2)
        for number, values in (
            ("gradient, mean over layers, clean images", [float(values.mean()) for values in gradient.values()]),
            ("sensitivity, mean over layers, images after fgsm:eps=0.1", [float(x.mean()) for x in moved.values()]),
            ("occurrence, mean over layers, clean images", list(occurrence.values())),
        ):
            assert found[number] == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_runs_without_traces_of_the_same_images_are_traced_anew(runs: Path, tmp_path: Path) -> None:
    hardened = tmp_path / "hardened"
    shutil.copytree(runs / "after" / "model", hardened)
    result = run("compare", runs / "before", hardened, "--samples", 6, "--attack", ATTACK, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["page"] == str(hardened / "compare.html")
    assert any("traced for this page, on the same 6 images" in note for note in told["notes"])
    pictures = load_data(f"folder:{runs / 'pictures'}", image_size=32)
    chosen = [pictures.dataset[index] for index in (0, 2, 5, 8, 10, 13)]
    data = torch.stack([image for image, _ in chosen]), torch.tensor([label for _, label in chosen])
    (view,) = told["route_data"]
    for at, name in ((0, "before"), (2, "after")):
        network = open_network(str(runs / name / "model"), pictures)
        frequency = ar.trace_routes(network, data, 0.2).frequency()
        assert {layer["name"]: layer["frequency"][at] for layer in view["layers"]} == {
            layer: values.tolist() for layer, values in frequency.items()
        }


def test_networks_with_other_layers_are_not_laid_over_one_another(runs: Path) -> None:
    torch.manual_seed(0)
    model = ar.build_model("vgg_small", width=0.5, num_classes=2)
    pictures = load_data(f"folder:{runs / 'pictures'}", image_size=32)
    found = RunFolder.open(runs / "before")
    content = Content(found, unmeasured(found.routes))
    other = Content(found, unmeasured(ar.trace_routes(model, ImageBatches(pictures))))
    page = build_comparison(RunComparison((content, other), ("a", "<b>")))
    words = Elements(page.html)
    assert "No channel of one network is known to correspond" in words.words["route"]
    assert "channels" not in words.sections and page.data["route_data"] == page.data["route_views"] == []
    assert "<b>" in words.words["summary"] and not any(tag == "b" for tag, _ in words.tags)


def test_bad_input_is_one_line(runs: Path, tmp_path: Path) -> None:
    refused(run("compare", runs / "before"), "RUN_B")
    refused(run("compare", runs / "before", tmp_path / "none"), "none", "no such folder")
    refused(run("compare", runs / "before", runs / "after", "--data", "nonsense"), "nonsense")
    refused(run("compare", runs / "before", runs / "after", "--attack", "fgsn"), "fgsn")
    lone = tmp_path / "lone"
    shutil.copytree(runs / "after" / "model", lone)
    refused(run("compare", lone, lone), "does not name its images")
    plain = tmp_path / "plain"
    plain.mkdir()
    Document("deactivate", {"data": f"folder:{runs / 'pictures'}"}).save(plain)
    refused(run("compare", runs / "before", plain), "does not name its network; give --model-b")
    refused(run("compare", plain, runs / "before"), "give --model-a")


def test_traces_alone_can_be_compared(runs: Path, tmp_path: Path) -> None:
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        for file in ("routes.safetensors", "route.json"):
            shutil.copy(runs / name / file, tmp_path / name)
    result: Any = run("compare", tmp_path / "before", tmp_path / "after")
    assert result.exit_code == 0 and result.stderr.count("Nothing was measured") == 2
    page = Elements((tmp_path / "after" / "compare.html").read_text())
    assert "are the runs' own traces" in page.words["route"] and "left and" in page.words["channels"]
