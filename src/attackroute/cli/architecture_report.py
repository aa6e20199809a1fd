"""The table of the architectures, on the screen and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attackroute.benchmark.architectures import ArchitectureResult
from attackroute.benchmark.report import BenchmarkReport
from attackroute.core.files import replace_file
from attackroute.tracing.sketches import FIRST_SKETCHES

HEADER = [
    "network",
    "route layers",
    "edges",
    "closed form",
    "trace / forward",
    "exact / forward",
    "deviation",
    "routes found",
    "closed form, frozen",
    "routes found, frozen",
]
NOTE = (
    f"trace / forward: with {FIRST_SKETCHES} sketches where an edge has no closed form (approximate), the look at the "
    "structure included. exact / forward: by vector-Jacobian products instead, extrapolated from some of them. "
    "deviation: largest relative distance of the exact scores from the oracle's, at reduced size, float64. routes "
    f"found: share of the oracle's critical channels that a trace with {FIRST_SKETCHES} sketches finds, likewise. "
    "frozen: with statistics and gates as constants (approximate), exact otherwise."
)


def rows(results: Sequence[ArchitectureResult]) -> list[list[str]]:
    """The table's rows."""
    return [
        [
            result.architecture.name,
            str(result.layers),
            str(result.edges),
            f"{result.closed / result.edges:.0%}",
            f"{result.ratio.median:.1f} ({result.ratio.low:.1f}-{result.ratio.high:.1f})",
            f"{result.exact_ratio:,.0f}" if result.exact else "the same",
            f"{result.deviation:.0e}",
            f"{result.agreement:.0%}" if result.closed < result.edges else "all, exact",
            f"{result.frozen_closed / result.frozen_edges:.0%}",
            f"{result.frozen_agreement:.0%}",
        ]
        for result in results
    ]


def write_table(path: Path, report: BenchmarkReport) -> None:
    """Write the table as Markdown.

    Raises:
        UserError: The file cannot be written.
    """
    on = report.environment
    batch = report.architectures[0].batch_size if report.architectures else 0
    lines = [HEADER, ["---"] * len(HEADER), *rows(report.architectures)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    measured = (
        f"{on.device}, {on.threads} thread(s), {on.dtype}, torch {on.versions['torch']}, {batch} images a batch, "
        f"{report.plan.turns} repeats (lowest-highest), seed {report.plan.seed}."
    )
    replace_file(path, f"{text}\n\n{measured}\n\n{NOTE}\n".encode())
