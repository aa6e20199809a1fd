"""What ``attackroute benchmark`` found: tables, a few lines, JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from attackroute.benchmark import hardening_speed, image_costs, process_speed
from attackroute.benchmark.attack_speed import MODEL, STEPS, WIDTH, AttackSpeed
from attackroute.benchmark.extrapolation import AIM, PAPER_HOURS, PAPER_IMAGES, NaiveResult
from attackroute.benchmark.hardening_speed import HardeningSpeed
from attackroute.benchmark.memory import LIMIT, MemoryResult
from attackroute.benchmark.process_speed import ProcessSpeed
from attackroute.benchmark.report import BenchmarkReport
from attackroute.benchmark.speed import SpeedResult
from attackroute.benchmark.timing import Runs, Spread
from attackroute.cli.architecture_report import HEADER, NOTE, rows
from attackroute.cli.console import Output
from attackroute.core.table import plural


def show(output: Output, report: BenchmarkReport) -> None:
    """Print all that was measured."""
    output.result(report.to_json())
    on = report.environment
    output.line(
        f"{on.device}, {plural(on.threads, 'thread')}, {on.dtype}, torch {on.versions['torch']}; "
        f"medians of {report.plan.turns} interleaved repeats (lowest-highest)"
    )
    if report.speed:
        _show_speed(output, report.speed)
    if report.naive is not None:
        _show_naive(output, report.naive)
    if report.memory is not None:
        _show_memory(output, report.memory)
    if report.attack is not None:
        _show_attack(output, report.attack)
    if report.hardening is not None:
        _show_hardening(output, report.hardening)
    if report.architectures:
        output.table(HEADER, rows(report.architectures))
        output.line(NOTE)
    if report.processes is not None:
        _show_processes(output, report.processes)


def _show_speed(output: Output, results: Sequence[SpeedResult]) -> None:
    output.table(
        ["case", "images", "trace / forward", "at most", "trace / training step", "noise trace / two forwards"],
        [
            [
                _name(result),
                f"{result.batches} x {result.batch_size}",
                _ratio(result.ratio),
                "-" if result.limit is None else f"{result.limit:.2f}",
                _ratio(result.training_ratio),
                _ratio(result.noise_ratio),
            ]
            for result in results
        ],
    )
    output.line("Where a trace's time goes, as shares of a plain forward pass:")
    phases = dict.fromkeys(phase for result in results for phase in result.shares)
    output.table(
        ["part of a trace", *(_name(result) for result in results)],
        [
            [phase, *(f"{r.shares[phase].median:.3f}" if phase in r.shares else "0" for r in results)]
            for phase in phases
        ],
    )


def _name(result: SpeedResult) -> str:
    return result.case.name if result.memory_format == "contiguous" else f"{result.case.name}, {result.memory_format}"


def _show_naive(output: Output, result: NaiveResult) -> None:
    rows = [["trace", f"{_spread(_scaled(result.trace.totals, 1e3))} ms", "all", "1"]]
    rows += [
        [
            f"naive: {way}",
            f"{_spread(Spread(runs.totals), digits=0)} s",
            f"{len(runs.parts)} x {timed:,} of {result.products:,}",
            _spread(result.ratio(way), digits=0),
        ]
        for way, (runs, timed) in result.ways.items()
    ]
    output.table(["VGG-16, 32x32", "one image", "timed products", "naive / trace"], rows)
    minutes = _scaled(result.trace.totals, PAPER_IMAGES / 60)
    output.line(f"Aim: {AIM:,.0f} or more. Naive times are extrapolated from these products, drawn at random.")
    output.line(f"{PAPER_IMAGES:,} such images by the trace, extrapolated: {_spread(minutes)} minutes;")
    output.line(f"as published (Li et al. 2021, section 3.5) on a GTX 1080: {PAPER_HOURS} hours")


def _show_memory(output: Output, result: MemoryResult) -> None:
    output.table(
        ["VGG-16, peak memory", "first", "second", "first / second"],
        [
            [
                f"trace / inference, {result.batch_size} x 224x224",
                _megabytes(result.trace.peak),
                _megabytes(result.forward.peak),
                _ratio(result.ratio),
            ],
            [
                "beyond libraries and weights",
                _megabytes(result.trace.own),
                _megabytes(result.forward.own),
                "-" if result.own_ratio is None else _ratio(result.own_ratio),
            ],
            [
                f"trace, {result.many_samples:,} / {result.few_samples} x 32x32",
                _megabytes(result.many.peak),
                _megabytes(result.few.peak),
                _ratio(result.growth),
            ],
        ],
    )
    output.line(f"To be kept: at most {LIMIT:.2f} for the first row, 1 (flat in the number of samples) for the last.")


def _show_attack(output: Output, result: AttackSpeed) -> None:
    rows = [["attackroute", _milliseconds(result.ours), "1"]]
    rows += [
        [f"{name} {result.versions[name]}", _milliseconds(runs), _ratio(result.ratio(name))]
        for name, runs in result.others.items()
    ]
    output.table([f"PGD-{STEPS}, {MODEL} x {WIDTH}, {result.batch_size} images", "time", "time / ours"], rows)
    output.line(f"Ours / {STEPS} bare forward and backward passes: {_ratio(result.overhead)}")
    if result.left_out:
        output.line(f"Not installed, and left out: {', '.join(result.left_out)}")


def _show_hardening(output: Output, result: HardeningSpeed) -> None:
    limits = {name: f"{limit:.2f}" for name, limit in hardening_speed.LIMITS.items()}
    output.table(
        [f"training step, {result.batch_size} images", "time", "time / plain or PAT", "at most"],
        [
            [name, _milliseconds(runs), _ratio(result.ratio(name)), limits.get(name, "-")]
            for name, runs in result.runs.items()
        ],
    )
    output.table(
        ["two such steps, peak memory", "memory", "beyond libraries and weights", "memory / plain or PAT"],
        [
            [name, _megabytes(peaks.peak), _megabytes(peaks.own), _ratio(result.memory_ratio(name))]
            for name, peaks in result.peaks.items()
        ],
    )
    output.line("The gradient penalty's approximation beside its exact gradient in float64, in training mode:")
    output.table(
        ["numbers", "eps", "cosine", "relative norm", "relative error"],
        [
            [dtype, f"{eps:g}", f"{found.cosine:.4f}", f"{found.relative_norm:.4f}", f"{found.relative_error:.4f}"]
            for dtype, deviations in result.deviations.items()
            for eps, found in deviations.items()
        ],
    )


def _show_processes(output: Output, result: ProcessSpeed) -> None:
    rows = [
        [name, f"{_spread(_scaled(runs.totals, 1000 / result.images), digits=2)} ms", ratio]
        for name, runs, ratio in (("one", result.alone, "1"), ("two", result.shared, _ratio(result.gain)))
    ]
    output.table(["processes, one thread each", "time an image", "throughput"], rows)
    output.line(f"Aim: {process_speed.AIM} or more, on two processor cores that do nothing else.")
    cases = [f"{costs.case}, {costs.image_size}x{costs.image_size}" for costs in result.costs]
    times = [(part, [costs.of(part) for costs in result.costs]) for part in image_costs.PARTS]
    sizes = [(name, [costs.sizes.get(name) for costs in result.costs]) for name in image_costs.SIZES]
    output.table(
        ["an image", *cases],
        [
            ["batches of", *(str(costs.batch_size) for costs in result.costs)],
            ["channels of route layers", *(f"{costs.channels:,}" for costs in result.costs)],
            *([part, *("-" if time is None else _small_time(time) for time in row)] for part, row in times),
            *([name, *("-" if size is None else f"{size:,.0f} bytes" for size in row)] for name, row in sizes),
        ],
    )
    repeats = max((len(times) for costs in result.costs for times in costs.seconds.values()), default=0)
    output.line(f"Times are processor time, medians of {plural(repeats, 'repeat')}:")
    output.line("of the process that traced the image for its trace, reading and packing,")
    output.line("of the first process for writing, of every process for sending, receiving and unpacking.")


def _milliseconds(runs: Runs) -> str:
    return f"{_spread(_scaled(runs.totals, 1e3), digits=0)} ms"


def _small_time(seconds: Spread) -> str:
    milliseconds = _scaled(seconds.values, 1e3)
    return f"{_spread(milliseconds, digits=1 if milliseconds.median >= 1 else 3)} ms"


def _megabytes(values: Sequence[int]) -> str:
    return f"{statistics.median(values) / 1e6:,.0f} MB"


def _scaled(values: Sequence[float], factor: float) -> Spread:
    return Spread(tuple(factor * value for value in values))


def _ratio(spread: Spread) -> str:
    return _spread(spread, digits=2)


def _spread(spread: Spread, digits: int = 1) -> str:
    low, high = (f"{value:,.{digits}f}" for value in (spread.low, spread.high))
    return f"{spread.median:,.{digits}f} ({low}-{high})"
