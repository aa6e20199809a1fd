"""Influence per standard deviation: its value, and that no parametrisation of the same function changes it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

import attackroute as ar
from architectures import CLOSED, MIXED, Head, chain
from attackroute.analysis.channel_statistics import loss_gradient, sensitivity
from attackroute.analysis.criteria import CRITERIA, channel_scores
from attackroute.analysis.experiment import analyze
from attackroute.analysis.experiments.rescaling import rescaled as in_other_parameters
from attackroute.analysis.study import BASELINES, Study
from attackroute.core.errors import UserError
from attackroute.core.layers import CHANNEL_DIM, LayerCall, LayerCalls
from attackroute.hardening.gradient_penalty import GradientPenalty
from attackroute.hardening.stabilisation_penalty import StabilisationPenalty
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.routes.route import Route
from attackroute.tracing import oracle
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.deviations import Deviations
from attackroute.tracing.influence import influence, mean_influence
from attackroute.tracing.oracle_check import verify
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.data import ImageData
from experiment_samples import make_case
from random_networks import networks, steady
from random_transformers import transformers
from token_networks import made, swin, vit
from tracing import agree_up_to_ties, deviation, ready, same_routes, shaken, state, worst

pytestmark = pytest.mark.filterwarnings("ignore:all scores of layer")

NETWORKS = [*CLOSED, *MIXED]
SOME = ["residual", "dense", "overlapping pools", "shuffled", "aliased", "wide pools"]


def outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Each layer's output, ``(values, C)``, over samples and positions."""
    values: dict[str, Tensor] = {}

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        values[call.name] = output.movedim(CHANNEL_DIM[call.kind], -1).flatten(0, -2).clone()
        return output

    with torch.no_grad(), LayerCalls(model, visit, linear=True):
        model(images.clone())
    return values


