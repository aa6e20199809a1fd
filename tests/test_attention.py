"""Networks whose linear maps run inside attention, or on windows: layers in sight, one row per sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures import Function
from attackroute.core.errors import UserError
from attackroute.core.layers import LayerCall, LayerCalls
from attackroute.tracing.config import TraceConfig
from attackroute.tracing.trace import trace_routes
from token_networks import TOKENS, PositionsFirst, made
from tracing import check, state


class Crossed(nn.Module):
    """Cross attention, positions first: queries from one map, keys and values from another."""

    def __init__(self, *, batch_first: bool = False) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(3, 6, 3, stride=3)
        self.attention = nn.MultiheadAttention(4, 2, kdim=6, vdim=6, batch_first=batch_first)
        self.batch_first = batch_first
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        order = (0, 2, 1) if self.batch_first else (2, 0, 1)
        left, right = (layer(x).flatten(2).permute(order) for layer in (self.left, self.right))
        return self.head(self.attention(left, right, right)[0].mean(1 if self.batch_first else 0))


def folded(*, together: bool) -> nn.Module:
    """A linear map on rows of which each image has several, one after another or not."""

    def forward(parts: nn.ModuleDict, x: Tensor) -> Tensor:
        x = parts["embed"](x).flatten(2)  # (n, C, T)
        samples, channels, positions = x.shape
        rows = (x.permute(0, 2, 1) if together else x.permute(2, 0, 1)).reshape(-1, channels)
        rows = F.gelu(parts["fc"](F.layer_norm(rows, (channels,))))
        rows = rows.view(*((samples, positions) if together else (positions, samples)), -1)
        return parts["head"](rows.mean(1 if together else 0))

    return Function(forward, embed=nn.Conv2d(3, 4, 4, stride=4), fc=nn.Linear(4, 6), head=nn.Linear(6, 5))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **TOKENS,
    "cross attention": Crossed,
    "cross attention, batch first": lambda: Crossed(batch_first=True),
    "folded rows": lambda: folded(together=True),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_traces_are_the_oracle_and_looking_on_changes_no_output(name: str) -> None:
    model, images, labels = made(NETWORKS[name], samples=2)
    plain, before, shapes = model(images), state(model), []

    def visit(call: LayerCall) -> Tensor:
        output = call.run()
        shapes.append(output.shape)
        return output

    check(model, images, labels, linear=True, influences=name in ("vit", "folded rows"))
    assert state(model) == before
    with torch.no_grad(), LayerCalls(model, visit, linear=True):
        torch.testing.assert_close(model(images), plain)
    assert {shape[0] for shape in shapes} == {2}
    torch.testing.assert_close(model(images), plain)


def test_layers_inside_attention_are_named() -> None:
    model, images, _ = made(TOKENS["vit"], samples=2)
    found = trace_routes(model, images, config=TraceConfig(linear=True, sketches=32))
    block = "encoder.layers.encoder_layer_0."
    names = [f"{block}self_attention", f"{block}self_attention#2", f"{block}mlp.0", f"{block}mlp.3"]
    assert list(found.layers)[1:5] == names
    assert [found.channels[name] for name in names] == [24, 8, 12, 8]
    windows, images, _ = made(TOKENS["swin"], samples=2)
    found = trace_routes(windows, images, config=TraceConfig(linear=True, sketches=32))
    assert {"features.1.0.attn", "features.1.0.attn#2", "features.1.0.mlp.0", "features.1.0.mlp.3"} < set(found.layers)


@pytest.mark.parametrize(
    ("build", "samples"),
    [
        (PositionsFirst, 16),  # as many images as positions
        (lambda: folded(together=False), 1),
        (lambda: folded(together=False), 2),
    ],
)
def test_rows_of_images_that_are_not_together_are_refused(build: Callable[[], nn.Module], samples: int) -> None:
    model, images, labels = made(build, samples)
    with pytest.raises(UserError, match="batch_first=True"):
        trace_routes(model, (images, labels), config=TraceConfig(linear=True))
