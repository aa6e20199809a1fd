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
from attackroute.core.errors import UserError
from attackroute.core.model_state import weights_digest
from attackroute.robustness.examples import INDEX, Examples, verify_examples
from attackroute.robustness.registry import parse_attack
from evaluated_models import ATTACKS, images_and_labels, small_model
from toy_training import Killed


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
    files = sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*.*") if path.is_file())
    assert len(files) == 1 + 2 * 3
    assert "runs-net/fgsm-eps=0.1.safetensors" in files
    images, labels = data()
    model = small_model().eval()
    for attack in map(parse_attack, ATTACKS):
        (examples,) = [
            examples
            for path in saved.rglob("*.safetensors")
            if (examples := Examples.load(path)).attack == str(attack) and examples.model == "runs/net"
        ]
        attacked = attack(model, images, labels)
        assert torch.equal(examples.adversarial, attacked)
        assert torch.equal(examples.clean, images)
        assert torch.equal(examples.labels, labels)
        assert torch.equal(examples.predictions, model(attacked).argmax(1))
        assert examples.weights == weights_digest(model)
        assert examples.classes == 4


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
    assert not any(verify_examples(tmp_path, [model]).column("faults"))


def test_sound_examples_pass(saved: Path) -> None:
    checks = verify_examples(saved, both())
    assert len(checks) == 2 * 3
    assert not any(checks.column("faults"))
    assert checks.column("accuracy") == checks.column("recorded_accuracy")
    images, labels = data()
    evaluation = ar.evaluate(small_model(), (images, labels), ATTACKS, batch_size=10, checks=0)
    for attack in evaluation.table.column("attack")[1:]:
        row = checks.one(model="runs/net", attack=attack)
        assert (row["accuracy"], row["samples"]) == (evaluation.accuracy(attack).value, 23)
    distances = {row["attack"].partition(":")[0]: row["largest_distance"] for row in checks}
    assert distances["fgsm"] == pytest.approx(0.1, rel=1e-6)
    assert distances["gaussian-noise"] is None
    one = next(saved.rglob("*.safetensors"))
    assert len(verify_examples(one, both())) == 1


def file_of(folder: Path) -> Path:
    return folder / "runs-net" / "fgsm-eps=0.1.safetensors"


def only_fault(folder: Path) -> str:
    faults = [(Path(row["file"]), row["faults"]) for row in verify_examples(folder, both()) if row["faults"]]
    ((path, (fault,)),) = faults
    assert path == file_of(folder)
    assert str(path) in fault
    return fault


def test_damaged_files_are_noticed(copied: Path) -> None:
    path = file_of(copied)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(load_file(path)["adversarial"][3].numpy().tobytes()) + 9] ^= 16
    path.write_bytes(flipped)
    assert "do not match the checksum" in only_fault(copied)
    for content in (b"", b"no tensors", whole[:100], whole[:-5]):
        path.write_bytes(content)
        assert "damaged" in only_fault(copied)
    path.unlink()
    assert "is missing" in only_fault(copied)


def rewritten(folder: Path, **changes: object) -> str:
    """A file that is whole, and yet not what the attack made."""
    path = file_of(folder)
    replace(Examples.load(path), **changes).save(path)  # type: ignore[arg-type]
    found = [fault for faults in verify_examples(folder, both()).column("faults") for fault in faults]
    assert all(str(path) in fault for fault in found)
    return " | ".join(found)


def test_images_outside_the_ball_or_the_range_are_named(copied: Path) -> None:
    examples = Examples.load(file_of(copied))
    for rows, value, fault in [
        ([4], float(examples.clean[4, 0, 0, 0] + 0.3) % 1, "sample 4 is outside the ball linf 0.1"),
        ([1, 2, 6, 8], 1.2, "sample 1, 2, 6 and 1 more has values outside [0, 1]"),
        ([5], torch.nan, "sample 5 is outside"),
    ]:
        changed = examples.adversarial.clone()
        changed[rows, 0, 0, 0] = value
        assert fault in rewritten(copied, adversarial=changed)


def test_other_answers_are_named(copied: Path) -> None:
    examples = Examples.load(file_of(copied))
    right = (examples.predictions == examples.labels).nonzero().flatten()
    row = int(right[0]) if len(right) else 0
    predictions = examples.predictions.clone()
    predictions[row] = (predictions[row] + 1) % 4
    found = rewritten(copied, predictions=predictions)
    assert f"sample {row} is classified otherwise" in found
    if len(right):
        assert f"accuracy is {len(right)} of 23, and {len(right) - 1} was recorded" in found
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
    (fault,) = [fault for faults in verify_examples(copied, both()).column("faults") for fault in faults]
    assert INDEX in fault


def test_a_resumed_evaluation_has_the_same_examples(saved: Path, tmp_path: Path) -> None:
    models = {"runs/net": small_model(), "runs net": small_model(1)}
    examples, results, real = tmp_path / "examples", tmp_path / "results", Examples.save

    def run(resume: bool = False) -> None:
        ar.evaluate(
            models, data(), ATTACKS, batch_size=10, checks=0, save_examples=examples, folder=results, resume=resume
        )

    def killed(fatal: int, *, resume: bool, parts: bool = True) -> None:
        """Die at a save, counting those of parts or not."""
        countdown = iter(range(fatal - 1, -1, -1))

        def save(self: Examples, path: Path) -> None:
            if (parts or "parts" not in str(path)) and next(countdown) == 0:
                raise Killed
            real(self, path)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Examples, "save", save)
            run(resume)

    for resume, files in ((False, 7), (True, 14)):
        killed(8, resume=resume)
        assert len(list(examples.rglob("*.safetensors"))) == files
    killed(3, resume=True, parts=False)  # and once more, while batches are put together
    assert len(list(examples.glob("*/*.safetensors"))) == 2
    run(resume=True)
    for path in saved.rglob("*.*"):
        if path.is_file():
            assert (examples / path.relative_to(saved)).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="holds examples already"):
        ar.evaluate(models, data(), ATTACKS, checks=0, save_examples=examples)