def spread(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Standard deviations, written out."""
    return {
        layer: (values - values.mean(0)).square().mean(0).sqrt().where(values.ne(values[0]).any(0), 0)
        for layer, values in outputs(model, images).items()
    }


def rescaled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same function in other parameters: each layer's channels scaled by 0.1 to 10, and scaled back behind it."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    for module in model.modules():
        if (
            isinstance(module, (nn.Conv2d, nn.Linear))
            and type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear
        ):
            factors = 10 ** (2 * torch.rand(len(module.weight), dtype=module.weight.dtype) - 1)
            with torch.no_grad():
                module.weight *= factors.view(-1, *(1,) * (module.weight.ndim - 1))
                if module.bias is not None:
                    module.bias *= factors
            shape = factors.view(-1, 1, 1) if isinstance(module, nn.Conv2d) else factors
            module.register_forward_hook(lambda _module, _args, output, shape=shape: output / shape)
    return model


# The deviations


@pytest.mark.parametrize("name", NETWORKS)
def test_deviations(name: str) -> None:
    model, images, labels = ready({**CLOSED, **MIXED}[name], samples=5)
    expected = spread(model, images)
    order = torch.tensor([3, 0, 4, 1, 2])
    for measured in (Deviations.of(model, images), Deviations.of(model, (images[order], labels), batch_size=2)):
        assert list(measured.values) == list(expected)
        for layer, values in measured.values.items():
            torch.testing.assert_close(values, expected[layer], rtol=1e-9, atol=1e-12)


def test_a_channel_that_never_varies_is_on_no_way() -> None:
    model, images, _ = ready(chain)
    first, second = [module for module in model.modules() if isinstance(module, nn.Conv2d)][:2]
    with torch.no_grad():
        second.weight[1] = 0
    deviations = Deviations.of(model, images)
    (name,) = [name for name, module in model.named_modules() if module is second]
    assert deviations.values[name][1] == 0 and (deviations.values[name] > 0).sum() == len(second.weight) - 1
    (source,) = [name_ for name_, module in model.named_modules() if module is first]
    matrix = influence(model, images, source, name, units="std")
    assert matrix.isfinite().all() and not matrix[:, 1].any() and matrix[:, 0].any()


# Routes beside the oracle


def check(model: nn.Module, images: Tensor, labels: Tensor, *, linear: bool = False, noise: bool = False) -> None:
    traced, clean = (shaken(model, images, labels), images) if noise else (images, None)
    expected = oracle.trace(
        model, traced, labels, clean=clean, width=0.3, linear=linear, deviations=spread(model, images)
    )
    config = TraceConfig(linear, "noise" if noise else "unit", units="std")
    found = trace_routes(
        model, (images, labels), 0.3, config=config, attack=shaken if noise else None, keep_scores=True
    )
    agree_up_to_ties(found, expected, floor=1e-6)
    assert found.provenance.criterion.endswith("units std")


@pytest.mark.parametrize("noise", [False, True], ids=["influence", "noise"])
@pytest.mark.parametrize("name", SOME)
def test_beside_the_oracle(name: str, noise: bool) -> None:
    check(*ready({**CLOSED, **MIXED}[name]), noise=noise)


@pytest.mark.parametrize("build", [vit, pytest.param(swin, marks=pytest.mark.slow)], ids=["vit", "swin"])
def test_transformers_beside_the_oracle(build: Callable[[], nn.Module]) -> None:
    model, images, labels = made(build, samples=2)
    check(model, images, labels, linear=True)


def test_sketches_are_near_and_replays_are_the_oracle() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    model, images, labels = ready(lambda: nn.Sequential(*layers, Head(8)))
    exact, sketched = (
        trace_routes(model, (images, labels), config=TraceConfig(units="std", sketches=count), keep_scores=True)
        for count in (None, 1000)
    )
    assert set(exact.methods.values()) == {"autograd"} and set(sketched.methods.values()) == {"sketch"}
    assert worst(sketched, exact) <= 0.1
    check(*made(vit, samples=2), linear=True, noise=True)


def test_influence_by_hand() -> None:
    model, images, _ = ready(chain)
    first, second, *_ = spread(model, images).items()
    raw = influence(model, images, first[0], second[0])
    expected = raw * first[1] / second[1].unsqueeze(1)
    assert deviation(influence(model, images, first[0], second[0], units="std"), expected) <= 1e-12
    mean = mean_influence(model, images, batch_size=2, units="std").matrices[first[0], second[0]]
    assert deviation(mean, expected.mean(0)) <= 1e-12


def test_a_check_takes_the_deviations_of_all_the_data() -> None:
    model, images, labels = ready(chain, samples=6)
    config = TraceConfig(units="std").measured(model, images)
    written = trace_routes(model, (images, labels), config=config).select(slice(2))
    found = verify(model, images[:2], labels[:2], config=config, written=written)
    assert found.passed and found.agreeing == 2


# Another parametrisation of the same function


def same_in_other_parameters(network: tuple[nn.Module, Tensor], linear: bool = False) -> None:
    model, images = network
    labels, other = torch.tensor([0, 2]), rescaled(model)
    assert deviation(other(images.clone()), model(images.clone())) <= 1e-9
    for options in ({}, {"carrier": "noise"}):
        config = TraceConfig(linear=linear, units="std", **options)
        attack: Any = None if not options else lambda _, batch, y: shaken(model, batch, y)
        try:
            one, two = (
                trace_routes(each, (images, labels), 0.4, config=config, attack=attack, keep_scores=True)
                for each in (model, other)
            )
        except UserError as error:
            assert "nothing is left to start from" in str(error)  # the last layers are dead on these images
            return
        agree_up_to_ties(two, as_expected(one), floor=1e-6)


def as_expected(routes: InstanceRoutes) -> oracle.OracleTrace:
    return oracle.OracleTrace(tuple(routes.layers), tuple(routes.methods), {}, routes.scores, routes.masks)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("drawn", "linear", "count"), [(networks(), False, 12), (transformers(), True, 5)], ids=["networks", "transformers"]
)
def test_random_architectures(drawn: SearchStrategy[tuple[nn.Module, Tensor]], linear: bool, count: int) -> None:
    settings(steady, max_examples=count)(given(drawn)(lambda network: same_in_other_parameters(network, linear)))()


def normalised() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 20, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 6, 3), nn.ReLU(), Head(6))


def off_route_scaled(model: nn.Sequential, route: Route) -> nn.Sequential:
    """What batch norm takes back: channels off the route by 0.1, moments with them, gamma for what eps leaves."""
    model = copy.deepcopy(model)
    convolution, norm = model[0], model[1]
    factors = torch.where(route.mask("0"), 1.0, 0.01).double()
    with torch.no_grad():
        before = norm.running_var.clone()
        convolution.bias *= factors
        norm.running_mean *= factors
        convolution.weight *= factors.view(-1, 1, 1, 1)
        norm.running_var *= factors**2
        norm.weight *= ((norm.running_var + norm.eps) / (before + norm.eps)).sqrt() / factors
    return model


def test_batch_norm_hides_the_parametrisation_from_routes_in_deviations_alone() -> None:
    model, images, labels = ready(normalised, samples=20)

    def traced(network: nn.Module, units: str) -> Route:
        return trace_routes(network, (images, labels), 0.3, config=TraceConfig(units=units)).aggregate(0.3)

    raw, std = traced(model, "raw"), traced(model, "std")
    other = off_route_scaled(model, raw)  # type: ignore[arg-type]
    assert deviation(other(images), model(images)) <= 1e-12
    assert not (traced(other, "raw") & raw).restrict(["0"]).size
    assert traced(other, "std").indices == std.indices


def test_everything_else_in_deviations() -> None:
    model, images, labels = ready(chain, samples=6)
    other, data = rescaled(model), (images, labels)
    attacked = shaken(model, images, labels)
    route = trace_routes(model, data).aggregate(0.4)

    def replayed(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return shaken(model, x, y)

    for by in CRITERIA:
        one, two = (channel_scores(each, data, by, attack=replayed, units="std").values for each in (model, other))
        for layer in one:
            torch.testing.assert_close(two[layer], one[layer], rtol=1e-9, atol=0)
    one, two = (ar.hardness(each, route, data, units="std").log_gradients for each in (model, other))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-9)
    assert (ar.hardness(other, route, data).log_gradients - one).abs().max() > 0.1
    values = spread(model, images)
    for layer, raw in loss_gradient(model, data).items():
        torch.testing.assert_close(loss_gradient(model, data, units="std")[layer], raw * values[layer])
    for layer, raw in sensitivity(model, images, attacked).items():
        torch.testing.assert_close(sensitivity(model, images, attacked, units="std")[layer], raw / values[layer])


def test_penalties_have_no_slope_along_what_changes_no_function() -> None:
    model, images, labels = ready(normalised, samples=6)
    route = trace_routes(model, (images, labels)).aggregate(0.5)
    attacked = shaken(model, images, labels)
    model.train()[1].eps = 1e-14  # batch norm over the batch takes back any factor on the kernel

    def slopes(network: nn.Module, **units: str) -> tuple[list[Tensor], list[Tensor]]:
        gradient, change = GradientPenalty(network, route, **units), StabilisationPenalty(network, route, **units)
        with gradient.watch(), change.watch():
            logits = network(attacked.clone())
        values = [gradient(logits, labels), change(images)]
        kernel, bias = network[0].weight, network[0].bias
        along = []
        for value in values:
            of_kernel, of_bias = torch.autograd.grad(value, [kernel, bias], retain_graph=True, materialize_grads=True)
            along.append((kernel * of_kernel).sum((1, 2, 3)) + bias * of_bias)
        return values, along

    (values, along), (raw, raw_along) = slopes(model, units="std"), slopes(model)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        scaled[0].weight *= 3
        scaled[0].bias *= 3
    for one, two in zip(values, slopes(scaled, units="std")[0], strict=True):
        torch.testing.assert_close(two, one, rtol=1e-9, atol=0)
    assert all(slope.abs().max() <= 1e-9 * value for slope, value in zip(along, values, strict=True))
    assert all(slope.abs().max() > 1e-3 * value for slope, value in zip(raw_along, raw, strict=True))


# The sanity check of criteria


def test_rescaling_finds_what_depends_on_the_parametrisation() -> None:
    case = make_case(12)
    pairs = list(zip(case.images, case.labels.tolist(), strict=True))
    images = ImageData(pairs, tuple("abcde"), (3, 13, 13), "pictures", "test")  # type: ignore[arg-type]
    study = Study(model=case.model, images=images, attacks="fgsm:eps=0.1", share=0.5)
    before = state(case.model)
    document = analyze(study, ["rescaling"])["rescaling"]
    assert state(case.model) == before
    for row in document.table:
        kept, chosen = row["kept"], row["channels"]
        assert kept == chosen if row["units"] == "std" or row["criterion"] == "attribution" else kept < chosen, row
    assert {row["criterion"] for row in document.table} == {"route", *BASELINES}


def test_a_copy_in_other_parameters_computes_the_same_or_is_refused() -> None:
    model, images, labels = ready(chain)
    route = trace_routes(model, (images, labels)).aggregate(0.3)
    other = in_other_parameters(model, route, images, 10.0)
    assert deviation(other(images), model(images)) <= 1e-12
    first = next(iter(route))
    convolutions = [dict(each.named_modules())[first].weight for each in (other, model)]
    expected = torch.where(route.mask(first), 10.0, 1.0).double()
    torch.testing.assert_close((convolutions[0] / convolutions[1]).mean((1, 2, 3)), expected)
    nn.utils.parametrizations.weight_norm(dict(model.named_modules())[first])
    with pytest.raises(UserError, match="shares or computes kernels"):
        in_other_parameters(model, route, images, 10.0)


# Bad input


def test_errors() -> None:
    model, images, labels = ready(chain)
    with pytest.raises(UserError, match="did you mean std"):
        TraceConfig(units="sdt")
    with pytest.raises(UserError, match="read once only"):
        trace_routes(model, iter([(images, labels)]), config=TraceConfig(units="std"))
    other = Deviations({"elsewhere": torch.ones(4)})
    with pytest.raises(UserError, match="not of this model"):
        trace_routes(model, (images, labels), config=TraceConfig(units=other))


def test_deviations_of_other_data_and_batches() -> None:
    model, images, labels = ready(chain, samples=6)
    measured = Deviations.of(model, images)
    whole = trace_routes(model, (images, labels), config=TraceConfig(units="std"), keep_scores=True)
    alone = trace_routes(model, (images[2:3], labels[2:3]), config=TraceConfig(units=measured), keep_scores=True)
    assert same_routes(alone, whole.select(slice(2, 3)))
    assert worst(alone, whole.select(slice(2, 3))) <= 1e-12
