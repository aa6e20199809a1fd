"""Traces in a row leave nothing behind: no hooks, no tensors, no cycles, no memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from architectures import CLOSED, MIXED, Function, Head
from attackroute.analysis.interventions import deactivate, record_outputs, transplant, weaken
from attackroute.core.errors import UserError
from attackroute.tracing.influence import influence
from attackroute.tracing.trace import trace_routes
from tracing import ready, small, state, untidy

MODELS = {name: {**CLOSED, **MIXED}[name] for name in ("residual", "inverted", "shuffled", "aliased")}


def tensors() -> int:
    """How many tensors are alive."""
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


def resident() -> int:
    """Bytes of memory that the process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def leaves_nothing(model: nn.Module, run: Callable[[], object]) -> None:
    """Five runs, after a first one that may fill caches, leave no tensor and no hook."""
    before = state(model)
    run()
    alive = tensors()
    for _ in range(5):
        run()
    assert tensors() <= alive
    assert state(model) == before


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("name", MODELS)
def test_traces_leave_no_tensor_and_no_hook(name: str) -> None:
    model, images, labels = ready(MODELS[name], samples=2)
    edge = next(iter(trace_routes(model, (images, labels)).methods))
    leaves_nothing(model, lambda: (trace_routes(model, (images, labels)), influence(model, images, *edge)))


def test_failures_leave_no_tensor_and_no_hook() -> None:
    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        parts["body"][:6](x)
        raise RuntimeError("broken")

    model, images = Function(forward, body=untidy()), torch.rand(2, 3, 9, 9)

    def fail() -> None:
        with pytest.raises(UserError, match="broken"):
            trace_routes(model, images)

    leaves_nothing(model, fail)


@pytest.mark.parametrize("name", MODELS)
def test_activations_die_without_the_garbage_collector(name: str, without_collector: None) -> None:
    """A reference cycle would keep a batch's activations until the collector comes, and memory would pile up."""
    model, images, labels = ready(MODELS[name], samples=2)
    seen: list[weakref.ref[Tensor]] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, args, output: seen.extend(map(weakref.ref, (args[0], output))))
    trace_routes(model, (images, labels))
    assert len(seen) > 10
    assert [reference for reference in seen if reference() is not None] == []


def test_a_batch_dies_before_the_next_one_is_traced(without_collector: None) -> None:
    model, images, _ = ready(small)
    earlier: list[weakref.ref[Tensor]] = []
    alive_at_read: list[int] = []

    def data() -> Iterator[Tensor]:
        for _ in range(4):
            alive_at_read.append(sum(reference() is not None for reference in earlier))
            batch = images.clone()
            earlier.append(weakref.ref(batch))
            yield batch
            del batch

    trace_routes(model, data())
    assert max(alive_at_read) <= 1


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("act", [nn.ReLU, nn.Softmax2d], ids=["closed form", "autograd"])
def test_memory_is_flat_in_the_number_of_batches(act: Callable[[], nn.Module]) -> None:
    stem = nn.Conv2d(3, 8, 3, stride=4 if act is nn.Softmax2d else 1)
    model = nn.Sequential(stem, act(), nn.Conv2d(8, 4, 3, stride=2), nn.ReLU(), Head(4)).eval()
    images = torch.rand(16, 3, 40, 40)

    def growth() -> int:
        peaks: list[int] = []
        trace_routes(model, (images for _ in range(45)), progress=lambda *_: peaks.append(resident()))
        return max(peaks[15:]) - max(peaks[:15])

    # the process may grow once for other reasons; a leak shows every time
    assert any(growth() < 16 * images.nbytes for _ in range(3))


def test_masks_are_packed_and_scores_dropped() -> None:
    model, images, _ = ready(small)
    routes = trace_routes(model, (images for _ in range(20)))
    assert routes.kept_scores is None
    assert sum(packed.nbytes for packed in routes.packed.values()) == 60 * len(routes.layers)


@pytest.mark.parametrize("fails", [False, True])
def test_interventions_leave_no_tensor_and_no_hook(fails: bool) -> None:
    model, images, _ = ready(small, samples=2)
    route = trace_routes(model, images).aggregate(0.5)

    def intervene() -> None:
        with transplant(model, images, route), weaken(model, route, 0.5), deactivate(model, route, at="activation"):
            model(images)
            if fails:
                model(images[:1])

    def run() -> None:
        with pytest.raises(UserError, match="the same images") if fails else nullcontext():
            intervene()

    leaves_nothing(model, run)


def test_clean_outputs_die_without_the_garbage_collector(without_collector: None) -> None:
    model, images, _ = ready(small, samples=2)
    route = trace_routes(model, images).aggregate(0.5)
    kept = record_outputs(model, images, route)
    references = [weakref.ref(values) for values in kept.values()]
    with transplant(model, kept, route), weaken(model, route, 0.5):
        model(images)
    del kept
    assert not any(reference() is not None for reference in references)
