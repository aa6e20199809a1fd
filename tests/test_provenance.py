from __future__ import annotations

import math

import pytest

from attackroute.core import __version__
from attackroute.core.errors import UserError
from attackroute.routes.provenance import Provenance


def test_provenance_outlasts_a_file() -> None:
    origin = Provenance(samples=3, width=0.3, model="vgg16", seed=0)
    assert (origin.version, origin.criterion) == (__version__, "influence")
    assert Provenance.from_json(origin.to_json()) == origin


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", -1),
        ("samples", 2.0),
        ("samples", True),
        ("samples", None),
        ("width", "0.2"),
        ("width", None),
        ("width", 0),
        ("width", math.nan),
        ("instance_width", 2),
        ("instance_width", []),
        ("model", 3),
        ("data", ["cifar10"]),
        ("attack", {}),
        ("seed", 1.5),
        ("seed", False),
        ("criterion", None),
        ("version", 1),
    ],
)
def test_provenance_guards_its_types(field: str, value: object) -> None:
    good = {"samples": 3, "width": 0.2}
    with pytest.raises(UserError, match=field):
        Provenance(**{**good, field: value})
