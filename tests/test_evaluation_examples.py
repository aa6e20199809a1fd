"""Adversarial examples on disk: exact, checked again, and every kind of damage named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import attackroute as ar
from attackroute.core.accuracy import Accuracy
from attackroute.core.errors import UserError
from attackroute.core.model_state import weights_digest
from attackroute.robustness import examples as adversarial_examples
from attackroute.robustness.example_checks import verify_examples
from attackroute.robustness.examples import INDEX, Examples, image_digests
from attackroute.robustness.registry import parse_attack
from evaluated_models import ATTACKS, images_and_labels, small_model


def data(levels: bool = True) -> tuple[Tensor, Tensor]:
    images, labels = images_and_labels()
    return ((images * 255).round() / 255 if levels else images), labels


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    models = {"runs/net": small_model(), "runs net": small_model(1)}
    ar.evaluate(models, data(), ATTACKS, batch_size=10, checks=0, save_examples=folder)
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "examples"))


def both() -> list[nn.Module]:
    return [small_model(1), small_model()]


def test_files_hold_what_the_attack_made(saved: Path) -> None:
    files = sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*.safetensors"))
    assert len(files) == 2 * 3 * 3
    assert "runs-net/fgsm-eps=25.5-255/000000.safetensors" in files
    images, labels = data()
    model = small_model().eval()
    for attack in map(parse_attack, ATTACKS):
        parts = [
            examples
            for name in files
            if (examples := Examples.load(saved / name)).attack == str(attack) and examples.model == "runs/net"
        ]
        assert [(part.start, len(part)) for part in parts] == [(0, 10), (10, 10), (20, 3)]
        for part, rows in zip(parts, torch.arange(23).split(10), strict=True):
            attacked = attack(model, images[rows], labels[rows])
            assert torch.equal(part.adversarial, attacked)
            assert torch.equal(part.clean, images[rows])
            assert torch.equal(part.labels, labels[rows])
            assert torch.equal(part.predictions, model(attacked).argmax(1))
            assert part.settings == attack.to_json()
            assert part.weights == weights_digest(model)
            assert part.classes == 4


@pytest.mark.parametrize(("levels", "stored"), [(True, torch.uint8), (False, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clean_images_come_back_exactly(
    tmp_path: Path, levels: bool, stored: torch.dtype | None, dtype: torch.dtype
) -> None:
    model = small_model().to(dtype)
    ar.evaluate(model, data(levels), ["fgsm"], checks=0, save_examples=tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    assert load_file(file)["clean"].dtype == (stored or dtype)
    examples = Examples.load(file)
    assert torch.equal(examples.clean, data(levels)[0].to(dtype))
    assert examples.adversarial.dtype == dtype
    assert all(not check.faults for check in verify_examples(tmp_path, [model]))


def test_sound_examples_pass(saved: Path) -> None:
    checks = verify_examples(saved, both())
    assert len(checks) == 18
    assert all(check.faults == () and check.found == check.recorded for check in checks)
    images, labels = data()
    evaluation = ar.evaluate(small_model(), (images, labels), ATTACKS, batch_size=10, checks=0)
    for row in evaluation.rows[1:]:
        own = [check.found for check in checks if (check.model, check.attack) == ("runs/net", row.attack)]
        assert row.accuracy == Accuracy(sum(x.correct for x in own if x), sum(x.total for x in own if x))
    distances = {check.label: check.distance for check in checks}
    assert distances["fgsm:eps=25.5/255"] == pytest.approx(0.1, rel=1e-6)
    assert distances["gaussian-noise:severity=2"] is None
    one = next(saved.rglob("*.safetensors"))
    assert len(verify_examples(one, both())) == 1


def file_of(folder: Path) -> Path:
    return folder / "runs-net" / "fgsm-eps=25.5-255" / "000001.safetensors"


def only_fault(folder: Path) -> str:
    faults = [(check.path, check.faults) for check in verify_examples(folder, both()) if check.faults]
    ((path, (fault,)),) = faults
    assert path == file_of(folder)
    assert str(path) in fault
    return fault


@pytest.mark.parametrize(
    ("name", "place", "words"), [("adversarial", 3, "adversarial image 3"), ("clean", 7, "clean image 7")]
)
def test_a_damaged_image_is_named(copied: Path, name: str, place: int, words: str) -> None:
    path = file_of(copied)
    content = bytearray(path.read_bytes())
    tensors = load_file(path)
    needle = tensors[name][place].numpy().tobytes()
    at = content.index(needle)
    content[at + 9] ^= 16
    path.write_bytes(content)
    assert f"({words} of the file differ)" in only_fault(copied)


def test_files_that_cannot_be_read(copied: Path) -> None:
    path = file_of(copied)
    whole = path.read_bytes()
    for content in (b"", b"no tensors", whole[:100], whole[:-5]):
        path.write_bytes(content)
        assert "damaged" in only_fault(copied)
    path.unlink()
    assert "is missing" in only_fault(copied)


def rewritten(folder: Path, **changes: object) -> str:
    """A file that is whole, and yet not what the attack made."""
    path = file_of(folder)
    replace(Examples.load(path), **changes).save(path)  # type: ignore[arg-type]
    found = [fault for check in verify_examples(folder, both()) for fault in check.faults]
    assert all(str(path) in fault for fault in found)
    return " | ".join(found)


def test_images_outside_the_ball_or_the_range_are_named(copied: Path) -> None:
    examples = Examples.load(file_of(copied))
    outside = examples.adversarial.clone()
    outside[4, 0, 0, 0] = (examples.clean[4, 0, 0, 0] + 0.3) % 1
    assert "sample 4 is outside the ball linf 25.5/255" in rewritten(copied, adversarial=outside)
    beyond = examples.adversarial.clone()
    beyond[[1, 2, 6, 8], 0, 3, 3] = 1.2
    assert "sample 1, 2, 6 and 1 more has values outside [0, 1]" in rewritten(copied, adversarial=beyond)
    broken = examples.adversarial.clone()
    broken[5, 0, 0, 0] = torch.nan
    assert "sample 5 is outside" in rewritten(copied, adversarial=broken)


def test_other_answers_are_named(copied: Path) -> None:
    examples = Examples.load(file_of(copied))
    right = (examples.predictions == examples.labels).nonzero().flatten()
    row = int(right[0]) if len(right) else 0
    predictions = examples.predictions.clone()
    predictions[row] = (predictions[row] + 1) % 4
    found = rewritten(copied, predictions=predictions)
    assert f"sample {row} is classified otherwise" in found
    if len(right):
        assert f"accuracy is {len(right)} of 10, and {len(right) - 1} was recorded" in found
    predictions[row] = 17
    assert f"sample {row} is classified otherwise" in rewritten(copied, predictions=predictions)


def test_other_models_and_paths_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"made with the model 'runs.net'.*--model"):
        verify_examples(saved, [small_model(5)])
    with pytest.raises(UserError, match="holds no examples"):
        verify_examples(tmp_path, both())
    with pytest.raises(UserError, match="does not exist"):
        verify_examples(tmp_path / "none", both())


def test_a_damaged_list_is_named(copied: Path) -> None:
    (copied / INDEX).write_text("{}")
    (fault,) = [fault for check in verify_examples(copied, both()) for fault in check.faults]
    assert INDEX in fault


def test_digests_are_those_of_the_bytes() -> None:
    import hashlib

    images = torch.rand(3, 1, 2, 2)
    expected = [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images]
    assert image_digests(images) == expected
    assert image_digests(images.to(memory_format=torch.channels_last)) == expected


def test_a_resumed_evaluation_has_the_same_examples(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"runs/net": small_model(), "runs net": small_model(1)}
    examples, results = tmp_path / "examples", tmp_path / "results"

    def run(resume: bool = False) -> None:
        ar.evaluate(
            models, data(), ATTACKS, batch_size=10, checks=0, save_examples=examples, folder=results, resume=resume
        )

    class Killed(BaseException):
        pass

    saves = []

    def dying(self: Examples, path: Path) -> None:
        saves.append(path)
        if len(saves) == 8:
            raise Killed
        real(self, path)

    real = adversarial_examples.Examples.save
    with monkeypatch.context() as patch:
        patch.setattr(adversarial_examples.Examples, "save", dying)
        with pytest.raises(Killed):
            run()
    assert len(list(examples.rglob("*.safetensors"))) == 7
    run(resume=True)
    for path in saved.rglob("*.*"):
        if path.is_file():
            assert (examples / path.relative_to(saved)).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="holds examples already"):
        ar.evaluate(models, data(), ATTACKS, checks=0, save_examples=examples)
