"""The tracer against the brute-force oracle, on every operation that it knows and on the built-in networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import CLOSED, MIXED, Function, Head, Perceptron, chain, tokens
from attackroute.analysis.interventions import deactivate, weaken
from attackroute.core.document import Document
from attackroute.core.errors import UserError
from attackroute.core.model_state import frozen
from attackroute.routes.instance_routes import InstanceRoutes
from attackroute.tracing import oracle, windows
from attackroute.tracing.closed_form import critical_sums, influence_matrix
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.oracle_check import verify
from attackroute.tracing.recorder import record
from attackroute.tracing.trace import trace_routes
from attackroute.zoo.networks import build_model
from tracing import check, deviation, ready, same_routes, small, worst

EVERY = {**CLOSED, **MIXED}


# Equality with the oracle


@pytest.mark.parametrize("name", EVERY)
def test_float64_is_the_oracle(name: str) -> None:
    found = check(*ready(EVERY[name]), influences=True)
    methods = set(found.methods.values())
    assert methods == {"closed-form"} if name in CLOSED else {"autograd"} <= methods <= {"closed-form", "autograd"}
    assert not any((found.scores[layer] < 0).any() for layer in found.layers)


@pytest.mark.parametrize("name", [*CLOSED, "shuffled", "aliased"])
def test_float32_is_the_oracle_to_four_digits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_SMALL", 0)  # maps are summed by segments, as larger ones are
    found = check(*ready(EVERY[name], dtype=torch.float32), tolerance=1e-4)
    assert found.scores[found.layers[0]].dtype == torch.float32


@pytest.mark.parametrize("build", [Perceptron, tokens, chain], ids=["perceptron", "tokens", "chain"])
def test_linear_maps_are_route_layers_when_asked(build: Callable[[], nn.Module]) -> None:
    model, images, labels = ready(build)
    found = check(model, images, labels, linear=True, influences=True)
    assert set(trace_routes(model, images).layers) < set(found.layers)


@pytest.mark.parametrize("name", ["residual", "shuffled"])
def test_any_loss_can_be_traced(name: str) -> None:
    def margin(logits: Tensor, labels: Tensor) -> Tensor:
        own = logits.gather(1, labels[:, None])[:, 0]
        return (logits.exp().sum(1) - own).square()

    model, images, labels = ready(EVERY[name])
    found = check(model, images, labels, loss=margin)
    assert not same_routes(found, trace_routes(model, (images, labels), 0.3))


@pytest.mark.parametrize("width", [1e-6, 0.2, 0.5, 1.0])
def test_every_width_is_the_oracle(width: float) -> None:
    found = check(*ready(CLOSED["residual"]), width=width)
    for layer in found.layers:
        channels = found.channels[layer]
        assert found.masks[layer].sum(1).eq(max(1, round(width * channels))).all()


@pytest.mark.parametrize("name", ["dense", "shuffled"])
def test_samples_without_labels_are_traced_for_the_prediction(name: str) -> None:
    model, images, _ = ready(EVERY[name])
    found = check(model, images, None)
    predicted = model(images).argmax(1)
    labelled = trace_routes(model, (images, predicted), 0.3, keep_scores=True)
    assert found.labels is None
    assert torch.equal(found.predictions, predicted)
    assert torch.equal(labelled.labels, predicted)
    assert worst(found, labelled) == 0


BUILT_IN = {
    "vgg16": ("vgg16", 1 / 64, 32),
    "vgg_small": ("vgg_small", 1 / 16, 32),
    "alexnet": ("alexnet", 1 / 64, 32),
    "resnet18": ("resnet18", 1 / 64, 32),
}
LARGE = {
    "resnet18, wider": ("resnet18", 1 / 16, 32),
    "torchvision's squeezenet1_1": ("torchvision:squeezenet1_1", 1, 32),
}


@pytest.mark.parametrize("name", [*BUILT_IN, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_built_in_networks_are_the_oracle(name: str) -> None:
    spec, width, size = {**BUILT_IN, **LARGE}[name]
    build = lambda: build_model(spec, num_classes=5, width=width, image_size=size)  # noqa: E731
    assert set(check(*ready(build, samples=1, size=size)).methods.values()) == {"closed-form"}


# Ties


def test_ties_go_to_the_lower_index() -> None:
    model, images, labels = ready(small)
    with torch.no_grad():
        for layer in (model[0], model[2]):  # every channel is the same
            layer.weight.copy_(layer.weight[:1, :1].expand_as(layer.weight).clone())
            layer.bias.zero_()
        head = model[6].weight.unflatten(1, (model[2].out_channels, -1))
        head.copy_(head[:, :1].expand_as(head).clone())
    for found in (trace_routes(model, (images, labels), 0.5), oracle.trace(model, images, labels, width=0.5)):
        for layer in found.layers:
            assert found.masks[layer].tolist() == [[True, True, False, False]] * 3


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 13, 13), torch.ones(2, 3, 13, 13), -torch.ones(2, 3, 13, 13)])
@pytest.mark.parametrize("name", ["chain", "activations", "overlapping pools", "residual", "split"])
def test_flat_images_full_of_ties_and_zeros(name: str, images: Tensor) -> None:
    model, _, labels = ready(CLOSED[name])
    for module in model.modules():  # without shifts, whole maps are exactly zero
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    expected = oracle.trace(model, images.double(), labels[:2], width=0.3)
    found = trace_routes(model, (images.double(), labels[:2]), 0.3, keep_scores=True)
    assert worst(found, expected) <= 1e-9


# Edges


def test_edges_are_listed_by_target_then_source_in_forward_order() -> None:
    model, images, labels = ready(CLOSED["dense"])
    found = trace_routes(model, (images, labels))
    order = {layer: index for index, layer in enumerate(found.layers)}
    edges = [(order[target], order[source]) for source, target in found.methods]
    assert edges == sorted(edges)
    assert all(source < target for target, source in edges)


def test_a_side_branch_that_ends_is_a_sink() -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        return parts["head"](F.relu(parts["b"](F.relu(parts["a"](x))))) + parts["end"](F.relu(parts["side"](x)))

    torch.manual_seed(1)  # a channel that never fires has no gradient
    layers = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 3), "side": nn.Conv2d(3, 5, 3)}
    model, images, labels = ready(lambda: Function(forward, **layers, head=Head(4), end=Head(5)))
    found = check(model, images, labels)
    assert found.scores["parts.side"].min() > 0
    assert list(found.methods) == [("parts.a", "parts.b")]


# Number formats and devices


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.05)])
@pytest.mark.parametrize("name", ["residual", "shuffled"])
def test_autocast_is_close_and_accumulates_in_float32(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, images, labels = ready(EVERY[name], dtype=torch.float32)
    exact = trace_routes(model, (images, labels), 1.0, keep_scores=True)
    fast = trace_routes(model, (images, labels), 1.0, keep_scores=True, autocast=dtype)
    assert fast.methods == exact.methods
    assert 0 < worst(fast, exact) < tolerance
    assert all(fast.scores[layer].dtype == torch.float32 for layer in fast.layers)
    assert not torch.is_autocast_enabled("cpu")


def test_a_bfloat16_network_is_traced_in_its_own_precision() -> None:
    model, images, labels = ready(CLOSED["chain"], dtype=torch.float32)
    exact = trace_routes(model, (images, labels), 1.0, keep_scores=True)
    coarse = trace_routes(model.bfloat16(), (images, labels), 1.0, keep_scores=True)
    assert 0 < worst(coarse, exact) < 0.1


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_made_on_the_cpu_behind_the_back_of_another_device(name: str) -> None:
    model, images, _ = ready(EVERY[name])
    model, images = model.to("meta"), images.to("meta")
    with frozen(model):
        recording = record(model, images)
    layers = recording.layers
    for layer in layers:
        scores = {index: images.new_zeros(len(images), layers[index].channels) for index in layer.sources}
        critical_sums(layer, torch.ones(len(images), layer.channels, dtype=torch.bool, device="meta"), scores)
        for index in layer.sources - layer.jacobian:
            assert influence_matrix(layer, index, layers[index].channels, len(images)).is_meta


def test_a_layer_without_scores_is_named_and_marked(tmp_path: Path) -> None:
    """A layer whose activations are dead for two of three samples: there is nothing to rank."""
    middle, head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), middle, nn.ReLU(), head, nn.AvgPool2d(2), nn.Flatten())
    for parameter in (model[0].weight, middle.weight):
        nn.init.ones_(parameter)  # type: ignore[arg-type]
    nn.init.constant_(middle.bias, -10.0)  # type: ignore[arg-type]
    images, labels = torch.tensor([9.0, 0.5, 1.0])[:, None, None, None].expand(3, 1, 2, 2), torch.arange(3)
    with pytest.warns(UserWarning, match=r"scores of layer '2' are zero for 2 of 3 samples.*first channels by index"):
        routes = trace_routes(model, (images, labels))
    expected = [[False] * 3, [False, True, False], [False, True, False]]
    assert routes.unranked is not None and routes.unranked.tolist() == expected
    assert routes.unranked_layers == ("2",) and "1 layer without scores" in repr(routes)
    assert routes.select([0, 1]).totals["unranked"].tolist() == [0, 1, 0]
    notes: list[str] = []
    stored = trace_routes(model, (images, labels), batch_size=1, folder=tmp_path, note=notes.append)
    assert any("layer '2'" in note for note in notes)
    assert stored.totals["unranked"].tolist() == [0, 2, 0]
    layers = Document.load(tmp_path / "summary.json").about["layers"]
    assert [layer.get("unranked") for layer in layers] == [None, 2, None]
    with pytest.raises(UserError, match=r"all scores of the last layers \(4\) are zero"):
        trace_routes(model, (images, labels), loss=lambda z, _: z.sum(1) * 0)


class Dropped(nn.Module):
    """A trunk with a head of its own whose answer is dropped, as auxiliary classifiers' is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.trunk = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3)
        self.aside, self.unused, self.head = nn.Conv2d(6, 40, 1), nn.Conv2d(40, 4, 1), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        self.unused(F.relu(self.aside(x)))
        return self.head(F.relu(self.trunk(x)))


