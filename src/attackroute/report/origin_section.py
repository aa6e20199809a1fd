"""The part of the page on how it was made: commands, versions, seeds, sizes, times."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from attackroute.report.fragments import sentence, terms, text
from attackroute.report.measuring import Measured
from attackroute.report.run_folder import RunFolder
from attackroute.robustness.evaluation_table import library_versions

_OPTIONS = ("model", "data", "split", "samples", "seed", "width", "attack", "sketches", "batch-size", "dtype")
_FLAGS = ("linear", "freeze-gates")  # both of a trace
_MOST = 40


def made(
    run: RunFolder, measured: Measured, notes: Sequence[str], version: str, command: str | None, seconds: float | None
) -> str:
    """Commands, versions, seeds, sizes and times, as the files have them.

    Args:
        run: The run's folder.
        measured: What was traced and measured.
        notes: Sentences on what is missing.
        version: Of this package.
        command: What made the page.
        seconds: How long its measurements took.
    """
    pairs: list[tuple[str, object]] = [("page", f"attackroute {version}")]
    if command is not None:
        pairs.append(("made by", command))
    if seconds is not None:
        pairs.append(("measurements for the page", f"{seconds:.1f} s"))
    traced = _trace_command(run)
    if traced is not None:
        pairs.append(("traced by", traced))
    for item in measured.conditions:
        if item.routes is not None:
            known = {key: value for key, value in item.routes.provenance.to_json().items() if value is not None}
            pairs.append((f"trace, {item.name}", known))
    if run.summary is not None:
        pairs += [(name, run.summary[name]) for name in ("seed", "seconds") if name in run.summary]
    pairs += [(name, value) for name, value in run.terms.items() if _is_setting(value)][:_MOST]
    libraries = None if run.evaluation is None else run.evaluation.content.get("libraries")
    if isinstance(libraries, Mapping):
        pairs.append(("libraries of the evaluation", libraries))
    pairs.append(("libraries of the page", library_versions()))
    for document in (*run.experiments, run.hardness, run.evaluation, *run.hardenings):
        if document is not None:
            took = document.content.get("seconds")
            pairs.append(("file", f"{document.path}{f' ({took:.1f} s)' if isinstance(took, (int, float)) else ''}"))
    if run.left_out:
        pairs.append(("not shown", run.left_out))
    return terms({(name, text(value)): (name, value) for name, value in pairs}.values()) + "".join(map(sentence, notes))


def _trace_command(run: RunFolder) -> str | None:
    """The command line that gives the run's trace again, from its terms."""
    found = None if run.summary is None else run.summary.get("terms")
    if not isinstance(found, Mapping) or "model" not in found:
        return None
    parts = ["attackroute", "trace"]
    for name in _OPTIONS:
        value = found.get(name)
        if isinstance(value, (str, int, float)) and not (name == "split" and value not in ("train", "test")):
            parts += [f"--{name}", str(value)]
    return shlex.join([*parts, *(f"--{name}" for name in _FLAGS if found.get(name) is True)])


def _is_setting(value: object) -> bool:
    """Whether it can stand in one line: plain, or a list of plain values."""
    parts = value if isinstance(value, list) else [value]
    return all(isinstance(part, (str, int, float)) for part in parts)
