"""Bad input: one line that says what to do, and a model that is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from architectures import Function, Head
from attackroute.core.errors import UserError
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.influence import influence
from attackroute.tracing.trace import trace_routes
from tracing import small, state, untidy

IMAGES, LABELS = torch.rand(4, 3, 13, 13), torch.tensor([0, 1, 2, 3])


@pytest.fixture
def model() -> Iterator[nn.Sequential]:
    """A model that every test here must leave as it was, and a caller whose modes are as they were."""
    model = untidy()
    before = state(model)
    given = IMAGES.clone(), LABELS.clone()
    yield model
    assert state(model) == before
    assert torch.equal(IMAGES, given[0])
    assert torch.equal(LABELS, given[1])
    assert _get_current_function_mode_stack() == _get_current_dispatch_mode_stack() == []
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")


def refused(message: str, function: Callable[..., object], *args: Any, **options: Any) -> str:
    with pytest.raises(UserError, match=message) as caught:
        function(*args, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert 20 < len(line) < 500
    return line


def test_a_trace_leaves_the_model_as_it_was(model: nn.Sequential) -> None:
    trace_routes(model, (IMAGES, LABELS), keep_scores=True)
    trace_routes(model, (IMAGES, LABELS), config=TraceConfig(linear=True), autocast=torch.bfloat16)
    sketched = trace_routes(model, (IMAGES, LABELS), config=TraceConfig(sketches=32))
    assert "sketch" in sketched.methods.values()
    influence(model, IMAGES, "0", "3")
    influence(model, IMAGES, "3", "6")


@pytest.mark.parametrize("width", [0, -0.5, 1.01, float("nan"), float("inf")])
def test_width(model: nn.Sequential, width: float) -> None:
    refused(r"width .* is outside \(0, 1\]", trace_routes, model, IMAGES, width)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:, :1], r"cannot run on a batch of shape \(2, 1, 13, 13\).*expected input.* to have 3 channels"),
        (IMAGES[:, :, :3, :3], r"cannot run on a batch of shape \(2, 3, 3, 3\).*Kernel size"),
        (IMAGES[:, :, None], r"cannot run on a batch of shape \(2, 3, 1, 13, 13\)"),
        (IMAGES[0], r"cannot run on a batch of shape \(2, 13, 13\)"),
        (IMAGES / 0, r"image 0 of batch 0 holds NaN or inf"),
        (IMAGES[:0], r"the loader is empty"),
    ],
)
def test_images(model: nn.Sequential, images: Tensor, message: str) -> None:
    refused(message, trace_routes, model, images)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + 2, r"label 5 is outside the model's 5 logits \(0 \.\. 4\)"),
        (-LABELS, r"label -1 is outside"),
        (LABELS.float(), r"type torch\.float32; expected 4 integers"),
        (LABELS[:, None], r"shape \(4, 1\)"),
        (LABELS[:2], r"4 images but labels of shape \(2,\)"),
    ],
)
def test_labels(model: nn.Sequential, labels: Tensor, message: str) -> None:
    refused(message, trace_routes, model, (IMAGES, labels))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(IMAGES, LABELS), IMAGES], "labels must come with every batch or with none"),
        ([], "the data hold no sample: the loader is empty"),
        (iter([]), "the data hold no sample: the loader is empty"),
        ([(IMAGES[:0], LABELS[:0])], "the data hold no sample: the loader is empty"),
    ],
    ids=["some labels", "list", "iterator", "empty batch"],
)
def test_data(model: nn.Sequential, data: Any, message: str) -> None:
    refused(message, trace_routes, model, data)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (IMAGES[:, :1], r"cannot run on a batch of shape \(4, "),
        (IMAGES[:, :, :3, :3], r"cannot run on a batch of shape \(4, "),
        (IMAGES / 0, r"image 0 of batch 1 holds NaN or inf"),
    ],
    ids=["channels", "size", "not finite"],
)
def test_a_later_batch_that_does_not_fit(model: nn.Sequential, later: Tensor, message: str) -> None:
    refused(message, trace_routes, model, iter([IMAGES, later]))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda z: (z, z), "returns tuple, not logits"),
        (lambda z: {"logits": z}, "returns dict, not logits"),
        (lambda z: None, "returns NoneType, not logits"),
        (lambda z: z[:, :, None], r"a tensor of shape \(2, 5, 1\)"),
        (lambda z: z.sum(), r"a tensor of shape \(\)"),
        (lambda z: z[:1], r"a tensor of shape \(1, 5\) for 2 images"),
        (lambda z: z.detach(), "the logits do not depend on any route layer"),
        (lambda z: z[:, :1], "single logit"),
        (lambda z: (z - 100).log(), "logits are not finite"),
        (lambda z: (z - 100) / torch.zeros(5), "logits are not finite"),
        (lambda z: z / 0, "not finite"),
    ],
)
def test_outputs(model: nn.Sequential, output: Callable[[Tensor], object], message: str) -> None:
    wrapped = Function(lambda parts, x: output(parts["model"](x)), model=model)
    refused(message, trace_routes, wrapped, IMAGES)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (F.cross_entropy, r"loss returned shape \(\), expected one loss per sample \(4,\): use reduction='none'"),
        (lambda z, _: z, r"loss returned shape \(4, 5\)"),
        (lambda z, y: y.float(), r"do not depend"),
        (lambda *_: None, r"loss returned"),
        (lambda z, _: z[:, 0] * torch.nan, r"NaN"),
    ],
)
def test_losses(model: nn.Sequential, loss: Any, message: str) -> None:
    refused(message, trace_routes, model, (IMAGES, LABELS), loss=loss)


def test_a_model_without_route_layers(model: nn.Sequential) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(507, 5))
    refused(r"no 2-D convolution.*linear=True", trace_routes, linear, IMAGES)
    assert trace_routes(linear, IMAGES, config=TraceConfig(linear=True)).layers == ("1",)
    flat = nn.Sequential(nn.Flatten())
    assert "linear=True" not in refused(r"no 2-D", trace_routes, flat, IMAGES, config=TraceConfig(linear=True))


def test_a_model_in_half_precision_on_the_cpu(model: nn.Sequential) -> None:
    refused(r"half precision \(float16\) on the CPU", trace_routes, small().half(), IMAGES)
    mixed = small()
    mixed[2].half()
    refused(r"cannot run", trace_routes, mixed, IMAGES)


def test_influence(model: nn.Sequential) -> None:
    refused(r"no route layer 'fc' ran: the layers are 0, 3, 6", influence, model, IMAGES, "0", "fc")
    refused(r"'0' and '6' are not adjacent; directly after '0': 3", influence, model, IMAGES, "0", "6")
    refused(r"not adjacent", influence, model, IMAGES, "3", "0")
    refused(r"not adjacent; directly after '6': no route layer", influence, model, IMAGES, "6", "6")
    refused(r"the batch holds no image", influence, model, IMAGES[:0], "0", "3")
    refused(r"expected input.* to have 3 channels", influence, model, IMAGES[:, :2], "0", "3")
    refused(r"NaN or inf", influence, model, IMAGES * torch.inf, "0", "3")


class Fails(nn.Module):
    """A network that runs some passes and then fails."""

    def __init__(self, body: nn.Module, error: BaseException, passes: int = 0) -> None:
        super().__init__()
        self.body, self.error, self.passes = body, error, passes

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[:4](x)
        if self.passes == 0:
            raise self.error
        self.passes -= 1
        return self.body[4:](x)


@pytest.mark.parametrize("passes", range(5))
@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), ZeroDivisionError("stop"), KeyError("stop")], ids=repr)
def test_the_model_is_as_it_was_after_an_error_inside(model: nn.Sequential, error: BaseException, passes: int) -> None:
    with pytest.raises(type(error), match="stop"):
        trace_routes(Fails(model, error, passes), (IMAGES, LABELS), batch_size=2)
    with pytest.raises(type(error), match="stop"):
        influence(Fails(model, error, min(passes, 1)), IMAGES, "body.3", "body.6")


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), ValueError(""), IndexError("a"), NotImplementedError("a")])
def test_what_pytorch_says_is_one_line(model: nn.Sequential, error: Exception) -> None:
    message = r"cannot run on a batch of shape \(2, 3, 13, 13\) and type torch\.float32: \w+$"
    refused(message, trace_routes, Fails(model, error), IMAGES)
    error = AssertionError("Wrong image height! Expected 32 but got 13!")  # as vision transformers say it
    refused(r"cannot run on a batch.*Wrong image height", trace_routes, Fails(model, error), IMAGES)


def test_a_model_that_autograd_cannot_differentiate(model: nn.Sequential) -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = F.relu(parts["a"](x))
        with torch.no_grad():
            x += 1  # destroys what the derivative of ReLU needs
        return parts["head"](parts["b"](F.softmax(x, 1)))

    spoilt = Function(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 4, 3), head=Head(4))
    refused(r"in-?place", trace_routes, spoilt, IMAGES)


@pytest.mark.parametrize("where", ["loss", "progress", "data"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_errors_in_the_callers_own_functions(model: nn.Sequential, where: str, error: type[BaseException]) -> None:
    def fail(*_: object) -> Tensor:
        raise error("mine")

    def data() -> Iterator[Tensor]:
        yield IMAGES
        fail()

    options = {where: fail} if where != "data" else {}
    with pytest.raises(error, match="mine"):
        trace_routes(model, data() if where == "data" else (IMAGES, LABELS), **options)


def test_memory_that_runs_out_is_not_the_models_fault(model: nn.Sequential) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        trace_routes(Fails(model, torch.OutOfMemoryError("full")), IMAGES)


def test_a_train_method_of_the_users_own_is_not_called() -> None:
    class Merging(nn.Sequential):
        """Merges weights when it goes into eval mode, as low-rank adapters do."""

        merged = False

        def train(self, mode: bool = True) -> Merging:
            self.merged = not mode
            return super().train(mode)

    model = Merging(*small())
    model.train()
    trace_routes(model, IMAGES)
    assert model.training
    assert not model.merged


def test_buffers_that_a_forward_pass_changes_come_back() -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        model.passes += 1
        return parts["body"](x)

    model = Function(forward, body=small())
    model.register_buffer("passes", torch.zeros((), dtype=torch.int64))
    trace_routes(model, IMAGES)
    assert model.passes == 0


def test_data_that_switch_the_model_to_training_do_no_harm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), Head(4)).eval()

    def attacks() -> Iterator[Tensor]:  # such as attacks that leave the model in training mode
        for batch in IMAGES.split(2):
            model.train()
            yield batch

    before = state(model)
    found = trace_routes(model, attacks())
    assert state(model) == before
    assert found == trace_routes(model, IMAGES)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = untidy()
    flags = [p.requires_grad for p in model.parameters()]
    try:
        trace_routes(model, IMAGES)
    except UserError as error:
        assert "inference_mode" in str(error)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("model", [nn.LazyConv2d(4, 3), "resnet18", lambda x: x], ids=["lazy", "name", "function"])
def test_what_is_no_initialised_module(model: Any) -> None:
    refused("lazy|uninitialised|module", trace_routes, model, IMAGES)


def test_images_of_other_kinds() -> None:
    model = small()
    refused(r"sparse", trace_routes, model, IMAGES.to_sparse())
    refused(r"shape \(\)", trace_routes, model, torch.tensor(1.0))
    refused(r"complex", trace_routes, model, IMAGES + 0j)
    refused(r"tuple|tensor", influence, model, (IMAGES, LABELS), "0", "2")
