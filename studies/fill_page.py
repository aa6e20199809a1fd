"""Fill docs/beyond.md between its marks with what studies wrote.

    python -m studies.fill_page docs/beyond.md --repair "VGG-16, vanilla=runs/repair/repair.json" ... \
        --hardening "VGG-16=runs/study/study.json" --hardness "VGG-16=runs/hardness/hardness.json" ...

Every file is given with the title that the page shows for it. Text outside of the marks stays as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attackroute.analysis.hardness_experiment import OURS, RANDOM
from attackroute.analysis.intervention_table import BEATS, LOSES
from attackroute.core.document import Document
from attackroute.core.statistics import AUROC
from attackroute.paper.claims import Findings, markdown, percent
from attackroute.paper.hardening_tables import accuracies_table, differences_table, study_terms
from attackroute.paper.page import fill
from studies.repair.criteria import ATTRIBUTION, FIRST_LAYERS, INFLUENCE, NOISE_ROUTE, SENSITIVITY
from studies.repair.criteria import RANDOM as RANDOM_CHANNELS
from studies.repair.oracle import ORACLES
from studies.repair.repair import ANY, EVERY
from studies.repair.results import AREA


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    for name in ("repair", "hardening", "hardness"):
        parser.add_argument(f"--{name}", action="append", default=[], metavar="TITLE=FILE")
    options = parser.parse_args(arguments)
    repairs, studies, hardness = (_read(getattr(options, name)) for name in ("repair", "hardening", "hardness"))
    texts = {}
    if repairs:
        texts["repair"] = _summary(repairs) + "\n\n" + "\n\n".join(map(_repair, repairs, repairs.values()))
    if studies:
        texts["hardening"] = "\n\n".join(map(_hardening, studies, studies.values()))
    if hardness:
        texts["hardness"] = _hardness(hardness)
    options.page.write_text(fill(options.page.read_text(encoding="utf-8"), texts), encoding="utf-8")


def _read(files: list[str]) -> dict[str, Findings]:
    parts = [each.rpartition("=") for each in files]
    return {title: Findings.of(Document.load(file)) for title, _, file in parts}


def _cell(difference: dict[str, Any]) -> str:
    """A difference in points with its intervals over images and over networks, bold where both leave out zero."""
    intervals = [difference["over_images"], difference["over_networks"]]
    text = "; ".join(f"{100 * ends[0]:+.1f} to {100 * ends[1]:+.1f}" for ends in intervals if ends is not None)
    text = f"{100 * difference['difference']:+.1f} ({text})"
    return f"**{text}**" if difference["verdict"] in (BEATS, LOSES) else text


def _difference(study: Findings, attack: str, first: str, second: str, what: str, share: float | None = None) -> str:
    pair = {"attack": attack, "first": first, "second": second, "what": what, "share": share}
    return "".join(map(_cell, study.entries("differences", **pair)[:1]))


def _summary(repairs: dict[str, Findings]) -> str:
    """The picked variant against the others, mean area, under every attack."""
    lines = []
    for title, study in repairs.items():
        for attack in study["untouched"]:
            others = (INFLUENCE, ATTRIBUTION, SENSITIVITY, RANDOM_CHANNELS)
            cells = {
                f"less {'random' if other == RANDOM_CHANNELS else other}": _difference(
                    study, attack, study["picked"], other, AREA
                )
                for other in others
            }
            lines.append({"networks": title, "attack": attack, "picked": study["picked"], **cells})
    return (
        "The picked variant of the noise route less other criteria, mean area in points (95 % intervals over images; "
        "over networks). Bold where both leave out zero:\n\n" + markdown(lines)
    )


def _repair(title: str, study: Findings) -> str:
    attacks, budgets = list(study["untouched"]), [f"{share:.0%}" for share in study["budgets"]]
    first = attacks[0]
    names = sorted(study.table.distinct("network"))
    images = ", ".join(f"{attack} leaves {percent(study['untouched'][attack])} %" for attack in attacks)
    means = markdown(
        {"criterion": by, **{attack: percent(study["mean_areas"][attack].get(by)) for attack in attacks}}
        for by in study["mean_areas"][first]
    )
    accuracies = markdown(
        {
            "criterion": by,
            **{
                f"{share} of {name}": percent(value)
                for place, name in ((EVERY, "every layer"), (ANY, "any"))
                for share, value in zip(budgets, places.get(place, [None] * len(budgets)), strict=True)
            },
        }
        for by, places in study["accuracies"][first].items()
    )
    layers = markdown(
        {"layer": layer, **{by: percent(values[layer]) for by, values in study["areas"][first].items()}}
        for layer in next(iter(study["areas"][first].values()))
    )
    moved = markdown(
        {
            "judged under": row["attack"],
            "criterion": row["criterion"],
            "ranked under": row["ranked_by"],
            "kept": f"{row['kept']:.0%}",
            **{
                f"{share} of every layer": percent(value)
                for share, value in zip(budgets, row["accuracies"], strict=True)
            },
        }
        for row in study["transfers"]
    )
    pairs = [
        (study["picked"], ATTRIBUTION),
        (study["picked"], INFLUENCE),
        (NOISE_ROUTE, INFLUENCE),
        (INFLUENCE, RANDOM_CHANNELS),
    ]
    oracles = [by for by in ORACLES if by in study["mean_areas"][first]]
    pairs += [(oracle, other) for oracle in oracles for other in (study["picked"], ATTRIBUTION)]
    pairs += [(one, FIRST_LAYERS) for one in (study["picked"], ATTRIBUTION)]
    share = study["budgets"][2]
    gains = markdown(
        {
            "first": one,
            "less": other,
            AREA: _difference(study, first, one, other, AREA),
            f"{share:.0%} of every layer": _difference(study, first, one, other, EVERY, share),
            f"{share:.0%} of any": _difference(study, first, one, other, ANY, share),
        }
        for one, other in dict.fromkeys(pairs)
    )
    return "\n\n".join(
        [
            f"### {title}",
            f"{len(names)} network{'s' * (len(names) > 1)}, {study['images'][first]} images that are right when clean, "
            f"of {study['samples']} for each; of them {images}. The rule picked `{study['picked']}`. "
            "Mean area:",
            means,
            f"Accuracy under {first} with shares of all channels replaced:",
            accuracies,
            f"Differences under {first}:",
            gains,
            f"<details><summary>Area by layer under {first}, and transfer</summary>",
            layers,
            "Channels ranked elsewhere: the share of the route's channels (30 % of each layer) that ranks under the "
            "attack itself keep too, and accuracy:",
            moved,
            "</details>",
        ]
    )


def _hardening(title: str, study: Findings) -> str:
    tried = markdown(
        {
            "variant": tuning["variant"],
            "lambda: clean / attacked on validation images (0: no penalty; bold: chosen)": ", ".join(
                _trial(trial, chosen=trial["lambda"] == tuning["chosen"])
                for trial in (tuning["without_penalty"], *tuning["trials"])
            ),
        }
        for tuning in study["tuning"]
    )
    return "\n\n".join(
        [
            f"**{title}.** {study_terms(study)} Accuracy in percent, mean over seeds (lowest-highest):",
            markdown(accuracies_table(study, "")),
            "Differences in points; bold where the 95 % intervals over images and over seeds both leave out zero:",
            markdown(differences_table(study)),
            "What lambda was chosen from, on a network of another seed:",
            tried,
        ]
    )


def _trial(trial: dict[str, Any], *, chosen: bool) -> str:
    text = f"{trial['lambda']:g}: {percent(trial['clean'])} / {percent(trial['attacked'])}"
    return f"**{text}**" if chosen else text


def _hardness(files: dict[str, Findings]) -> str:
    """AUROC of V along the noise and of its rivals."""
    lines = []
    for title, hardness in files.items():
        for attack in hardness["attacks"]:
            draws = []
            fooled = f"{hardness['attacks'][attack]['fooled']} of {hardness['correctly_classified']}"
            cells = {"network": title, "attack": attack, "fooled": fooled}
            for row in hardness.table.select(statistic=AUROC, target=attack):
                if row["predictor"].startswith(RANDOM):
                    draws += [] if row["value"] is None else [row["value"]]  # none if all images are alike in that
                else:
                    cells[row["predictor"]] = _estimate(row)
            lines.append({**cells, RANDOM: f"{min(draws):.3f} to {max(draws):.3f}" if draws else ""})
    return (
        "AUROC for being fooled, of test images that are right when clean; bold where the 95 % interval of the "
        "difference to V along the noise (`hardness V`) leaves out zero:\n\n"
    ) + markdown(lines)


def _estimate(item: dict[str, Any]) -> str:
    """An AUROC, bold where it is clearly away from that of V along the noise."""
    if item["value"] is None:
        return ""
    text, low, high = f"{item['value']:.3f}", item["lead_low"], item["lead_high"]
    away = item["predictor"] != OURS and low is not None and (low > 0 or high < 0)
    return f"**{text}**" if away else text


if __name__ == "__main__":
    main()
