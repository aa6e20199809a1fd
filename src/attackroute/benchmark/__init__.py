"""What traces and attacks cost: in time, against other ways of doing the same, and in memory."""

from __future__ import annotations

from attackroute.benchmark.plan import Plan
from attackroute.benchmark.report import BenchmarkReport, run_benchmark

__all__ = ["BenchmarkReport", "Plan", "run_benchmark"]
