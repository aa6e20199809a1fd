from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from attackroute.core.errors import UserError
from attackroute.routes.route import Route
from route_samples import instances, refused

ROUTE = Route({"conv1": [2, 0], "conv2": [3], "fc": []}, {"conv1": 4, "conv2": 8, "fc": 2})


def test_check_accepts_more_layers_in_any_order() -> None:
    ROUTE.check({"head": 10, "fc": 2, "conv2": 8, "conv1": 4})


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"conv1": 4, "conv2": 16, "fc": 3}, "layer 'conv2' has 8 channels in the route but 16 in the network"),
        ({"conv1": 4, "fc": 2}, r"layer 'conv2' \(8 channels\) of the route is not in the network"),
        ({}, "layer 'conv1'"),
    ],
    ids=str,
)
def test_check_names_the_first_layer_that_differs(channels: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ROUTE.check(channels, what="network")


class Block(nn.Module):
    """Contains calls of other sizes than the one that it states."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.out_channels = 99


def model(last: int = 5) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Block(), nn.Linear(6, last))


def test_loading_into_a_model(tmp_path: Path) -> None:
    channels = {"0": 4, "2.conv": 6, "2.conv#2": 6, "2": 6, "1": 4, "model": 3, "3": 5}
    route = instances(channels=channels).aggregate()
    path = tmp_path / "r"
    route.save(path)
    assert Route.load(path, model=model()) == route
    line = refused(Route, path, model=model(last=7))
    assert "layer '3' has 5 channels in the route but 7 in the model" in line
    line = refused(Route, path, model=nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert "layer '2.conv' (6 channels) of the route is not in the model" in line


def test_a_submodule_called_model_is_not_the_root(tmp_path: Path) -> None:
    path = tmp_path / "r"
    Route({"model": [0]}, {"model": 4}).save(path)
    wrapper = nn.Module()
    wrapper.model = nn.Conv2d(3, 8, 3)
    refused(Route, path, "'model' has 4 channels in the route but 8", model=wrapper)
    assert Route.load(path, model=nn.Conv2d(3, 4, 3)).layers == ("model",)
