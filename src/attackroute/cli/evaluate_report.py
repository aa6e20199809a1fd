"""What ``attackroute evaluate`` found: tables, checks, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attackroute.cli.console import Output, print_error
from attackroute.core.accuracy import Accuracy
from attackroute.core.journal import MEASUREMENTS
from attackroute.core.table import plural
from attackroute.robustness.evaluation_table import COLUMNS, EVALUATION, Evaluation
from attackroute.robustness.example_checks import FileCheck
from attackroute.robustness.masking import SKIPPED, Check


def report(output: Output, evaluation: Evaluation, out: Path | None, examples: Path | None) -> None:
    """Print the table, the checks and where the files are."""
    folders = {"folder": None if out is None else str(out), "examples": None if examples is None else str(examples)}
    output.result({**evaluation.to_json(), **folders})
    output.table(COLUMNS, [row.cells() for row in evaluation.rows])
    for model in dict.fromkeys(check.model for check in evaluation.checks):
        output.line(f"checks for masked gradients, {model}:")
        for check in evaluation.checks:
            if check.model == model:
                output.line(f"  {check.verdict:<10}  {check.name}: {_numbers(check)}{check.sentence}")
    if evaluation.checks:
        output.line("")
    output.line(evaluation.reading())
    if out is not None:
        output.line(f"{EVALUATION}.json, {EVALUATION}.csv and {MEASUREMENTS} are in {out}")
    if examples is not None:
        output.line(f"adversarial examples are in {examples}; check them with --verify {examples}")


def report_verification(output: Output, files: Sequence[FileCheck]) -> bool:
    """Print what was found in files of examples, and say whether all of it is as it was."""
    faults = [fault for file in files for fault in file.faults]
    output.result({"files": [file.to_json() for file in files], "faults": len(faults), "passed": not faults})
    groups: dict[tuple[str, str], list[FileCheck]] = {}
    for file in files:
        if file.model is not None and file.attack is not None:
            groups.setdefault((file.model, file.attack), []).append(file)
    output.table(
        ["model", "attack", "files", "samples", "recorded", "now", "largest distance"],
        [[model, group[0].label, *_cells(group)] for (model, _), group in groups.items()],
    )
    for fault in faults:
        print_error(fault)
    where = "all is as it was recorded" if not faults else f"{plural(len(faults), 'fault')}"
    output.line(f"{plural(len(files), 'file')} checked: {where}")
    return not faults


def _numbers(check: Check) -> str:
    if check.verdict == SKIPPED:
        return ""
    listed = ", ".join(
        f"{value} {name}" if isinstance(value, int) else f"{name} {value:.1%}" for name, value in check.numbers.items()
    )
    p = "" if check.p is None else f", p = {check.p:.2g}"
    return f"{listed} ({plural(check.samples, 'image')}{p}). "


def _cells(files: Sequence[FileCheck]) -> list[str]:
    recorded = [file.recorded for file in files if file.recorded is not None]
    found = [file.found for file in files if file.found is not None]
    distances = [file.distance for file in files if file.distance is not None]
    return [
        str(len(files)),
        str(sum(part.total for part in recorded)),
        _share(recorded),
        _share(found),
        f"{max(distances):.6g}" if distances else "none kept",
    ]


def _share(parts: Sequence[Accuracy]) -> str:
    total = sum(part.total for part in parts)
    return f"{sum(part.correct for part in parts) / total:.2%}" if total else "none"
