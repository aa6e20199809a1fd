"""Transplants of each image's own route, against transplants of one image at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attackroute as ar
from attackroute.analysis.own_routes import OWN, RANDOM, own_transplant_accuracy
from attackroute.core.errors import UserError


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
    found = own_transplant_accuracy(model, (images, labels), attack, groups, width=0.3, batch_size=5)
    assert found.samples == 14 and {row.accuracy.total for row in found.rows} == {13}
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
        own = next(row for row in found.rows if row.layers == tuple(group) and row.criterion == OWN)
        assert own.accuracy.correct == right
    untouched = int((model(attack(model, images, labels)).argmax(1) == labels).sum())
    assert len({row.accuracy.correct for row in found.rows} | {untouched}) > 1  # it does something here


def test_all_channels_bring_every_image_back(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = case
    found = own_transplant_accuracy(model, (images, labels), ar.parse_attack("fgsm:eps=0.3"), [["6"]], width=1.0)
    assert [row.accuracy.value for row in found.rows] == [1.0, 1.0]
    assert [row.criterion for row in found.rows] == [OWN, RANDOM]
    assert "own random in 1 of the layers 100.0%" in found.reading()


def test_what_cannot_be_measured_is_refused(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, images, labels = case
    attack = ar.parse_attack("fgsm:eps=0.3")
    with pytest.raises(UserError, match="none of the 14"):
        own_transplant_accuracy(model, (images, (model(images).argmax(1) + 1) % 4), attack, [["0"]])
    with pytest.raises(UserError, match="no labels"):
        own_transplant_accuracy(model, images, attack, [["0"]])
    with pytest.raises((UserError, KeyError)):
        own_transplant_accuracy(model, (images, labels), attack, [["conv1"]])
