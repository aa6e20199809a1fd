"""Hardening: the losses of Eqs. (11), (12), (14) and (15), routes, controls, and runs that go on after a kill."""

from __future__ import annotations

import copy
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import attackroute
from architectures import Function
from attackroute.core.batches import shuffled
from attackroute.core.errors import UserError
from attackroute.core.random import derived_generator
from attackroute.hardening.harden import ROUTE_FILE, HardenResult, RouteObjective, harden
from attackroute.hardening.settings import HardenSettings, TrainSettings, learning_rate
from attackroute.hardening.training import train
from attackroute.robustness.gradient_attacks import PGD
from attackroute.routes.route import Route
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.weights import BEST, LAST
from toy_training import Killed, identical, killed_at, raises, toy_data, toy_network, weights_of, without_time

SETTINGS = TrainSettings(epochs=2, batch_size=8, lr=0.05, augment="crop-flip", seed=7, robust_samples=8)
ATTACK = "pgd:eps=0.1,steps=2,step_size=0.05"


pytestmark = pytest.mark.usefixtures("one_thread")


def hardened(model: nn.Module | None = None, **options: Any) -> tuple[dict[str, Tensor], HardenResult]:
    """Harden with the arguments of :func:`harden`, among which those of its settings may be."""
    model = toy_network() if model is None else model
    given = {"train": SETTINGS, "lam": 0.05, "route_samples": 0.5, **options}
    settings = HardenSettings(**{name: given.pop(name) for name in _SETTINGS if name in given})
    result = harden(model, toy_data(), toy_data(12, seed=1), settings=settings, **given)
    return weights_of(model), result


_SETTINGS = {field.name for field in fields(HardenSettings)}
HALF = Route({"0": [0, 2, 3], "4": [1, 5, 6, 7]}, {"0": 6, "4": 8})


