"""What ``attackroute evaluate`` found: tables, checks, JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attackroute.cli.console import Output, print_error
from attackroute.core.journal import MEASUREMENTS
from attackroute.core.table import Record, Table, plural
from attackroute.robustness.evaluation_table import COLUMNS, EVALUATION, Evaluation
from attackroute.robustness.masking import SKIPPED, Check
from attackroute.robustness.registry import short_name


def report(output: Output, evaluation: Evaluation, out: Path | None, examples: Path | None) -> None:
    """Print the table, the checks and where the files are."""
    folders = {"folder": None if out is None else str(out), "examples": None if examples is None else str(examples)}
    output.result({**flat(evaluation), **folders})
    output.table(COLUMNS, evaluation.cells())
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


def flat(evaluation: Evaluation) -> dict[str, Any]:
    """The result as one JSON object."""
    document = evaluation.document().to_json()
    return {**document["settings"], **document["about"], "reading": document["reading"], "rows": document["rows"]}


def report_verification(output: Output, files: Table) -> bool:
    """Print what was found in files of examples, and say whether all of it is as it was."""
    faults = [fault for file in files for fault in file["faults"]]
    output.result({"files": files.to_json(), "faults": len(faults), "passed": not faults})
    output.table(
        ["model", "attack", "samples", "recorded", "now", "largest distance"],
        [_cells(file) for file in files if file["model"] is not None],
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


def _cells(file: Record) -> list[str]:
    now, distance = file["accuracy"], file["largest_distance"]
    return [
        file["model"],
        short_name(file["attack"]),
        str(file["samples"]),
        f"{file['recorded_accuracy']:.2%}",
        "none" if now is None else f"{now:.2%}",
        "none kept" if distance is None else f"{distance:.6g}",
    ]