@pytest.mark.parametrize("noise", [False, True])
def test_a_head_that_is_dropped_is_not_on_the_route(noise: bool) -> None:
    model, images, labels = ready(Dropped)
    found = check(model, images, labels, noise=noise)
    assert found.layers == ("first", "trunk") and list(found.methods) == [("first", "trunk")]
    del model.unused, model.aside
    model.unused = model.aside = nn.Identity()
    assert worst(found, check(model, images, labels, noise=noise)) == 0


def test_one_image_alone_has_the_products_of_a_batch() -> None:
    """PyTorch's batched products through batch norm are wrong for one row whose gradient comes permuted."""

    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = F.gelu(parts["norm"](parts["first"](x))).permute(0, 2, 3, 1)
        return parts["head"](parts["last"](parts["mix"](x, x).permute(0, 3, 1, 2)))

    torch.manual_seed(0)
    layers = {"first": nn.Conv2d(3, 8, 3), "norm": nn.BatchNorm2d(8), "mix": nn.Bilinear(8, 8, 8)}
    model, images, labels = ready(lambda: Function(forward, **layers, last=nn.Conv2d(8, 6, 3), head=Head(6)))
    found = check(model, images[:1], labels[:1])
    assert set(found.methods.values()) == {"autograd"}
    whole = trace_routes(model, (images, labels), 0.3, keep_scores=True)
    assert deviation(found.scores["parts.first"], whole.scores["parts.first"][:1]) < 1e-12


