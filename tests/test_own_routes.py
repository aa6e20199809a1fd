"""Transplants of each image's own route, against transplants of one image at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attackroute as ar
from attackroute.core.errors import UserError
from attackroute.paper.experiments import OWN, OWN_RANDOM, per_image_transplant


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4),
    ).eval()  # fmt: skip
    images = torch.rand(14, 3, 8, 8)
    labels = model(images).argmax(1)
    labels[3] = (labels[3] + 1) % 4  # one that the network gets wrong
    return model, images, labels


def test_it_is_a_transplant_of_every_image_alone(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = case
    attack = ar.parse_attack("fgsm:eps=0.3")
    groups = [["0"], ["0", "4"], ["4", "6"]]
    found = per_image_transplant(model, (images, labels), attack, groups, width=0.3, batch_size=5)
    assert found.about()["images"] == 14 and found.table.distinct("samples") == [13]
    masks = ar.trace_routes(model, (images, labels), 0.3).masks
    for group in groups:
        right = 0
        for index in (i for i in range(14) if i != 3):
            one, label = images[index : index + 1], labels[index : index + 1]
            route = ar.Route(
                {layer: masks[layer][index].nonzero().flatten().tolist() for layer in group},
                {layer: masks[layer].shape[1] for layer in group},
            )
            moved = attack(model, one, label)
            with ar.transplant(model, clean=one, route=route), torch.no_grad():
                right += int(model(moved).argmax(1) == label)
        assert found.table.one(layers="+".join(group), criterion=OWN)["accuracy"] == right / 13
    untouched = int((model(attack(model, images, labels)).argmax(1) == labels).sum())
    assert len({*found.table.column("accuracy"), untouched / 13}) > 1  # it does something here


def test_all_channels_bring_every_image_back(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = case
    found = per_image_transplant(model, (images, labels), ar.parse_attack("fgsm:eps=0.3"), [["6"]], width=1.0)
    assert found.table.column("accuracy") == [1.0, 1.0]
    assert found.table.column("criterion") == [OWN, OWN_RANDOM]
    assert "own random in 1 of the layers 100.0%" in found.reading()


def test_what_cannot_be_measured_is_refused(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = case
    attack = ar.parse_attack("fgsm:eps=0.3")
    with pytest.raises(UserError, match="none of the 14"):
        per_image_transplant(model, (images, (model(images).argmax(1) + 1) % 4), attack, [["0"]], width=0.3)
    with pytest.raises(UserError, match="no labels"):
        per_image_transplant(model, images, attack, [["0"]], width=0.3)
    with pytest.raises((UserError, KeyError)):
        per_image_transplant(model, (images, labels), attack, [["conv1"]], width=0.3)
