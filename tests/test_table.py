"""Tables and documents: what goes in comes out, and faults are named."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attackroute.core.document import Document
from attackroute.core.errors import UserError
from attackroute.core.table import Table

TABLE = Table.of(
    [
        {"criterion": "route", "layer": "a", "accuracy": 0.5},
        {"criterion": "route", "layer": "b", "accuracy": 0.25},
        {"criterion": "random", "layer": "a", "accuracy": None, "draw": 1},
    ]
)


def test_a_table_selects_lists_and_averages_by_column() -> None:
    assert TABLE.columns == ("criterion", "layer", "accuracy", "draw")
    assert TABLE.select(criterion="route").column("accuracy") == [0.5, 0.25]
    assert TABLE.distinct("criterion") == ["route", "random"]
    assert TABLE.mean("accuracy") == 0.375
    assert math.isnan(TABLE.select(layer="c").mean("accuracy"))
    assert TABLE.one(criterion="random")["draw"] == 1


def test_a_table_reads_well_in_a_notebook() -> None:
    assert repr(TABLE) == "<Table of 3 rows: criterion, layer, accuracy, draw>"
    html = Table.of([{"a<": "x&", "b": 0.25}])._repr_html_()
    assert html == "<table><tr><th>a&lt;</th><th>b</th></tr><tr><td>x&amp;</td><td>0.25</td></tr></table>"


def test_a_table_names_what_is_missing() -> None:
    with pytest.raises(UserError, match="no column 'acuracy'; it has criterion, layer, accuracy, draw"):
        TABLE.column("acuracy")


cells = st.none() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]))


@given(st.lists(st.fixed_dictionaries({"a": cells, 'b,"': cells}), min_size=1))
def test_csv_and_json_hold_every_cell(records: list[dict[str, object]]) -> None:
    table = Table.of(records)
    defined = [
        {name: None if isinstance(cell, float) and not math.isfinite(cell) else cell for name, cell in record.items()}
        for record in records
    ]
    assert json.loads(json.dumps(table.to_json(), allow_nan=False)) == defined
    read = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert read == [{name: "" if cell is None else str(cell) for name, cell in record.items()} for record in defined]


def test_a_document_is_read_as_it_was_written(tmp_path: Path) -> None:
    document = Document("transplant", {"model": "vgg16", "seed": 0}, "It repairs.", TABLE, {"verdicts": [1, 2]})
    assert document.save(tmp_path) == tmp_path / "transplant.json" and (tmp_path / "transplant.csv").is_file()
    assert Document.load(tmp_path / "transplant.json") == document
    assert Document.is_at(tmp_path / "transplant.json")
    assert not Document.is_at(tmp_path / "transplant.csv")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds no JSON object"),
        ("{", "not JSON, or damaged"),
        ('{"format": "attackroute document", "version": 1, "kind": 3}', "'kind' must be a str"),
        ('{"format": "attackroute document", "version": 2}', "of version 1"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ("[" * 100_000, "not JSON, or damaged"),
    ],
)
def test_a_file_that_is_no_document_is_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"x.json: .*{said}"):
        Document.load(path)
