"""``attackroute report``: what the page says, that nothing in it is dangerous, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import attackroute as ar
from attackroute.core.document import Document
from attackroute.core.table import Table
from attackroute.report.measuring import Condition, Measured, unmeasured
from attackroute.report.page import _SCRIPTS, Content, build_page, percent
from attackroute.report.run_folder import RunFolder
from attackroute.report.two_runs import RunComparison, build_comparison
from attackroute.zoo.data import load_data
from command_line import done, refused, run
from report_runs import CLASSES, data_of, make_network, make_pictures, make_run

FIGURE = "<svg onload='alert(1)'></svg>"
PARTS = (
    *("route", "summary", "occurrence", "responses", "experiments"),
    *("hardening", "hardness", "evaluation", "made", "values"),
)


class Elements(HTMLParser):
    """Tags, attributes and text by section, as a browser without scripts sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: list[str] = []
        self.words: dict[str, str] = {}
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._inside: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "section":
            self.sections.append(dict(attributes)["id"] or "")
        if tag in self.raw:
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.raw:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside[-1]].append(data)
        elif self.sections:
            self.words[self.sections[-1]] = self.words.get(self.sections[-1], "") + data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, with its page."""
    made = make_run(tmp_path_factory.mktemp("report"))
    done("report", made, "--samples", 8, "--quiet")
    return made


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    return made


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_numbers_are_those_of_the_files(folder: Path) -> None:
    data = data_of(folder / "report.html")
    assert data["summary"] == read(folder / "trace.json")
    assert data["evaluation"] == read(folder / "evaluation" / "evaluation.json")
    assert data["hardenings"] == {} and data["hardness"] == read(folder / "hardness" / "hardness.json")
    assert data["experiments"] == {"occurrence": read(folder / "analysis" / "occurrence.json")}
    (view,) = data["route_data"]
    for at, place in enumerate((folder, folder / "attacked")):
        routes = ar.InstanceRoutes.load(place / "routes.safetensors")
        frequency = routes.frequency()
        assert {layer["name"]: layer["frequency"][at] for layer in view["layers"]} == {
            name: values.tolist() for name, values in frequency.items()
        }
        assert view["conditions"][at]["trace"] == routes.provenance.to_json()
        assert view["conditions"][at]["influence_samples"] == 8
    route = ar.Route.load(folder / "route.json")
    assert [layer["route"][0] for layer in view["layers"]] == [list(indices) for indices in route.indices.values()]
    names = [layer["name"] for layer in view["layers"]]
    assert [(names[e["source"]], names[e["target"]], e["method"]) for e in view["edges"]] == [
        (*edge, method) for edge, method in routes.methods.items()
    ]


def test_every_part_says_what_was_found(folder: Path) -> None:
    page = Elements((folder / "report.html").read_text())
    assert page.sections == list(PARTS)  # the route first
    summary, evaluation = read(folder / "trace.json"), read(folder / "evaluation" / "evaluation.json")
    for layer, share in ar.InstanceRoutes.load(folder / "routes.safetensors").occurrence(0.2).items():
        assert layer in page.words["occurrence"] and percent(share) in page.words["occurrence"]
    assert percent(summary["about"]["accuracy"]) in page.words["summary"]
    for row in evaluation["rows"]:
        assert row["attack"] in page.words["evaluation"] and percent(row["accuracy"]) in page.words["evaluation"]
    for check in evaluation["about"]["checks"]:
        assert check["check"] in page.words["evaluation"] and check["sentence"] in page.words["evaluation"]
    assert (
        "Occurrence, clean and attacked" in page.words["experiments"] and "Table (1 row)" in page.words["experiments"]
    )
    for part in ("summary", "hardness"):  # where it is first shown
        assert "V is the sum of an image's votes" in page.words[part]
    for word in ("AUROC", "V_mean"):
        assert word in page.words["hardness"]
    for part, document in (
        ("evaluation", evaluation),
        ("hardness", read(folder / "hardness" / "hardness.json")),
        ("experiments", read(folder / "analysis" / "occurrence.json")),
    ):
        assert document["reading"] in page.words[part] and document["reading"] in page.words["summary"]
    for library, version in evaluation["settings"]["libraries"].items():
        assert f"{library}: {version}" in page.words["made"]
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    pictures = [base64.b64decode(source.partition(",")[2]) for source in sources]
    for file in ("analysis/occurrence.svg", "hardness/hardness.svg", "hardness/hardness-images.png"):
        assert (folder / file).read_bytes() in pictures
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")


def test_the_page_needs_nothing_and_may_load_nothing(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Elements(text)
    assert len(text.encode()) < 10_000_000
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r'base64,[^"]*', "", "".join(page.raw["style"])))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/"))
    targets = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert {target[1:] for target in targets if target} <= set(PARTS)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in (policy or "").split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    _, script = page.raw["script"]
    for name, source in (("script-src", script), ("style-src", page.raw["style"][0])):
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert rules[name] == f"'sha256-{digest}'"
    assert "http" not in re.sub(r"base64,[^\"]*", "", text).replace("http-equiv", "")


def hostile(value: Any, attack: str) -> Any:
    """The same with an attack in every name and text."""
    if isinstance(value, dict):
        return {f"{name}{attack}": hostile(item, attack) for name, item in value.items()} | {
            name: hostile(item, attack) for name, item in value.items()
        }
    if isinstance(value, list):
        return [hostile(item, attack) for item in value]
    return f"{value}{attack}" if isinstance(value, str) else value


def test_names_of_the_user_are_harmless(folder: Path, tmp_path: Path) -> None:
    attack = "</script><script>alert('{{ data }}')</script>\"><b onclick=x>"
    home = tmp_path / "<b onclick=x>&"
    home.mkdir()
    model = make_network(tmp_path / "net")
    traced = ar.trace_routes(model, (torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 1])), 0.3)
    traced = replace(traced, provenance=replace(traced.provenance, data=attack, model=attack, criterion=attack))
    attacked = replace(traced, provenance=replace(traced.provenance, attack=attack))
    documents = {path.stem: Document.load(path) for path in folder.rglob("*.json") if Document.is_at(path)}
    hardening = {
        "penalties": {"gradient": 1.0}, "strengths": {"gradient": 1.0}, "target": "route", "lambda": "x",
        "evaluation": documents["evaluation"].about,
    }  # fmt: skip
    documents["hardening"] = replace(documents["evaluation"], kind="hardening", about=hardening)
    documents["novel"] = replace(documents["occurrence"], kind=attack, about={"verdicts": [{"a": "b"}]})
    for name, document in documents.items():
        kind = attack if name == "novel" else document.kind
        settings, about = hostile(dict(document.settings), attack), hostile(dict(document.about), attack)
        if kind == "trace":
            about["attack"] = None
        rows = Table.of(hostile(list(document.table), attack))
        Document(kind, settings, f"{document.reading}{attack}", rows, about).save(home, name)
    (home / f"novel-{CLASSES[1]}.svg").write_text(FIGURE)
    (home / f"novel-{'<i>'}.svg").write_text(FIGURE + "x" * 3_000_000)
    found = RunFolder.open(home)
    assert len(found.experiments) == 2 and found.trace and found.hardness and found.evaluation and found.hardenings
    content = Content(found, unmeasured(traced, [attacked]), CLASSES, (attack,))
    pages = (
        build_page(content),
        build_comparison(RunComparison((content, replace(content, notes=())), (attack, f"{attack}2"), (attack,))),
        build_comparison(
            RunComparison((content, replace(content, measured=Measured(Condition(None)))), (attack, "b"), [attack])
        ),
    )
    for built in pages:
        page = Elements(built.html)
        assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == [
            "application/json",
            None,
        ]
        assert {tag for tag, _ in page.tags if tag in ("b", "i", "script")} == {"script"}
        assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
        assert "<svg onload" not in built.html and base64.b64encode(FIGURE.encode()).decode() in built.html
        for part in ("route", "summary", "experiments", "hardening", "hardness", "evaluation", "made"):
            assert attack in page.words[part], part
        assert built.html.count("alert(") == built.html.count("alert(&#39;") + built.html.count("u003ealert(")
    held = json.loads(Elements(pages[0].html).raw["script"][0])
    assert held == json.loads(json.dumps(pages[0].data)) and held["route_data"][0]["classes"] == list(CLASSES)
    assert held["experiments"][attack] == read(home / "novel.json")


def test_approximate_routes_say_so(tmp_path: Path) -> None:
    model = make_network(tmp_path / "net")
    traced = ar.trace_routes(model, (torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 1])), 0.3)
    criterion = "influence, approximate (32 sketches)"
    drawn = replace(traced, provenance=replace(traced.provenance, criterion=criterion))
    drawn.aggregate(0.3).save(tmp_path / "route.json")
    content = Content(RunFolder.open(tmp_path), unmeasured(drawn), CLASSES)
    assert f"routes by {criterion}" in build_page(content).html
    assert "routes by" not in build_page(replace(content, measured=unmeasured(traced))).html


@pytest.mark.parametrize("value", ["</script>", "<!--<script>", "\u2028", "]]>", "&lt;", "\ud7ff\U0001f600"])
def test_json_in_a_script_is_the_same_json(value: str) -> None:
    built = build_page(Content(RunFolder(Path("run")), unmeasured(None), notes=[value]))
    written = Elements(built.html).raw["script"][0]
    assert json.loads(written)["notes"] == [value] and not set("<>&\u2028") & set(written)


def test_what_is_missing_leaves_a_sentence(folder: Path, empty: Path) -> None:
    shutil.copy(folder / "route.json", empty)
    result = run("report", empty)
    assert result.exit_code == 0 and "give --model" in result.stderr
    page = Elements((empty / "report.html").read_text())
    assert page.sections == list(PARTS)
    for part, word in (
        ("route", "Influence between channels was not measured"),
        ("route", "There is no trace of attacked samples"),
        ("summary", "attackroute trace"),
        ("responses", "the network and its images are needed"),
        ("experiments", "attackroute analyze"),
        ("hardening", "attackroute harden"),
        ("hardness", "attackroute hardness"),
        ("evaluation", "attackroute evaluate"),
    ):
        assert word in page.words[part]
    (view,) = data_of(empty / "report.html")["route_data"]
    assert view["edges"] == [] and view["layers"][0]["frequency"][0] is not None
    shutil.copy(folder / "evaluation" / "evaluation.json", empty)
    (empty / "route.json").unlink()
    done("report", empty, "--quiet")
    page = Elements((empty / "report.html").read_text())
    assert "attackroute trace" in page.words["occurrence"]
    assert "no route to draw" in page.words["route"] and data_of(empty / "report.html")["route_data"] == []


def test_a_network_alone_is_traced_for_the_page(folder: Path, empty: Path) -> None:
    shutil.copytree(folder / "model", empty / "model")
    pictures = f"folder:{folder.parent / 'pictures'}"
    result = run("report", empty, "--data", pictures, "--samples", 6, "--attack", "fgsm:eps=0.2", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["bytes"] == (empty / "report.html").stat().st_size
    assert {"page", "bytes", "missing", *data_of(empty / "report.html")} == set(told)
    clean, attacked = (condition["trace"] for condition in told["route_data"][0]["conditions"])
    assert (clean["samples"], clean["attack"]) == (6, None)
    assert attacked["attack"].startswith("fgsm:eps=") and attacked["samples"] == 6
    assert any("has no trace of clean images, images after fgsm:eps=" in note for note in told["missing"])


def test_pictures_are_those_of_the_runs_samples(folder: Path, tmp_path: Path) -> None:
    (view,) = data_of(folder / "report.html")["route_data"]
    routes = ar.InstanceRoutes.load(folder / "routes.safetensors")
    pictures = load_data(f"folder:{folder.parent / 'pictures'}", image_size=32)
    assert [(item["row"], item["picture"]) for item in view["samples"]] == [(2 * n, n) for n in range(8)]
    for item, source in zip(view["samples"], view["pictures"], strict=True):
        image, label = pictures.dataset[item["row"]]
        assert item["label"] == label == int(routes.labels[item["row"]])
        shown = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB")
        assert torch.equal(torch.from_numpy(np.array(shown)).movedim(2, 0), (image * 255).round().byte())
    make_pictures(tmp_path / "others", 5)
    result = run("report", folder, "--data", f"folder:{tmp_path / 'others'}", "--page", tmp_path / "page.html")
    assert result.exit_code == 0
    (view,) = data_of(tmp_path / "page.html")["route_data"]
    assert all(item["picture"] is None for item in view["samples"]) and len(view["pictures"]) == 10


def test_traces_after_several_radii_stand_in_order(folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "run"
    shutil.copytree(folder, changed)
    routes = ar.InstanceRoutes.load(folder / "attacked" / "routes.safetensors")
    for place, eps in (("a", "16/255"), ("b", "2/255"), ("c", "2/255")):
        (changed / place).mkdir()
        origin = replace(routes.provenance, attack=f"fgsm:eps={eps}")
        replace(routes, provenance=origin).save(changed / place / "routes.safetensors")
    done("report", changed, "--samples", 4, "--attack", "fgsm:eps=8/255", "--quiet")
    data = data_of(changed / "report.html")
    (setup,), (view,) = data["route_views"], data["route_data"]
    assert setup["control"] == "eps"
    assert [pair["label"] for pair in setup["pairs"]] == ["2/255", "8/255", "16/255", "0.1"]
    samples = [view["conditions"][pair["second"]]["trace"]["samples"] for pair in setup["pairs"]]
    assert samples == [16, 4, 16, 16]  # the one that was asked for was traced on the images of the page


def test_other_weights_are_not_taken_in_silence(folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "run"
    shutil.copytree(folder, changed)
    file = changed / "model" / "best.safetensors"
    weights = load_file(file)
    save_file({name: value * 1.01 if value.is_floating_point() else value for name, value in weights.items()}, file)
    result = run("report", changed)
    assert result.exit_code == 0 and "has other weights" in result.stderr
    (view,) = data_of(changed / "report.html")["route_data"]
    assert all(found is None for edge in view["edges"] for found in edge["influence"])


def test_large_figures_and_long_tables_are_shortened(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    for name, size in (("occurrence.svg", 600_000), ("occurrence.png", 400_000), ("occurrence-more.svg", 500_001)):
        (tmp_path / "run" / "analysis" / name).write_text("x" * size)
    rows = Table.of([{"layer": "conv", "number": number} for number in range(2_000)])
    Document("novel", {}, "Told.", rows, {"verdicts": [{"sign": "p"}]}).save(tmp_path / "run")
    found = RunFolder.open(tmp_path / "run")
    page = build_page(Content(found, unmeasured(found.routes, found.attacked)))
    words = Elements(page.html).words["experiments"]
    assert "1600 more rows are in the data" in words
    assert re.findall("Left out, to keep the page small: (.*?)[.]", words) == ["occurrence-more"]
    assert "data:image/png;base64,eHh4" in page.html and "data:image/svg+xml;base64,eHh4" not in page.html
    assert len(page.data["experiments"]["novel"]["rows"]) == 2_000


def test_bad_input_is_one_line(folder: Path, empty: Path, tmp_path: Path) -> None:
    refused(run("report", tmp_path / "none"), "none", "no such folder")
    refused(run("report", empty), str(empty), "holds no run")
    refused(run("report", folder / "route.json"), "is a file")
    refused(run("report"), "RUN_DIR")
    refused(run("report", folder, "--model", "nonsense"), "nonsense")
    refused(run("report", folder, "--data", "nonsense"), "nonsense")
    refused(run("report", folder, "--attack", "fgsn"), "fgsn")
    refused(run("report", folder, "--samples", 4, "--page", tmp_path / "none" / "page.html"), "cannot be written")
    for content in ("{", "[1]", "", '{"reading": NaN}'):
        for name in ("route.json", "routes.safetensors"):
            (empty / name).write_text(content)
            refused(run("report", empty), name)
            (empty / name).unlink()
    Document("novel", {}).save(empty)
    whole = (empty / "novel.json").read_text()
    for damaged in (whole[:-3], whole.replace('"version": 1', '"version": 9'), whole.replace("{}", "3", 1)):
        assert damaged != whole
        (empty / "novel.json").write_text(damaged)
        refused(run("report", empty), "novel.json")


def test_what_no_command_wrote_is_left_alone(empty: Path) -> None:
    Document("novel", {}, "Told.").save(empty)
    for name, content in (("notes.json", "{"), ("other.json", '{"format": "something"}'), ("list.json", "[1]")):
        (empty / name).write_text(content)
    (empty / "folder.json").mkdir()
    assert [document.path for document in RunFolder.open(empty).experiments] == ["novel.json"]


def test_any_experiment_is_shown_where_it_wants_to_be(empty: Path) -> None:
    """An experiment that this package does not know yet needs no change of the page."""
    (empty / "analysis").mkdir()
    rows = Table.of([{"layer": "conv", "accuracy": 0.25, "held": True}])
    for kind, about in (
        ("novel", {"title": "Something novel", "order": 9, "verdicts": [{"sign": "p"}], "seconds": 3.5}),
        ("early", {"title": "Something early", "order": 1}),
        ("unplaced", {"order": "first"}),
    ):
        Document(kind, {"batch-size": 7}, f"{kind} costs much.", rows, about).save(empty / "analysis")
    Document("novel", {}, "A second one.").save(empty / "analysis", "zz")
    for name in ("novel.svg", "novel-more.svg", "novelty.svg"):
        (empty / "analysis" / name).write_text(f"{FIGURE}{name}")
    done("report", empty, "--quiet")
    text = (empty / "report.html").read_text()
    page = Elements(text)
    words = page.words["experiments"]
    assert words.index("Something early") < words.index("Something novel") < words.index("unplaced costs much")
    for word in ("novel costs much.", "Verdicts (1 row)", "Table (1 row)", "0.25", "yes"):
        assert word in words
    assert "novel costs much." in page.words["summary"] and "A second one." not in text
    assert "batch-size" in page.words["made"] and "analysis/novel.json (3.5 s)" in page.words["made"]
    assert "1 more novel" in page.words["made"]
    shown = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert shown == ["Figure novel", "Figure novel-more"]
    assert base64.b64encode(f"{FIGURE}novel.svg".encode()).decode() in text


def test_the_summary_counts_which_controls_the_route_beats(empty: Path) -> None:
    for kind, verdicts in {
        "deactivate": [{"control": "random", "verdict": "beats"}, {"control": "random", "verdict": "is undecided"},
                       {"control": "weight", "verdict": "loses to"}],
        "sensitivity": [{"control": "random", "beats": True, "loses": False}, {"control": "random", "beats": True}],
        "gradcam": [{"sign": "p"}],
    }.items():  # fmt: skip
        Document(kind, {}, f"Told of {kind}.", about={"verdicts": verdicts}).save(empty)
    content = Content(RunFolder.open(empty), unmeasured(None))
    assert list(content.won) == [
        {"experiment": "deactivate", "beats random": "1 of 2", "beats weight": "0 of 1"},
        {"experiment": "sensitivity", "beats random": "2 of 2", "beats weight": None},
    ]
    words = Elements(build_page(content).html).words
    assert "1 of 2" in words["summary"] and "Told of gradcam." in words["summary"]
    assert "Told of deactivate." not in words["summary"] and "Told of deactivate." in words["experiments"]


def test_a_trace_of_attacked_images_names_network_and_images_too(empty: Path) -> None:
    settings = {"model": "vgg_small", "data": "folder:x", "linear": True}
    Document("trace", settings, about={"attack": "pgd:eps=0.1"}).save(empty, "summary")
    run = RunFolder.open(empty)
    assert run.trace is None and (run.network, run.settings["data"], run.settings["linear"]) == (
        "vgg_small", "folder:x", True,
    )  # fmt: skip


def test_images_are_chosen_as_the_trace_chose_them(empty: Path) -> None:
    Document("trace", {"data": "digits", "samples": None, "seed": 3}, about={"attack": None}).save(empty)
    Document("novel", {"data": "others", "samples": 400, "draws": 5}).save(empty)
    settings = RunFolder.open(empty).settings
    assert settings == {"data": "digits", "samples": None, "seed": 3, "draws": 5}


def test_the_network_called_model_is_the_runs_own(empty: Path) -> None:
    for name in ("hardened", "model", "other"):
        (empty / name).mkdir()
        (empty / name / "model.json").write_text("{}")
    assert RunFolder.open(empty).model == empty / "model"
    shutil.rmtree(empty / "model")
    assert RunFolder.open(empty).model == empty / "hardened"
    (empty / "model.json").write_text("{}")
    assert RunFolder.open(empty).model == empty


def test_odd_documents_are_shown_as_far_as_they_go(empty: Path) -> None:
    rows = [{}, {"accuracy": "high"}, {"accuracy_low": None, "accuracy": 0.5}]
    odd = Document("evaluation", {"libraries": []}, "\ud800", Table.of(rows), {"checks": 3})
    odd.save(empty)
    attacks = {"a": 1, "b": {"bins_hardest_first": 3}, "c": {"bins_hardest_first": [4, [1, 0]]}}
    about = {"attacks": attacks, "classes": None}
    Document("hardness", {"data": 3}, about=about).save(empty)
    Document("weaken", {}, about={"verdicts": [None], "seconds": "long"}).save(empty)
    done("report", empty, "--quiet")
    assert data_of(empty / "report.html")["evaluation"] == odd.to_json()
    page = Elements((empty / "report.html").read_text())
    assert page.words["hardness"].count("The file gives no reading.") == 1 and "50.0" in page.words["evaluation"]


def test_no_file_chooses_code_to_run(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "chosen.py").write_text(f"def factory():\n    open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    Document("trace", {"model": "chosen:factory", "data": "mnist-sample"}).save(empty)
    result = run("report", empty)
    assert result.exit_code == 0 and "give --model" in result.stderr and not (tmp_path / "ran").exists()


def test_routes_of_another_network_are_left_aside(folder: Path, empty: Path) -> None:
    shutil.copy(folder / "routes.safetensors", empty)
    (empty / "a").mkdir()
    ar.Route({"other": [0]}, {"other": 3}).save(empty / "a" / "route.json")
    found = RunFolder.open(empty)
    assert found.route is None and found.routes == ar.InstanceRoutes.load(folder / "routes.safetensors")
    (empty / "routes.safetensors").unlink()
    assert RunFolder.open(empty).route == ar.Route({"other": [0]}, {"other": 3})


def test_the_texts_of_the_page_are_package_data() -> None:
    home = Path(ar.__file__).parent / "report" / "assets"
    assert set(_SCRIPTS) == {path.name for path in home.glob("*.js")}
    named = set(re.findall(r'"([\w.]+\.j2)"', "".join(path.read_text() for path in home.glob("*.j2"))))
    assert named | {"run.html.j2", "two_runs.html.j2"} == {path.name for path in home.glob("*.j2")}
    assert (home / "report.css").is_file()
