"""Draw what a transplant repairs and what an injection spoils, layer by layer, out of the files of ``analyze``.

python tools/draw_directions.py RUN_DIR docs/images/directions.svg
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from attackroute.core.document import Document

SETS = {
    "route": ("the route", "#D55E00", "o"),
    "random off-route": ("random channels off it (mean and range of five draws)", "#8A8A8A", "s"),
    "weight": ("weight norm", "#009E73", "D"),
    "gradient": ("loss gradient", "#CC79A7", "v"),
    "attribution": ("attribution patching", "#56B4E9", "^"),
}
TITLES = {
    "transplant": "Clean values into an attacked pass:\nright answers come back",
    "inject": "Attacked values into a clean pass:\nright answers are lost",
}


def draw(axes: Axes, document: Document) -> None:
    """One panel: accuracy at the main share, single layers from the top down."""
    rows = document.table.select(share=document.about["main_share"])
    layers = [layer for layer in rows.select(criterion="route").distinct("layers") if "+" not in layer]
    for shift, (criterion, (name, colour, marker)) in enumerate(SETS.items()):
        for place, layer in enumerate(layers):
            values = [100 * value for value in rows.select(criterion=criterion, layers=layer).column("accuracy")]
            height = place + 0.15 * (shift - (len(SETS) - 1) / 2)
            axes.plot([min(values), max(values)], [height] * 2, color=colour, linewidth=1.2)
            label = name if place == 0 else None
            axes.plot(statistics.fmean(values), height, marker, color=colour, markersize=4, label=label)
    axes.set_yticks(range(len(layers)), [f"conv{place + 1}" for place in range(len(layers))])
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlim(-3, 103)
    axes.grid(axis="x", alpha=0.3)
    for place in range(len(layers) - 1):
        axes.axhline(place + 0.5, color="black", alpha=0.08, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"accuracy in %, {document.about['counted']} images that are right when clean")
    axes.set_title(TITLES[document.kind], fontsize=10)


def main(folder: str, picture: str) -> None:
    """Read both documents and write the picture."""
    documents = [Document.load(Path(folder) / f"{kind}.json") for kind in TITLES]
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 6.4), sharey=True)
    for axes, document in zip(panels, documents, strict=True):
        draw(axes, document)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=3, frameon=False, fontsize=9)
    share = documents[0].about["main_share"]
    figure.suptitle(f"VGG-16, PGD 8/255: {share:.0%} of one layer's channels exchanged", fontsize=11)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    plt.rcParams["svg.hashsalt"] = "attackroute"
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
