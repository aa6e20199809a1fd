"""A command one of whose processes is killed at a given moment: ``killed_command.py RANK WHERE CALLS ARGUMENT...``.

``WHERE`` names a method as ``package.module:Class.method``; process RANK is gone when it is called once more than CALLS
times, a while after that, so that the others have taken in what came of the calls before.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import reduce
from importlib import import_module
from typing import Any

from attackroute.__main__ import main
from attackroute.routes import folder

_WHILE = 3.0  # seconds

folder._SHARD_SAMPLES = 3  # rounded up to a batch


def kill_at(where: str, calls: int) -> None:
    """Let this process be killed at a call."""
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner: Any = reduce(getattr, owners, import_module(module))
    original = getattr(owner, name)
    seen: list[None] = []

    def killed(*arguments: Any, **options: Any) -> Any:
        if len(seen) == calls:
            time.sleep(_WHILE)
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(None)
        return original(*arguments, **options)

    setattr(owner, name, killed)


if __name__ == "__main__":
    rank, where, calls, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank:
        kill_at(where, int(calls))
    sys.argv[1:] = arguments
    main()
