"""The same routes on an accelerator: nothing waits for it layer by layer (shown without one), all results are the same.

What needs CUDA is skipped without it; on a GPU the file takes about two minutes: ``pytest tests/test_cuda.py``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import attackroute as ar
import token_networks
from architectures import Dense, Residual, activations, chain, overlapping_pools, randomised
from attackroute.core.model_state import frozen
from attackroute.tracing import oracle
from attackroute.tracing import trace as tracing
from attackroute.tracing.config import NOISE, TraceConfig
from command_line import done
from report_runs import make_network, make_pictures
from tracing import ready, same_routes, shaken, worst

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "in place": lambda: chain(inplace=True),
    "activations": activations,
    "overlapping pools": overlapping_pools,
    "wide pools": lambda: overlapping_pools(5, 2),
    "residual": Residual,
    "dense": Dense,
}
TOKENS: dict[str, Callable[[], nn.Module]] = {
    "vit": token_networks.vit,
    "swin": token_networks.swin,
    "convnext": token_networks.convnext,
    "attentive": token_networks.Attentive,
}
READS = 8
"""How often one batch may wait for the device: images, logits, labels, ranking and results, with room for PyTorch's."""


# Without a GPU


def on_meta(model: nn.Module) -> nn.Module:
    """The network on a device that has no values to wait for."""
    return copy.deepcopy(model).to("meta")


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "mobilenet_v2", "googlenet", "densenet121"])
def test_no_layer_waits_for_the_device_or_leaves_it(name: str) -> None:
    """On the meta device any look at a value is an error, and so is an operation that mixes devices."""
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, **options).eval()
    with frozen(model):
        tracer = tracing.Tracer(model, torch.rand(2, 3, 64, 64), 0.2)
    # a model cannot be probed on meta, so the structure is the CPU's
    images, labels = torch.empty(3, 3, 64, 64, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    with frozen(moved := on_meta(model)):
        tracer.model = moved
        result = tracer._ranked(images, labels)
    assert result.predictions.device.type == "meta"
    for layer, channels in tracer.structure.channels.items():
        ranked = result.layers[layer]
        assert ranked.mask.device.type == ranked.scores.device.type == "meta"
        assert ranked.mask.shape == (3, channels)


# With one


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@CUDA
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_routes_are_the_oracles(build: Callable[[], nn.Module], memory_format: torch.memory_format) -> None:
    model, images, labels = ready(build, size=17)
    expected = oracle.trace(model, images, labels, width=0.3)
    model = model.to("cuda", memory_format=memory_format)  # type: ignore[call-overload]
    images = images.to("cuda").contiguous(memory_format=memory_format)
    found = ar.trace_routes(model, (images, labels), 0.3, keep_scores=True)
    assert worst(found, expected) <= 1e-8  # CUDA's hyperbolic tangents differ from the CPU's in the last digits
    assert same_routes(found, expected)


@CUDA
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "mobilenet_v2"])
def test_batches_repeated_as_a_graph_have_the_routes_of_batches_alone(name: str, labelled: bool) -> None:
    """Of one shape, the first two batches run as they are, the others as a graph; the last one has another shape."""
    torch.manual_seed(0)
    model = randomised(torchvision.models.get_model(name).eval()).double().to("cuda")
    images, labels = torch.rand(22, 3, 64, 64).double(), torch.arange(22)
    data = (images, labels) if labelled else images
    together = ar.trace_routes(model, data, batch_size=4, keep_scores=True)
    for start in range(0, 22, 4):
        rows = slice(start, start + 4)
        alone = ar.trace_routes(model, (images[rows], labels[rows]) if labelled else images[rows], keep_scores=True)
        for layer in alone.layers:
            torch.testing.assert_close(together.scores[layer][rows], alone.scores[layer], rtol=1e-9, atol=1e-12)
            assert torch.equal(together.masks[layer][rows], alone.masks[layer])


@CUDA
def test_a_model_that_waits_for_the_device_is_traced_without_a_graph() -> None:
    class Waiting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = chain()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * (2 if x.sum().item() > 0 else 1)

    model = Waiting().double().eval().to("cuda")
    images = torch.rand(20, 3, 13, 13).double()
    together = ar.trace_routes(model, images, batch_size=4)
    assert same_routes(together, ar.trace_routes(model.cpu(), images, batch_size=4))


@CUDA
@pytest.mark.parametrize("build", TOKENS.values(), ids=TOKENS)
def test_routes_over_tokens_are_the_cpus(build: Callable[[], nn.Module]) -> None:
    model, images, labels = ready(build, size=16)
    config = TraceConfig(linear=True)
    expected = ar.trace_routes(model, (images, labels), 0.3, config=config, keep_scores=True)
    found = ar.trace_routes(model.to("cuda"), (images, labels), 0.3, config=config, keep_scores=True)
    assert found.methods == expected.methods
    assert worst(found, expected) <= 1e-9