def by_hand(model: nn.Sequential, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The toy network without dropout, and its layers' outputs."""
    first = model[0](images)
    second = model[4](model[3](model[2](model[1](first))))
    return model[9](model[7](model[6](model[5](second)))), [first, second]


def gradient_penalty(model: nn.Sequential, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits, outputs = by_hand(model, images)
    loss = functional.cross_entropy(logits, labels)
    gradients = torch.autograd.grad(loss, outputs, create_graph=True)
    return loss, sum(g[:, HALF[name]].abs().sum() for name, g in zip(HALF, gradients, strict=True))


def weight_penalty(model: nn.Sequential) -> Tensor:
    gain = (model[5].weight / (model[5].running_var + 1e-5).sqrt()).abs()
    return (gain[HALF["4"]] * model[4].weight[HALF["4"]][:, HALF["0"]].abs().sum((1, 2, 3))).sum()


def stabilisation_penalty(model: nn.Sequential, images: Tensor, attacked: Tensor) -> Tensor:
    (_, noisy), (_, quiet) = by_hand(model, attacked), by_hand(model, images)
    changes = [(after - before)[:, HALF[name]] for name, after, before in zip(HALF, noisy, quiet, strict=True)]
    return sum((change.abs().sum((0, 2, 3)) / change[:, 0].numel()).sum() for change in changes)


@pytest.mark.parametrize(
    ("penalty", "attacked"),
    [
        *itertools.product(("gradient", "weight", ("gradient", "weight")), (False, True)),
        ("stabilisation", True),
        (("gradient", "stabilisation"), True),
    ],
)
def test_weights_equal_those_of_a_plain_loop(penalty: Any, attacked: bool) -> None:
    settings = replace(SETTINGS, augment="none", epochs=1, momentum=0.0, weight_decay=0.0)
    attack = PGD(eps=0.1, steps=2, step_size=0.05)
    model = toy_network(dropout=0.0)
    _, result = hardened(
        model, penalty=penalty, train=settings, attack=attack if attacked else None, route=HALF,
        lam={"gradient": 0.05, "weight": 0.02, "stabilisation": 0.3},
    )  # fmt: skip

    plain = toy_network(dropout=0.0)
    images, labels = toy_data().tensors
    sums = {"gradient": 0.0, "weight": 0.0, "stabilisation": 0.0}
    for step, batch in enumerate(shuffled(24, 8, settings.seed, 1), start=1):
        x, y = images[batch], labels[batch]
        used = x
        if attacked:
            used = attack(plain, x, y, generator=derived_generator(settings.seed, "attack", step))
        plain.train()
        loss, on_used = gradient_penalty(plain, used, y)
        if "gradient" in penalty:
            loss = loss + 0.05 * on_used
            sums["gradient"] += on_used.item() * len(batch)
        if attacked and "gradient" in penalty:
            kept = {name: value.clone() for name, value in plain.named_buffers()}
            _, on_clean = gradient_penalty(plain, x, y)
            loss = loss + 0.05 * on_clean
            sums["gradient"] += on_clean.item() * len(batch)
            for name, value in plain.named_buffers():
                value.data.copy_(kept[name])
        if "weight" in penalty:
            value = weight_penalty(plain)
            loss = loss + 0.02 * value
            sums["weight"] += value.item() * len(batch)
        if "stabilisation" in penalty:
            kept = {name: value.clone() for name, value in plain.named_buffers()}
            copy_ = copy.deepcopy(plain)
            for module, original in zip(copy_.modules(), plain.modules(), strict=True):
                module._parameters = original._parameters  # another network with the same parameters: statistics stay
            value = stabilisation_penalty(copy_, x, used)
            loss = loss + 0.3 * value
            sums["stabilisation"] += value.item() * len(batch)
        rate = learning_rate(0.05, step - 1, 3)
        parameters = list(plain.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data.sub_(rate * gradient)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    names = (penalty,) if isinstance(penalty, str) else penalty
    assert result.training.last.penalties == pytest.approx({name: sums[name] / 24 for name in names}, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"attack": ATTACK}, {"penalty": None}])
def test_logits_in_an_object_are_trained_as_others(options: dict[str, Any]) -> None:
    """As the networks of Hugging Face give them."""
    every = ("gradient", "weight", "stabilisation") if "attack" in options else ("gradient", "weight")
    plain, expected = hardened(**{"penalty": every, **options})
    model = Function(lambda parts, x: SimpleNamespace(logits=parts["model"](x), loss=None), model=toy_network())
    wrapped, result = hardened(model, **{"penalty": every, **options})
    assert identical({f"parts.model.{name}": value for name, value in plain.items()}, wrapped)
    assert without_time(result.training.history) == without_time(expected.training.history)


@pytest.mark.parametrize("attack", [None, ATTACK])
@pytest.mark.parametrize("penalty", ["gradient", "weight", "stabilisation"])
def test_a_factor_of_zero_is_plain_training_bit_for_bit(attack: str | None, penalty: str) -> None:
    plain = toy_network()
    reference = train(plain, toy_data(), toy_data(12, seed=1), SETTINGS, attack=attack)
    if attack is None and penalty == "stabilisation":
        pytest.skip("needs an attack")
    weights, result = hardened(lam=0.0, attack=attack, penalty=penalty)
    assert identical(weights, weights_of(plain))
    assert [record.test for record in result.training.history] == [record.test for record in reference.history]
    assert all(value > 0 for record in result.training.history for value in record.penalties.values())
    none, _ = hardened(penalty=None, attack=attack)
    assert identical(none, weights)


def test_the_route_is_traced_from_a_share_of_the_samples(tmp_path: Path) -> None:
    model = toy_network()
    expected = trace_of(model)
    weights, result = hardened(model, folder=tmp_path / "a")
    assert result.route == expected == Route.load(tmp_path / "a" / ROUTE_FILE)
    everything = trace_routes(toy_network(), toy_data().tensors, 0.2).aggregate(0.3)
    assert result.overlap is not None
    shared = sum(len({*expected[layer].tolist()} & {*everything[layer].tolist()}) for layer in expected)
    assert (result.overlap.shared, result.overlap.size) == (shared, expected.size)
    assert result.overlap.least == min(expected.overlap(everything).values())
    assert result.overlap.share == shared / expected.size
    assert hardened(toy_network(), compare_full=False)[1].overlap is None
    assert hardened(toy_network(), route_samples=1.0)[1].overlap is None
    expected.save(tmp_path / "route.json")
    for route in (expected, tmp_path / "route.json"):
        assert identical(hardened(route=route)[0], weights)


@pytest.mark.parametrize("penalty", ["gradient", "weight", "stabilisation"])
def test_controls_punish_other_neurons(penalty: str) -> None:
    attack = ATTACK if penalty == "stabilisation" else None
    options: dict[str, Any] = {"penalty": penalty, "attack": attack}
    weights = {target: hardened(target=target, route=HALF, **options)[0] for target in ("route", "random", "all")}
    assert not any(identical(weights["route"], weights[target]) for target in ("random", "all"))
    everything = Route({"0": range(6), "4": range(8)}, {"0": 6, "4": 8})
    assert identical(weights["all"], hardened(route=everything, **options)[0])


def trace_of(model: nn.Module) -> Route:
    order = torch.randperm(24, generator=derived_generator(SETTINGS.seed, "route", 0))[:12].sort().values
    images, labels = (values[order] for values in toy_data().tensors)
    return trace_routes(model, (images, labels), 0.2).aggregate(0.3)


def test_strengths_are_ratios_of_gradient_norms() -> None:
    _, result = hardened(toy_network(dropout=0.0), penalty=("gradient", "weight"), route=HALF)
    model = toy_network(dropout=0.0).train()
    images, labels = toy_data().tensors
    loss, penalty = gradient_penalty(model, images, labels)
    fresh = toy_network(dropout=0.0)  # its running variances have not moved

    def norm(value: Tensor, of: nn.Module) -> float:
        gradients = torch.autograd.grad(value, list(of.parameters()), retain_graph=True, allow_unused=True)
        return sum(float(gradient.double().square().sum()) for gradient in gradients if gradient is not None) ** 0.5

    assert result.strengths == pytest.approx(
        {
            "gradient": norm(penalty, model) / norm(loss, model),
            "weight": norm(weight_penalty(fresh), fresh) / norm(loss, model),
        },
        rel=1e-4,
    )


def test_strengths_repeat_in_a_network_with_dropout() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        objective = RouteObjective({"gradient": 1.0, "weight": 1.0}, route=HALF)
        objective.start(toy_network(dropout=0.5), toy_data(), 3)
        found.append(objective.strengths)
    assert found[0] == found[1]


def test_strengths_are_measured_over_all_classes_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data in class folders begin with one class, whose gradients are other ones."""
    module = sys.modules["attackroute.hardening.harden"]
    images, labels = toy_data(600).tensors
    sorted_data = TensorDataset(*(values[labels.argsort(stable=True)] for values in (images, labels)))
    drawn = []
    real = module.samples_of

    def spied(model: nn.Module, data: Any, numbers: Any) -> Any:
        drawn.append(real(model, data, numbers)[1].bincount().tolist())
        return real(model, data, numbers)

    monkeypatch.setattr(module, "samples_of", spied)
    strengths = []
    for data in (sorted_data, toy_data(600)):
        objective = RouteObjective({"gradient": 1.0}, route=HALF)
        objective.start(toy_network(dropout=0.0), data, 3)
        strengths.append(objective.strengths["gradient"])
    assert drawn == [[32] * 4] * 2
    assert strengths[0] == pytest.approx(strengths[1], rel=0.1)


def test_data_in_every_form() -> None:
    reference, _ = hardened()
    for data in (toy_data().tensors, DataLoader(toy_data(), batch_size=3)):
        model = toy_network()
        harden(model, data, toy_data(12, seed=1), lam=0.05, settings=HardenSettings(route_samples=0.5), train=SETTINGS)
        assert identical(weights_of(model), reference)


VARIANTS: list[dict[str, Any]] = [
    {"penalty": "gradient", "attack": ATTACK},
    {"penalty": "weight", "attack": ATTACK},
    {"penalty": ("gradient", "weight"), "target": "random"},
    {"penalty": None, "attack": ATTACK},
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("epoch", [1, 2])
def test_resuming_is_bit_identical(tmp_path: Path, options: dict[str, Any], epoch: int) -> None:
    settings = replace(SETTINGS, epochs=3)
    whole, reference = hardened(train=settings, folder=tmp_path / "whole", **options)
    with pytest.raises(Killed):
        hardened(train=settings, folder=tmp_path / "broken", on_epoch=raises(Killed(), epoch), **options)
    weights, result = hardened(toy_network(seed=9), train=settings, folder=tmp_path / "broken", resume=True, **options)
    assert identical(weights, whole)
    for name in (LAST, BEST):
        assert identical(load_file(tmp_path / "broken" / name), load_file(tmp_path / "whole" / name))
    assert without_time(result.training.history) == without_time(reference.training.history)
    assert (result.route, result.strengths) == (reference.route, reference.strengths)
    assert result.overlap == reference.overlap


def test_what_is_known_before_the_first_step_is_on_disk_then(tmp_path: Path) -> None:
    """Wherever a run is broken off: in its first step, or between any two files that belong to an epoch's end."""
    settings = replace(SETTINGS, epochs=1)
    _, reference = hardened(train=settings, folder=tmp_path / "whole")
    route = (tmp_path / "whole" / ROUTE_FILE).read_bytes()

    def stopped(*_: Any) -> None:
        assert (tmp_path / "stopped" / ROUTE_FILE).read_bytes() == route
        raise Killed

    with pytest.raises(Killed):
        hardened(train=settings, folder=tmp_path / "stopped", progress=stopped)
    for writes in itertools.count():
        folder = tmp_path / str(writes)
        if not killed_at(writes, ("replace",), lambda folder=folder: hardened(train=settings, folder=folder)):
            break
        _, result = hardened(train=settings, folder=folder, resume=True)
        assert (folder / ROUTE_FILE).read_bytes() == route
        assert (result.strengths, result.overlap) == (reference.strengths, reference.overlap)
        assert result.route is not None and result.route.frequency is not None
    assert writes > 8


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lam": 0.1}, "factors"), ({"target": "all"}, "target"), ({"attack": "pgd"}, "attack"),
        ({"penalty": "weight"}, "factors"), ({"route": HALF}, "route"),
        ({"folded": False}, "folded"), ({"penalty": None}, "factors"),
    ],
)  # fmt: skip
def test_resuming_on_other_terms_names_them(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    hardened(folder=tmp_path, train=replace(SETTINGS, epochs=1))
    with pytest.raises(UserError, match=named):
        hardened(folder=tmp_path, train=replace(SETTINGS, epochs=1), resume=True, **change)


def test_the_best_epoch_is_the_most_robust(tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=4, robust_samples=12)
    _, result = hardened(train=settings, attack=ATTACK, folder=tmp_path)
    robust = [record.robust.value for record in result.training.history if record.robust]
    assert len(robust) == 4
    best = result.training.best
    assert best is not None
    assert best.epoch == 1 + robust.index(max(robust))
    assert all(record.robust.total == 12 for record in result.training.history if record.robust)


def test_an_unusable_folder_is_found_before_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(
        sys.modules["attackroute.hardening.harden"], "trace_routes", lambda *_, **__: pytest.fail("traced")
    )
    with pytest.raises(UserError, match="file"):
        hardened(folder=file)


@pytest.mark.parametrize("attack", [None, ATTACK])
def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_epoch(tmp_path: Path, attack: str | None) -> None:
    def spoil(record: Any) -> None:
        if record.epoch == 1:
            model[0].weight.data[0, 0, 0, 0] = float("nan")

    model = toy_network()
    with pytest.raises(UserError, match=r"epoch 2, step 1: .*keeps epoch 1"):
        hardened(model, folder=tmp_path, attack=attack, on_epoch=spoil)
    assert all(value.isfinite().all() for value in load_file(tmp_path / LAST).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "grad"}, "penalty 'grad'"),
        ({"target": "none"}, "target 'none'"),
        ({"lam": -1}, "lambda of the gradient"),
        ({"lam": {"weight": 1.0}}, "lambda of the gradient penalty is nan"),
        ({"attack": "pdg"}, "pdg"),
        ({"route_samples": 0}, "share of 0"),
        ({"route": Route({"9": [0]}, {"9": 3})}, "'9'"),
        ({"route": "missing.json"}, "missing.json"),
        ({"resume": True}, "folder"),
        ({"penalty": None, "route": HALF}, "no penalty"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        hardened(**options)


def test_an_operation_without_a_second_derivative_asks_for_another_penalty() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.positive = x > 0
            return x.relu()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * ctx.positive

    model = toy_network()
    model[6] = Function(lambda _, x: Once.apply(x))  # type: ignore[no-untyped-call]
    with pytest.raises(UserError, match="take the weight penalty"):
        hardened(model)
    assert hardened(model, penalty="weight")[1].training.last.epoch == 2


KILLED: dict[str, Any] = {"attack": ATTACK, "penalty": ("gradient", "weight")}


@pytest.mark.filterwarnings("ignore:all scores of layer")  # after many epochs
@pytest.mark.parametrize(("kills", "epochs"), [(2, 5), pytest.param(20, 80, marks=pytest.mark.slow)])
def test_resuming_after_sigkill(tmp_path: Path, kills: int, epochs: int) -> None:
    folder = tmp_path / "run"
    settings = replace(SETTINGS, epochs=epochs)
    hardened(train=replace(SETTINGS, epochs=1), **KILLED)  # the first optimiser step imports a lot
    started = time.perf_counter()
    whole, reference = hardened(train=settings, folder=folder.with_name("whole"), **KILLED)
    length = time.perf_counter() - started
    command = [sys.executable, __file__, str(folder), str(epochs)]
    paths = (str(Path(attackroute.__file__).parents[1]), str(Path(__file__).parent))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    pipe, killed = subprocess.PIPE, 0
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as server:
        assert server.stdin is not None and server.stdout is not None
        for _ in range(kills):
            print("start", file=server.stdin, flush=True)
            child = int(server.stdout.readline())
            time.sleep(random.uniform(0.3, 1.3) * length / kills)
            os.kill(child, signal.SIGKILL)  # the server has not reaped it yet, so the id is still its own
            print("reap", file=server.stdin, flush=True)
            killed += int(server.stdout.readline()) == -signal.SIGKILL
        server.stdin.close()
    assert killed >= kills / 4
    weights, result = hardened(train=settings, folder=folder, resume=True, **KILLED)
    assert result.training.resumed_from > 0
    assert identical(weights, whole)
    for name in (LAST, BEST):
        assert identical(load_file(folder / name), load_file(folder.with_name("whole") / name))
    assert without_time(result.training.history) == without_time(reference.training.history)
    assert result.route == reference.route


def serve(folder: Path, epochs: int) -> None:
    """For each line of input start a run in a child that has nothing left to import, tell its id, and then reap it."""
    import torch._dynamo  # the first optimiser step would import it

    torch.set_num_threads(1)
    while sys.stdin.readline():
        child = os.fork()
        if child == 0:
            lines = iter([os.getpid()])

            def announce(*_: object, lines: Iterator[int] = lines) -> None:
                for line in lines:
                    print(line, flush=True)

            hardened(train=replace(SETTINGS, epochs=epochs), folder=folder, resume=True, progress=announce, **KILLED)
            announce()
            os._exit(0)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)  # PyTorch takes a second to leave


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
