"""What every test shares."""

from __future__ import annotations

import os
import signal

import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, since the workers share the cores
    torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as where the tests were started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
