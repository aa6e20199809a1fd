"""What every test shares."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from route_samples import SAMPLES

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, since the workers share the cores
    torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as where the tests were started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def float64() -> Iterator[None]:
    """Double precision for what is compared with an oracle, and weights that are the same every time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, for what is compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list(SAMPLES))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, Path]:
    """A class of :mod:`route_samples`, what is saved of it, and where."""
    kind, make = SAMPLES[request.param]
    path = tmp_path / f"{request.param}.bin"
    value = make()
    value.save(path)
    return kind, value, path
