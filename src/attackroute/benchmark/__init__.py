"""What a trace costs: against a plain forward pass, a training step and the naive way, in time and in memory."""

from __future__ import annotations

from attackroute.benchmark.plan import Plan
from attackroute.benchmark.report import BenchmarkReport, run_benchmark

__all__ = ["BenchmarkReport", "Plan", "run_benchmark"]
