"""The files of ``attackroute hardness``: tables, figures, JSON."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attackroute.analysis.figures.hardness_bars import hardness_figure
from attackroute.analysis.figures.hardness_images import images_figure, pick_images
from attackroute.analysis.figures.style import save_figure
from attackroute.analysis.hardness_study import HardnessStudy
from attackroute.analysis.hardness_tables import write_csv, write_parquet
from attackroute.cli.console import Output
from attackroute.cli.hardness_report import summarise
from attackroute.core.errors import UserError
from attackroute.core.files import replace_file, write_json
from attackroute.zoo.data import ImageBatches, ImageData

_SHOWN = 10


def write_study(
    folder: Path,
    network: nn.Module,
    images: ImageData,
    study: HardnessStudy,
    origin: Mapping[str, Any],
    batch_size: int,
    output: Output,
) -> None:
    """Write all files of a study.

    Args:
        folder: A folder that exists.
        network: The network.
        images: The images that were judged, in the study's order.
        study: What was found.
        origin: Further entries of ``hardness.json``.
        batch_size: Images at a time.
        output: Where a note goes if a file is left out.
    """
    found = study.hardness
    write_csv(found, folder / "hardness.csv")
    try:
        write_parquet(found, folder / "hardness.parquet")
    except UserError as error:
        output.note(f"note: hardness.parquet is left out: {error}")
    found.save(folder / "hardness.safetensors")
    save_figure(
        hardness_figure(study, f"How hard the model is to fool on each of {len(found)} images"), folder, "hardness"
    )
    count, right = min(_SHOWN, len(found)), min(_SHOWN, study.correct)
    rows = {
        "Learned best: the largest V": found.hardest(count),
        "Learned worst: the smallest V": found.weakest(count),
        "The smallest V of those classified correctly": found.weakest(right, found.correct),
    }
    picked = pick_images(network, ImageBatches(images, batch_size), found, torch.cat(list(rows.values())))
    parts = dict(zip(rows, picked.split([len(row) for row in rows.values()]), strict=True))
    picture = io.BytesIO()
    images_figure(found, rows, parts, images.classes).savefig(picture, dpi=200)
    replace_file(folder / "images.png", picture.getvalue())
    write_json(folder / "hardness.json", summarise(study, origin))
