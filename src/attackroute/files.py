"""Files that are replaced whole: a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from attackroute.errors import UserError


def replace_file(path: Path, data: bytes) -> None:
    """Write to a new file beside ``path`` and move it there.

    Raises:
        UserError: The file cannot be written.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _keep_name(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{shown(path)}: cannot be written: {reason}; choose another file or folder") from None


def _keep_name(folder: Path) -> None:
    """Let a new name in a folder outlast a power failure, where the system can promise that."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def shown(path: str | os.PathLike[str]) -> str:
    """A path as it can stand in a message of one line."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)
