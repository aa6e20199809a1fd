"""What every test shares."""

from __future__ import annotations

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker, since the workers share the cores
    torch.set_num_threads(1)