@CUDA
@pytest.mark.parametrize("build", [chain, Residual, token_networks.Attentive], ids=["chain", "residual", "attentive"])
def test_noise_and_sketches_are_the_cpus(build: Callable[[], nn.Module]) -> None:
    model, images, labels = ready(build, size=16)

    def both(where: str) -> list[ar.InstanceRoutes]:
        moved = model.to(where)
        noise, sketched = TraceConfig(carrier=NOISE), TraceConfig(linear=True, sketches=16)
        return [
            ar.trace_routes(moved, (images, labels), 0.3, attack=shaken, config=noise, keep_scores=True),
            ar.trace_routes(moved, (images, labels), 0.3, config=sketched, keep_scores=True),
        ]

    for expected, found, tolerance in zip(both("cpu"), both("cuda"), (1e-9, 1e-5), strict=True):
        assert worst(found, expected) <= tolerance  # sketches draw in float32


@CUDA
def test_influence_interventions_and_hardness_are_the_cpus() -> None:
    model, images, labels = ready(Residual, size=17)
    route = ar.trace_routes(model, (images, labels), 0.3).aggregate(0.4)
    other = images.flip(0)

    def results(where: str) -> dict[str, Tensor]:
        moved, here, there = model.to(where), images.to(where), other.to(where)
        answers: dict[str, Tensor] = {"influence": ar.influence(moved, here, "conv1", "a1.0")}
        for name, context in {
            "deactivate": lambda: ar.deactivate(moved, route),
            "transplant": lambda: ar.transplant(moved, clean=here, route=route),
            "weaken": lambda: ar.weaken(moved, route, beta=0.5),
        }.items():
            with context(), torch.no_grad():
                answers[name] = moved(there)
        answers["hardness"] = ar.hardness(moved, route, (here, labels)).values
        ranked = ar.rank_channels(moved, (here, labels), by="weight")
        answers["ranked"] = torch.cat([ranked.mask(layer) for layer in ranked])
        return {name: value.detach().double().cpu() for name, value in answers.items()}

    expected, found = results("cpu"), results("cuda")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=name)


@CUDA
def test_penalties_and_their_gradients_are_the_cpus() -> None:
    model, images, labels = ready(chain, size=17)
    route = ar.trace_routes(model, (images, labels), 0.3).aggregate(0.4)

    def gradients(where: str) -> list[Tensor]:
        moved = copy.deepcopy(model).to(where).requires_grad_()
        here, answers = images.to(where), labels.to(where)
        gradient = ar.GradientPenalty(moved, route)
        with gradient.watch():
            logits = moved(here)
        penalty = gradient(logits, answers) + ar.WeightPenalty(moved, route, here)()
        penalty.backward()
        return [penalty.detach().cpu(), *(p.grad.cpu() for p in moved.parameters() if p.grad is not None)]

    for found, expected in zip(gradients("cuda"), gradients("cpu"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@CUDA
def test_a_network_is_attacked_evaluated_and_hardened(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ar.build_model("vgg16", width=0.125, num_classes=4, image_size=32).to("cuda")
    data = torch.rand(32, 3, 32, 32), torch.arange(32) % 4
    on_cpu = copy.deepcopy(model).cpu()
    expected, found = (ar.evaluate(each, data, ["fgsm:eps=8/255"], checks=0).table for each in (on_cpu, model))
    assert [row["correct"] for row in found.to_json()] == [row["correct"] for row in expected.to_json()]
    before = copy.deepcopy(model)
    ar.harden(model, TensorDataset(*data), train=ar.TrainSettings(epochs=1, batch_size=16), folder=tmp_path)
    assert any(not torch.equal(old, new) for old, new in zip(before.parameters(), model.parameters(), strict=True))
    assert next(model.parameters()).device.type == "cuda"


@CUDA
def test_the_command_traces_there(tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures")
    make_network(tmp_path / "net")
    common = ("--model", tmp_path / "net", "--data", f"folder:{tmp_path / 'pictures'}", "--device", "cuda")
    done("trace", *common, "--out", tmp_path / "routes")
    assert len(ar.RouteFolder.open(tmp_path / "routes")) == 16


@CUDA
def test_bfloat16_finds_most_of_the_route() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval().to("cuda")
    data = torch.rand(8, 3, 96, 96), torch.arange(8)
    exact, rounded = (ar.trace_routes(model, data, autocast=dtype) for dtype in (None, torch.bfloat16))
    shared = sum(int((exact.masks[layer] & rounded.masks[layer]).sum()) for layer in exact.layers)
    assert shared / sum(int(exact.masks[layer].sum()) for layer in exact.layers) > 0.7


@CUDA
def test_memory_does_not_grow_with_batches() -> None:
    model = torchvision.models.resnet18().eval().to("cuda")

    def peak(batches: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        ar.trace_routes(model, torch.rand(8 * batches, 3, 96, 96), batch_size=8)
        return torch.cuda.max_memory_allocated()

    peak(2)  # what is made once and kept
    assert peak(9) <= 1.05 * peak(3)


@CUDA
@pytest.mark.parametrize("name", ["vgg16_bn", "resnet50", "mobilenet_v2"])
def test_a_batch_waits_for_the_device_a_few_times(name: str) -> None:
    model = torchvision.models.get_model(name).eval().to("cuda")

    def waits(batches: int) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                ar.trace_routes(model, torch.rand(4 * batches, 3, 64, 64), batch_size=4)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    waits(1)  # what is made once and kept
    assert (waits(7) - waits(2)) / 5 <= READS
