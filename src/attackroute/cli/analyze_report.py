"""What the experiments of ``attackroute analyze`` found: a small table each, and its sentence."""

from __future__ import annotations

import statistics

from attackroute.analysis.accuracy_table import AccuracyTable, Setting, spread
from attackroute.analysis.attention import CLEAN, INSIDE, SHIFT, Attention
from attackroute.analysis.detection import Detection
from attackroute.analysis.occurrence import OCCURRENCE, OVERLAP, RANDOM_ROUTES, Occurrence
from attackroute.analysis.rankings import OFF_ROUTE, RANDOM, ROUTE
from attackroute.analysis.responses import Responses
from attackroute.analysis.tables import Result
from attackroute.cli.console import Output

Table = tuple[list[str], list[list[str]]]


def report(output: Output, name: str, result: Result, seconds: float) -> None:
    """Print the table and the reading of one experiment."""
    output.line(f"\n{name} ({seconds:.0f} s)")
    output.table(*_table(result))
    output.line(result.reading())


def _table(result: Result) -> Table:
    if isinstance(result, AccuracyTable):
        return _accuracies(result)
    if isinstance(result, Occurrence):
        return _occurrences(result)
    if isinstance(result, Responses):
        return _responses(result)
    if isinstance(result, Attention):
        return _attention(result)
    assert isinstance(result, Detection)
    return _detection(result)


def _accuracies(table: AccuracyTable) -> Table:
    """Settings at the main share, or factors: the route, random channels, and which controls the route beats."""
    attack = table.attacks[0]
    if table.main_beta is not None:
        head, shown = "beta", {setting: f"{setting.beta:g}" for setting in table.settings()}
    else:
        own = [each for each in table.settings() if each.share == table.main_share and each.attack == attack]
        head, shown = "layer", {each: _layers(each, table.layers) for each in own}
    told: dict[Setting, dict[str, list[str]]] = {setting: {} for setting in shown}
    for verdict in table.verdicts(shown):
        told[verdict.setting].setdefault(verdict.verdict, []).append(verdict.criterion)
    rows = [
        [
            text,
            *(spread(values) if (values := table.values(setting, by)) else "-" for by in (ROUTE, RANDOM)),
            *(", ".join(told[setting].get(verdict, [])) or "-" for verdict in ("beats", "loses to")),
        ]
        for setting, text in shown.items()
    ]
    under = f" under {attack}" if attack else ""
    return [head, f"route{under}", RANDOM, "route beats", "route loses to"], rows


def _layers(setting: Setting, single: tuple[str, ...]) -> str:
    if len(setting.layers) == 1:
        return setting.layers[0]
    return f"{'all' if setting.layers == single else 'first'} {len(setting.layers)} layers"


def _occurrences(found: Occurrence) -> Table:
    """Occurrence of the route, of random routes, and overlaps with the routes of attacked images and of controls."""
    first = found.names(OCCURRENCE)[0][0]
    overlaps = found.names(OVERLAP)
    rows = [
        [
            layer,
            *(f"{statistics.fmean(found.values(layer, OCCURRENCE, name)):.1%}" for name in (first, RANDOM_ROUTES)),
            ", ".join(f"{beside} {found.values(layer, OVERLAP, of, beside)[0]:.2f}" for of, beside in overlaps) or "-",
        ]
        for layer in found.layers
    ]
    return ["layer", f"occurrence, {first}", RANDOM_ROUTES, "Jaccard index with the route of"], rows


def _responses(found: Responses) -> Table:
    """The route's mean over that of all other neurons."""
    head, rows = ["layer"], [[layer] for layer in found.layers]
    for quantity, attack in found.quantities:
        head.append(f"{quantity}{f' to {attack}' if attack else ''}, route / off-route")
        for row, layer in zip(rows, found.layers, strict=True):
            ours, theirs = (found.of(layer, quantity, attack, by)[0].mean for by in (ROUTE, OFF_ROUTE))
            row.append(f"{ours / theirs:.2f}" if theirs else "-")
    return head, rows


def _attention(found: Attention) -> Table:
    """Where the maps' energy is, and how far it moves under the first attack."""
    attack = found.attacks[0]
    cases = [(CLEAN, INSIDE), (attack, INSIDE), (attack, SHIFT)]
    rows = []
    for criterion in found.criteria:
        row = [criterion]
        for images, measure in cases:
            values = [each.mean.value for each in found.values(images, criterion, measure)]
            row.append(f"{statistics.fmean(values):.3f}")
        rows.append(row)
    return ["set", *(f"{measure}, {images}" for images, measure in cases)], rows


def _detection(found: Detection) -> Table:
    rows = []
    for score in found.scores:
        row = [score]
        for attack in found.attacks:
            each = found.values(attack, score)
            row.append("-" if not each[0].attacked else f"{statistics.fmean(one.auroc for one in each):.3f}")
        rows.append(row)
    return ["score", *(f"AUROC, {attack}" for attack in found.attacks)], rows
