"""Studies as a library has them: the registry of experiments, documents with and without files, and what is loaded."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from attackroute.analysis.experiment import all_experiments, analyze
from attackroute.analysis.study import BASELINES, Study
from attackroute.core.document import Document
from attackroute.core.errors import UserError
from attackroute.robustness.gradient_attacks import FGSM
from attackroute.zoo.data import ImageData
from experiment_samples import Case, make_case

NAMES = ["occurrence", "sensitivity", "transplant", "inject", "hold", "deactivate", "weaken", "gradcam", "rescaling"]


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(12)


@pytest.fixture
def images(case: Case) -> ImageData:
    pairs = list(zip(case.images, case.labels.tolist(), strict=True))
    return ImageData(pairs, tuple("abcde"), (3, 13, 13), "pictures", "test")  # type: ignore[arg-type]


def test_experiments_are_found_in_order() -> None:
    assert list(all_experiments()) == NAMES
    assert all(each.title and each.help for each in all_experiments().values())


def test_a_study_without_a_folder_has_the_same_numbers(case: Case, images: ImageData, tmp_path: Path) -> None:
    attacks = {"fgsm": FGSM(eps=0.1)}
    study = Study(model=case.model, images=images, attacks=attacks, draws=1, seed=2, layers=["0", "3"])
    written = analyze(replace(study, folder=tmp_path), ["deactivate"])["deactivate"]
    plain = analyze(study, ["deactivate"])["deactivate"]
    assert plain.table == written.table == Document.load(tmp_path / "deactivate.json").table
    assert {path.suffix for path in tmp_path.glob("deactivate.*")} == {".json", ".csv", ".png", ".svg"}
    assert written.about["figures"] == ["deactivate", "deactivate-route"]
    title = f"The critical attacking route of {type(case.model).__name__} on {len(images) // 2} images"
    assert title in (tmp_path / "deactivate-route.svg").read_text()


def test_what_was_finished_is_not_run_again(case: Case, images: ImageData, tmp_path: Path) -> None:
    told: list[tuple[str, bool]] = []

    def run(**settings: object) -> None:
        options = {"model": case.model, "images": images, "folder": tmp_path, "draws": 1, **settings}
        study = Study(attacks={"fgsm": FGSM(eps=0.1)}, **options)  # type: ignore[arg-type]
        analyze(study, ["weaken"], resume=True, done=lambda document, new: told.append((document.kind, bool(new))))

    run()
    run()
    run(share=0.5)
    (tmp_path / "weaken.json").write_text("{")
    run(share=0.5)
    assert told == [("weaken", True), ("weaken", False), ("weaken", True), ("weaken", True)]


class Wrapped(nn.Module):
    """A model whose output bears its logits, as those of Hugging Face do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(images))


def test_outputs_may_bear_logits(case: Case, images: ImageData) -> None:
    study = Study(model=Wrapped(case.model), images=images, attacks="fgsm:eps=0.1", draws=1)
    pictures, labels = study.examples()
    assert len(pictures) == 4 and torch.equal(case.model(pictures).argmax(1), labels)
    document = analyze(study)["gradcam"]  # the others run too
    plain = analyze(replace(study, model=case.model), ["gradcam"])["gradcam"]
    found, expected = (each.table.select(draw=None).column("mean") for each in (document, plain))  # draws go by name
    assert found == pytest.approx(expected, nan_ok=True)


def test_how_long_it_takes_is_said_before_it_starts(case: Case, images: ImageData) -> None:
    def slow(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        time.sleep(0.4)
        return x

    notes: list[str] = []
    study = Study(model=case.model, images=images, attacks={"slow": slow}, draws=1, note=notes.append)
    attack, passes, _, held = study.unit_seconds
    sets = 4 * (1 + 1 + len(BASELINES))  # layers, and sets of channels of each
    assert attack > 0.4 / 8 > passes / sets > 0 and held == sets * attack
    study.__dict__["unit_seconds"] = (4.0, 20.0, 3.0)
    analyze(study, ["weaken"])
    half = len(study.halves[1])
    first, second = (timedelta(seconds=half * each) for each in (2 * 4 + 3, 20))
    assert notes[0].startswith(f"note: it takes about {first + second}, by a try on a few images: ")
    assert notes[0].endswith(f"routes and controls {first}, weaken {second}")
    study.__dict__["unit_seconds"] = (1e-3, 1e-3, 1e-3)
    notes.clear()
    analyze(study, ["weaken"])
    assert not notes  # not worth a word


def test_bad_studies_are_one_line(case: Case, images: ImageData) -> None:
    for options, message in (
        ({"attacks": {}}, "no attack"),
        ({"at": "outputs"}, "did you mean output"),
        ({"layers": ["9"]}, "no layer '9'"),
        ({"images": replace(images, dataset=[images.dataset[0]])}, "one image is too few"),
    ):
        with pytest.raises(UserError, match=message) as error:
            analyze(Study(**{"model": case.model, "images": images, **options}), ["weaken"])  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
