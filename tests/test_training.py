"""Training that repeats bit for bit, survives kills and reports what went wrong."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import Dataset, TensorDataset

from attackroute.core.batches import shuffled
from attackroute.core.errors import UserError
from attackroute.core.statistics import Accuracy, count_correct
from attackroute.hardening import training
from attackroute.hardening.checkpoint import EpochRecord
from attackroute.hardening.objective import Objective
from attackroute.hardening.settings import TrainSettings, learning_rate
from attackroute.hardening.training import train
from attackroute.zoo.weights import LAST
from model_checks import one_line
from toy_training import SETTINGS_USED, identical, raises, toy_data, toy_model, trained, weights_of, without_time

pytestmark = pytest.mark.usefixtures("one_thread")


def test_weights_equal_those_of_a_plain_loop() -> None:
    """Nesterov's SGD with PyTorch's own scheduler over the same batches."""
    data, epochs, size = toy_data(20), 3, 8
    settings = TrainSettings(epochs=epochs, batch_size=size, lr=0.1, weight_decay=0.01, seed=4)
    model = toy_model(dropout=0.0)
    result = train(model, data, toy_data(12, seed=1), settings)
    assert result.last.test == count_correct(model, toy_data(12, seed=1))

    plain = toy_model(dropout=0.0).train()
    optimiser = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    scheduler = OneCycleLR(optimiser, 0.1, total_steps=epochs * 3, cycle_momentum=False)
    images, labels = data.tensors
    losses, accuracies = [], []
    for epoch in range(1, epochs + 1):
        total, right = 0.0, 0
        for batch in shuffled(20, size, 4, epoch):
            logits = plain(images[batch])
            loss = nn.functional.cross_entropy(logits, labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            scheduler.step()
            total += loss.item() * len(batch)
            right += int((logits.argmax(1) == labels[batch]).sum())
        losses.append(total / 20)
        accuracies.append(Accuracy(right, 20))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert [record.loss for record in result.history] == pytest.approx(losses, rel=1e-5)
    assert [record.train for record in result.history] == accuracies


@pytest.mark.parametrize("steps", [4, 5, 10, 97])
def test_the_schedule_equals_pytorchs(steps: int) -> None:
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = OneCycleLR(optimiser, 0.3, total_steps=steps, cycle_momentum=False)
    rates = []
    for _ in range(steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        if len(rates) < steps:
            scheduler.step()
    ours = [learning_rate(0.3, step, steps) for step in range(steps)]
    assert ours == pytest.approx(rates, rel=1e-9, abs=1e-15)


def test_runs_of_one_or_two_steps_begin_at_the_peak() -> None:
    assert learning_rate(1.0, 0, 1) == 1.0
    assert [learning_rate(1.0, step, 2) for step in range(2)] == pytest.approx([1.0, 4e-6])


def test_frozen_parameters_stay() -> None:
    model = toy_model()
    model[0].requires_grad_(False)
    before = weights_of(model)
    train(model, toy_data(), None, SETTINGS_USED)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[6].weight, before["6.weight"])


@pytest.mark.parametrize("change", [{"amp": True}, {"channels_last": True}])
def test_fast_forms_learn_nearly_the_same(change: dict[str, bool]) -> None:
    plain, _ = trained()
    fast, result = trained(replace(SETTINGS_USED, **change))
    assert result.last.epoch == 3
    for name, value in fast.items():
        assert value.dtype == plain[name].dtype
        assert value.is_contiguous()
        torch.testing.assert_close(value, plain[name], rtol=0.1, atol=0.05)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("change", [{}, {"amp": True}, {"channels_last": True}, {"workers": 2}])
def test_same_seed_same_weights_whatever_the_global_generator(change: dict[str, Any]) -> None:
    settings = replace(SETTINGS_USED, **change)
    torch.manual_seed(1)
    first, one = trained(settings)
    torch.manual_seed(2)
    torch.rand(5)
    second, two = trained(settings)
    assert identical(first, second)
    assert without_time(one.history) == without_time(two.history)


def test_every_epoch_and_seed_draws_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: dict[str, list[int]] = {}

    def spy(name: str, seed_of: Callable[..., int]) -> None:
        real, seeds[name] = getattr(training, name), []

        def spied(*args: Any, **options: Any) -> Any:
            seeds[name].append(seed_of(*args, **options))
            return real(*args, **options)

        monkeypatch.setattr(training, name, spied)

    spy("augment", lambda images, kind, generator, **_: generator.initial_seed())
    spy("DataLoader", lambda *_, generator, **__: generator.initial_seed())
    spy("seed_device", lambda device, seed: seed)
    for seed in (0, 1):
        train(toy_model(), toy_data(), None, replace(SETTINGS_USED, seed=seed))
    assert (len(seeds["augment"]), len(seeds["DataLoader"])) == (2 * 9, 2 * 3)
    assert [len(set(drawn)) for drawn in seeds.values()] == [2 * 3] * 3


def test_neither_folder_nor_test_data_nor_callbacks_change_the_weights(tmp_path: Path) -> None:
    model = toy_model()
    train(model, toy_data(), None, SETTINGS_USED)
    observed, _ = trained(folder=tmp_path, on_epoch=lambda record: torch.rand(3), progress=lambda *_: None)
    assert identical(observed, weights_of(model))


def test_the_callers_generator_and_flags_come_back() -> None:
    model = toy_model().double()
    model.train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    train(model, toy_data(), toy_data(), SETTINGS_USED)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == flags
    assert model[0].weight.dtype == torch.float64
    with pytest.raises(RuntimeError, match="stop"):
        train(model, toy_data(), None, SETTINGS_USED, on_epoch=raises(RuntimeError("stop"), 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == flags


def test_a_nan_loss_stops_and_the_last_good_checkpoint_stays(tmp_path: Path) -> None:
    data = toy_data()
    good: dict[str, Tensor] = {}
    model = toy_model()

    def poison(record: EpochRecord) -> None:
        if record.epoch == 2:
            good.update(weights_of(model))
            data.tensors[0][shuffled(24, 8, SETTINGS_USED.seed, 3)[1][0]] = torch.nan

    with pytest.raises(UserError, match=r"epoch 3, step 2: the loss is nan;.*keeps epoch 2"):
        train(model, data, None, SETTINGS_USED, folder=tmp_path, on_epoch=poison)
    assert identical(load_file(tmp_path / LAST), good)


@pytest.mark.parametrize("interval", [1, 2, 50])
def test_a_nan_is_located_however_rarely_the_loss_is_read(monkeypatch: pytest.MonkeyPatch, interval: int) -> None:
    monkeypatch.setattr(training, "loss_interval", lambda device: interval)
    data = toy_data()
    data.tensors[0][shuffled(24, 4, 0, 1)[2][0]] = torch.inf
    with pytest.raises(UserError, match="epoch 1, step 3: the loss is nan"):
        train(toy_model(), data, None, TrainSettings(epochs=1, batch_size=4, lr=0.01))


@pytest.mark.parametrize("finite", [False, True])
def test_weights_that_are_spoilt_by_the_last_step_or_useless_are_not_kept(tmp_path: Path, finite: bool) -> None:
    settings = TrainSettings(epochs=1, batch_size=24, lr=1e38)
    model, images, labels = toy_model() if finite else flat(4), *toy_data().tensors
    before, data = weights_of(model), TensorDataset(images if finite else images * 1e4, labels)
    spoilt = r"the weights in 1.weight .*lr \(now 1e\+38\).* keeps epoch 0"
    message = "the logits for the test data are NaN" if finite else spoilt
    with pytest.raises(UserError, match=f"epoch 1, step 1: {message}"):
        train(model, data, toy_data(12, seed=1) if finite else None, settings, folder=tmp_path)
    assert identical(load_file(tmp_path / LAST), before)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 0}, "epochs"), ({"epochs": 1.5}, "epochs"), ({"epochs": True}, "epochs"),
        ({"batch_size": 0}, "batch_size"), ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"), ({"lr": 1e300}, "lr"), ({"lr": "1"}, "lr"),
        ({"momentum": 1.0}, "momentum"), ({"momentum": -0.1}, "momentum"), ({"weight_decay": -1.0}, "weight_decay"),
        ({"augment": "flip"}, "augment is 'flip'; give one of 'none', 'crop', 'crop-flip'"),
        ({"amp": 1}, "amp"), ({"channels_last": None}, "channels_last"),
        ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"), ({"workers": -1}, "workers"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(change: dict[str, Any], named: str) -> None:
    with one_line(match=named):
        TrainSettings(**change)


def flat(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, outputs))


IMAGES = toy_data(8).tensors[0]


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (flat(4), TensorDataset(IMAGES, torch.tensor([0, 1, 2, 3, 0, 1, 2, 4])), "label 4 in the training data"),
        (flat(4), TensorDataset(IMAGES, torch.tensor([-1] * 8)), "label -1 "),
        (flat(4), TensorDataset(IMAGES[:0], torch.tensor([], dtype=torch.int64)), "training data is empty"),
        (flat(4), TensorDataset(IMAGES[:, :1], torch.zeros(8, dtype=torch.int64)), r"does not take .*\(1, 8, 8\)"),
        (flat(4), TensorDataset(IMAGES, torch.zeros(8)), "expected 1 integers"),
        (nn.Conv2d(3, 2, 3), TensorDataset(IMAGES, torch.zeros(8, dtype=torch.int64)), "not logits"),
        (nn.Sequential(flat(4), nn.Softmax(1)), toy_data(), "probabilities"),
        (flat(4).requires_grad_(False), toy_data(), "nothing to train"),
        (flat(4).half(), toy_data(), "float16"),
        (nn.Flatten(), toy_data(), "nothing to train"),
    ],
)
def test_bad_models_and_data_are_named_before_the_first_epoch_ends(
    tmp_path: Path, model: nn.Module, data: Dataset[Any], message: str
) -> None:
    with one_line(match=message):
        train(model, data, None, replace(SETTINGS_USED, batch_size=3), folder=tmp_path)


def test_an_objective_comes_with_its_own_attack() -> None:
    with pytest.raises(UserError, match="leave out attack"):
        trained(attack="fgsm:eps=0.1", objective=Objective("fgsm:eps=0.1"))
    assert identical(trained(objective=Objective("fgsm:eps=0.1"))[0], trained(attack="fgsm:eps=0.1")[0])


def test_bad_test_data_is_named_before_anything_is_written(tmp_path: Path) -> None:
    for test, message in [(TensorDataset(IMAGES, torch.full((8,), 9)), "label 9 in the test"), (toy_data(0), "empty")]:
        with pytest.raises(UserError, match=message):
            train(toy_model(), toy_data(), test, SETTINGS_USED, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unusable_folder_is_found_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    before = weights_of(toy_model())
    model = toy_model()

    def no_step(*_: object) -> None:
        pytest.fail("a step was taken")

    for place in ("file", "file/below"):
        with pytest.raises(UserError, match="another"):
            train(model, toy_data(), None, SETTINGS_USED, folder=tmp_path / place, progress=no_step)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        train(model, toy_data(), None, SETTINGS_USED, folder=tmp_path / "closed", progress=no_step)
    assert identical(weights_of(model), before)


def strided(channels: int) -> nn.Sequential:
    """A residual block's shortcut of few channels, whose weight gradient crashes PyTorch in channels_last on a CPU."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 16, 1, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def formats_seen(model: nn.Module, memory_format: torch.memory_format, **settings: Any) -> set[bool]:
    """Train, and note whether what the strided layer is given to learn from is in that format."""
    formats = set[bool]()

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module.training:
            formats.add(args[0].is_contiguous(memory_format=memory_format))

    hook = model[2].register_forward_pre_hook(note)
    train(model, toy_data(), None, replace(SETTINGS_USED, **settings))
    hook.remove()
    return formats


@pytest.mark.parametrize("given", ["by the setting", "by the caller"])
def test_what_crashes_in_channels_last_is_trained_in_the_contiguous_format(given: str) -> None:
    contiguous, model, by_setting = strided(8), strided(8), given == "by the setting"
    train(contiguous, toy_data(), None, SETTINGS_USED)
    if not by_setting:
        model.to(memory_format=torch.channels_last)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert formats_seen(model, torch.contiguous_format, channels_last=by_setting) == {True}
    assert ["contiguous format" in str(warning.message) for warning in caught] == [True] * by_setting
    assert identical(weights_of(model), weights_of(contiguous))
    assert model[0].weight.is_contiguous() == by_setting  # as it was given


@pytest.mark.parametrize("channels", [1, 16])
def test_what_does_not_crash_is_trained_in_channels_last(channels: int) -> None:
    assert formats_seen(strided(channels), torch.channels_last, channels_last=True) == {True}