def test_products_from_layers_without_positions() -> None:
    """Squeeze and excite by linear maps, whose outputs have no positions."""

    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        x = m["stem"](x)
        gate = m["excite"](F.gelu(F.softmax(m["norm"](m["squeeze"](x.mean((2, 3)))), 1)))
        return m["head"](x * torch.sigmoid(gate)[:, :, None, None])

    torch.manual_seed(0)
    parts = {"stem": nn.Conv2d(3, 6, 3), "squeeze": nn.Linear(6, 4), "norm": nn.LayerNorm(4), "excite": nn.Linear(4, 6)}
    found = check(*ready(lambda: Function(forward, **parts, head=Head(6))), linear=True, influences=True)
    assert found.methods["parts.squeeze", "parts.excite"] == "autograd"


# Under interventions


@pytest.mark.filterwarnings("ignore:all scores of layer")
@pytest.mark.parametrize(
    ("name", "kind"),
    [*itertools.product(("chain", "residual", "dense"), ("deactivate", "weaken")), ("perceptron", "deactivate")],
)
def test_routes_of_a_network_under_an_intervention(name: str, kind: str) -> None:
    """What an intervention leaves of a layer's output is the output, in the engine as in the oracle."""
    linear = name == "perceptron"
    model, images, labels = ready(Perceptron if linear else CLOSED[name])
    route = trace_routes(model, (images, labels), 0.3, config=TraceConfig(linear)).aggregate(0.4)
    with deactivate(model, route) if kind == "deactivate" else weaken(model, route, beta=0.5):
        model(images)  # to weaken takes a look at the first batch
        found = check(model, images, labels, linear=linear)
    if kind == "deactivate" and not linear:
        assert set(found.methods.values()) == {"closed-form"}


# The check of what was written


def test_written_routes_are_checked_and_not_traced_again() -> None:
    model, images, labels = ready(CLOSED["chain"])
    routes = trace_routes(model, (images, labels), 0.3)
    assert verify(model, images, labels, 0.3, written=routes).agreeing == 3
    swapped = verify(model, images, labels, 0.3, written=routes.select([1, 2, 0]))
    assert swapped.faults and swapped.agreeing < 3 and swapped.deviation < 1e-9 and not swapped.passed


def test_a_tie_is_no_fault() -> None:
    """Two channels that are the same in all: which of them is on the route is chance."""
    model, images, labels = ready(lambda: small((3, 4, 4)))
    with torch.no_grad():
        for parameter in model[0].parameters():  # type: ignore[index]
            parameter[1] = parameter[0]
        model[2].weight[:, 1] = model[2].weight[:, 0]  # type: ignore[index]
    routes = trace_routes(model, (images, labels), 0.25)
    order = torch.tensor([1, 0, 2, 3])
    mirrored = {"0": routes.masks["0"][:, order], "2": routes.masks["2"]}
    check = verify(model, images, labels, 0.25, written=InstanceRoutes.from_masks(mirrored, routes.provenance))
    tied = int(routes.masks["0"][:, :2].any(1).sum())
    assert tied and (check.agreeing, check.faults, check.passed) == (3 - tied, 0, True)
