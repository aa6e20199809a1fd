"""The table of :class:`attackroute.Hardness`, one row a sample, as CSV and as Parquet."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from attackroute.analysis.hardness import Hardness
from attackroute.core.errors import UserError
from attackroute.core.files import replace_file

MISSING_EXTRA = 'Parquet files need pyarrow: pip install "attackroute[parquet]"'


def columns(hardness: Hardness) -> dict[str, list[Any]]:
    """The table's columns: index, label, prediction, V, and ``votes:LAYER`` for each layer in forward order."""
    found: dict[str, list[Any]] = {
        "index": list(range(len(hardness))),
        "label": hardness.labels.tolist(),
        "prediction": hardness.predictions.tolist(),
        "V": hardness.values.tolist(),
    }
    return found | {f"votes:{layer}": hardness.votes[:, at].tolist() for at, layer in enumerate(hardness.layers)}


def write_csv(hardness: Hardness, path: str | os.PathLike[str]) -> None:
    """Write the table as CSV, replacing a file of that name in one step.

    Raises:
        UserError: The file cannot be written.
    """
    table = columns(hardness)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    replace_file(Path(path), text.getvalue().encode())


def write_parquet(hardness: Hardness, path: str | os.PathLike[str]) -> None:
    """Write the table as Parquet, with the optional package pyarrow, replacing a file of that name in one step.

    Raises:
        UserError: pyarrow is not installed, or the file cannot be written.
    """
    try:
        from pyarrow import BufferOutputStream, parquet, table
    except ImportError as error:
        raise UserError(MISSING_EXTRA) from error
    buffer = BufferOutputStream()
    parquet.write_table(table(columns(hardness)), buffer)
    replace_file(Path(path), buffer.getvalue().to_pybytes())
