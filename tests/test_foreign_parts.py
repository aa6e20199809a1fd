"""Networks with parts that PyTorch's dispatcher does not show, hooks, constants and outputs of their own."""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, library, nn
from torchvision import ops

import attackroute as ar
from attackroute.core.errors import UserError
from attackroute.tracing import oracle
from attackroute.tracing.oracle_check import verify
from tracing import ready, same_routes, worst

LINEAR = ar.TraceConfig(linear=True)


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def chain(between: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), between, nn.Conv2d(6, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


@library.custom_op("attackroute_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


twice.register_autograd(lambda _, gradient: gradient * 2)


@torch.jit.script
def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Deformed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offsets, self.convolution = nn.Conv2d(6, 18, 3, padding=1), ops.DeformConv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution(x, self.offsets(x))


def regions(x: Tensor) -> Tensor:
    return ops.roi_align(x, [x.new_tensor([[0.0, 0, 6, 6]])] * len(x), (5, 5))


FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "custom operation": lambda: Calls(lambda x: x + twice(x)),
    "scripted": lambda: Calls(lambda x: x + swish(x)),
    "deformable convolution": Deformed,
    "region of interest": lambda: Calls(regions),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_every_trace_is_the_oracle(name: str) -> None:
    model, images, labels = ready(lambda: chain(FOREIGN[name]()))
    expected = oracle.trace(model, images, labels, width=0.4)
    for _ in range(3 if name == "scripted" else 1):  # that runs otherwise from its second and third call on
        found = ar.trace_routes(model, (images, labels), 0.4, keep_scores=True)
        assert worst(found, expected) < 1e-9
        assert same_routes(found, expected)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_backward_hooks_rest_and_stay(register: str, place: int) -> None:
    seen: list[Any] = []
    model, images, labels = ready(lambda: chain(nn.ReLU()))
    plain = ar.trace_routes(model, (images, labels), keep_scores=True)
    getattr(model[place], register)(lambda *args: seen.append(args))
    found = ar.trace_routes(model, (images, labels), keep_scores=True)
    assert found == plain and set(found.methods.values()) == {"closed-form"}
    assert not seen
    model(images).sum().backward()
    assert len(seen) == 1


class Pooled(nn.Module):
    """Tokens that a learned query, itself projected, gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.query = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.of_query, self.of_tokens, self.head = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        keys, values = self.of_tokens(self.patches(x).flatten(2).transpose(1, 2)).chunk(2, -1)
        query = self.of_query(self.query).expand(len(x), -1, -1)
        return self.head(F.scaled_dot_product_attention(query, keys, values)[:, 0])


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("noise", [False, True])
def test_maps_of_parameters_alone_are_no_layers(samples: int, noise: bool) -> None:
    model, images, labels = ready(Pooled, samples=samples, size=12)
    config = ar.TraceConfig(linear=True, carrier="noise" if noise else "unit")
    attack = ar.parse_attack("fgsm:eps=0.1") if noise else None
    found = ar.trace_routes(model, (images, labels), config=config, attack=attack)
    assert found.layers == ("patches", "of_tokens", "head")
    assert verify(model, images, labels, attack=attack, config=config).passed


def test_a_map_of_one_channel_may_lie_channels_last() -> None:
    def build() -> nn.Module:
        clamp = Calls(lambda x: x.clamp(min=0))
        return nn.Sequential(nn.Conv2d(3, 1, 3), clamp, nn.Conv2d(1, 6, 3), nn.Flatten(1), nn.Linear(150, 5))

    model, images, labels = ready(build, size=9)
    plain = ar.trace_routes(model, (images, labels), keep_scores=True)
    last = images.contiguous(memory_format=torch.channels_last)
    found = ar.trace_routes(model.to(memory_format=torch.channels_last), (last, labels), keep_scores=True)
    assert worst(found, plain) < 1e-12


def test_influence_runs_in_bfloat16() -> None:
    model, images, _ = ready(lambda: chain(nn.ReLU()), dtype=torch.float32)
    exact = ar.influence(model, images, "0", "3")
    found = ar.influence(model.bfloat16(), images.bfloat16(), "0", "3")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.05 * float(exact.max()))


class One(nn.Module):
    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.network, self.head, self.flat = chain(nn.ReLU()), nn.Linear(5, 1), flat

    def forward(self, x: Tensor) -> Tensor:
        logit = self.head(self.network(x))
        return logit[:, 0] if self.flat else logit


def test_one_logit_takes_a_loss_or_is_told_how() -> None:
    model, images, _ = ready(lambda: One(flat=False))
    labels = torch.arange(len(images)) % 2

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits), reduction="none")

    found = ar.trace_routes(model, (images, labels), loss=loss, keep_scores=True)
    assert torch.equal(found.predictions, (model(images)[:, 0] > 0).long())

    def both(x: Tensor) -> Tensor:
        logit = model(x)[:, 0]
        return torch.stack([torch.zeros_like(logit), logit], 1)

    doubled = ar.trace_routes(Wrapped(model, both), (images, labels), keep_scores=True)
    assert [scores.argsort().tolist() for scores in found.scores.values()] == [
        scores.argsort().tolist() for scores in doubled.scores.values()
    ]
    for broken in (model, One(flat=True).double()):
        with pytest.raises(UserError, match=r"stack\(\[torch.zeros_like\(z\), z\], 1\)"):
            ar.trace_routes(broken, (images, labels))


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.answer = model, answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(x)


@pytest.mark.parametrize("answer", [lambda x: (x, x), lambda x: {"out": x}])
def test_outputs_that_are_no_logits_are_named(answer: Callable[[Tensor], Any]) -> None:
    model, images, labels = ready(lambda: chain(nn.ReLU()))
    with pytest.raises(UserError, match=r"returns (tuple|dict), not logits .* wrap it in a module"):
        ar.trace_routes(Wrapped(model, lambda x: answer(model(x))), (images, labels))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = chain(nn.ReLU())

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.network(x * scale)


def test_a_second_input_is_named() -> None:
    images, labels = torch.rand(3, 3, 13, 13), torch.arange(3)
    with pytest.raises(UserError, match=r"cannot run on a batch .* missing 1 required positional argument: 'scale'"):
        ar.trace_routes(Two(), (images, labels))


def test_observers_of_quantisation_come_back_as_they_were() -> None:
    model = chain(nn.ReLU()).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = torch.ao.quantization.prepare_qat(model)
    images, labels = torch.rand(3, 3, 13, 13), torch.arange(3)
    for batch in (images, images):  # observers that have seen nothing, then some that have
        before = {name: value.clone() for name, value in prepared.state_dict().items()}
        ar.trace_routes(prepared, (10 * images.flip(0), labels))
        for name, after in prepared.state_dict().items():
            torch.testing.assert_close(after, before[name], rtol=0, atol=0, msg=name)
        prepared(batch)


def test_results_draw_and_show_themselves() -> None:
    model, images, labels = ready(lambda: chain(nn.ReLU()), dtype=torch.float32)
    routes = ar.trace_routes(model, (images, labels))
    route = routes.aggregate(0.3)
    found = ar.hardness(model, route, (images, labels))
    evaluation = ar.evaluate(model, (images, labels), attacks=["fgsm"], checks=0)
    axes = route.plot()
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0 (6)", "3 (6)"]
    assert len(axes.images) == 2
    own = Figure().subplots()
    assert found.plot(own) is own
    assert sum(patch.get_height() for patch in own.patches if patch.get_height()) >= 3
    bars = evaluation.plot().patches
    assert [bar.get_height() for bar in bars] == evaluation.table.column("accuracy")
    for each in (routes, route, found, evaluation):
        assert html.escape(repr(each)) in each._repr_html_()
    bare = ar.Route(route.indices, route.channels)
    with pytest.raises(UserError, match="no frequencies to draw"):
        bare.plot()


def test_an_answer_without_rows_is_named_among_tokens() -> None:
    model, images, labels = ready(Pooled, size=12)
    with pytest.raises(UserError, match=r"returns a tensor of shape \(\) for 2 images, not logits"):
        ar.trace_routes(Wrapped(model, lambda x: model(x).sum()), (images, labels), config=LINEAR)
